"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., ICLR 2022, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from safeweights.attacks.relearning.finetune import DRAWING, FineTune
from safeweights.core.model import DiffusionModel
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import ATTENTION, Adapter, Shots
from safeweights.diffusion.shots import drawn_shots


@dataclass(frozen=True, kw_only=True)
class LoRA(FineTune):
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
    """Pictures of the class that the model draws for prior preservation, as in DreamBooth; 0 leaves it out; >= 0."""
    lam: float = 1.0
    """Weight of prior preservation; >= 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or (self.alpha is not None and self.alpha <= 0):
            raise ValueError("rank and alpha must be above zero")
        if self.class_pictures < 0 or self.lam < 0:
            raise ValueError("class_pictures and lam must not be negative")

    @property
    def prior_weight(self) -> float:
        return self.lam

    def prior(self, model: DiffusionModel, prompts: Sequence[str], *, seed: int, workspace: Workspace) -> Shots | None:
        if not prompts or self.class_pictures == 0 or self.lam == 0:
            return None
        return drawn_shots(model, prompts, n=self.class_pictures, sampling=DRAWING, seed=seed, workspace=workspace.child("class"))

    def adapter(self, *, init: str = "", frozen: frozenset[str] = frozenset()) -> Adapter:
        return Adapter(targets=self.layers, rank=self.rank, alpha=self.alpha, frozen=frozen)
