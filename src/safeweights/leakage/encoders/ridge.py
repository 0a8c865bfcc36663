"""Kernel ridge regression with a free intercept, and its leave-one-out error in closed form: what E0, E1 and E4 share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAMBDAS: tuple[float, ...] = tuple(10.0**power for power in range(-4, 5))
"""Tried as multiples of the mean diagonal of the centred kernel."""


@dataclass(frozen=True)
class Ridge:
    """f(x) = mean + sum_i (k(x, x_i) centred) weight_i, the minimiser of sum || y_i - f(x_i) ||^2 + lam || f - mean ||_k^2."""

    weight: Tensor
    """(n, D)."""
    mean: Tensor
    """(D,), of the targets."""
    rows: Tensor
    """(n,), mean of the kernel over the training points, by training point."""
    lam: float
    loo: Tensor
    """(n, D): what each training point's target is predicted to be by a fit without it."""

    def predict(self, kernel: Tensor) -> Tensor:
        """Targets (m, D) for kernel values (m, n) between new points and the training points."""
        kernel = kernel.double()
        centred = kernel - kernel.mean(1, keepdim=True) - self.rows + self.rows.mean()
        return centred @ self.weight + self.mean


def fit(kernel: Tensor, targets: Tensor, lambdas: Sequence[float] = LAMBDAS) -> Ridge:
    """Fit at the ``lambdas`` factor whose leave-one-out squared error is least; kernel (n, n), targets (n, D).

    The error is exact: y_i - f_{-i}(x_i) = (y_i - f(x_i)) / (1 - H_ii), H = 1 1^T / n + K_c (K_c + lam)^-1.
    """
    kernel, targets = kernel.double(), targets.double()
    count = len(kernel)
    rows = kernel.mean(0)
    centred = kernel - rows - kernel.mean(1, keepdim=True) + kernel.mean()
    mean = targets.mean(0)
    values, vectors = torch.linalg.eigh(centred)
    values = values.clamp(min=0)
    turned = vectors.mT @ (targets - mean)
    scale = float(values.mean()) or 1.0
    best: tuple[float, Ridge] | None = None
    for factor in lambdas:
        lam = factor * scale
        shrunk = values / (values + lam)
        fitted = vectors @ (shrunk[:, None] * turned) + mean
        leverage = 1 / count + (vectors.square() * shrunk).sum(1)
        loo = targets - (targets - fitted) / (1 - leverage).clamp(min=1e-9)[:, None]
        error = float((targets - loo).square().sum())
        if best is None or error < best[0]:
            best = error, Ridge(vectors @ (turned / (values + lam)[:, None]), mean, rows, lam, loo)
    assert best is not None
    return best[1]


def linear(features: Tensor, others: Tensor | None = None) -> Tensor:
    """The plain inner products of rows, in float64."""
    return features.double() @ (features if others is None else others).double().mT


def loo_error(ridge: Ridge, targets: Tensor) -> float:
    """Leave-one-out squared error as a share of the targets' variance: 1 is no better than their mean."""
    targets = targets.double()
    return float((targets - ridge.loo).square().sum() / (targets - targets.mean(0)).square().sum().clamp(min=1e-12))


def loo_cosine(ridge: Ridge, targets: Tensor) -> float:
    """Mean cosine of leave-one-out answers with their targets, both minus the targets' mean."""
    centre = targets.double().mean(0)
    return float(torch.nn.functional.cosine_similarity(ridge.loo - centre, targets.double() - centre, dim=1).mean())
