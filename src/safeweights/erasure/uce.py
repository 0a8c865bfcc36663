"""Unified Concept Editing in Diffusion Models (Gandikota et al., WACV 2024, arXiv:2308.14761)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from safeweights.core.concept import Concept
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.closed_form import edit
from safeweights.diffusion.parameters import select
from safeweights.diffusion.sampling import embed_all
from safeweights.diffusion.search import find_term, text_length


@dataclass(frozen=True, kw_only=True)
class UCE:
    """Map the concept's keys and values in cross-attention to those of its anchor, in closed form.

    W = (sum_i a v_i c_i^T + sum_j b W_o c_j c_j^T + lam W_o) (sum_i a c_i c_i^T + sum_j b c_j c_j^T + lam I)^-1,
    v_i = W_o c_i^anchor, for every W in {to_k, to_v}                                              (eq. 7)

    Needs: cross-attention with linear keys and values.   Cost: no denoiser call; one d x d solve for all matrices.
    Differs from the reference code: float64 solve (fp32 inverse there); a concept token is paired with the anchor token as far
    from the end of its prompt; the start-of-text position is never edited (an empty anchor pairs with the start token there and
    with the end token here).
    """

    name: ClassVar[str] = "uce"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"small": {}, "paper": {"prompts": "term"}}

    tokens: Literal["last", "all"] = "all"
    """Positions edited: the concept's last token, or all from its first through the padding (as the stronger, older script)."""
    alpha: float = 1.0
    """Weight of an edited token, a in eq. 7; > 0."""
    beta: float | None = None
    """Weight of a retained token, b in eq. 7; none: max(0.1, 1 / number of retained prompts)."""
    lam: float = 0.5
    """Ridge towards the base weights, lambda in eq. 7; > 0."""
    prompts: Literal["term", "prompts", "both"] = "both"
    """What stands for the concept: its term alone, its prompts with the term exchanged for the anchor's, or both."""
    erase_with: Literal["anchor", "empty"] = "anchor"
    """What the concept becomes: its anchor, or the empty prompt."""

    def __post_init__(self) -> None:
        if self.alpha <= 0 or self.lam <= 0 or (self.beta is not None and self.beta < 0):
            raise ValueError("alpha and lam must be above zero, beta not below")

    def protect(
        self,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        *,
        retain: Sequence[str] = (),
        rng: torch.Generator,
        workspace: Workspace | None = None,
    ) -> Protection:
        names = select(model.named_parameters(), "xattn_kv")
        weights = dict(model.named_parameters())
        pairs = [pair for concept in concepts for pair in self._pairs(concept)]
        erased, guides = self._keys(model, pairs)
        # A prompt that names an erased concept cannot be retained.
        kept = [text for text in retain if not any(concept.term.lower() in text.lower() for concept in concepts)]
        keys_retain = self._retained(model, kept)
        beta = max(0.1, 1 / max(len(kept), 1)) if self.beta is None else self.beta
        tensors = {}
        for name in names:
            W = weights[name].detach()
            tensors[name] = edit(W, erased, guides @ W.to(guides).T, keys_retain, alpha=self.alpha, beta=beta, lam=self.lam)
        return Protection(
            method=self.name,
            concepts=tuple(concept.name for concept in concepts),
            tensors=tensors,
            settings=describe(self),
            cost={"eps_calls": 0, "edited_keys": len(erased), "retained_keys": len(keys_retain)},
        )

    def _pairs(self, concept: Concept) -> list[tuple[str, str, str]]:
        """(prompt that asks for the concept, prompt it shall mean instead, the concept's term)."""
        texts = {"term": [concept.term], "prompts": [*concept.texts], "both": [concept.term, *concept.texts]}[self.prompts]
        return [(text, concept.without(text) if self.erase_with == "anchor" else "", concept.term) for text in texts]

    def _keys(self, model: DiffusionModel, pairs: Sequence[tuple[str, str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text states (n, D) of the concept and of what they shall mean, float64, paired from the end of the text onwards."""
        ids = model.tokenize([text for text, _, _ in pairs])
        old = embed_all(model, [text for text, _, _ in pairs]).states.double()
        new = embed_all(model, [guide for _, guide, _ in pairs]).states.double()
        ends = text_length(model, ids).tolist()
        guide_ends = text_length(model, model.tokenize([guide for _, guide, _ in pairs])).tolist()
        erased, guides = [], []
        for row, (_, _, term) in enumerate(pairs):
            end, guide_end = ends[row], guide_ends[row]
            where = find_term(model, ids[row : row + 1], term)[0]
            first, last = (where[0], where[-1]) if where else (end, end)
            # Each position is paired with the guide's position as far from the end of its text.
            shift = guide_end - end
            if self.tokens == "last":
                # Without a text to point at, the end token stands for the empty prompt.
                positions = [(last, max(1, last + shift))]
            else:
                positions = [(p, max(1, p + shift)) for p in range(first, old.shape[1]) if p + shift < old.shape[1]]
            erased += [old[row, p] for p, _ in positions]
            guides += [new[row, q] for _, q in positions]
        return torch.stack(erased), torch.stack(guides)

    def _retained(self, model: DiffusionModel, prompts: Sequence[str]) -> torch.Tensor:
        """Text states (n, D) that must keep their keys and values: of the last token, or of all positions but the first."""
        if not prompts:
            return torch.empty(0, model.vocabulary.shape[1], dtype=torch.float64, device=model.device)
        states = embed_all(model, prompts).states.double()
        if self.tokens == "last":
            ends = text_length(model, model.tokenize(prompts)).clamp(min=1)
            return states[torch.arange(len(prompts)), ends]
        return states[:, 1:].flatten(0, 1)
