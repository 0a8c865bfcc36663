"""High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., CVPR 2022, arXiv:2112.10752), trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safeweights.attacks.relearning.finetune import FineTune
from safeweights.diffusion.adaptation import Adapter


@dataclass(frozen=True, kw_only=True)
class Full(FineTune):
    """Train the whole denoiser on.

    theta  <-  theta - lr AdamW(grad E || eps - eps_theta(x_t, t, c) ||^2)

    Needs: pictures with captions.   Cost: one pass forward and backward a step; memory of the model four times over.
    Differs from the reference code: pictures are encoded once and not flipped; no accumulation of gradients.
    """

    name: ClassVar[str] = "full"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {"steps": 2000, "lr": 1e-5},
    }

    steps: int = 100
    """Optimiser steps; > 0."""
    lr: float = 2e-4
    """Constant learning rate; > 0."""
    parameters: str = "full"
    """What is trained: a parameter group, or several joined by +."""

    def adapter(self, *, init: str = "", frozen: frozenset[str] = frozenset()) -> Adapter:
        return Adapter(parameters=self.parameters, frozen=frozen)
