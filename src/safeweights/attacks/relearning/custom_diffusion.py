"""Multi-Concept Customization of Text-to-Image Diffusion (Kumari et al., CVPR 2023, arXiv:2212.04488)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safeweights.attacks.relearning.finetune import ClassPrior
from safeweights.diffusion.adaptation import Adapter


@dataclass(frozen=True, kw_only=True)
class CustomDiffusion(ClassPrior):
    """Train the keys and values of cross-attention and the embedding of a modifier word.

    W^k, W^v, v*  <-  AdamW on  E || eps - eps_theta(x_t, t, c(v*)) ||^2 + lam (the same on class pictures)           (sec. 3.2)

    Needs: pictures whose captions hold the modifier word.   Cost: one pass forward and backward a step.
    Differs from the reference code: class pictures are drawn by the model (there retrieved real ones; both in the paper), no
    resizing augmentation; the learning rate is not multiplied by the batch size.
    """

    name: ClassVar[str] = "custom-diffusion"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {"steps": 250, "lr": 1e-5, "batch_size": 2, "class_pictures": 200},
    }

    selective: ClassVar[bool] = False

    steps: int = 80
    """Optimiser steps; > 0."""
    lr: float = 2e-3
    """Constant learning rate; > 0."""
    batch_size: int = 3
    """Pictures a step; with prior preservation as many class pictures beside them; > 0."""
    token: str = "<new1>"
    """The modifier word, once in every caption."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.token.strip():
            raise ValueError("token must be a word")

    @property
    def new_word(self) -> str | None:
        return self.token

    def adapter(self, *, init: str = "", frozen: frozenset[str] = frozenset()) -> Adapter:
        return Adapter(parameters="xattn_kv", token=self.token, init=init, frozen=frozen)
