"""Text-free attack: the initial noise from which the erased model draws a given picture of the concept, without any prompt
(the inversion of Song et al., ICLR 2021, arXiv:2010.02502, used as in Rusanovsky et al., CVPR 2025, arXiv:2412.00782)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from safeweights.attacks.adversarial.rounds import Search, adam, pictures_of, play
from safeweights.core.attack import Access, Budget, Candidate, Mode, Original, Revival, Target
from safeweights.core.concept import Concept
from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.sampling import ddim_run, invert


@dataclass(frozen=True, kw_only=True)
class LatentInversion:
    """Invert a picture of the concept under the empty prompt, then move the latent until the erased model draws the picture.

    x_T <- DDIM^-1(z, ""),   then   min_{x_T} || DDIM_theta(x_T, "") - z ||^2   by Adam, through the whole chain of steps

    The prompt says nothing, so nothing that a method does to text can help; what is left of the concept in the denoiser is what
    draws it. The picture comes out of the attacker's hands: success shows that the model can still make such a picture, not that
    a word would find it, and is to be read beside the same attack on a model that never knew the concept. ``latent_deviation``
    in each round's facts is 1 for a latent that could be noise.

    Needs: gradients of the erased model and the right to choose its initial latent; one picture of the concept a prompt.
    Cost: with S sampling steps, S * iterations passes once and rounds * steps * S passes forward (twice) and backward, ``images``
    pictures a prompt, all prompts in one batch; activations of one sampling step at a time are kept.
    Differs from the reference code: none is known to us.
    """

    name: ClassVar[str] = "latent-inversion"
    access: ClassVar[Access] = Access.GRADIENT
    mode: ClassVar[Mode] = "live"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"small": {}, "paper": {"batch_size": 2}}

    iterations: int = 5
    """Fixed-point iterations for each step of the inversion, 1 for plain DDIM inversion; > 0."""
    images: int = 11
    """Pictures a prompt, the plain one included; >= 2. Give every attack the same."""
    steps: int = 2
    """Gradient steps before each picture; the first picture is the inversion's own; > 0."""
    lr: float = 0.02
    """Adam's step in the latent, whose noise has deviation 1; > 0."""
    batch_size: int = 16
    """Prompts searched together; memory grows with it, results do not depend on it."""

    def __post_init__(self) -> None:
        if min(self.iterations, self.steps, self.batch_size) < 1 or self.images < 2 or self.lr <= 0:
            raise ValueError("iterations, steps, batch_size and lr must be above zero, images at least 2")

    @property
    def budget(self) -> Budget:
        rounds = self.images - 1
        return Budget(images=self.images, gradient_steps=(rounds - 1) * self.steps)

    def revive(
        self,
        model: DiffusionModel,
        concept: Concept,
        targets: Sequence[Target],
        *,
        sampling: Sampling,
        original: Original | None = None,
        workspace: Workspace | None = None,
    ) -> Generator[Revival, Sequence[bool], None]:
        if sampling.scheduler != "ddim":
            raise UserError(f"{self.name} inverts the ddim sampler, not {sampling.scheduler}; sample with --scheduler ddim")
        return play(
            self,
            model,
            targets,
            lambda standing: _Search(self, model, sampling, standing),
            steps=self.steps,
            sampling=sampling,
            workspace=workspace,
        )


class _Search(Search):
    """The initial latents ``latents`` (P, C, h, w) of all standing prompts, and their Adam moments."""

    moving = ("latents", "first", "second")
    fixed = ("x_0",)

    def __init__(self, attack: LatentInversion, model: DiffusionModel, sampling: Sampling, targets: Sequence[Target]) -> None:
        super().__init__(attack.name, model, targets, attack.batch_size)
        self.attack, self.sampling = attack, sampling
        self.x_0 = pictures_of(attack.name, model, targets)
        self.none = model.embed([""]).detach()
        self.latents = torch.zeros_like(self.x_0)
        self.first, self.second = torch.zeros_like(self.x_0), torch.zeros_like(self.x_0)

    def step(self, number: int) -> None:
        """Round 1 inverts, once; the others descend."""
        if number > 1:
            super().step(number)
        elif not self.latents.any():
            for start in range(0, len(self.targets), self.batch_size):
                rows = slice(start, start + self.batch_size)
                x_0, iterations = self.x_0[rows], self.attack.iterations
                self.latents[rows] = invert(self.model, self.none, x_0, self.sampling, iterations=iterations)

    def gradient_of(self, rows: slice) -> tuple[Tensor, Tensor]:
        x = self.latents[rows].clone().requires_grad_()
        drawn = ddim_run(self.model, self.none, x, self.sampling, checkpoints=True)
        loss = (drawn - self.x_0[rows]).square().flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        return loss.detach(), gradient

    def move(self, rows: slice, gradient: Tensor) -> None:
        first, second = self.first[rows], self.second[rows]
        self.latents[rows] = adam(self.latents[rows], gradient, first, second, self.steps, self.attack.lr)

    def candidates(self) -> list[Candidate]:
        latents = self.latents.cpu()
        return [Candidate("", target.seed, latents=row) for target, row in zip(self.targets, latents, strict=True)]

    def facts(self) -> dict[str, float]:
        told = super().facts() if self.steps else {}
        return {**told, "latent_deviation": float(self.latents.std())}
