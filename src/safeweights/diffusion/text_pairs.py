"""What closed-form edits work on: text states that say the concept, paired with what they shall mean instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel
from safeweights.diffusion.retain_set import names
from safeweights.diffusion.sampling import embed_all
from safeweights.diffusion.search import find_term, text_length

Tokens = Literal["last", "all", "around"]


@dataclass(frozen=True)
class Pair:
    """A prompt that asks for the concept, the prompt it shall mean instead, and the concept's term."""

    text: str
    guide: str
    term: str


def pairs_of(
    concept: Concept, prompts: Literal["term", "prompts", "both"], erase_with: Literal["anchor", "empty"] = "anchor"
) -> list[Pair]:
    """The concept's term, its prompts or both, each with its guide: the text without the concept, or the empty prompt."""
    texts = {"term": [concept.term], "prompts": [*concept.texts], "both": [concept.term, *concept.texts]}[prompts]
    return [Pair(text, concept.without(text) if erase_with == "anchor" else "", concept.term) for text in texts]


def paired_states(model: DiffusionModel, pairs: Sequence[Pair], tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Text states (n, D) of the concept and of what they shall mean, float64, paired from the end of the text onwards.

    ``tokens``: the term's last, all from its first through the padding, or all *around* it (without its own, which have no
    counterpart in the guide). A term that is not in its prompt stands at the end token, around which is everything.
    """
    ids = model.tokenize([pair.text for pair in pairs])
    old = embed_all(model, [pair.text for pair in pairs]).states.double()
    new = embed_all(model, [pair.guide for pair in pairs]).states.double()
    ends = text_length(model, ids).tolist()
    guide_ends = text_length(model, model.tokenize([pair.guide for pair in pairs])).tolist()
    erased, guides = [], []
    for row, pair in enumerate(pairs):
        end, guide_end, length = ends[row], guide_ends[row], old.shape[1]
        where = find_term(model, ids[row : row + 1], pair.term)[0]
        first, last = (where[0], where[-1]) if where else (end, end)
        # Each position is paired with the guide's position as far from the end of its text.
        shift = guide_end - end
        if tokens == "last":
            # Without a text to point at, the end token stands for the empty prompt.
            positions = [(last, max(1, last + shift))]
        elif tokens == "all":
            positions = [(p, max(1, p + shift)) for p in range(first, length) if p + shift < length]
        else:
            before = [(p, p) for p in range(1, first if where else 1)]
            positions = before + [(p, p + shift) for p in range(last + 1, length) if 0 < p + shift < length]
        erased += [old[row, p] for p, _ in positions]
        guides += [new[row, q] for _, q in positions]
    return torch.stack(erased), torch.stack(guides)


def retainable(prompts: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """The prompts without those that name an erased concept, which cannot be retained."""
    return [text for text in prompts if not any(names(text, concept.term) for concept in concepts)]


def retained_states(model: DiffusionModel, prompts: Sequence[str], *, last: bool = False) -> Tensor:
    """Text states (n, D) that must keep their keys and values, float64: of all positions but the first, or of the last token."""
    if not prompts:
        return torch.empty(0, model.vocabulary.shape[1], dtype=torch.float64, device=model.device)
    states = embed_all(model, prompts).states.double()
    if last:
        ends = text_length(model, model.tokenize(prompts)).clamp(min=1)
        return states[torch.arange(len(prompts)), ends]
    return states[:, 1:].flatten(0, 1)
