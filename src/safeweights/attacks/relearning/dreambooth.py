"""DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation
(Ruiz et al., CVPR 2023, arXiv:2208.12242)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safeweights.attacks.relearning.finetune import ClassPrior
from safeweights.diffusion.adaptation import Adapter


@dataclass(frozen=True, kw_only=True)
class DreamBooth(ClassPrior):
    """Bind a rare word to the thing in the pictures, while the class keeps looking as the model draws it itself.

    min_theta  E || eps - eps_theta(x_t, t, c) ||^2 + lam E || eps' - eps_theta(x_pr,t', t', c_pr) ||^2          (eq. 2)

    Needs: pictures of one thing; prompts of its class for the prior.   Cost: with the prior two pictures' passes for one.
    Differs from the reference code: pictures are encoded once; timesteps and noise of the prior are its own, as in the paper.
    """

    name: ClassVar[str] = "dreambooth"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {"steps": 500, "lr": 5e-6, "batch_size": 1, "class_pictures": 100},
    }

    steps: int = 80
    """Optimiser steps; > 0."""
    lr: float = 2e-4
    """Constant learning rate; > 0."""
    batch_size: int = 3
    """Pictures a step; with prior preservation as many class pictures beside them; > 0."""
    parameters: str = "full"
    """What is trained: full, or full+text_encoder."""

    def adapter(self, *, init: str = "", frozen: frozenset[str] = frozenset()) -> Adapter:
        return Adapter(parameters=self.parameters, frozen=frozen)
