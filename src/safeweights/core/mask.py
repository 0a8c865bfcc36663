"""What pruning a model leaves its owner with: where entries were taken out, and what stood there. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Fill = Literal["zero", "noise"]
"""What stands where an entry was pruned: zero, or a value drawn from the rest of its row, so that the place does not show."""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Pruned entries by tensor. Whoever holds ``indices`` and ``values`` can put the original back, bit for bit."""

    indices: Mapping[str, Tensor]
    """Places in the flattened tensor, rising, int64; tensors without a pruned entry are left out."""
    values: Mapping[str, Tensor]
    """What stood there before, in the tensor's own dtype."""
    fill: Fill = "zero"
    seed: int = 0
    """Fixes what noise is filled in. Whoever knows it can tell the places, so it stands in the owner's files only."""

    @property
    def count(self) -> int:
        """Pruned entries of all tensors together."""
        return sum(len(where) for where in self.indices.values())
