"""How a pruned eraser's settings fare: rate and retention, on tuning prompts only.

    python benchmarks/prune_strength.py --concepts emblem mosaic --try p-esd:budget=0.01 p-ac:budget=0.02,steps=100 -o runs/prune

One row for each concept and each ``METHOD:key=value,…``. Banks of latents are kept under ``-o`` and shared by rows whose settings
allow it. ``--attacks soft-prompt:images=4,steps=10`` also meets the model with live attacks on the same prompts. Any eraser may
stand beside the pruned ones. Prints a Markdown table; the defaults of `p-esd` and `p-ac` were chosen by it.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

from eraser_defaults import configured
from esd_strength import rates

from safeweights.audit.audit import Names, audit
from safeweights.core.model import Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import generator
from safeweights.models.door import open_model
from safeweights.sandbox.files import sandbox_concepts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", required=True)
    parser.add_argument("--try", dest="tried", nargs="+", required=True, metavar="METHOD:key=value,…")
    parser.add_argument("--n", type=int, default=16, help="judged pictures of the concept")
    parser.add_argument("--retain-n", type=int, default=2, help="judged pictures of every other concept")
    parser.add_argument("--attacks", nargs="*", default=[], metavar="NAME:key=value,…", help="live attacks on n tuning prompts")
    parser.add_argument("--seed", type=int, default=0, help="the eraser's seed: which trajectories and batches it learns from")
    parser.add_argument("--output", "-o", type=Path, required=True)
    options = parser.parse_args()
    file, model = sandbox_concepts(), open_model("sandbox", device="cpu")
    columns = ["concept", "method and settings", "rate", *options.attacks, "kept", "harmed", "moved (L2)", "seconds"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for tried in options.tried:
        method = configured(tried)
        for concept in options.concepts:
            started = time.perf_counter()
            # A descent is resumed only under the settings it was begun with, so rows may share a folder.
            workspace = Workspace(options.output / f"{method.name}-{options.seed}" / concept)
            protection = method.protect(
                model, file.pick([concept]), retain=file.retain, rng=generator(options.seed), workspace=workspace
            )
            seconds, protected = time.perf_counter() - started, protection.apply(model)
            rate = rates(protected, file, [concept], options.n)[concept]
            others = rates(protected, file, [other for other in file.concepts if other != concept], options.retain_n)
            harmed = ", ".join(f"{other} {value:.2f}" for other, value in others.items() if value < 1)
            kept, moved = math.fsum(others.values()) / len(others), protection.cost.get("moved", float("nan"))
            own = replace(file.concepts[concept], test_prompts=())
            fallen = [
                audit(
                    protected, model, own, configured(told), names=Names(model=tried, reference="sandbox"),
                    sampling=Sampling(**file.generation), seed=7000, n=options.n,
                ).details["asr"]["rate"]
                for told in options.attacks
            ]  # fmt: skip
            attacked = "".join(f" {share:.2f} |" for share in fallen)
            print(
                f"| {concept} | {tried} | {rate:.2f} |{attacked} {kept:.3f} | {harmed} | {moved:.1f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
