"""One-shot scores of weights: how much a concept's pictures need them. Higher scores are pruned first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safeweights.core.errors import UserError
from safeweights.core.model import Conditioning, DiffusionModel

Asked = tuple[Tensor, Tensor, Conditioning]
"""Noisy latents (B, C, h, w), their timesteps (B,) and what they are asked under (B rows)."""


def snip(weights: Mapping[str, nn.Parameter], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """|W * sum of gradients|: how much the loss feels each connection (Lee et al., ICLR 2019, arXiv:1810.02340).

    It is the size of the gradient that a mask over W has where it is one everywhere, the first step of a learned mask.
    """
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
    return {name: (p.detach() * total[name]).abs() for name, p in weights.items()}


@torch.no_grad()
def input_norms(model: DiffusionModel, names: Sequence[str], batches: Iterable[Asked], bins: int = 1) -> dict[str, Tensor]:
    """Norms of what goes into the linear layers of the named weights, column by column: (bins, columns) each.

    Every token's input is scaled to length one first; squares are summed over tokens and latents. Bin 0 holds the noisiest
    timesteps. Raises UserError for a weight that is no linear layer's.
    """
    modules = dict(model.denoiser.named_modules())
    width = len(model.alpha) / bins
    totals: dict[str, Tensor] = {}
    where = torch.zeros(0, dtype=torch.long)
    hooks = []

    def watch(name: str, module: nn.Linear) -> Any:
        totals[name] = torch.zeros(bins, module.in_features, device=model.device)

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = nn.functional.normalize(inputs[0].detach().float(), dim=-1)
            totals[name].index_add_(0, where, x.square().flatten(1, -2).sum(1))

        return module.register_forward_pre_hook(hook)

    try:
        for name in names:
            module = modules.get(name.removeprefix("unet.").removesuffix(".weight"))
            if not isinstance(module, nn.Linear):
                raise UserError(f"{name} is no linear layer's; wanda and conceptprune need parameters=neurons or ffn")
            hooks.append(watch(name, module))
        for x_t, t, c in batches:
            where = (bins - 1 - (t / width).long().clamp(max=bins - 1)).to(model.device)
            model.eps(x_t, t, c)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: total.sqrt() for name, total in totals.items()}


def wanda(weights: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|W_ij| * norm of input j, ranked within each output row (Sun et al., ICLR 2024, arXiv:2306.11695); in (0, 2).

    The whole part of the order is the rank in the row, so every row gives the same share; the score itself breaks ties.
    """
    ranked = {}
    for name, weight in weights.items():
        score = weight.detach().abs() * norms[name].norm(dim=0)
        ranked[name] = _rank_in_row(score) + _below_one(score) / score.shape[1]
    return ranked


def concept_prune(
    weights: Mapping[str, Tensor], target: Mapping[str, Tensor], base: Mapping[str, Tensor], *, top: float, first: int
) -> dict[str, Tensor]:
    """In how many of the ``first`` bins a weight is skilled (Chavhan et al., ICLR 2025, arXiv:2405.19237).

    Skilled: among the top share of its row by |W| * norm of the concept's inputs, and above the same score for inputs without
    the concept. Equals are told apart by how far above.
    """
    votes = {}
    for name, weight in weights.items():
        size = weight.detach().abs()
        width = max(1, round(top * size.shape[1]))
        count, above = torch.zeros_like(size), torch.zeros_like(size)
        for step in range(first):
            s, s_base = size * target[name][step], size * base[name][step]
            in_top = _rank_in_row(s) * s.shape[1] >= s.shape[1] - width
            count += (in_top & (s > s_base)).float()
            above += s - s_base
        votes[name] = count + _below_one(above.clamp(min=0))
    return votes


def _rank_in_row(score: Tensor) -> Tensor:
    """0 for the lowest of a row up to just below 1 for its highest."""
    return score.argsort(dim=1, stable=True).argsort(dim=1).float() / score.shape[1]


def _below_one(score: Tensor) -> Tensor:
    return score / (score.max() + score.max().clamp(min=torch.finfo(score.dtype).tiny) * 1e-3 + torch.finfo(score.dtype).tiny)
