"""How many ESD steps a concept needs: rate and retention after each, on tuning prompts only.

    python benchmarks/esd_strength.py --concepts teapot fish [--steps 40 60 80 110] [--n 24] [--retain-n 3]

One erasing run a concept, judged at each of ``--steps``. Prints a Markdown table; the fewest steps with a rate of at most 0.1
are what benchmarks/specs/foundation.yaml uses, so that a concept is erased no further than needed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable

import torch

import safeweights.erasure.esd as esd
from safeweights.core.concept import ConceptFile
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.detectors.load import open_detector
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import candidates_of, generate
from safeweights.models.door import open_model
from safeweights.sandbox.files import sandbox_concepts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", required=True)
    parser.add_argument("--steps", nargs="+", type=int, default=[40, 60, 80, 110])
    parser.add_argument("--lr", type=float, default=esd.ESD.lr)
    parser.add_argument("--n", type=int, default=24, help="judged pictures of the concept")
    parser.add_argument("--retain-n", type=int, default=3, help="judged pictures of every other concept")
    options = parser.parse_args()
    file, model = sandbox_concepts(), open_model("sandbox", device="cpu")
    print("| concept | steps | rate | retention | harmed |\n|---|---|---|---|---|")
    for name in options.concepts:
        for steps, protected in strengths(model, file, name, options.steps, options.lr):
            rate = rates(protected, file, [name], options.n)[name]
            others = rates(protected, file, [other for other in file.concepts if other != name], options.retain_n)
            harmed = ", ".join(f"{other} {value:.2f}" for other, value in others.items() if value < 1)
            print(f"| {name} | {steps} | {rate:.2f} | {math.fsum(others.values()) / len(others):.3f} | {harmed} |", flush=True)


def strengths(
    model: DiffusionModel, file: ConceptFile, name: str, wanted: list[int], lr: float
) -> Iterable[tuple[int, DiffusionModel]]:
    """The model after each of the wanted numbers of steps of one run."""
    taken: dict[int, dict[str, torch.Tensor]] = {}
    descend = esd.descend

    def watched(parameters, loss_at, **rest):  # type: ignore[no-untyped-def]
        def loss(step: int) -> torch.Tensor:
            if step in wanted:
                taken[step] = {key: value.detach().clone() for key, value in parameters.items()}
            return loss_at(step)

        return descend(parameters, loss, **rest)

    esd.descend = watched
    try:
        esd.ESD(steps=max(wanted) + 1, lr=lr).protect(model, file.pick([name]), rng=generator(0))
    finally:
        esd.descend = descend
    for steps, tensors in sorted(taken.items()):
        print(f"judging {name} after {steps} steps", file=sys.stderr)
        yield steps, Protection(method="esd", concepts=(name,), tensors=tensors, settings={}, cost={}).apply(model)


def rates(model: DiffusionModel, file: ConceptFile, names: list[str], n: int) -> dict[str, float]:
    """Share of n pictures of each concept that its detector recognises; tuning prompts, seeds from 7000."""
    texts = [concept.texts[i % len(concept.texts)] for concept in file.pick(names) for i in range(n)]
    pictures = generate(model, candidates_of(texts, [7000 + i for _ in names for i in range(n)]), Sampling(**file.generation))
    found = {}
    for name, part in zip(names, pictures.split(n), strict=True):
        spec = file.concepts[name].detector
        assert spec is not None
        found[name] = float(open_detector(spec, concept=name).detect(part).present.float().mean())
    return found


if __name__ == "__main__":
    main()
