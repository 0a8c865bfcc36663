"""What a Ray cluster of two workers costs beside the cells it measures.

    python benchmarks/ray_overhead.py [--cells 200] [--cell-seconds 0.5]

Prints JSON. The cells are those of a real benchmark (UCE on the sandbox: protect, evaluate and attack for each seed, in that
order) and go through the real driver, scheduler and record store; only the measuring itself is replaced by waiting
``--cell-seconds`` and writing a record, so that nothing but the scheduling is timed. Overhead is what two workers could have
measured in the wall time, over what they did: ``workers * wall / sum of cell times - 1``. Beginning Ray, opening the model and
the first cell of each worker (its process starts) come before the clock and are told apart.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

from safeweights.bench import runner
from safeweights.bench.cells import Cell
from safeweights.bench.runner import Job, Outcome, prepare, run
from safeweights.bench.spec import Bench

WORKERS = 2
SECONDS = 0.5


def waiting(job: Job, cell: Cell) -> Outcome:
    """A cell of a known length that leaves a record."""
    import os
    import time
    from dataclasses import replace

    from safeweights.bench.cells import CellStore, failure

    began = time.perf_counter()
    time.sleep(float(os.environ.get("SAFEWEIGHTS_CELL_SECONDS", "0.5")))
    CellStore(job.folder, cell).add(replace(failure(cell, ""), status="ok", error=None))
    return Outcome(cell, "waited", time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--cell-seconds", type=float, default=SECONDS)
    options = parser.parse_args()
    import os

    os.environ["SAFEWEIGHTS_CELL_SECONDS"] = str(options.cell_seconds)
    from ray.cluster_utils import Cluster

    runner._on_ray = waiting
    spec = Bench.model_validate({
        "version": 1, "concepts": ["mosaic"], "methods": ["uce"], "attacks": ["no-attack"], "device": "cpu",
        "seeds": list(range(math.ceil(options.cells / 3) + 1)), "resources": {"cpus": 1.0},
    })  # fmt: skip
    started = time.perf_counter()
    cluster = Cluster()
    for _ in range(WORKERS):
        cluster.add_node(num_cpus=1, include_dashboard=False)
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(spec, Path(folder))
        ends, seconds = [], []
        for outcome in run(job, executor="ray", address=cluster.address):
            assert outcome.ok, outcome.said
            ends.append(time.perf_counter())
            seconds.append(outcome.seconds)
            if len(ends) == options.cells + WORKERS:
                break
        recorded = len(prepare(spec, Path(folder)).finished)
    cluster.shutdown()
    wall = ends[-1] - ends[WORKERS - 1]
    measured = sum(seconds[WORKERS:])
    print(json.dumps({
        "cells": len(ends) - WORKERS, "workers": WORKERS, "recorded": recorded,
        "cell_seconds": round(measured / (len(ends) - WORKERS), 4),
        "wall_seconds": round(wall, 2), "ideal_seconds": round(measured / WORKERS, 2),
        "overhead": round(WORKERS * wall / measured - 1, 4), "until_first_cells_seconds": round(ends[WORKERS - 1] - started, 1),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
