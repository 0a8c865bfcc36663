"""Erasing Concepts from Diffusion Models (Gandikota et al., ICCV 2023, arXiv:2303.07345)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import mse_loss

from safeweights.core.concept import Concept
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.guided_away import Prompts, away, away_bank, concept_texts
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import embed_all
from safeweights.diffusion.training import descend


@dataclass(frozen=True, kw_only=True)
class ESD:
    """Given the concept, predict noise guided away from it.

    eps(x_t, c)  <-  eps_o(x_t) - eta [eps_o(x_t, c) - eps_o(x_t)],   eps_o = base model         (eq. 7)

    Needs: nothing but the model and the concept's prompts.   Cost: one student pass forward and backward a step; the base model's
    predictions come free with the DDIM trajectories, which are drawn once.
    Differs from the reference code: trajectories come from the base model and are reused (there: the current model, one partial
    trajectory a step), x_t and t match exactly (there up to 48 timesteps apart), eta counts from the unconditional prediction as
    in the paper (the authors' later script counts from the conditional one, its eta=2 is this eta=1). With whole prompts
    eps_o(x_t) is the prediction for the prompt without the concept; for the term alone, as in the paper, for the empty prompt.
    """

    name: ClassVar[str] = "esd"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "lr": 1e-5, "steps": 1000, "batch_size": 1, "prompts": "term", "trajectories": 64, "ddim_steps": 50,
        },
    }  # fmt: skip

    parameters: str = "xattn"
    """What is trained: xattn (ESD-x), noxattn (ESD-u), selfattn, full, text_encoder, or another parameter group."""
    eta: float = 1.0
    """Strength of the negative guidance in eq. 7; unitless, > 0."""
    steps: int = 110
    """Optimiser steps; > 0."""
    lr: float = 1e-4
    """Adam's learning rate; > 0."""
    batch_size: int = 4
    """Noisy latents a step; > 0."""
    prompts: Prompts = "both"
    """What stands for the concept: its term alone (the paper), its prompts, or both in turn. A prompt names other things too; it
    is guided away from what it says without the concept, so that they stay."""
    trajectories: int = 27
    """DDIM trajectories drawn once for each concept, its prompts in turn; > 0."""
    ddim_steps: int = 20
    """Steps of a trajectory; > 0."""
    guidance: float = 3.0
    """Guidance of the trajectories (only of those; the regression is unguided)."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.trajectories, self.ddim_steps) < 1 or min(self.lr, self.eta) <= 0:
            raise ValueError("steps, batch_size, trajectories, ddim_steps, lr and eta must be above zero")

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
        sampling = Sampling(steps=self.ddim_steps, guidance_scale=self.guidance)
        banks = [
            away_bank(model, concept, self.prompts, n=self.trajectories, sampling=sampling, seed=seed, workspace=workspace)
            for concept in concepts
        ]
        student = model.fork(self.parameters)
        trains_text = any(name.startswith("text_encoder.") for name in student.trainable())
        texts = [concept_texts(concept, self.prompts) for concept in concepts]
        embedded = [embed_all(model, prompts) for prompts in texts]

        def loss_at(step: int) -> torch.Tensor:
            which = step % len(banks)
            batch = banks[which].draw(self.batch_size, generator("esd", seed, step), parted=True)
            asked = batch.prompt.tolist()
            c = student.embed([texts[which][i] for i in asked]) if trains_text else embedded[which][batch.prompt]
            return mse_loss(student.eps(batch.x_t, batch.t, c), away(batch, self.eta))

        losses = descend(
            student.trainable(),
            loss_at,
            steps=self.steps,
            lr=self.lr,
            workspace=workspace,
            description="erasing (esd)",
            facts={"seed": seed, "texts": texts, "settings": describe(self)},
        )
        return Protection(
            method=self.name,
            concepts=tuple(concept.name for concept in concepts),
            tensors=student.edited(),
            settings=describe(self),
            cost={"steps": self.steps, "eps_calls": model.calls.eps - calls, "loss": losses[-1]},
        )
