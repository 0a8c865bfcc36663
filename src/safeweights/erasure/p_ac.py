"""Pruning for Robust Concept Erasing in Diffusion Models (Yang et al., 2024, arXiv:2405.16534), with AC's objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from safeweights.core.concept import Concept
from safeweights.core.method import Protection
from safeweights.core.model import Conditioning, DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.drawn_set import draw_pictures, pseudo_prompts
from safeweights.diffusion.latent_bank import Batch
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import embed_all
from safeweights.erasure.pruning import (
    Attacker,
    Control,
    Criterion,
    Objective,
    Optimizer,
    Unit,
    check,
    fork_weights,
    holding,
    prune,
    standing_in,
)


@dataclass(frozen=True, kw_only=True)
class PAC:
    """Zero the few weights without which the concept's prompt means its anchor, found with AC's objective; all others stay.

    min_m  || eps_m(x_t, c) - eps_o(x_t, a) ||^2  +  lam || eps_m(x_t, c') - eps_o(x_t, c') ||^2,   x: pictures of the anchor a
    eps_m: base model with W * m,   m in {0, 1},   sum (1 - m) = budget * |UNet|,   c' a retained prompt

    Needs: an anchor (the concept's prompts without the concept), prompts to retain.   Cost: two student passes forward and
    backward a step; pictures, noise and the base model's predictions are made once.
    Differs from the reference code: there is none, and the paper's equations are not public in full (`erasure/pruning.py` says
    what is stated and what is ours). Anchors are as in `ac`.
    """

    name: ClassVar[str] = "p-ac"
    prunes: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "budget": 0.01, "lam": 1.0, "steps": 600, "ramp": 300, "batch_size": 8,
            "pictures": 200, "ddim_steps": 50, "guidance": 7.5,
        },
    }  # fmt: skip

    parameters: str = "neurons"
    """Where weights may be pruned: neurons (both linear layers of the feed-forward blocks, keys and values of cross-attention),
    ffn, xattn_kv, full, or another group; biases and norms stay."""
    budget: float = 0.005
    """Share of the UNet's weights that is pruned, counted exactly; in (0, 1)."""
    criterion: Criterion = "learned"
    """How they are chosen: learned, or one-shot by snip, wanda or conceptprune (over ``steps`` batches)."""
    unit: Unit = "weight"
    """What a gate is for: a single weight, or a whole neuron (hard-concrete gates, as an ablation)."""
    steps: int = 240
    """Optimiser steps, or batches of a one-shot criterion; > 0. Fewer leave more to attacks and harm more."""
    ramp: int = 120
    """Steps over which the number of pruned weights grows to the budget; >= 0."""
    optimizer: Optimizer = "sgd"
    """How scores move: sgd adds gradients up, so that a big effect counts more; adam counts how steadily it points one way."""
    lr: float = 0.05
    """Step of the scores; > 0. Without meaning for sgd, where only their order counts."""
    batch_size: int = 4
    """Noisy latents of each of the two sets a step; > 0."""
    lam: float = 1.0
    """Weight of the retained prompts; >= 0."""
    pictures: int = 18
    """Anchor pictures drawn once for each concept, its prompts without the concept in turn; > 0."""
    retained: int = 41
    """Retained pictures drawn once, the prompts and the empty one in turn; > 0."""
    noises: int = 10
    """Noisy latents made of each picture; > 0."""
    ddim_steps: int = 20
    """Steps of trajectories and pictures; > 0."""
    guidance: float = 3.0
    """Guidance of trajectories and pictures (only of those; the regressions are unguided)."""
    attack_steps: int = 0
    """Beyond the paper: steps of an attack on the masked model before each step after the ramp, so that the mask also holds
    against prompts made to wake the concept (AdvUnlearn's lower level); 0: no attack; >= 0."""
    attack_lr: float = 1e-2
    """Adam's step on the attack's free token embeddings; > 0."""
    tokens: int = 1
    """Free tokens of the attack, before the prompt; > 0."""
    conceal: Literal["none", "noise"] = "none"
    """What stands in the pruned places: zeros, which show where they are, or noise like the rest of their rows."""
    control: Control = "none"
    """For comparison, instead of the mask found: as many weights of each tensor at random, the smallest or the largest; or
    fine-tuning as far as the mask moves the weights (movement)."""
    instead: str = ""
    """For comparison: learn the mask for these words in place of the concept's term."""

    def __post_init__(self) -> None:
        check(self)
        if self.pictures < 1:
            raise ValueError("pictures must be above zero")

    def protect(
        self,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        *,
        retain: Sequence[str] = (),
        rng: torch.Generator,
        workspace: Workspace | None = None,
    ) -> Protection:
        workspace = workspace or Workspace()
        seed, calls = rng.initial_seed(), model.calls.eps
        asked, student = standing_in(concepts, self.instead), fork_weights(model, self.parameters)
        pairs = pseudo_prompts(asked)
        bank = draw_pictures(
            model, [*pairs.values()], n=self.pictures * len(asked), noises=self.noises,
            sampling=Sampling(steps=self.ddim_steps, guidance_scale=self.guidance), seed=seed,
            workspace=workspace.child("anchor"),
        )  # fmt: skip
        # Row by row the anchor's prompt and the concept's: they share an index.
        c, anchor = embed_all(model, [*pairs]), embed_all(model, [*pairs.values()])

        def ask(step: int) -> tuple[Batch, Conditioning, Conditioning]:
            batch = bank.draw(self.batch_size, generator("p-ac", seed, step))
            return batch, c[batch.prompt], anchor[batch.prompt]

        attacker = None
        if self.attack_steps:
            # The attack wants the concept drawn; the bank's rows stand under its prompts for that, in the same order.
            bank = replace(bank, prompts=(*pairs,))
            bank.precompute("eps_c", lambda batch: model.eps(batch.x_t, batch.t, c[batch.prompt]))
            attacker = Attacker(self, student, bank, seed)

        def erase(step: int) -> Tensor:
            batch, of_concept, _ = ask(step)
            if attacker and step >= self.ramp:
                of_concept = attacker.attacked(batch.prompt, step)
            return mse_loss(student.eps(batch.x_t, batch.t, of_concept), batch.outputs["eps_o"])

        objective = Objective(erase, ask)
        keep = holding(student, [*concepts, *asked], retain, how=self, seed=seed, workspace=workspace)
        pruned = prune(self, student, asked, objective=objective, keep=keep, seed=seed, workspace=workspace)
        return replace(
            pruned,
            concepts=tuple(concept.name for concept in concepts),
            settings=describe(self),
            cost={**pruned.cost, "eps_calls": model.calls.eps - calls},
        )
