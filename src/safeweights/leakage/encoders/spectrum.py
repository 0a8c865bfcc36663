"""E0: norms and singular values only, what dataset size and training length leave behind (as in Salama et al., arXiv:2406.19395).

An encoder of identity must beat this one: a spectrum tells how much was learnt, not what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from safeweights.leakage.canonical import Factors, singular_values
from safeweights.leakage.encoders import ridge
from safeweights.leakage.encoders.gram import padded

KEPT = 4
"""Singular values of each layer; further ones are left out, absent ones count as none."""


def features(adapters: Sequence[Factors], layers: Sequence[str]) -> Tensor:
    """log norm and log singular values of every layer (n, layers * (1 + KEPT))."""
    columns = []
    for name in layers:
        s = torch.zeros(len(adapters), KEPT)
        # Rows of zeros, which lower ranks are filled up with, add singular values of zero only.
        if any(name in item for item in adapters):
            found = singular_values(*padded(adapters, name))[:, :KEPT].float()
            s[:, : found.shape[1]] = found
        columns += [s.square().sum(1, keepdim=True).sqrt(), s]
    return torch.cat(columns, 1).clamp(min=1e-8).log()


@dataclass(frozen=True)
class Spectrum:
    """Ridge on standardised log spectra.   Cost: one small SVD a layer, all adapters at once."""

    name: ClassVar[str] = "spectrum"
    layers: tuple[str, ...]
    centre: Tensor
    spread: Tensor
    weight: Tensor
    """(F, D)."""
    offset: Tensor
    error: float
    """Leave-one-out squared error over the targets' variance."""

    @classmethod
    def fit(cls, adapters: Sequence[Factors], targets: Tensor) -> Spectrum:
        """Targets (n, D), lambda by leave-one-out."""
        layers = tuple(adapters[0])
        found = features(adapters, layers)
        centre, spread = found.mean(0), found.std(0).clamp(min=1e-6)
        scaled = (found - centre) / spread
        fitted = ridge.fit(ridge.linear(scaled), targets)
        weight = scaled.double().mT @ (fitted.weight - fitted.weight.mean(0))
        # The features are centred, so the intercept is the targets' mean.
        return cls(layers, centre, spread, weight.float(), fitted.mean.float(), ridge.loo_error(fitted, targets))

    def predict(self, adapters: Sequence[Factors]) -> Tensor:
        """Targets (m, D)."""
        scaled = (features(adapters, self.layers) - self.centre) / self.spread
        return (scaled @ self.weight + self.offset).double()

    def tensors(self) -> dict[str, Tensor]:
        """Everything, ready for a safetensors file."""
        return {"centre": self.centre, "spread": self.spread, "weight": self.weight, "offset": self.offset}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], layers: Sequence[str]) -> Spectrum:
        """The inverse of `tensors`."""
        centre, spread, weight, offset = (tensors[key].float() for key in ("centre", "spread", "weight", "offset"))
        return cls(tuple(layers), centre, spread, weight, offset, float("nan"))
