"""kill -9 at random moments of ``safeweights bench``, then the same command: the records of an undisturbed run, none made twice.

    python benchmarks/kill_bench.py [--kills 20] [--seed 0]

Prints JSON. Runs on a sandbox of random weights with the architecture of the real one: a benchmark of 14 cells takes seconds.
Each kill has a folder of its own: the command runs, dies at a moment drawn uniformly from the undisturbed run's duration, and is
repeated. ``measured_twice`` counts records that were there at the kill and were written again (a new inode); ``different`` counts
final records that differ from the undisturbed run's in anything but times; ``odd_files`` counts files that are no such record.
Processes are forked from one that has loaded the libraries already, or most kills would hit an import.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import conftest
import folders
from safeweights.bench.runner import prepare
from safeweights.bench.spec import load_bench
from safeweights.cli.main import run
from safeweights.records.store import deterministic

SPEC = {
    "version": 1, "concepts": ["mosaic"], "methods": ["none", "uce"], "prompts": 2, "evaluation": {"n": 4, "retain_n": 2},
    "attacks": ["no-attack", {"name": "random", "settings": {"images": 3, "tokens": 1}}], "seeds": [0, 1], "device": "cpu",
}  # fmt: skip


def begun(command: list[str]) -> int:
    """The command in a process of its own, and of its own group; its id."""
    pid = os.fork()
    if pid == 0:
        os.setpgrp()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(run(command))
    return pid


def records(path: Path, folder: Path) -> dict[str, str]:
    return {record.provenance["cell"]: json.dumps(deterministic(record), sort_keys=True, default=str)
            for record in prepare(load_bench(path), folder).records()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        (top / "tiny").mkdir()
        os.environ["SAFEWEIGHTS_SANDBOX"] = str(folders.sandbox(top / "sandbox", conftest.build_tiny_sd(top / "tiny")))
        path = top / "bench.yaml"
        path.write_text(yaml.safe_dump(SPEC))

        def command(name: str) -> list[str]:
            return ["bench", str(path), "-o", str(top / name)]

        assert run(command("warm")) == 0  # loads whatever is loaded late
        started = time.perf_counter()
        assert os.waitpid(begun(command("whole")), 0)[1] == 0
        whole = time.perf_counter() - started
        expected = records(path, top / "whole")
        twice = different = odd = failed = 0
        there = []
        for number in range(options.kills):
            name, moment = f"kill-{number}", rng.uniform(0, whole)
            pid = begun(command(name))
            time.sleep(moment)
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:  # it was done before
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            cells = top / name / "records"
            before = {entry.name: entry.stat().st_ino for entry in cells.glob("*.json")}
            there.append(len(before))
            failed += os.waitpid(begun(command(name)), 0)[1] != 0
            after = {entry.name: entry.stat().st_ino for entry in cells.glob("*.json")}
            twice += sum(after.get(key) != value for key, value in before.items())
            odd += len(after) - len(expected)
            found = records(path, top / name)
            different += sum(found.get(key) != value for key, value in expected.items()) + len(found.keys() - expected.keys())
        print(json.dumps({
            "kills": options.kills, "cells": len(expected), "undisturbed_seconds": round(whole, 1), "recorded_at_the_kill": there,
            "failed": failed, "measured_twice": twice, "different": different, "odd_files": odd,
        }))  # fmt: skip


if __name__ == "__main__":
    main()
