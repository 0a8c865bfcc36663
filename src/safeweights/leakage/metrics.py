"""How well predictions name their subject, with the adapter as the statistical unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from safeweights.core.intervals import bootstrap_mean, wilson
from safeweights.records.record import Measurement

PERMUTATIONS = 10_000


def cosines(predicted: Tensor, gallery: Tensor, centre: Tensor | None = None) -> Tensor:
    """Cosine (n, m) of every prediction with every gallery entry, both minus ``centre``; never rescaled to (1 + cos) / 2."""
    if centre is not None:
        predicted, gallery = predicted - centre, gallery - centre
    return F.normalize(predicted.double(), dim=1) @ F.normalize(gallery.double(), dim=1).mT


def percentile_ranks(scores: Tensor, own: Sequence[int]) -> Tensor:
    """Share of the other gallery entries (n,) that score lower than the own one; ties count half. 0.5 is chance, 1 the best."""
    return _every_rank(scores)[torch.arange(len(scores)), torch.as_tensor(own)]


def _every_rank(scores: Tensor) -> Tensor:
    """The percentile rank of every gallery entry for every adapter (n, m)."""
    scores = scores.contiguous()
    ordered = scores.sort(1).values
    below, up_to = (torch.searchsorted(ordered, scores, right=right).double() for right in (False, True))
    return (below + 0.5 * (up_to - below - 1)) / (scores.shape[1] - 1)


@dataclass(frozen=True)
class Retrieval:
    """Gallery retrieval of n adapters among m identities."""

    n: int
    gallery: int
    top1: int
    top5: int
    mrr: float
    rank: float
    """Mean percentile rank."""
    interval: tuple[float, float]
    """95 % bootstrap over adapters, of the mean percentile rank."""
    lift: float
    """Mean cosine with the own identity minus the mean cosine with the others."""
    p: float
    """Share of label permutations whose mean percentile rank is as high."""
    ranks: tuple[float, ...]

    def measurements(self, prefix: str) -> list[Measurement]:
        """Ready for a record."""
        return [
            Measurement(name=f"{prefix}_percentile_rank", value=self.rank, n=self.n, interval=self.interval, better="lower"),
            Measurement(
                name=f"{prefix}_top1", value=self.top1 / self.n, n=self.n, interval=wilson(self.top1, self.n), better="lower"
            ),
            Measurement(
                name=f"{prefix}_top5", value=self.top5 / self.n, n=self.n, interval=wilson(self.top5, self.n), better="lower"
            ),
            Measurement(name=f"{prefix}_mrr", value=self.mrr, n=self.n, better="lower"),
        ]


def retrieval(scores: Tensor, own: Sequence[int], *, permutations: int = PERMUTATIONS, seed: int = 0) -> Retrieval:
    """Retrieval from scores (n, m); ``own[i]`` is the gallery place of adapter i's identity."""
    ranks = percentile_ranks(scores, own)
    place = torch.as_tensor(own)
    mine = scores[torch.arange(len(scores)), place][:, None]
    # The worst place among equals: an encoder that says the same of everybody finds nobody.
    position = (scores >= mine).sum(1)
    others = (scores.sum(1) - mine[:, 0]) / (scores.shape[1] - 1)
    return Retrieval(
        n=len(scores), gallery=scores.shape[1], top1=int((position == 1).sum()), top5=int((position <= 5).sum()),
        mrr=float((1 / position.double()).mean()), rank=float(ranks.mean()),
        interval=bootstrap_mean(ranks.tolist(), seed=seed), lift=float((mine[:, 0] - others).mean()),
        p=permutation_p(scores, own, permutations=permutations, seed=seed), ranks=tuple(ranks.tolist()),
    )  # fmt: skip


def permutation_p(scores: Tensor, own: Sequence[int], *, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """(1 + times a permutation of the labels ranks as high on average) / (1 + permutations)."""
    places = torch.as_tensor(own).numpy()
    # Every rank once; a permutation then only looks them up.
    table = _every_rank(scores).numpy()
    rows, rng = np.arange(len(scores)), np.random.default_rng(seed)
    observed, high = table[rows, places].mean(), 0
    for start in range(0, permutations, 1000):
        orders = rng.permuted(np.tile(places, (min(1000, permutations - start), 1)), axis=1)
        high += int((table[rows, orders].mean(1) >= observed - 1e-12).sum())
    return (1 + high) / (1 + permutations)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values (Holm, 1979): the family-wise error stays at the level they are read at."""
    adjusted, highest = {}, 0.0
    for place, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p) - place) * value))
        adjusted[name] = highest
    return adjusted


def copy_scores(drawn: Tensor, trained: Tensor, held: Tensor) -> Tensor:
    """Nearest training picture minus nearest held-out picture of the same subject (n,), as cosines of features.

    ``drawn`` (n, k, D) features of k reconstructions each, ``trained`` and ``held`` (n, j, D); above 0 says that pictures were
    copied rather than the subject learnt.
    """
    unit = [F.normalize(part.double(), dim=-1) for part in (drawn, trained, held)]
    near = [(unit[0] @ part.mT).flatten(1).amax(1) for part in unit[1:]]
    return near[0] - near[1]


def auc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive scores above a negative, ties half (Mann-Whitney)."""
    p, q = positive.double()[:, None], negative.double()[None]
    return float(((p > q).double() + 0.5 * (p == q).double()).mean())


def tpr_at(positive: Tensor, negative: Tensor, fpr: float = 0.01) -> tuple[int, float]:
    """(positives above the threshold, false-positive rate there): the lowest threshold that at most ``fpr`` of negatives pass."""
    allowed = int(fpr * len(negative))
    threshold = negative.double().sort(descending=True).values[allowed]
    return int((positive.double() > threshold).sum()), float((negative.double() > threshold).double().mean())
