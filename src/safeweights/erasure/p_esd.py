"""Pruning for Robust Concept Erasing in Diffusion Models (Yang et al., 2024, arXiv:2405.16534), with ESD's objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from safeweights.core.concept import Concept
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.erasure.pruning import (
    Control,
    Criterion,
    Optimizer,
    Unit,
    check,
    fork_weights,
    guided_away,
    holding,
    prune,
    standing_in,
)


@dataclass(frozen=True, kw_only=True)
class PESD:
    """Zero the few weights through which the concept passes, found with ESD's objective; all others stay as they are.

    min_m  || eps_m(x_t, c) - [eps_o(x_t) - eta (eps_o(x_t, c) - eps_o(x_t))] ||^2  +  lam || eps_m(x_t, c') - eps_o(x_t, c') ||^2
    eps_m: base model with W * m,   m in {0, 1},   sum (1 - m) = budget * |UNet|,   c' a retained prompt

    Needs: prompts to retain.   Cost: two student passes forward and backward a step; trajectories, pictures and the base model's
    predictions are made once.
    Differs from the reference code: there is none, and the paper's equations are not public in full (`erasure/pruning.py` says
    what is stated and what is ours). Prompts stand for the concept as in `esd`.
    """

    name: ClassVar[str] = "p-esd"
    prunes: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "budget": 0.01, "eta": 1.0, "lam": 1.0, "steps": 600, "ramp": 300, "batch_size": 8,
            "trajectories": 64, "ddim_steps": 50, "guidance": 7.5,
        },
    }  # fmt: skip

    parameters: str = "neurons"
    """Where weights may be pruned: neurons (both linear layers of the feed-forward blocks, keys and values of cross-attention),
    ffn, xattn_kv, full, or another group; biases and norms stay."""
    budget: float = 0.003
    """Share of the UNet's weights that is pruned, counted exactly; in (0, 1)."""
    criterion: Criterion = "learned"
    """How they are chosen: learned, or one-shot by snip, wanda or conceptprune (over ``steps`` batches)."""
    unit: Unit = "weight"
    """What a gate is for: a single weight, or a whole neuron (hard-concrete gates, as an ablation)."""
    steps: int = 240
    """Optimiser steps, or batches of a one-shot criterion; > 0. With a quarter of them a style's mask depends on the seed; with
    half, other objects are lost."""
    ramp: int = 120
    """Steps over which the number of pruned weights grows to the budget; >= 0."""
    optimizer: Optimizer = "sgd"
    """How scores move: sgd adds gradients up, so that a big effect counts more; adam counts how steadily it points one way."""
    lr: float = 0.05
    """Step of the scores; > 0. Without meaning for sgd, where only their order counts."""
    batch_size: int = 4
    """Noisy latents of each of the two sets a step; > 0."""
    lam: float = 3.0
    """Weight of the retained prompts; >= 0."""
    eta: float = 3.0
    """Strength of the negative guidance; unitless, > 0. ESD's 1 silences the plain prompt only: attacks find what is left, and a
    style needs to be aimed past it even for that."""
    trajectories: int = 18
    """DDIM trajectories drawn once for each concept, its term and prompts in turn; > 0."""
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
        if self.trajectories < 1 or self.eta <= 0:
            raise ValueError("trajectories and eta must be above zero")

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
        objective = guided_away(
            model, student, asked, eta=self.eta, trajectories=self.trajectories, how=self, seed=seed, workspace=workspace
        )
        keep = holding(student, [*concepts, *asked], retain, how=self, seed=seed, workspace=workspace)
        pruned = prune(self, student, asked, objective=objective, keep=keep, seed=seed, workspace=workspace)
        return replace(
            pruned,
            concepts=tuple(concept.name for concept in concepts),
            settings=describe(self),
            cost={**pruned.cost, "eps_calls": model.calls.eps - calls},
        )
