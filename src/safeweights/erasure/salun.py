"""SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency (Fan et al., ICLR 2024, arXiv:2310.12508)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from safeweights.core.concept import Concept
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.drawn_set import DrawnSets, Target, asking
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import guided
from safeweights.diffusion.training import descend


@dataclass(frozen=True, kw_only=True)
class SalUn:
    """Relabel pictures of the concept as something else, changing only the weights the concept is most sensitive to.

    m = 1[ |sum_batches grad_theta MSE(eps_theta(x_f, c_f), eps)| among the top share ]                            (eq. 4)
    min over m * theta   E || eps_theta(x_f, c_f) - eps_o(x_f, c_pseudo) ||^2  +  alpha L_r(theta)                 (eq. 7)

    Needs: prompts to retain.   Cost: two student passes forward and backward a step, and mask_batches guided ones for the mask;
    pictures, noise and the base model's predictions are made once.
    Differs from the reference code: the pseudo target is the base model's (there: the network being trained, without gradient);
    forget and pseudo prediction see the same noisy latent (there: two draws of the VAE's posterior); c_pseudo is each prompt
    without its concept (there: the next class, or one fixed prompt); target=base retains predictions instead of the loss.
    """

    name: ClassVar[str] = "salun"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "parameters": "full", "lr": 1e-5, "steps": 100, "batch_size": 8, "alpha": 0.1, "target": "noise", "pictures": 800,
            "retained": 800, "noises": 1, "mask_batches": 100, "ddim_steps": 50, "guidance": 7.5, "mask_guidance": 8.5,
        },
    }  # fmt: skip

    parameters: str = "xattn"
    """What is trained and ranked: full (the paper's), xattn, noxattn, or another parameter group."""
    share: float = 0.5
    """Share of the weights in the mask, the most salient ones over all tensors together; in (0, 1]."""
    alpha: float = 1.0
    """Weight of the retained pictures' loss, alpha in eq. 7; >= 0."""
    target: Target = "base"
    """What retained pictures keep: the plain diffusion loss (noise, the paper's), or the base model's predictions (base)."""
    steps: int = 100
    """Optimiser steps; > 0."""
    lr: float = 3e-4
    """Adam's learning rate; > 0."""
    batch_size: int = 4
    """Noisy latents of each of the two sets a step; > 0."""
    pictures: int = 27
    """Pictures drawn once for each concept, its term and prompts in turn; > 0."""
    retained: int = 40
    """Retained pictures drawn once, the prompts in turn; > 0."""
    noises: int = 20
    """Noisy latents made of each picture; > 0."""
    mask_batches: int = 25
    """Batches whose gradients are summed for the mask; > 0."""
    mask_guidance: float = 4.0
    """Guidance of the prediction the mask is taken from (the paper's code: that of sampling)."""
    ddim_steps: int = 20
    """DDIM steps of a picture; > 0."""
    guidance: float = 4.0
    """Guidance of the pictures (only of those; the regression is unguided)."""

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size, self.pictures, self.retained, self.noises, self.mask_batches, self.ddim_steps)
        if min(counts) < 1 or self.lr <= 0:
            raise ValueError("steps, batch_size, pictures, retained, noises, mask_batches, ddim_steps and lr must be above zero")
        if not 0 < self.share <= 1 or self.alpha < 0:
            raise ValueError("share must be above 0 and at most 1, alpha not below zero")

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
        sets = DrawnSets.draw(
            model, concepts, retain,
            pictures=self.pictures, retained=self.retained, noises=self.noises,
            sampling=Sampling(steps=self.ddim_steps, guidance_scale=self.guidance), seed=seed, workspace=workspace,
        )  # fmt: skip
        student = model.fork(self.parameters)
        trained = student.trainable()
        mask = saliency_mask(trained, self._saliency_losses(student, sets, seed, workspace), self.share)
        forget = sets.forgetting(student, self.batch_size, "salun", seed)
        keep = sets.retaining(student, self.batch_size, self.target, "salun", seed)

        def masked(step: int) -> None:
            for name, parameter in trained.items():
                if parameter.grad is not None:
                    parameter.grad.mul_(mask[name])

        # Adam without decay leaves a weight whose gradient is always zero bit for bit as it was.
        losses = descend(
            trained,
            lambda step: forget(step) + self.alpha * keep(step) if self.alpha else forget(step),
            steps=self.steps,
            lr=self.lr,
            workspace=workspace,
            description="erasing (salun)",
            facts={"seed": seed, "texts": [sets.forget.prompts, sets.retain.prompts], "settings": describe(self)},
            gradients=masked,
        )
        return Protection(
            method=self.name,
            concepts=tuple(concept.name for concept in concepts),
            tensors=student.edited(),
            settings=describe(self),
            cost={"steps": self.steps, "eps_calls": model.calls.eps - calls, "loss": losses[-1]},
        )

    def _saliency_losses(self, student: DiffusionModel, sets: DrawnSets, seed: int, workspace: Workspace) -> Iterable[Tensor]:
        """MSE of the guided prediction against the noise on pictures of the concept, batch by batch."""
        ask = asking(student, sets.forget.prompts)
        for step in workspace.track(range(self.mask_batches), "weighing"):
            batch = sets.forget.draw(self.batch_size, generator("salun mask", seed, step))
            eps = guided(student, batch.x_t, batch.t, ask(batch), student.embed([""]), self.mask_guidance)
            yield mse_loss(eps, batch.outputs["eps"])


def saliency_mask(parameters: Mapping[str, nn.Parameter], losses: Iterable[Tensor], share: float) -> dict[str, Tensor]:
    """True for the top ``share`` of all entries together by |sum of the losses' gradients|; never for a zero gradient.

    Gradients are summed with their signs and only then made absolute, so that what the batches disagree about cancels.
    """
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
    saliency = {name: value.abs() for name, value in total.items()}
    everything = torch.cat([value.flatten() for value in saliency.values()])
    count = max(1, round(share * len(everything)))
    threshold = everything.kthvalue(len(everything) - count + 1).values
    return {name: (value >= threshold) & (value > 0) for name, value in saliency.items()}
