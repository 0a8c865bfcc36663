"""Benchmarks on a local Ray cluster of two workers: nothing is lost when a worker or the driver is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import folders
from safeweights.bench import runner
from safeweights.bench.cells import Cell
from safeweights.bench.runner import Job, Outcome, prepare, run
from safeweights.bench.spec import Bench, load_bench
from safeweights.cli.main import run as cli
from safeweights.core.errors import UserError
from safeweights.records.store import deterministic

ray: Any = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "version": 1,
    "concepts": ["mosaic"],
    "methods": ["none", "uce"],
    "attacks": ["no-attack", {"name": "random", "settings": {"images": 2, "tokens": 1}}],
    "prompts": 2,
    "evaluation": {"n": 2, "retain_n": 1},
    "device": "cpu",
    "resources": {"cpus": 1},
}


@dataclass(frozen=True)
class Place:
    """A cluster of two nodes with one processor and one (imagined) GPU each, and the processes that begin workers there."""

    address: str
    raylets: frozenset[int]

    def busy(self) -> list[int]:
        """Workers of ours that are at a cell."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    title = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if parent in self.raylets and title.startswith(b"ray::_on_ray"):
                    found.append(int(entry.name))
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Callable[..., Path]) -> Iterator[Place]:
    from ray.cluster_utils import Cluster

    sandbox = folders.sandbox(tmp_path_factory.mktemp("world") / "sandbox", tiny_sd())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEWEIGHTS_SANDBOX", str(sandbox))
        patch.setenv("RAY_worker_niceness", "0")  # beside other jobs, workers of Ray's own niceness hardly get a turn
        cluster = Cluster()
        nodes = [cluster.add_node(num_cpus=1, num_gpus=1, include_dashboard=False) for _ in range(2)]
        raylets = frozenset(info.process.pid for node in nodes for info in node.all_processes["raylet"])
        yield Place(cluster.address, raylets)
        cluster.shutdown()


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


def told(spec: Bench, folder: Path) -> dict[str, Any]:
    return {r.provenance["cell"]: {**deterministic(r), "provenance": 0} for r in prepare(spec, folder).records()}


def test_a_worker_killed_at_a_cell_costs_that_cell_only(tmp_path: Path, place: Place) -> None:
    spec, folder = load_bench(written(tmp_path)), tmp_path / "out"
    killed, outcomes = 0, []
    for outcome in run(prepare(spec, folder), executor="ray", address=place.address):
        outcomes.append(outcome)
        for _ in range(200):
            if killed or not (busy := place.busy()):
                time.sleep(0.02)
            else:
                os.kill(busy[0], signal.SIGKILL)
                killed = busy[0]
            if killed:
                break
    assert killed
    assert [(o.cell.title, o.said) for o in outcomes if not o.ok] == []
    assert len(outcomes) == len(prepare(spec, folder).finished) == 7
    assert list(run(prepare(spec, tmp_path / "alone")))
    assert told(spec, folder) == told(spec, tmp_path / "alone")


def test_a_killed_driver_loses_nothing_and_nothing_is_measured_twice(
    tmp_path: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = written(tmp_path, methods=["none"], seeds=[0, 1]), tmp_path / "out"
    command = [sys.executable, "-m", "safeweights", "bench", str(path), "-o", str(folder), "--executor", "ray",
               "--address", place.address]  # fmt: skip
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stderr=said, stdout=said)
    records = folder / "records"
    for _ in range(3600):
        if len(list(records.glob("*.json"))) >= 2 or process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = {entry.name: entry.stat().st_ino for entry in records.glob("*.json")}
    assert len(before) >= 2, (tmp_path / "said").read_text()[-3000:]
    assert cli(command[3:]) == 0
    after = {entry.name: entry.stat().st_ino for entry in records.glob("*.json")}
    assert {name: after[name] for name in before} == before
    assert len(after) == 6
    assert capsys.readouterr().err.count("min left") == 6 - len(before)  # live progress, cell by cell
    assert "6</strong> of 6 cells measured" in (folder / "leaderboard.html").read_text()


def test_cells_get_their_share_of_a_gpu(tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(runner, "_on_ray", share)
    spec = load_bench(written(tmp_path, methods=["none"], attacks=[], seeds=[0, 1], resources={"cpus": 0.5, "gpus": 0.25}))
    said = [outcome.said for outcome in run(prepare(spec, tmp_path / "out"), executor="ray", address=place.address)]
    assert said == ["CPU 0.5 GPU 0.25"] * 2
    greedy = load_bench(written(tmp_path, methods=["none"], resources={"gpus": 3}))
    with pytest.raises(UserError, match="a cell wants 3 GPU, the Ray cluster has 2"):
        list(run(prepare(greedy, tmp_path / "more"), executor="ray", address=place.address))


def share(job: Job, cell: Cell) -> Outcome:
    """What Ray has set aside for this cell."""
    import ray

    given = ray.get_runtime_context().get_assigned_resources()
    return Outcome(cell, f"CPU {given['CPU']:g} GPU {given['GPU']:g}", 0.0)
