"""Similarity gap ratios: what a protection takes from an adaptation (IMMA: Zheng & Yeh, ECCV 2024, arXiv:2311.18815; for several
concepts MIMA: AAAI 2025, arXiv:2412.15320). No torch.

SGR = [M(ref, without) - M(ref, with)] / M(ref, without) with M the mean similarity of two sets of pictures, all pairs; "without"
and "with" are drawn by models adapted from the unprotected and the protected weights. Over an adaptation it is the mean over
checkpoints.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def gap_ratio(without: float, with_: float) -> float:
    """SGR of one checkpoint from M(ref, without) and M(ref, with). Raises ValueError where M(ref, without) is not above zero."""
    if not (math.isfinite(without) and math.isfinite(with_)) or without <= 0:
        raise ValueError(f"the gap ratio needs a similarity above zero without protection, not {without}")
    return (without - with_) / without


def sgr(without: Sequence[float], with_: Sequence[float]) -> float:
    """SGR of an adaptation: the mean of `gap_ratio` over its checkpoints, the same for both models; higher protects better."""
    if len(without) != len(with_) or not without:
        raise ValueError(
            f"{len(without)} checkpoints without protection and {len(with_)} with it; both need the same, at least one"
        )
    return sum(map(gap_ratio, without, with_)) / len(without)


def rsgr(target: float, other: float) -> float:
    """Relative SGR, SGR(target concept) - SGR(other concept): above zero where the protection spares what it should spare."""
    return target - other


def msgr(per_concept: Mapping[str, float] | Sequence[float]) -> float:
    """Multi-concept SGR: the mean of SGR over concepts."""
    values = list(per_concept.values()) if isinstance(per_concept, Mapping) else list(per_concept)
    if not values:
        raise ValueError("MSGR needs the SGR of at least one concept")
    return sum(values) / len(values)


def mrsgr(targets: Mapping[str, float] | Sequence[float], others: Mapping[str, float] | Sequence[float]) -> float:
    """Multi-concept relative SGR, MSGR(targets) - MSGR(other concepts)."""
    return msgr(targets) - msgr(others)


@dataclass(frozen=True)
class Gap:
    """What every prompt gave at every checkpoint, (checkpoints, prompts), without and with protection: one concept."""

    without: NDArray[np.float64]
    with_: NDArray[np.float64]

    @classmethod
    def of(cls, without: Sequence[Sequence[float]], with_: Sequence[Sequence[float]]) -> Gap:
        """From similarities by checkpoint and prompt. Raises ValueError unless both are of the same checkpoints and prompts."""
        gap = cls(np.asarray(without, np.float64), np.asarray(with_, np.float64))
        if gap.without.shape != gap.with_.shape or gap.without.ndim != 2 or not gap.without.size:
            raise ValueError("a gap needs the same checkpoints and prompts without and with protection, at least one of each")
        return gap

    def sgr(self, prompts: Sequence[int] | None = None) -> float:
        """SGR over all prompts, or over these (some of them several times)."""
        parts = (self.without, self.with_) if prompts is None else (self.without[:, list(prompts)], self.with_[:, list(prompts)])
        without, with_ = (part.mean(1) for part in parts)
        return sgr(without.tolist(), with_.tolist())


def msgr_interval(
    targets: Sequence[Gap], others: Sequence[Gap] = (), *, seed: int = 0, resamples: int = 2000
) -> tuple[float, tuple[float, float]]:
    """MSGR of the targets, less that of the others where there are any (MRSGR), with its 95 % bootstrap interval over prompts.

    A resample takes each concept's prompts with replacement, the same ones without and with protection and at every checkpoint;
    one whose likeness without protection is not above zero has no ratio and is left out. Raises ValueError for no target, and
    where all prompts together have no ratio.
    """

    def value(rng: np.random.Generator | None) -> float:
        def one(gap: Gap) -> float:
            n = gap.without.shape[1]
            return gap.sgr() if rng is None else gap.sgr([int(row) for row in np.asarray(rng.integers(n, size=n))])

        wanted = msgr([one(gap) for gap in targets])
        return mrsgr([wanted], [one(gap) for gap in others]) if others else wanted

    return value(None), _interval(value, seed, resamples)


def msgr_difference(
    mine: Sequence[Gap], theirs: Sequence[Gap], *, seed: int = 0, resamples: int = 2000
) -> tuple[float, tuple[float, float]]:
    """MSGR of one protection less that of another, with its 95 % bootstrap interval over prompts, the same ones for both.

    Raises ValueError unless both hold the same concepts, prompts and checkpoints.
    """
    if [gap.without.shape for gap in mine] != [gap.without.shape for gap in theirs] or not mine:
        raise ValueError("two protections compare on the same concepts, prompts and checkpoints")

    def value(rng: np.random.Generator | None) -> float:
        apart = []
        for ours, others in zip(mine, theirs, strict=True):
            n = ours.without.shape[1]
            rows = None if rng is None else [int(row) for row in np.asarray(rng.integers(n, size=n))]
            apart.append(ours.sgr(rows) - others.sgr(rows))
        return sum(apart) / len(apart)

    return value(None), _interval(value, seed, resamples)


def _interval(value: Callable[[np.random.Generator], float], seed: int, resamples: int) -> tuple[float, float]:
    """The middle 95 % of what resamples give."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        with contextlib.suppress(ValueError):
            found.append(value(rng))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
