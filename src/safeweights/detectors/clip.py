"""Zero-shot detection with CLIP: does a picture match the concept's text better than the listed others?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safeweights.core.concept import DetectorSpec
from safeweights.core.detector import Detection
from safeweights.core.errors import UserError
from safeweights.models.vision import CLIP

__all__ = ["CLIP", "ZeroShotCLIP"]


class ZeroShotCLIP:
    """Judge pictures by the softmax over listed texts; scored is ``label``, or the first text without one."""

    def __init__(self, spec: DetectorSpec) -> None:
        if len(spec.texts) < 2:
            raise UserError("detector: type clip needs 'texts', the concept's own first and at least one to compare with")
        if spec.label and spec.label not in spec.texts:
            raise UserError(f"detector: label {spec.label!r} is not among its texts: {', '.join(spec.texts)}")
        self.spec = spec
        self.index = spec.texts.index(spec.label) if spec.label else 0
        self.clip = CLIP(spec.model, "detector")
        self.prompts = self.clip.texts(spec.texts)

    @torch.no_grad()
    def detect(self, images: Tensor) -> Detection:
        """Judge pictures (N, 3, H, W) in [0, 1]."""
        if not len(images):
            return Detection(present=torch.zeros(0, dtype=torch.bool), score=torch.zeros(0))
        vectors = self.clip.images(images)
        logits = self.clip.scale * vectors @ self.prompts.to(vectors.device).T
        score = logits.softmax(dim=-1)[:, self.index].cpu()
        return Detection(present=score >= self.spec.threshold, score=score)

    def describe(self) -> dict[str, Any]:
        """Type, model, label, texts, threshold and sha256."""
        return {
            "type": self.spec.type,
            "model": self.spec.model,
            "label": self.spec.texts[self.index],
            "texts": list(self.spec.texts),
            "threshold": self.spec.threshold,
            "sha256": self.clip.sha256,
        }
