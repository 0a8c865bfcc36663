"""How alike two sets of pictures are, as re-learning is measured: what `metrics.gap_ratio` reads its gaps from."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from safeweights.models.vision import Embedder

Mode = Literal["clean", "paper"]
"""clean: pictures as they are. paper: as the published scripts show them to the networks, 64 pixels wide, mapped to [0.5, 1]."""


class Similarity(Protocol):
    """M(a, b): how alike two sets of pictures (N, 3, H, W) in [0, 1] are; 1 for equal pictures."""

    name: str

    def __call__(self, images: Tensor, references: Tensor) -> float: ...

    def each(self, images: Tensor, references: Tensor) -> list[float]:
        """For every picture its mean similarity to all references; their mean is M(a, b)."""
        ...


class CosineSimilarity:
    """Mean cosine of features over all pairs: CLIP, DINO or the sandbox's embedder, whichever the embedder is."""

    def __init__(self, embedder: Embedder, mode: Mode = "clean") -> None:
        self.embedder, self.mode, self.name = embedder, mode, f"cosine of {embedder.name.rstrip('/').rpartition('/')[2]}"

    def __call__(self, images: Tensor, references: Tensor) -> float:
        return _mean(self.each(images, references))

    def each(self, images: Tensor, references: Tensor) -> list[float]:
        """For every picture its mean cosine to all references."""
        ours, theirs = (normalize(self.embedder.features(as_shown(part, self.mode)), dim=-1) for part in (images, references))
        # The mean over all references of a linear form is that of their mean.
        return [float(value) for value in ours.double() @ theirs.double().mean(0)]


class PerceptualSimilarity:
    """One minus the mean distance of unit feature vectors, position by position, over all layers and pairs: unweighted LPIPS."""

    def __init__(self, embedder: Embedder, mode: Mode = "clean") -> None:
        self.embedder, self.mode = embedder, mode
        self.name = f"perceptual of {embedder.name.rstrip('/').rpartition('/')[2]}"

    def __call__(self, images: Tensor, references: Tensor) -> float:
        return _mean(self.each(images, references))

    def each(self, images: Tensor, references: Tensor) -> list[float]:
        """For every picture one minus its mean distance to all references."""
        ours, theirs = (self._layers(as_shown(part, self.mode)) for part in (images, references))
        distances = []
        for a, b in zip(ours, theirs, strict=True):
            # |a - b|^2 of unit vectors is 2 - 2 a b, and its mean over references needs their mean alone.
            distances.append(2 - 2 * (a * b.mean(0)).sum(dim=1).mean(dim=1))
        return [1 - float(value) for value in torch.stack(distances).mean(0)]

    @torch.no_grad()
    def _layers(self, images: Tensor) -> list[Tensor]:
        """Unit features (N, C, positions) of every layer."""
        parts: list[list[Tensor]] = []
        for batch in self.embedder.pixels(images):
            hidden = self.embedder.model(pixel_values=batch, output_hidden_states=True).hidden_states
            # Convolutional networks give (N, C, h, w), transformers (N, positions, C).
            flat = [layer.flatten(2) if layer.ndim == 4 else layer.transpose(1, 2) for layer in hidden]
            parts.append([normalize(layer.double(), dim=1) for layer in flat])
        return [torch.cat(layers) for layers in zip(*parts, strict=True)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def as_shown(images: Tensor, mode: Mode) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] as a mode shows them to a network.

    The published evaluation resizes to 64 pixels and takes values in [0, 1] for values in [-1, 1]: black becomes grey.
    """
    if mode == "clean":
        return images
    small = interpolate(images, (64, 64), mode="bilinear", align_corners=False, antialias=True)
    return (small.clamp(0, 1) + 1) / 2
