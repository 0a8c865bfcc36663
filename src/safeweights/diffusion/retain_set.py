"""Prompts that must stay as they were: objects of the everyday, and which of them an erased concept forbids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel
from safeweights.core.text import whole_words
from safeweights.diffusion.sampling import embed_all
from safeweights.diffusion.search import text_length

OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "ball", "kite", "baseball bat",
    "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "television", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair dryer",
    "toothbrush",
)  # fmt: skip
"""The object classes of COCO (Lin et al., ECCV 2014, arXiv:1405.0312)."""


def object_prompts(objects: Sequence[str] = OBJECTS) -> tuple[str, ...]:
    """ "a photo of a bicycle", … for concept files that name nothing to retain."""
    return tuple(f"a photo of {'an' if item[0] in 'aeiou' else 'a'} {item}" for item in objects)


def filter_retain(
    model: DiffusionModel,
    prompts: Sequence[str],
    concepts: Sequence[Concept],
    *,
    threshold: float = 0.7,
    drop: Sequence[str] = (),
    keep: Callable[[str, Concept], bool] | None = None,
) -> list[str]:
    """The prompts that may stay when ``concepts`` go, each once and in their order.

    Out goes a prompt that names a concept's term or a text of ``drop`` as whole words, and one that is related to a concept:
    judged by ``keep(prompt, concept)`` where given, else by `relatedness` above ``threshold`` in the model's own text encoder.
    """
    named = [concept.term for concept in concepts] + list(drop)
    kept = [prompt for prompt in dict.fromkeys(prompts) if not any(names(prompt, term) for term in named)]
    if keep is not None:
        return [prompt for prompt in kept if all(keep(prompt, concept) for concept in concepts)]
    if not kept:
        return []
    related = relatedness(model, kept, concepts).amax(dim=1)
    return [prompt for prompt, value in zip(kept, related.tolist(), strict=True) if value <= threshold]


def relatedness(model: DiffusionModel, prompts: Sequence[str], concepts: Sequence[Concept]) -> torch.Tensor:
    """How much of a concept a prompt says, (prompts, concepts): 1 is the concept itself, 0 nothing of it.

    The text encoder's state at the end token, as CLIP pools it, measured along the way from the mean prompt to the concept's
    term: <e(prompt) - m, e(term) - m> / |e(term) - m|^2. Plain cosines are all near 1, since every text shares most of its state.
    """
    e = _pooled(model, prompts)
    mean = e.mean(0)
    ways = _pooled(model, [concept.term for concept in concepts]) - mean
    return (e - mean) @ ways.T / ways.square().sum(1).clamp(min=1e-12)


def names(text: str, words: str) -> bool:
    """Whether ``words`` stand in ``text`` as whole words, in any case."""
    return whole_words(words).search(text) is not None


def _pooled(model: DiffusionModel, prompts: Sequence[str]) -> torch.Tensor:
    """States at the first end token (B, D), float64."""
    ends = text_length(model, model.tokenize(prompts)) + 1
    states = embed_all(model, prompts).states
    return states[torch.arange(len(prompts), device=states.device), ends].double()
