"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., ICLR 2022, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safeweights.attacks.relearning.finetune import ClassPrior
from safeweights.diffusion.adaptation import ATTENTION, Adapter


@dataclass(frozen=True, kw_only=True)
class LoRA(ClassPrior):
    """Train low-rank factors beside the denoiser's attention weights, which stay as they are.

    W x  <-  W x + (alpha / r) B A x,   B = 0 and A ~ N(0, 1 / r^2) at first                                        (eq. 3)

    Needs: pictures with captions.   Cost: one pass forward and backward a step; memory of one model and the factors.
    Differs from the reference code: A starts as diffusers' training scripts start it (there Kaiming uniform).
    """

    name: ClassVar[str] = "lora"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {"steps": 1000, "lr": 1e-4, "batch_size": 1},
    }

    selective: ClassVar[bool] = False
    instead: ClassVar[str] = "name layers that are free with --set layers=PATTERN, or fine-tune with full or dreambooth"

    steps: int = 100
    """Optimiser steps; > 0."""
    lr: float = 3e-3
    """Constant learning rate; > 0."""
    rank: int = 4
    """Rank of the factors, r; > 0."""
    alpha: float | None = None
    """Scale of the factors, alpha; none is the rank."""
    layers: str = ATTENTION
    """The weights that get factors: a pattern their names match as a whole."""
    class_pictures: int = 0
    """As in DreamBooth; 0, the default, leaves prior preservation out; >= 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or (self.alpha is not None and self.alpha <= 0):
            raise ValueError("rank and alpha must be above zero")

    def adapter(self, *, init: str = "", frozen: frozenset[str] = frozenset()) -> Adapter:
        return Adapter(targets=self.layers, rank=self.rank, alpha=self.alpha, frozen=frozen)
