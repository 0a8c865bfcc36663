"""Which networks the quality metrics look through."""

from __future__ import annotations

from dataclasses import dataclass

from safeweights.core.concept import ConceptFile
from safeweights.models.vision import CLIP, Embedder


@dataclass(frozen=True)
class Backbones:
    """Folders or Hub ids: ``clip`` for the CLIP score, ``features`` for the Fréchet distance; None measures nothing."""

    clip: str | None = None
    features: str | None = None

    def open_clip(self) -> CLIP | None:
        """The CLIP model, where one is named."""
        return CLIP(self.clip) if self.clip else None

    def open_features(self) -> Embedder | None:
        """The feature model, where one is named."""
        return Embedder(self.features) if self.features else None


def default_backbones(file: ConceptFile) -> Backbones:
    """The folders ``clip`` and ``embedder`` beside the concept file, as far as they are there."""
    if file.path is None:
        return Backbones()
    clip, features = (file.path.resolve().parent / name for name in ("clip", "embedder"))
    return Backbones(str(clip) if clip.is_dir() else None, str(features) if features.is_dir() else None)
