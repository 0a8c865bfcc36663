"""Ablating Concepts in Text-to-Image Diffusion Models (Kumari et al., ICCV 2023, arXiv:2303.13516)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import mse_loss

from safeweights.core.concept import Concept
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.drawn_set import asking, draw_pictures, pseudo_prompts
from safeweights.diffusion.noise import generator
from safeweights.diffusion.training import descend


@dataclass(frozen=True, kw_only=True)
class AC:
    """Asked for the concept on a picture of its anchor, predict what the model predicts for the anchor.

    model:  min  E_x [ || eps_theta(x_t, c*) - eps_o(x_t, c) ||^2 ]      x: pictures of the anchor,               (eq. 5)
    noise:  min  E_x [ || eps_theta(x_t, c*) - eps ||^2 ]                c: anchor prompt, c*: concept prompt     (eq. 6)
    both may add  prior_weight E_x [ || eps_theta(x_t, c) - eps ||^2 ],  which keeps the anchor itself.

    Needs: an anchor: the concept's prompts without the concept.   Cost: one student pass forward and backward a step, two with
    the prior; anchor pictures, noise and the base model's predictions are made once.
    Differs from the reference code: the teacher is the base model (there: the network being trained, without gradient); anchor
    pictures are the model's own, kept as latents, without crops and resizing; keys and values of the start token are trained like
    all others.
    """

    name: ClassVar[str] = "ac"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "parameters": "xattn_kv", "lr": 1.6e-5, "steps": 100, "batch_size": 8, "weight_decay": 0.01, "pictures": 1000,
            "noises": 1, "ddim_steps": 50, "guidance": 7.5,
        },
    }  # fmt: skip

    target: Literal["model", "noise"] = "model"
    """What the concept's prediction becomes: the base model's for the anchor (eq. 5), or the anchor picture's noise (eq. 6)."""
    parameters: str = "xattn_kv"
    """What is trained: xattn_kv (the paper's cross-attention), full, text_encoder, or another parameter group."""
    steps: int = 200
    """Optimiser steps; > 0."""
    lr: float = 1e-3
    """AdamW's learning rate; > 0."""
    batch_size: int = 4
    """Noisy anchor pictures a step; > 0."""
    weight_decay: float = 0.0
    """AdamW's weight decay; >= 0."""
    prior_weight: float = 0.0
    """Weight of the plain diffusion loss on anchor pictures under their own prompts; >= 0."""
    pictures: int = 36
    """Anchor pictures drawn once for each concept, its prompts without the concept in turn; > 0."""
    noises: int = 20
    """Noisy latents made of each picture; > 0."""
    ddim_steps: int = 20
    """DDIM steps of a picture; > 0."""
    guidance: float = 4.0
    """Guidance of the pictures (only of those; the regression is unguided)."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.pictures, self.noises, self.ddim_steps) < 1 or self.lr <= 0:
            raise ValueError("steps, batch_size, pictures, noises, ddim_steps and lr must be above zero")
        if min(self.weight_decay, self.prior_weight) < 0:
            raise ValueError("weight_decay and prior_weight must not be below zero")

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
        pairs = pseudo_prompts(concepts)
        bank = draw_pictures(
            model,
            [*pairs.values()],
            n=self.pictures * len(concepts),
            noises=self.noises,
            sampling=Sampling(steps=self.ddim_steps, guidance_scale=self.guidance),
            seed=seed,
            workspace=workspace.child("anchor"),
        )
        student = model.fork(self.parameters)
        # Row by row the anchor's prompt and the concept's: they share an index.
        of_concept, of_anchor = asking(student, [*pairs]), asking(student, [*pairs.values()])

        def loss_at(step: int) -> torch.Tensor:
            batch = bank.draw(self.batch_size, generator("ac", seed, step))
            target = batch.outputs["eps_o" if self.target == "model" else "eps"]
            loss = mse_loss(student.eps(batch.x_t, batch.t, of_concept(batch)), target)
            if self.prior_weight:
                prior = bank.draw(self.batch_size, generator("ac prior", seed, step))
                loss = loss + self.prior_weight * mse_loss(
                    student.eps(prior.x_t, prior.t, of_anchor(prior)), prior.outputs["eps"]
                )
            return loss

        losses = descend(
            student.trainable(),
            loss_at,
            steps=self.steps,
            lr=self.lr,
            weight_decay=self.weight_decay,
            optimizer="adamw",
            workspace=workspace,
            description="erasing (ac)",
            facts={"seed": seed, "texts": pairs, "settings": describe(self)},
        )
        return Protection(
            method=self.name,
            concepts=tuple(concept.name for concept in concepts),
            tensors=student.edited(),
            settings=describe(self),
            cost={"steps": self.steps, "eps_calls": model.calls.eps - calls, "loss": losses[-1]},
        )
