"""Made-up adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHAPES = {"unet.one.weight": (6, 5), "unet.two.weight": (4, 8)}


def adapters_like(n: int, *, ranks: Sequence[int] = (2,), seed: int = 0) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """n adapters beside two layers, of these ranks in turn."""
    rng = torch.Generator().manual_seed(seed)
    return [
        {
            name: (torch.randn(ranks[i % len(ranks)], k, generator=rng), torch.randn(out, ranks[i % len(ranks)], generator=rng))
            for name, (out, k) in SHAPES.items()
        }
        for i in range(n)
    ]
