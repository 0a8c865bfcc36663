"""What pruned places give away: a matrix guesses its missing entries, and missing entries may show where they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def soft_threshold(matrix: Tensor, level: float) -> Tensor:
    """The matrix with ``level`` taken off every singular value, none below zero: the nearest one of small nuclear norm."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    shrunk: Tensor = (u * (s - level).clamp(min=0)) @ v
    return shrunk


def complete(matrix: Tensor, missing: Tensor, *, iterations: int, shrink: float) -> Tensor:
    """The matrix (rows, columns) with its missing entries filled by a low-rank guess (Mazumder et al., JMLR 2010).

    Z <- S_lambda(W where known, Z where missing),   lambda = shrink * the largest singular value of W
    """
    known = matrix.float().masked_fill(missing, 0)
    level = shrink * float(torch.linalg.matrix_norm(known, 2))
    guess = known
    for _ in range(iterations):
        guess = torch.where(missing, soft_threshold(guess, level), known)
    return guess


def suspects(matrix: Tensor, share: float) -> Tensor:
    """Where something may have been pruned and filled: the smallest ``share`` relative to their rows."""
    scores = _relative(matrix).flatten()
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.argsort(stable=True)[: max(1, round(share * len(scores)))]] = True
    return chosen.view(matrix.shape)


def _relative(matrix: Tensor) -> Tensor:
    """|W_ij| over the spread of its row."""
    size = matrix.float().abs()
    return size / size.square().mean(dim=1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Recovery:
    """How well one score tells pruned places from others: area under its ROC curve, 0.5 is chance, with a 95 % interval."""

    score: str
    auc: float
    low: float
    high: float
    n: int
    """Pruned places."""

    @property
    def chance(self) -> bool:
        """Whether the interval contains 0.5."""
        return self.low <= 0.5 <= self.high


def recover_positions(weights: Mapping[str, Tensor], indices: Mapping[str, Tensor], *, shrink: float = 0.1) -> list[Recovery]:
    """What somebody without the mask learns of its places from the released tensors alone, by three scores.

    ``small``: how near zero an entry is relative to its row (below 0.5: pruned places are larger than others); ``residual``:
    how far it lies from the low-rank part of its matrix; ``repeated``: whether its very value stands in its row more than once;
    ``rounded``: whether half precision holds it exactly.
    """
    scores: dict[str, list[Tensor]] = {"small": [], "residual": [], "repeated": [], "rounded": []}
    labels = []
    for name, where in indices.items():
        matrix = weights[name].detach().float().cpu().flatten(1)
        mask = torch.zeros(matrix.numel(), dtype=torch.bool)
        mask[where.cpu()] = True
        labels.append(mask)
        scores["small"].append(-_relative(matrix).flatten())
        scores["rounded"].append((matrix == matrix.half().float()).float().flatten())
        low = soft_threshold(matrix, shrink * float(torch.linalg.matrix_norm(matrix, 2)))
        spread = matrix.square().mean(dim=1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        scores["residual"].append(((matrix - low) / spread).abs().flatten())
        ordered, order = matrix.sort(dim=1, stable=True)
        same = torch.zeros_like(ordered, dtype=torch.bool)
        same[:, 1:] |= ordered[:, 1:] == ordered[:, :-1]
        same[:, :-1] |= ordered[:, 1:] == ordered[:, :-1]
        scores["repeated"].append(torch.zeros_like(ordered).scatter(1, order, same.float()).flatten())
    pruned = torch.cat(labels)
    return [Recovery(score, *auc(torch.cat(parts), pruned), n=int(pruned.sum())) for score, parts in scores.items()]


def auc(scores: Tensor, positive: Tensor) -> tuple[float, float, float]:
    """Area under the ROC curve of ``scores`` (N,) for ``positive`` (N,), ties half, with Hanley and McNeil's 95 % interval.

    Raises ValueError without a positive or without a negative.
    """
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        raise ValueError("an area under the curve needs places of both kinds")
    _, level, counts = scores.double().unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    # The mean rank of each distinct score, from 1.
    ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2
    area = (float(ranks[level[positive]].sum()) - n * (n + 1) / 2) / (n * m)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (n - 1) * (q1 - area**2) + (m - 1) * (q2 - area**2)) / (n * m)
    half = 1.959964 * math.sqrt(max(variance, 0.0))
    return area, max(0.0, area - half), min(1.0, area + half)
