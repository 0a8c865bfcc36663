"""Output folders: whole or not at all, whatever happens on the way."""
# ruff: noqa: PT012 - what happens inside the block is what is tested

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from safeweights.core.errors import UserError
from safeweights.records.machine import versions
from safeweights.release import output as module
from safeweights.release.manifest import hash_input, hash_tensor, read_manifest, write_manifest
from safeweights.release.output import output_folder


def siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with output_folder(target) as out:
        (out.folder / "a.txt").write_text("a")
        (out.work / "checkpoint").write_text("c")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "a"
    assert siblings(target.parent) == ["out"]


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with output_folder(tmp_path / "out") as out:
        (out.folder / "a").touch()
    assert siblings(tmp_path / "out") == ["a"]


def test_a_full_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(UserError, match="--overwrite"), output_folder(tmp_path / "out"):
        pytest.fail("must not begin")
    assert siblings(tmp_path) == ["out"]
    assert siblings(tmp_path / "out") == ["precious"]


def test_overwriting_replaces_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(ValueError, match="broken"), output_folder(target, overwrite=True) as out:
        (out.folder / "new").touch()
        raise ValueError("broken")
    assert siblings(target) == ["old"]
    with output_folder(target, overwrite=True) as out:
        (out.folder / "new").touch()
    assert siblings(target) == ["new"]
    assert siblings(tmp_path) == ["out"]


def test_places_that_are_never_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "file", tmp_path, tmp_path.parent, Path.home(), tmp_path / "file" / "below"):
        with pytest.raises(UserError), output_folder(place, overwrite=True):
            pytest.fail("must not begin")
    assert siblings(tmp_path) == ["file"]


def test_a_user_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such concept"), output_folder(tmp_path / "out") as out:
        (out.work / "checkpoint").touch()
        raise UserError("no such concept")
    assert siblings(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("crash"), OSError(errno.ENOSPC, "No space left")])
def test_checkpoints_outlive_what_can_be_resumed(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "out"
    with pytest.raises((type(error), UserError)), output_folder(target, options={"steps": 3}) as out:
        (out.folder / "half").touch()
        (out.work / "checkpoint").write_text("step 2")
        raise error
    assert siblings(tmp_path) == [".out.work"]
    with output_folder(target, resume=True, options={"steps": 3}) as out:
        assert (out.work / "checkpoint").read_text() == "step 2"
        assert not (out.folder / "half").exists()
    assert siblings(tmp_path) == ["out"]


def test_without_a_checkpoint_nothing_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert siblings(tmp_path) == []


def test_resuming_another_run_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), output_folder(target, options={"seed": 0, "path": Path("a")}) as out:
        (out.work / "checkpoint").touch()
        raise KeyboardInterrupt
    with (
        pytest.raises(UserError, match=r"seed = 0, now it is 1"),
        output_folder(target, resume=True, options={"seed": 1, "path": Path("a")}),
    ):
        pytest.fail("must not begin")
    with output_folder(target, resume=True, options={"seed": 0, "path": Path("a")}) as out:
        assert (out.work / "checkpoint").exists()


def test_without_resume_an_interrupted_run_starts_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "out", options={"seed": 0}) as out:
        (out.work / "checkpoint").touch()
        raise KeyboardInterrupt
    with output_folder(tmp_path / "out", options={"seed": 1}) as out:
        assert not (out.work / "checkpoint").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota"), OSError(errno.EFBIG, "too large"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)  # fmt: skip
def test_a_full_disk_is_one_line(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UserError, match="disk is full") as raised, output_folder(tmp_path / "out"):
        raise error
    assert "\n" not in str(raised.value)
    assert siblings(tmp_path) == []


WRITER = """
import resource, sys, torch
from safetensors.torch import save_file
from safeweights.core.errors import UserError
from safeweights.release.output import output_folder
try:
    with output_folder(sys.argv[1]) as out:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        save_file({"a": torch.zeros(100_000)}, out.folder / "model.safetensors")
except UserError as error:
    sys.exit(str(error))
"""


def test_a_real_write_that_does_not_fit(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "disk is full" in done.stderr
    assert siblings(tmp_path) == []


SLEEPER = """
import sys, time
from safeweights.release.output import output_folder
with output_folder(sys.argv[1], options={"seed": 0}) as out:
    (out.folder / "half").touch()
    (out.work / "checkpoint").touch()
    print("ready", flush=True)
    time.sleep(60)
"""


def test_killed_and_taken_up_again(tmp_path: Path) -> None:
    target = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLEEPER, str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    began = time.monotonic()
    with pytest.raises(UserError, match="another run"), output_folder(target, resume=True, options={"seed": 0}):
        pytest.fail("two runs must not share a target")
    assert time.monotonic() - began < 10
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not target.exists()
    with output_folder(target, resume=True, options={"seed": 0}) as out:
        assert (out.work / "checkpoint").exists()
        assert not (out.folder / "half").exists()
    assert siblings(tmp_path) == ["out"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    target, left = tmp_path / "out", tmp_path / ".out.old"
    left.mkdir()
    (left / "old").touch()
    with pytest.raises(UserError, match="not empty"), output_folder(target):
        pytest.fail("the older output must be back")
    assert siblings(target) == ["old"]
    with output_folder(target, overwrite=True) as out:
        (out.folder / "new").touch()
    assert siblings(target) == ["new"]
    assert siblings(tmp_path) == ["out"]


def test_no_json_is_ever_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module.write_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O"):
        module.write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="JSON"):
        module.write_json(tmp_path / "b.json", {"a": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_the_manifest_holds_the_recipe(tmp_path: Path) -> None:
    tensors = {"unet.b": torch.ones(2, dtype=torch.float16), "unet.a": torch.zeros(2)}
    written = write_manifest(
        tmp_path, command=["safeweights", "erase"], method="esd", concepts=["mosaic"], options={"settings": {"lr": 0.1}}, seed=3,
        inputs={"model": "abc", "concepts_file": None}, tensors=tensors, cost={"steps": 4}, seconds=1.23456,
    )  # fmt: skip
    assert read_manifest(str(tmp_path)) == written
    assert set(written) == {
        "safeweights", "command", "method", "concepts", "options", "seed", "inputs", "changed", "cost", "seconds",
        "peak_memory_gb", "versions",
    }  # fmt: skip
    assert list(written["changed"]) == ["unet.a", "unet.b"]
    assert written["changed"]["unet.b"] == hash_tensor(tensors["unet.b"])
    assert written["peak_memory_gb"] > 0.01
    assert {"python", "torch", "diffusers"} <= set(versions())
    assert read_manifest(str(tmp_path / "none")) == {}


def test_hashes_tell_contents_apart(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "w").write_bytes(b"123")
    assert hash_input(one) == hash_input(two)
    (two / "manifest.json").write_text("times differ")
    assert hash_input(one) == hash_input(two)
    (two / "unet" / "w").write_bytes(b"124")
    assert hash_input(one) != hash_input(two)
    assert hash_input(tmp_path / "none") is None
    plain = torch.arange(6)
    hashes = {hash_tensor(t) for t in (plain, plain.float(), plain.view(2, 3), plain + 1)}
    assert len(hashes) == 4
    assert hash_tensor(plain.view(2, 3).T.contiguous().T) == hash_tensor(plain.view(2, 3))
