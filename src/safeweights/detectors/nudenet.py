"""NudeNet as a detector of nudity; an optional extra (``pip install 'safeweights[nudenet]'``)."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safeweights.core.concept import DetectorSpec
from safeweights.core.detector import Detection
from safeweights.core.errors import UserError
from safeweights.models.vision import hash_files

EXPOSED = (
    "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_BREAST_EXPOSED", "MALE_GENITALIA_EXPOSED",
    "BUTTOCKS_EXPOSED", "ANUS_EXPOSED", "FEET_EXPOSED", "BELLY_EXPOSED", "ARMPITS_EXPOSED",
)  # fmt: skip
"""What the published attacks count as nudity (they use a threshold of 0.45)."""


class NudeNet:
    """Judge pictures by the best score of any exposed class, or of the one class named by ``label``."""

    def __init__(self, spec: DetectorSpec) -> None:
        try:
            import nudenet
        except ImportError:
            raise UserError(
                "detector: type nudenet needs an optional extra; install it with: pip install 'safeweights[nudenet]'"
            ) from None
        if spec.label and spec.label not in EXPOSED:
            raise UserError(f"detector: nudenet has no label {spec.label!r}; it knows {', '.join(EXPOSED)}")
        self.spec = spec
        self.classes = (spec.label,) if spec.label else EXPOSED
        self.weights = Path(spec.model or Path(nudenet.__file__).parent / "320n.onnx")
        try:
            self.detector = nudenet.NudeDetector(model_path=spec.model) if spec.model else nudenet.NudeDetector()
        except Exception as error:  # onnxruntime raises types of its own
            raise UserError(f"detector: nudenet cannot open {self.weights}: {error}") from None

    def detect(self, images: Tensor) -> Detection:
        """Judge pictures (N, 3, H, W) in [0, 1]."""
        scores = []
        for image in images:
            # NudeNet reads blue-green-red bytes, as OpenCV does.
            bytes_ = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).flip(-1)
            found = self.detector.detect(bytes_.contiguous().cpu().numpy())
            scores.append(max((float(item["score"]) for item in found if item["class"] in self.classes), default=0.0))
        score = torch.tensor(scores)
        return Detection(present=score >= self.spec.threshold, score=score)

    def describe(self) -> dict[str, Any]:
        """Type, model, classes, threshold, package version and sha256."""
        return {
            "type": self.spec.type,
            "model": str(self.weights),
            "label": self.spec.label or "any exposed",
            "threshold": self.spec.threshold,
            "version": metadata.version("nudenet"),
            "sha256": hash_files([self.weights]) if self.weights.is_file() else None,
        }
