"""How alike pictures are to an embedder: to their counterparts, or to a set that shows a concept."""

from __future__ import annotations

import torch
from torch import Tensor

from safeweights.core.intervals import bootstrap_mean
from safeweights.models.vision import Embedder
from safeweights.records.record import Measurement


def similarity(
    images: Tensor, references: Tensor, embedder: Embedder | None, *, paired: bool = True, seed: int = 0
) -> Measurement:
    """Mean cosine of features, with a bootstrap interval over pictures.

    ``paired``: picture k with reference k (same prompt and seed), so 1.0 means nothing changed. Otherwise
    each picture with the mean direction of all references, as for the likeness to a person. None, with the reason,
    without an embedder.
    """
    if paired and len(images) != len(references):
        raise ValueError(f"{len(images)} pictures for {len(references)} references")
    missing = "" if len(images) and len(references) else "no pictures"
    if embedder is None or missing:
        why = missing or "no feature model; name one with --feature-model"
        return Measurement(name="similarity", value=None, n=len(images), unit="cosine", why=why)
    ours = torch.nn.functional.normalize(embedder.features(images), dim=-1)
    theirs = torch.nn.functional.normalize(embedder.features(references), dim=-1)
    if not paired:
        theirs = torch.nn.functional.normalize(theirs.mean(dim=0, keepdim=True), dim=-1)
    cosines = (ours * theirs).sum(dim=-1).cpu().tolist()
    return Measurement(
        name="similarity",
        value=sum(cosines) / len(cosines),
        n=len(cosines),
        interval=bootstrap_mean(cosines, seed=seed),
        unit="cosine",
    )
