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
        return CLIP(self.clip) if self.clip else None

    def open_features(self) -> Embedder | None:
        return Embedder(self.features) if self.features else None


def default_backbones(file: ConceptFile) -> Backbones:
    """The sandbox's own CLIP and embedder for the sandbox's concept file; nothing for any other."""
    from safeweights.sandbox.files import sandbox_concepts, weights_folder

    sandbox = sandbox_concepts().path
    if file.path is None or sandbox is None or file.path.resolve() != sandbox.resolve():
        return Backbones()
    clip, features = weights_folder() / "clip", weights_folder() / "embedder"
    return Backbones(str(clip) if clip.is_dir() else None, str(features) if features.is_dir() else None)
