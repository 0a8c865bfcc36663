"""Fréchet distance of two sets of pictures in an embedder's features (Heusel et al., 2017, arXiv:1706.08500)."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

from torch import Tensor

from safeweights.models.vision import AsModule, Embedder
from safeweights.records.record import Measurement

LEAST = 32
"""Fewer pictures than this give no distance at all: it would be nearly all bias."""


def frechet_distance(images: Tensor, references: Tensor, embedder: Embedder | None) -> Measurement:
    """Distance of Gaussians fitted to the features of two sets of pictures (N, 3, H, W) in [0, 1]; 0 for equal sets.

    It is biased upwards, the more the fewer pictures: compare only distances of equal n and equal features. ``unit``
    names the features. None, with the reason, without an embedder or with under `LEAST` pictures on a side.
    """
    name = "frechet_distance"
    n = min(len(images), len(references))
    if embedder is None:
        why = "no feature model; name one with --feature-model"
        return Measurement(name=name, value=None, n=n, better="lower", why=why)
    unit = f"features of {Path(embedder.name).name}"
    if n < LEAST:
        why = f"{n} pictures on a side are too few; at least {LEAST} are needed"
        return Measurement(name=name, value=None, n=n, better="lower", unit=unit, why=why)
    # torchmetrics looks for optional packages on import and warns about each.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.fid import FrechetInceptionDistance

    size = int(embedder.features(images[:1]).shape[-1])
    metric = FrechetInceptionDistance(feature=AsModule(embedder, size)).to(images.device)
    metric.update(references, real=True)
    metric.update(images, real=False)
    value = float(metric.compute())
    if not math.isfinite(value):
        return Measurement(name=name, value=None, n=n, better="lower", unit=unit, why="the distance is not finite")
    why = f"biased upwards: {n} pictures for {size} features; compare at equal n only" if n <= 2 * size else ""
    return Measurement(name=name, value=max(value, 0.0), n=n, better="lower", unit=unit, why=why)
