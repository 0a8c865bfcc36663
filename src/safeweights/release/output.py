"""Output folders that appear whole or not at all, and runs that can be taken up again. No torch."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safeweights.core.errors import UserError
from safeweights.core.launch import follows

_OPTIONS, _LOCK = "options.json", "lock"


@dataclass(frozen=True)
class Output:
    """``folder`` is filled and becomes the target at the end; ``work`` holds what a resumed run goes on from."""

    folder: Path
    work: Path
    target: Path


@contextlib.contextmanager
def output_folder(
    target: str | Path, *, overwrite: bool = False, resume: bool = False, options: Mapping[str, Any] | None = None
) -> Iterator[Output]:
    """Fill a hidden sibling of ``target`` and rename it when the block ends well.

    A kill at any moment leaves ``.NAME.work``, with which the same run goes on under ``resume``; so do, after the
    first checkpoint, an interrupt, a full disk and a crash. Any other failure leaves nothing. ``options`` are what
    makes two runs the same; without ``resume`` the remains of an older run are deleted first.
    Raises UserError for a target in use, a place that cannot be written, a full disk, and other options on resuming.
    """
    target = Path(target).expanduser().resolve()
    if follows():  # the first process writes, and ends all of them where it cannot
        with tempfile.TemporaryDirectory() as spare:
            (Path(spare) / "folder").mkdir()
            (Path(spare) / "work").mkdir()
            yield Output(Path(spare) / "folder", Path(spare) / "work", target)
        return
    folder, work, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "work", "old"))
    try:
        if old.exists() and not target.exists():
            old.rename(target)  # an earlier run was killed between its two renames
        check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(old)
        work.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}; choose another output with -o") from None
    with lock(work, target):
        _check_same_run(work, resume, dict(options or {}), target)
        done = False
        try:
            _remove(folder)
            folder.mkdir()
            yield Output(folder, work, target)
            _put_in_place(folder, target, old)
            done = True
        except UserError:
            done = True
            raise
        except KeyboardInterrupt:
            if _has_checkpoints(work):
                print("what was done is kept; go on with the same command plus --resume", file=sys.stderr)
            raise
        except Exception as error:
            raise _explained(error, target) from error
        finally:
            _remove(folder)
            if done or not _has_checkpoints(work):
                _remove(work)


@contextlib.contextmanager
def output_file(
    target: str | Path, *, overwrite: bool = False, resume: bool = False, options: Mapping[str, Any] | None = None
) -> Iterator[Output]:
    """As `output_folder`, for one file: the block writes ``folder / target.name``, which is then put in the target's place."""
    target = Path(target).expanduser().resolve()
    folder, work = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "work"))
    check_file_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}; choose another output with -o") from None
    with lock(work, target):
        _check_same_run(work, resume, dict(options or {}), target)
        done = False
        try:
            _remove(folder)
            folder.mkdir()
            yield Output(folder, work, target)
            (folder / target.name).replace(target)
            done = True
        except UserError:
            done = True
            raise
        except KeyboardInterrupt:
            if _has_checkpoints(work):
                print("what was done is kept; go on with the same command plus --resume", file=sys.stderr)
            raise
        except Exception as error:
            raise _explained(error, target) from error
        finally:
            _remove(folder)
            if done or not _has_checkpoints(work):
                _remove(work)


def check_file_target(target: str | Path, overwrite: bool) -> None:
    """Refuse, before any work is done, a target that `output_file` would refuse."""
    target = Path(target).expanduser().resolve()
    if target.is_dir():
        raise UserError(f"the output {target} is a folder; give the name of a file with -o")
    if target.exists() and not overwrite:
        raise UserError(f"the output {target} is there already; choose another one or add --overwrite")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file under a temporary name, sync and rename it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False, allow_nan=False, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def check_target(target: str | Path, overwrite: bool) -> None:
    """Refuse, before any work is done, a target that `output_folder` would refuse."""
    target = Path(target).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"the output {target} is a file; give a folder with -o")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"the output folder {target} is not empty; choose another one or add --overwrite")
    # An overwritten folder is deleted with all it holds, so some are never one.
    if target in (Path.home().resolve(), Path.cwd().resolve(), *Path.cwd().resolve().parents):
        raise UserError(f"the output cannot be {target}, which other things live in; give a folder of its own")


def _check_same_run(work: Path, resume: bool, options: dict[str, Any], target: Path) -> None:
    """A resumed run must be the interrupted one; any other starts from nothing."""
    stored = work / _OPTIONS
    wanted = json.loads(json.dumps(options, default=str))
    if not resume:
        for path in work.iterdir():
            if path.name != _LOCK:
                _remove(path)
    elif stored.is_file():
        before = json.loads(stored.read_text(encoding="utf-8"))
        for key in sorted({*before, *wanted}):
            if before.get(key) != wanted.get(key):
                raise UserError(
                    f"the interrupted run of {target} had {key} = {before.get(key)!r}, now it is {wanted.get(key)!r}; "
                    "repeat that command with --resume, or leave out --resume to start anew"
                )
    try:
        write_json(stored, wanted)
    except OSError as error:
        raise _explained(error, target) from None


def _put_in_place(folder: Path, target: Path, old: Path) -> None:
    if target.exists() and any(target.iterdir()):
        target.rename(old)
    folder.rename(target)
    _remove(old)


def _has_checkpoints(work: Path) -> bool:
    return any(path.name not in (_OPTIONS, _LOCK) for path in work.iterdir())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(work: Path, target: Path) -> Iterator[None]:
    """Keep two runs from writing the same output; the system drops the lock when a run dies."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    file: IO[str]
    with (work / _LOCK).open("w") as file:
        # A run that was just killed may take a moment to let go.
        for attempt in range(10):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt == 9:
                    raise UserError(f"another run is writing to {target} just now; wait or choose another output") from None
                time.sleep(0.2)
        yield


def _explained(error: Exception, target: Path) -> Exception:
    """What the user can mend, in one line; any other error stays what it is."""
    code = error.errno if isinstance(error, OSError) else None
    # safetensors names the system's error in its text only.
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(r"os error (27|28|122)\b", str(error)):
        return UserError(f"the disk is full while writing {target}; free some space and repeat the command with --resume")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG):
        assert isinstance(error, OSError)
        return UserError(f"{error.filename or target} cannot be used: {error.strerror}; choose another place with -o")
    return error
