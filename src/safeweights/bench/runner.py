"""Run the cells of a benchmark: in this process, in worker processes of this machine, or on Ray.

A cell is finished when its record is in the folder, and only then; workers write records themselves. So a killed worker costs
the cell it was at, a killed driver nothing, and the same command goes on where the last one ended.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safeweights.bench.cells import Cell, CellStore, Worker, failure, forget, hash_reference, plan
from safeweights.bench.spec import Bench
from safeweights.core.errors import UserError
from safeweights.records.record import Record
from safeweights.release.output import lock, write_json

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

SPEC = "bench.json"
"""Marks a benchmark's folder and says what was asked for last."""


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: what came out in a few words, or why nothing did."""

    cell: Cell
    said: str
    seconds: float
    ok: bool = True
    died: bool = False
    """The worker went away, so another try may help."""


class Crew(Protocol):
    """Those who do the work."""

    @property
    def free(self) -> bool:
        """Whether one more cell can be begun."""
        ...

    def begin(self, cell: Cell) -> None: ...

    def ended(self) -> list[Outcome]:
        """Wait until at least one cell has ended."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """A benchmark, where it goes, and its cells; ``finished`` are the keys of those whose records are there."""

    spec: Bench
    folder: Path
    cells: Sequence[Cell]
    finished: frozenset[str]
    allow_python_detectors: bool = False

    @property
    def open_cells(self) -> list[Cell]:
        """What is left to do."""
        return [cell for cell in self.cells if cell.key not in self.finished]

    def records(self) -> list[Record]:
        """What is recorded of this benchmark's cells, failures included; records of other settings are left out."""
        keys = {cell.key for cell in self.cells}
        return [record for record in CellStore(self.folder).records() if record.provenance.get("cell") in keys]


def prepare(spec: Bench, folder: Path, *, allow_python_detectors: bool = False) -> Job:
    """Open the model, lay out the cells and look which are finished. Raises UserError for a folder of something else."""
    from safeweights.models.door import open_model

    folder = folder.expanduser().resolve()
    try:
        if folder.exists() and not (folder / SPEC).is_file() and any(item.name != "work" for item in folder.iterdir()):
            raise UserError(f"the output folder {folder} is not empty and holds no benchmark; choose another one")
    except NotADirectoryError:
        raise UserError(f"the output {folder} is a file; give a folder with -o") from None
    for concept in spec.file().concepts.values():
        if concept.detector is not None and concept.detector.type == "python" and not allow_python_detectors:
            raise UserError(
                f"concept {concept.name!r}: its detector is code; allow it with --allow-python-detectors if you trust it"
            )
    model = open_model(spec.model, device="cpu" if spec.device == "auto" else spec.device, dtype=spec.dtype)
    cells = plan(spec, model, hash_reference(spec, model))
    finished = CellStore(folder).finished()
    return Job(
        spec=spec, folder=folder, cells=cells, finished=frozenset(cell.key for cell in cells if cell.key in finished),
        allow_python_detectors=allow_python_detectors,
    )  # fmt: skip


def run(job: Job, *, executor: str = "local", jobs: int = 1, address: str | None = None) -> Iterator[Outcome]:
    """Measure every open cell and say so of each; a cell that fails leaves an error record and the rest go on.

    Raises UserError for a folder that cannot be written or that another run is writing to.
    """
    work = job.folder / "work"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{job.folder} cannot be written: {error.strerror}; choose another output with -o") from None
    with lock(work, job.folder):
        write_json(job.folder / SPEC, job.spec.model_dump())
        todo = job.open_cells
        if not todo:
            return
        crew = _crew(job, executor, min(jobs, len(todo)), address)
        try:
            yield from _drive(job, todo, crew)
        finally:
            crew.close()


def _drive(job: Job, todo: Sequence[Cell], crew: Crew) -> Iterator[Outcome]:
    """Hand out cells in their order, each after the cell that makes its model."""
    waiting, running = deque(todo), 0
    made = {cell.key for cell in job.cells if cell.kind == "protect"} - {cell.key for cell in todo}
    lost: set[str] = set()
    failed_models: set[str] = set()
    strikes: dict[str, int] = {}
    left: dict[str, int] = {}
    for cell in todo:
        left[cell.model_key] = left.get(cell.model_key, 0) + 1
    needs = {cell.key for cell in job.cells if cell.kind == "protect"}

    def ready(cell: Cell) -> bool:
        return cell.kind == "protect" or cell.model_key in made or cell.model_key not in needs

    def settle(outcome: Outcome) -> Outcome:
        cell = outcome.cell
        if not outcome.ok:
            CellStore(job.folder, cell).add(failure(cell, outcome.said))
            if cell.kind == "protect":
                lost.add(cell.key)
        elif cell.kind == "protect":
            made.add(cell.key)
        left[cell.model_key] -= 1
        if left[cell.model_key] == 0 and cell.model_key not in failed_models:
            forget(job.folder, cell)
        return outcome

    while waiting or running:
        while crew.free:
            following = next((cell for cell in waiting if cell.model_key not in lost and ready(cell)), None)
            if following is None:
                break
            waiting.remove(following)
            crew.begin(following)
            running += 1
        for cell in [cell for cell in waiting if cell.model_key in lost]:
            waiting.remove(cell)
            yield settle(Outcome(cell, "not run: its protection failed", 0.0, ok=False))
        if not running:
            continue
        for outcome in crew.ended():
            running -= 1
            cell = outcome.cell
            if outcome.died and CellStore(job.folder).recorded(cell):
                outcome = Outcome(cell, "recorded, then its worker died", outcome.seconds)
            elif outcome.died and strikes.get(cell.key, 0) < job.spec.retries:
                strikes[cell.key] = strikes.get(cell.key, 0) + 1
                waiting.appendleft(cell)
                continue
            if not outcome.ok:
                failed_models.add(cell.model_key)
            yield settle(outcome)


def attempt(worker: Worker, cell: Cell) -> Outcome:
    """Measure a cell; whatever goes wrong in it becomes its outcome."""
    started = time.perf_counter()
    try:
        return Outcome(cell, worker.measure(cell), time.perf_counter() - started)
    except Exception as error:  # one cell must not end the others
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Outcome(cell, " ".join(text.split())[:500], time.perf_counter() - started, ok=False)


def _crew(job: Job, executor: str, jobs: int, address: str | None) -> Crew:
    if executor == "ray":
        return OnRay(job, address)
    if executor != "local":
        raise UserError(f"unknown executor {executor!r}; known are local and ray")
    if address is not None:
        raise UserError("--address is for --executor ray")
    return Here(job) if jobs == 1 else Processes(job, jobs)


class Here:
    """This process, one cell at a time."""

    def __init__(self, job: Job) -> None:
        self.worker = _hire(job)
        self.next: Cell | None = None

    @property
    def free(self) -> bool:
        return self.next is None

    def begin(self, cell: Cell) -> None:
        self.next = cell

    def ended(self) -> list[Outcome]:
        assert self.next is not None
        cell, self.next = self.next, None
        return [attempt(self.worker, cell)]

    def close(self) -> None:
        pass


class Processes:
    """Worker processes of this machine, each with its share of the cores. One that dies is replaced."""

    def __init__(self, job: Job, jobs: int) -> None:
        self.job, self.threads = job, max(1, (os.cpu_count() or 1) // jobs)
        self.context = multiprocessing.get_context("spawn")
        self.idle: list[tuple[SpawnProcess, Connection]] = [self._start() for _ in range(jobs)]
        self.busy: dict[Connection, tuple[SpawnProcess, Cell, float]] = {}

    @property
    def free(self) -> bool:
        return bool(self.idle)

    def begin(self, cell: Cell) -> None:
        process, line = self.idle.pop(0)
        with contextlib.suppress(OSError):  # it died while idle: found out when it is listened to
            line.send(cell)
        self.busy[line] = process, cell, time.perf_counter()

    def ended(self) -> list[Outcome]:
        found = []
        for line in wait(list(self.busy)):
            assert isinstance(line, Connection)
            process, cell, began = self.busy.pop(line)
            try:
                found.append(line.recv())
                self.idle.append((process, line))
            except (EOFError, OSError):
                process.join()
                line.close()
                seconds = time.perf_counter() - began
                found.append(Outcome(cell, f"its worker died (exit code {process.exitcode})", seconds, ok=False, died=True))
                self.idle.append(self._start())
        return found

    def close(self) -> None:
        for process, line in self.idle:
            line.close()  # a worker whose line is cut goes home
            process.join()
        for line, (process, _, _) in self.busy.items():
            process.terminate()
            process.join()
            line.close()

    def _start(self) -> tuple[SpawnProcess, Connection]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs, self.job, self.threads), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def _serve(line: Connection, job: Job, threads: int) -> None:
    """A worker process: cells in, outcomes out, until the line is cut."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # A worker without its driver must not go on writing beside the next run.
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    import torch

    torch.set_num_threads(min(threads, torch.get_num_threads()))
    worker: Worker | None = None
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            cell = line.recv()
            try:
                worker = worker or _hire(job)
                outcome = attempt(worker, cell)
            except UserError as error:
                outcome = Outcome(cell, str(error), 0.0, ok=False)
            line.send(outcome)


def _hire(job: Job) -> Worker:
    return Worker(job.spec, job.folder, allow_python_detectors=job.allow_python_detectors)


class OnRay:
    """A Ray cluster, begun here or joined; the output folder must be one that every node can write to.

    A task whose worker or node dies is begun again by Ray, ``retries`` times.
    """

    def __init__(self, job: Job, address: str | None) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("ray is not installed; pip install 'safeweights[ray]', or use --executor local") from None
        self.ray, self.job = ray, job
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                include_dashboard=False if address is None else None,
                # A cluster's workers have an environment of their own.
                runtime_env={"env_vars": ours} if (ours := _ours()) and address is not None else None,
            )
        except Exception as error:  # Ray raises bare ones as well
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"Ray cannot be begun or joined ({address or 'this machine'}): {reason}") from error
        share = job.spec.resources
        there = ray.cluster_resources()
        for name, wanted in (("CPU", share.cpus), ("GPU", share.gpus)):
            if wanted > there.get(name, 0):
                ray.shutdown()
                raise UserError(f"a cell wants {wanted:g} {name}, the Ray cluster has {there.get(name, 0):g}; change 'resources'")
        fitting = [there["CPU"] / share.cpus, *([there["GPU"] / share.gpus] if share.gpus else [])]
        # Somewhat more than fit are handed in, so that none waits for the driver; not all, so that their order is kept.
        self.slots: int = 1 + math.ceil(1.5 * min(fitting))
        # A worker needs no list of all cells, and would unpack it anew for each.
        self.shared = ray.put(replace(job, cells=(), finished=frozenset()))
        self.task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=job.spec.retries)(_on_ray)
        self.running: dict[Any, tuple[Cell, float]] = {}

    @property
    def free(self) -> bool:
        return len(self.running) < self.slots

    def begin(self, cell: Cell) -> None:
        self.running[self.task.remote(self.shared, cell)] = cell, time.perf_counter()

    def ended(self) -> list[Outcome]:
        done, _ = self.ray.wait(list(self.running), num_returns=1)
        found = []
        for reference in done:
            cell, began = self.running.pop(reference)
            try:
                found.append(self.ray.get(reference))
            except self.ray.exceptions.RayError as error:
                text = " ".join(str(error).split())[:300]
                found.append(Outcome(cell, f"its worker died ({text})", time.perf_counter() - began, ok=False))
        return found

    def close(self) -> None:
        self.ray.shutdown()


def _ours() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("SAFEWEIGHTS_")}


_HIRED: dict[str, Worker] = {}
"""Ray's workers outlive a task; the model they opened is used again for the next."""


def _on_ray(job: Job, cell: Cell) -> Outcome:
    key = job.spec.model_dump_json()
    if key not in _HIRED:
        _HIRED.clear()
        try:
            _HIRED[key] = _hire(job)
        except UserError as error:
            return Outcome(cell, str(error), 0.0, ok=False)
    return attempt(_HIRED[key], cell)
