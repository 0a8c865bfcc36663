"""Do an eraser's defaults erase, and what do they keep? Tuning prompts and seeds from 7000 only.

    python benchmarks/eraser_defaults.py --methods spm salun:steps=60,lr=1e-4 --concepts mosaic fish [--n 12] [--retain-n 2]

Prints a Markdown row for each method and concept: the share of ``--n`` pictures that still show the concept; of ``--retain-n``
pictures of each neighbour and ``--others`` of every other concept the share that still show theirs, and which do not; the
Fréchet distance of these to the unedited model's for the same prompts and seeds.
"""

from __future__ import annotations

import argparse
import time

import torch

from safeweights.core.concept import ConceptFile
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import method
from safeweights.detectors.load import open_detector
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import candidates_of, generate
from safeweights.metrics.frechet import frechet_distance
from safeweights.models.door import open_model
from safeweights.models.vision import Embedder
from safeweights.sandbox.files import sandbox_concepts, weights_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", required=True, metavar="NAME[:KEY=VALUE,…]")
    parser.add_argument("--concepts", nargs="+", required=True)
    parser.add_argument("--n", type=int, default=12, help="judged pictures of the concept")
    parser.add_argument("--retain-n", type=int, default=2, help="judged pictures of each neighbour")
    parser.add_argument("--others", type=int, default=1, help="judged pictures of every other concept")
    parser.add_argument("--seed", type=int, default=7000, help="the eraser's seed, at least 7000")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file, model = sandbox_concepts(), open_model("sandbox", device="cpu")
    features = Embedder(str(weights_folder() / "embedder"))
    print("| method | concept | rate | kept | harmed | Fréchet | loss | seconds |\n|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.concepts:
        before = judged(model, file, name, options)[2]
        for told in options.methods:
            eraser = configured(told)
            began = time.perf_counter()
            protection = eraser.protect(model, file.pick([name]), retain=file.retain, rng=generator(options.seed))
            seconds = time.perf_counter() - began
            rate, others, drawn = judged(protection.apply(model), file, name, options)
            distance = frechet_distance(drawn, before, features).value
            pictures = [float(seen) for shown in others.values() for seen in shown]
            harmed = ", ".join(f"{other} {sum(shown)}/{len(shown)}" for other, shown in others.items() if not all(shown))
            apart = "–" if distance is None else f"{distance:.3f}"
            print(
                f"| {told} | {name} | {rate:.2f} | {sum(pictures) / len(pictures):.2f} | {harmed} "
                f"| {apart} | {protection.cost.get('loss', float('nan')):.4f} | {seconds:.0f} |",
                flush=True,
            )


def configured(told: str):  # type: ignore[no-untyped-def]
    """``esd:steps=40,lr=1e-4`` as an eraser."""
    name, _, rest = told.partition(":")
    return method(name, **dict(pair.split("=", 1) for pair in rest.split(",") if pair))


def judged(
    model: DiffusionModel, file: ConceptFile, name: str, options: argparse.Namespace
) -> tuple[float, dict[str, list[bool]], torch.Tensor]:
    """The concept's rate, for every other concept whether each of its pictures shows it, and those pictures."""
    neighbours = file.concepts[name].neighbours
    counts = {other: max(options.others, options.retain_n * (other in neighbours)) for other in file.concepts}
    counts[name] = options.n
    texts = [file.concepts[other].texts[i % len(file.concepts[other].texts)] for other, m in counts.items() for i in range(m)]
    seeds = [7000 + i for m in counts.values() for i in range(m)]
    parts = generate(model, candidates_of(texts, seeds), Sampling(**file.generation)).split(list(counts.values()))
    seen = {}
    for other, part in zip(counts, parts, strict=True):
        spec = file.concepts[other].detector
        assert spec is not None
        seen[other] = [bool(present) for present in open_detector(spec, concept=other).detect(part).present]
    shown = seen.pop(name)
    return sum(shown) / options.n, seen, torch.cat([part for other, part in zip(counts, parts, strict=True) if other != name])


if __name__ == "__main__":
    main()
