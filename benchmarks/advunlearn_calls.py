"""What drawing latents once saves AdvUnlearn: model calls an iteration and the loss, both ways, in one run.

    python benchmarks/advunlearn_calls.py [--concept emblem] [--steps 30] [--set batch_size=2 …]

The naive way is that of the released code: every noisy latent, in every attack step too, comes from a DDIM run of its own with
guidance, and the base model is asked about it anew. Everything else, settings and seeds included, is the same. Prints JSON: calls
an iteration counted by the model itself (banks apart and shared out over the run), seconds, the mean loss of the second half of
either run with its standard error, and what the formulas say for the paper's settings.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import safeweights.erasure.advunlearn as advunlearn
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import method, parse_settings
from safeweights.diffusion.latent_bank import Batch
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import ddim_step, ddim_timesteps, embed_all, predictions
from safeweights.erasure.advunlearn import AdvUnlearn
from safeweights.models.door import open_model
from safeweights.sandbox.files import sandbox_concepts

DEFAULTS = ("batch_size=2", "retain_batch=4", "attack_steps=3", "warm_up=0", "prompts=term", "retain_empty=false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", default="emblem")
    parser.add_argument("--steps", type=int, default=30, help="iterations of each run")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="KEY=VALUE", help=f"after {' '.join(DEFAULTS)}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file, model = sandbox_concepts(), open_model("sandbox", device="cpu")
    settings = {**parse_settings(DEFAULTS), **parse_settings(options.settings), "steps": options.steps}
    eraser: AdvUnlearn = method("advunlearn", **settings)
    concept = file.concepts[options.concept]
    banked = run(model, eraser, concept, file.retain)
    aim, held = advunlearn._Aim._bank, AdvUnlearn._held
    advunlearn._Aim._bank = lambda aim, model, workspace: Fresh(model, tuple(aim.texts), eraser.sampling())  # type: ignore[assignment,method-assign,return-value]
    AdvUnlearn._held = lambda eraser, model, kept, seed, workspace: Fresh(model, tuple(kept), eraser.sampling())  # type: ignore[assignment,method-assign,return-value]
    try:
        naive = run(model, eraser, concept, file.retain)
    finally:
        advunlearn._Aim._bank, AdvUnlearn._held = aim, held  # type: ignore[method-assign]
    paper: AdvUnlearn = method("advunlearn", preset="paper")
    attacked = replace(paper, warm_up=0).naive_calls_per_step(243)
    told = {
        "concept": concept.name,
        "settings": settings,
        "naive": naive,
        "banked": banked,
        "fewer_calls": naive["calls_per_step"] / banked["calls_per_step"],
        "fewer_calls_banks_included": naive["calls_per_step"] / banked["calls_per_step_with_banks"],
        "paper_settings": paper_settings(paper, attacked),
    }
    print(json.dumps(told, indent=1))


def paper_settings(paper: AdvUnlearn, naive: float) -> dict[str, float]:
    """Calls of an attacked iteration by the formulas: the student's in either case, latents drawn anew or once."""
    own = paper.batch_size * (1 + paper.attack_steps) + paper.retain_batch + paper.retain_empty
    banks = 2 * paper.ddim_steps * (paper.trajectories + paper.retain_trajectories) / paper.steps
    return {"naive": naive, "banked": own, "fewer_calls": naive / own, "fewer_calls_banks_included": naive / (own + banks)}


def run(model: DiffusionModel, eraser: AdvUnlearn, concept: Any, retain: Sequence[str]) -> dict[str, float]:
    """Calls and losses of one run."""
    losses: list[float] = []
    descend = advunlearn.descend

    def watched(*args: Any, **rest: Any) -> list[float]:
        losses.extend(descend(*args, **rest))
        return losses

    advunlearn.descend = watched
    began = time.perf_counter()
    try:
        cost = eraser.protect(model, [concept], retain=retain, rng=generator(7000)).cost
    finally:
        advunlearn.descend = descend
    tail = torch.tensor(losses[len(losses) // 2 :])
    return {
        "calls_per_step": cost["calls_per_step"],
        "calls_per_step_with_banks": cost["calls_per_step_with_banks"],
        "seconds": round(time.perf_counter() - began, 1),
        "loss": float(tail.mean()),
        "loss_standard_error": float(tail.std()) / math.sqrt(len(tail)),
    }


@dataclass
class Fresh:
    """Noisy latents as the released code comes by them: each from a run of its own, asked about when it is there."""

    model: DiffusionModel
    prompts: tuple[str, ...]
    sampling: Sampling

    def __post_init__(self) -> None:
        self.c, self.none = embed_all(self.model, self.prompts), self.model.embed([""]).detach()

    @torch.no_grad()
    def draw(self, batch: int, rng: torch.Generator, prompt_index: Any = None) -> Batch:
        """``batch`` latents at timesteps drawn uniformly from the grid, and the base model's predictions for them."""
        model, grid = self.model, ddim_timesteps(self.model, self.sampling.steps)
        chosen = (
            torch.randint(len(self.prompts), (batch,), generator=rng) if prompt_index is None else torch.as_tensor(prompt_index)
        )
        chosen = chosen.expand(batch)
        at = torch.randint(len(grid), (batch,), generator=rng)
        x = torch.randn((batch, *model.latent_shape), generator=rng)
        for number in range(int(at.max())):
            rows = (at > number).nonzero().flatten()
            t, t_next = int(grid[number]), int(grid[number + 1])
            eps_0, eps_c = predictions(model, x[rows], torch.full((len(rows),), t), self.c[chosen[rows]], self.none)
            x[rows] = ddim_step(model, x[rows], t, t_next, eps_0 + self.sampling.guidance_scale * (eps_c - eps_0))
        t = grid[at]
        eps_0, eps_c = predictions(model, x, t, self.c[chosen], self.none)
        outputs = {"eps_none": eps_0, "eps_c": eps_c, "eps_without": eps_0}
        return Batch(x, t, chosen, torch.zeros(batch, dtype=torch.long), outputs)


if __name__ == "__main__":
    main()
