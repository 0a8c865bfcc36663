"""Any transformers image classifier as a detector: the concept is there where its label reaches the threshold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safeweights.core.concept import DetectorSpec
from safeweights.core.detector import Detection
from safeweights.core.errors import UserError
from safeweights.models.vision import Backbone


class ImageClassification:
    """Judge pictures by the probability a classifier gives one label: softmax, or sigmoid for a multi-label model.

    A folder may ship its measured error rates in ``measured.json``, per label or for all labels:
    ``{"mosaic": {"false_positive": 0.001, "false_negative": 0.01}}``.
    """

    def __init__(self, spec: DetectorSpec) -> None:
        self.spec = spec
        self.backbone = Backbone(spec.model, "AutoModelForImageClassification", "detector")
        self.backbone.refuse_missing()
        config = self.backbone.model.config
        labels = {str(label): int(index) for index, label in config.id2label.items()}
        if spec.label not in labels:
            raise UserError(f"detector {spec.model} has no label {spec.label!r}; it knows {_listing(list(labels))}")
        self.index = labels[spec.label]
        self.multi_label = getattr(config, "problem_type", None) == "multi_label_classification"

    @torch.no_grad()
    def detect(self, images: Tensor) -> Detection:
        """Judge pictures (N, 3, H, W) in [0, 1]."""
        scores = [self._score(pixels) for pixels in self.backbone.pixels(images)]
        score = torch.cat(scores).cpu() if scores else torch.zeros(0)
        return Detection(present=score >= self.spec.threshold, score=score)

    def _score(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.backbone.model(pixel_values=pixels).logits.float()
        probability = logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)
        return probability[:, self.index]

    def describe(self) -> dict[str, Any]:
        """Type, model, label, threshold, sha256 and the measured error rates, where the folder ships them."""
        return {
            "type": self.spec.type,
            "model": self.spec.model,
            "label": self.spec.label,
            "threshold": self.spec.threshold,
            "sha256": self.backbone.sha256,
            **measured_errors(Path(self.spec.model), self.spec.label),
        }


def measured_errors(folder: Path, label: str) -> dict[str, float]:
    """``false_positive`` and ``false_negative`` of a label from a folder's measured.json; {} without one."""
    path = folder / "measured.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data = data.get("labels", data)
        entry = data.get(label, data)
        return {key: float(entry[key]) for key in ("false_positive", "false_negative") if entry.get(key) is not None}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a table of error rates ({error}); mend or remove it") from None


def _listing(labels: list[str], most: int = 30) -> str:
    rest = f", … ({len(labels)} in all)" if len(labels) > most else ""
    return ", ".join(labels[:most]) + rest
