"""95 % intervals. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054
"""Two-sided 95 % point of the standard normal."""


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, JASA 1927). Raises ValueError for impossible counts."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no proportion")
    p = successes / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5
    # The bounds at 0 and n are 0 and 1 exactly; rounding must not say otherwise.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def difference(successes: int, n: int, other: int, m: int) -> tuple[float, float]:
    """Newcombe's interval of successes/n - other/m, independent samples (Newcombe, Stat. Med. 1998, method 10)."""
    p, q = successes / n if n else 0.0, other / m if m else 0.0
    (low_p, high_p), (low_q, high_q) = wilson(successes, n), wilson(other, m)
    delta = p - q
    return (
        delta - ((p - low_p) ** 2 + (high_q - q) ** 2) ** 0.5,
        delta + ((high_p - p) ** 2 + (q - low_q) ** 2) ** 0.5,
    )


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron, 1979), the same for the same seed.

    Raises ValueError for no values or for values that are not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample) or not np.isfinite(sample).all():
        raise ValueError("a bootstrap needs at least one value, and finite ones")
    rng = np.random.default_rng(seed)
    means = np.array([rng.choice(sample, size=len(sample)).mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
