"""A detector written by the user: ``module:function``, which takes pictures (N, 3, H, W) in [0, 1] and gives N scores.

It runs code that a concept file names, so it is only opened where the caller allows it.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from safeweights.core.concept import DetectorSpec
from safeweights.core.detector import Detection
from safeweights.core.errors import UserError


class PythonDetector:
    """Judge pictures with a function of the user's; a score is a probability, a bool counts as 0 or 1."""

    def __init__(self, spec: DetectorSpec) -> None:
        module, _, function = spec.model.partition(":")
        if not module or not function:
            raise UserError(f"detector: type python needs 'model: module:function', not {spec.model!r}")
        # A module in the current folder is found, as `python -m` would find it.
        sys.path.insert(0, "")
        try:
            self.function = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise UserError(f"detector: {spec.model} cannot be loaded: {error}") from None
        finally:
            sys.path.remove("")
        if not callable(self.function):
            raise UserError(f"detector: {spec.model} is not a function")
        self.spec = spec

    @torch.no_grad()
    def detect(self, images: Tensor) -> Detection:
        """Judge pictures (N, 3, H, W) in [0, 1]. Raises UserError where the function gives no N scores in [0, 1]."""
        score = torch.as_tensor(self.function(images)).detach().float().cpu()
        if score.shape != (len(images),) or not bool(((score >= 0) & (score <= 1)).all()):
            raise UserError(f"detector {self.spec.model} must give {len(images)} scores from 0 to 1, one per picture")
        return Detection(present=score >= self.spec.threshold, score=score)

    def describe(self) -> dict[str, Any]:
        """Type, function, label, threshold and the sha256 of its source."""
        try:
            source = inspect.getsource(self.function)
        except (OSError, TypeError):
            source = None
        return {
            "type": self.spec.type,
            "model": self.spec.model,
            "label": self.spec.label,
            "threshold": self.spec.threshold,
            "sha256": hashlib.sha256(source.encode()).hexdigest() if source else None,
        }
