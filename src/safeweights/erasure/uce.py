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
from safeweights.diffusion.text_pairs import paired_states, pairs_of, retainable, retained_states


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
        pairs = [pair for concept in concepts for pair in pairs_of(concept, self.prompts, self.erase_with)]
        erased, guides = paired_states(model, pairs, self.tokens)
        kept = retainable(retain, concepts)
        keys_retain = retained_states(model, kept, last=self.tokens == "last")
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
