"""Scissorhands: Scrub Data Influence via Connection Sensitivity in Networks (Wu & Harandi, ECCV 2024, arXiv:2401.06187)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from safeweights.core.concept import Concept
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.drawn_set import DrawnSets, Target
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parameters import select
from safeweights.diffusion.training import descend


@dataclass(frozen=True, kw_only=True)
class Scissorhands:
    """Cut the connections the concept's pictures are most sensitive to, then train the model to retain and not to relearn.

    s = |theta * sum_batches |grad_theta L(x_f)||,   theta_i drawn afresh for the top share of s                    (eq. 3)
    theta <- theta - Adam(grad (L_r + lam L_f)),   L_f = E || eps_theta(x_f, c_f) - eps_o(x_f, c_pseudo) ||^2
    projected:  g <- g - <g, g_f> / |g_f|^2 g_f  where  <g, g_f> < 0,   g_f = grad L_f                                (eq. 7)

    Needs: prompts to retain.   Cost: two student passes forward and backward a step, and snip_batches for the scores, one more
    backward a step where gradients are projected; pictures, noise and the base model's predictions are made once.
    Differs from the reference code: the pseudo target is the base model's and c_pseudo each prompt without its concept (there:
    the network being trained, one fixed prompt; for objects the plain forget loss subtracted); the score's loss is the unguided
    diffusion loss; fresh norm scales are one; target=base retains predictions instead of the loss.
    """

    name: ClassVar[str] = "scissorhands"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "parameters": "full", "cut": "selfattn", "share": 0.005, "lr": 1e-5, "steps": 250, "batch_size": 16, "lam": 0.1,
            "target": "noise", "pictures": 800, "retained": 800, "noises": 1, "snip_batches": 10, "ddim_steps": 50,
            "guidance": 7.5,
        },
    }  # fmt: skip

    parameters: str = "xattn"
    """What is scored and trained: full (the paper's), xattn, noxattn, or another parameter group."""
    cut: str = "xattn_kv"
    """Where entries may be drawn afresh: selfattn, xattn, xattn_kv, or another group; what is not in ``parameters`` is left."""
    share: float = 0.005
    """Share of the most sensitive entries over all of ``parameters`` together, 1 - the paper's sparsity; in (0, 1]."""
    lam: float = 1.0
    """Weight of the forget loss, lambda; >= 0."""
    project: bool = False
    """Take out of every step what would raise the forget loss to first order."""
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
    snip_batches: int = 10
    """Batches whose absolute gradients are summed for the scores; > 0."""
    ddim_steps: int = 20
    """DDIM steps of a picture; > 0."""
    guidance: float = 4.0
    """Guidance of the pictures (only of those; the regression is unguided)."""

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size, self.pictures, self.retained, self.noises, self.snip_batches, self.ddim_steps)
        if min(counts) < 1 or self.lr <= 0:
            raise ValueError("steps, batch_size, pictures, retained, noises, snip_batches, ddim_steps and lr must be above zero")
        if not 0 < self.share <= 1 or self.lam < 0:
            raise ValueError("share must be above 0 and at most 1, lam not below zero")

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
        denoise = sets.denoising(student, self.batch_size, "scissorhands snip", seed)
        scores = sensitivity(trained, (denoise(step) for step in workspace.track(range(self.snip_batches), "weighing")))
        cut_count = cut_entries(trained, scores, self.share, select(model.named_parameters(), self.cut), seed)
        forget = sets.forgetting(student, self.batch_size, "scissorhands", seed)
        keep = sets.retaining(student, self.batch_size, self.target, "scissorhands", seed)

        def project(step: int) -> None:
            g_f = torch.autograd.grad(forget(step), list(trained.values()), allow_unused=True, materialize_grads=True)
            away_from_conflict([p.grad for p in trained.values()], g_f)

        losses = descend(
            trained,
            lambda step: keep(step) + self.lam * forget(step) if self.lam else keep(step),
            steps=self.steps,
            lr=self.lr,
            workspace=workspace,
            description="erasing (scissorhands)",
            facts={"seed": seed, "texts": [sets.forget.prompts, sets.retain.prompts], "settings": describe(self)},
            gradients=project if self.project else None,
        )
        return Protection(
            method=self.name,
            concepts=tuple(concept.name for concept in concepts),
            tensors=student.edited(),
            settings=describe(self),
            cost={"steps": self.steps, "cut": cut_count, "eps_calls": model.calls.eps - calls, "loss": losses[-1]},
        )


def sensitivity(parameters: Mapping[str, nn.Parameter], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """SNIP's connection sensitivity of every entry, |theta * sum of |gradients|| (Lee et al., ICLR 2019, arXiv:1810.02340)."""
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.abs()
    return {name: (parameters[name].detach() * value).abs() for name, value in total.items()}


@torch.no_grad()
def cut_entries(
    parameters: Mapping[str, nn.Parameter], scores: Mapping[str, Tensor], share: float, where: Sequence[str], seed: int
) -> int:
    """Draw the entries of the top ``share`` of all scores afresh, in the tensors named by ``where`` only; how many they were.

    Matrices and kernels as a fresh layer (Kaiming uniform, bound sqrt(1 / fan_in)), biases zero, scales of norms one.
    """
    everything = torch.cat([score.flatten() for score in scores.values()])
    count = max(1, round(share * len(everything)))
    threshold = everything.kthvalue(len(everything) - count + 1).values
    cut = 0
    for name, parameter in parameters.items():
        hit = (scores[name] >= threshold) & (scores[name] > 0)
        if name not in where or not hit.any():
            continue
        if parameter.dim() > 1:
            bound = parameter[0].numel() ** -0.5
            fresh = torch.rand(parameter.shape, generator=generator("scissorhands cut", seed, name)) * 2 * bound - bound
        else:
            fresh = torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)
        parameter.copy_(torch.where(hit, fresh.to(parameter), parameter))
        cut += int(hit.sum())
    return cut


@torch.no_grad()
def away_from_conflict(g: Sequence[Tensor | None], g_f: Sequence[Tensor]) -> None:
    """Where <g, g_f> < 0, take the part along g_f out of g in place: what is left is orthogonal to g_f and nearest to g."""
    pairs = [(one, other) for one, other in zip(g, g_f, strict=True) if one is not None]
    inner = torch.stack([(one * other).sum() for one, other in pairs]).sum()
    if float(inner) < 0:
        square = torch.stack([other.square().sum() for _, other in pairs]).sum()
        for one, other in pairs:
            one.sub_(inner / square * other)
