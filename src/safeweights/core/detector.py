"""What a detector takes and gives: pictures in, a verdict with its score out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Detection:
    """``present`` (N,) bool and ``score`` (N,) in [0, 1]."""

    present: Tensor
    score: Tensor


class Detector(Protocol):
    """Decides whether a picture shows one concept."""

    def detect(self, images: Tensor) -> Detection:
        """Judge pictures (N, 3, H, W) in [0, 1]."""
        ...

    def describe(self) -> dict[str, Any]:
        """Type, model, label, threshold, sha256 and, where shipped, measured ``false_positive`` and ``false_negative`` rates."""
        ...
