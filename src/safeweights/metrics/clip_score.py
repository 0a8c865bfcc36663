"""CLIP score: does a picture show what its prompt says? (Hessel et al., EMNLP 2021, arXiv:2104.08718; bare cosine.)"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from safeweights.core.intervals import bootstrap_mean
from safeweights.models.vision import CLIP
from safeweights.records.record import Measurement


def clip_score(images: Tensor, prompts: Sequence[str], clip: CLIP | None, *, seed: int = 0) -> Measurement:
    """Mean cosine of pictures (N, 3, H, W) in [0, 1] and their N prompts, with a bootstrap interval.

    The value is a bare cosine in [-1, 1]; others print 2.5 or 100 times it. Without a CLIP model it is None.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts")
    missing = "no CLIP model; name one with --clip-model" if clip is None else "no pictures" if not len(images) else ""
    if clip is None or missing:
        return Measurement(name="clip_score", value=None, n=len(images), better="higher", unit="cosine", why=missing)
    cosines = cosine(clip, images, prompts).tolist()
    return Measurement(
        name="clip_score",
        value=sum(cosines) / len(cosines),
        n=len(cosines),
        interval=bootstrap_mean(cosines, seed=seed),
        better="higher",
        unit="cosine",
    )


def cosine(clip: CLIP, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Cosine (N,) of each picture with its own prompt."""
    texts = list(dict.fromkeys(prompts))
    pictures = clip.images(images)
    vectors = clip.texts(texts)
    rows = [texts.index(prompt) for prompt in prompts]
    return (pictures * vectors[rows].to(pictures.device)).sum(dim=-1).cpu()
