"""Roots Beneath the Cut: pruned concepts revived from the weights alone (CVPR 2026, arXiv:2603.06640)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from safeweights.attacks.adversarial.baselines import as_asked
from safeweights.core.attack import Access, Budget, Candidate, Mode, Original, Revival, Target
from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.completion import complete, suspects
from safeweights.diffusion.latent_bank import fingerprint
from safeweights.diffusion.parameters import select

NATURAL = 1e-4
"""Share of weights that may be zero without anybody having pruned them, as rounding to half precision leaves some."""


@dataclass(frozen=True, kw_only=True)
class MaskRevival:
    """Fill what was pruned with what the rest of the matrix makes likely, without data, training or the original.

    Z <- S_lambda(W where known, Z where pruned),   repeated;   pruned: W = 0
    round 1: W = Z;   then  W_ij = strength * sign(Z_ij) max_k |W_ik|  for the top share of |Z|, 0 for the rest

    Needs: the right to change the weights, nothing else. Where no more weights are zero than happen to be (`NATURAL`), the places
    are not known and the share ``suspected``, the smallest of their rows, is taken instead.   Cost: ``iterations`` singular value
    decompositions of every matrix, once for all prompts, and ``images`` pictures a prompt.
    Differs from the reference code: strengths below the row's largest entry are tried too, and the plain completion.
    """

    name: ClassVar[str] = "mask-revival"
    access: ClassVar[Access] = Access.WEIGHTS
    mode: ClassVar[Mode] = "live"

    parameters: str = "neurons"
    """Where it looks for pruned weights: a parameter group."""
    images: int = 4
    """Pictures a prompt: the plain one, one of the plain completion, the rest at strengths rising evenly to 1; >= 1."""
    iterations: int = 30
    """Rounds of completion; > 0."""
    shrink: float = 0.05
    """What is taken off the singular values, in units of the largest; > 0."""
    top: float = 0.6
    """Share of the pruned entries, by size of the guess, whose sign is trusted; in (0, 1]."""
    suspected: float = 0.01
    """Share of a matrix that is taken for pruned where no weight is zero; in (0, 1]."""

    def __post_init__(self) -> None:
        if min(self.images, self.iterations) < 1 or self.shrink <= 0:
            raise ValueError("images, iterations and shrink must be above zero")
        if not 0 < self.top <= 1 or not 0 < self.suspected <= 1:
            raise ValueError("top and suspected must be above 0 and at most 1")

    @property
    def budget(self) -> Budget:
        return Budget(images=self.images)

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
        seen = yield as_asked(model, targets)
        standing = [target for target, fell in zip(targets, seen, strict=True) if not fell]
        if not standing or self.images < 2:
            return
        guesses = self.guess(model, workspace)
        for number in range(1, self.images):
            strength = (number - 1) / max(1, self.images - 2)
            revived = model.with_tensors(self.fill(model, guesses, strength))
            facts = {"strength": strength, "filled": float(sum(int(mask.sum()) for mask, _ in guesses.values()))}
            seen = yield Revival(revived, tuple(Candidate(target.prompt, target.seed) for target in standing), facts)
            standing = [target for target, fell in zip(standing, seen, strict=True) if not fell]
            if not standing:
                return

    @torch.no_grad()
    def guess(self, model: DiffusionModel, workspace: Workspace | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """By tensor: where it seems pruned and the completed matrix, both (rows, columns). Kept in the workspace."""
        workspace = workspace or Workspace()
        told: dict[str, Any] = {"settings": describe(self), "model": fingerprint(model)}
        if (stored := workspace.load("completion")) is not None and stored[1] == told:
            names = sorted(name.removeprefix("guess/") for name in stored[0] if name.startswith("guess/"))
            return {name: (stored[0][f"where/{name}"], stored[0][f"guess/{name}"]) for name in names}
        weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
        names = sorted(name for name in select(model.named_parameters(), self.parameters) if name in weights)
        matrices = {name: weights[name].detach().float().cpu().flatten(1) for name in names}
        zeros = sum(int((matrix == 0).sum()) for matrix in matrices.values())
        visible = zeros > NATURAL * sum(matrix.numel() for matrix in matrices.values())
        found = {}
        for i in workspace.track(range(len(names)), "completing"):
            matrix = matrices[names[i]]
            # Zeros say how this model was pruned: a matrix without any was left alone.
            missing = (matrix == 0) if visible else suspects(matrix, self.suspected)
            if missing.any():
                found[names[i]] = missing, complete(matrix, missing, iterations=self.iterations, shrink=self.shrink)
        tensors = {f"where/{name}": mask for name, (mask, _) in found.items()}
        workspace.save("completion", {**tensors, **{f"guess/{name}": value for name, (_, value) in found.items()}}, told)
        return found

    @torch.no_grad()
    def fill(self, model: DiffusionModel, guesses: dict[str, tuple[Tensor, Tensor]], strength: float) -> dict[str, Tensor]:
        """The tensors of ``model`` with their suspected places filled; strength 0 is the completion as it is."""
        weights = dict(model.named_parameters())
        filled = {}
        for name, (missing, guess) in guesses.items():
            weight = weights[name].detach()
            value = guess
            if strength > 0:
                size = guess.abs()[missing]
                bound = size.sort(descending=True).values[max(1, round(self.top * len(size))) - 1]
                largest = guess.masked_fill(missing, 0).abs().amax(dim=1, keepdim=True)
                value = torch.where(guess.abs() >= bound, guess.sign() * largest * strength, torch.zeros_like(guess))
            matrix = torch.where(missing, value, weight.float().cpu().flatten(1))
            filled[name] = matrix.view(weight.shape).to(weight)
        return filled
