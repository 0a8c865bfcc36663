"""Fusing several fine-tunes of one model, differentiably (Kumari et al., CVPR 2023, arXiv:2212.04488; as a layer in Zheng & Yeh,
AAAI 2025, arXiv:2412.15320)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel
from safeweights.diffusion.sampling import embed_all
from safeweights.diffusion.search import find_term, text_length


@dataclass(frozen=True)
class Merge:
    """The map that does to each concept's tokens what that concept's own fine-tune does, and else stays near the old one.

    phi = argmin_W || (W - W_0) C_reg^T ||_F   s.t.   W C_n^T = W_n C_n^T for every concept n
    C rows: all C_n;   A = C_reg^T C_reg,   D = C A^-1,   R = (D C^T)^-1 D,   P_n = C_n^T R_n

    phi = W_0 (I - sum_n P_n) + sum_n W_n P_n is linear in the weights, with oblique projectors P_n P_m = delta_nm P_n that depend
    on text features alone: computed once, shared by all keys and values; the gradient of W_n is that of phi times P_n^T.
    """

    projectors: Tensor
    """P (N, d, d), float64."""

    @classmethod
    def fit(cls, targets: Sequence[Tensor], regular: Tensor, *, ridge: float = 1e-4, prior: float = 1e-6) -> Merge:
        """The projectors for token features ``targets`` (k_n, d) of N concepts and ``regular`` (r, d) of ordinary text.

        Of a concept's features nearer than cosine 0.999 one is kept. ``ridge`` is added to D C^T in parts of its mean diagonal:
        it holds the solve steady where concepts share tokens, which then take the mean of their fine-tunes; 0 meets every
        constraint exactly. ``prior`` does the same for A, which ordinary text need not span. Raises ValueError for no concept,
        non-finite features, or more tokens than dimensions without a ridge.
        """
        if not targets or any(len(rows) == 0 for rows in targets):
            raise ValueError("a merge needs at least one token of at least one concept")
        rows = [_distinct(part.detach().double()) for part in targets]
        C, C_reg = torch.cat(rows), regular.detach().double().to(rows[0].device)
        if not (torch.isfinite(C).all() and torch.isfinite(C_reg).all()):
            raise ValueError("token features hold NaN or infinite entries")
        k, d = C.shape
        if k > d and ridge <= 0:
            raise ValueError(f"{k} tokens cannot all be kept by a map of {d} dimensions; give fewer, or a ridge above zero")
        A = C_reg.T @ C_reg if len(C_reg) else torch.eye(d, dtype=C.dtype, device=C.device)
        A = A + prior * A.diagonal().mean().clamp(min=1e-30) * torch.eye(d, dtype=C.dtype, device=C.device)
        D = torch.linalg.solve(A, C.T).T
        G = D @ C.T
        R = torch.linalg.solve(G + ridge * G.diagonal().mean() * torch.eye(k, dtype=C.dtype, device=C.device), D)
        parts = zip(rows, R.split([len(part) for part in rows]), strict=True)
        return cls(torch.stack([C_n.T @ R_n for C_n, R_n in parts]))

    def __call__(self, W_0: Tensor, tuned: Sequence[Tensor]) -> Tensor:
        """phi (out, d) of the old map W_0 and the N fine-tunes, in W_0's dtype; differentiable in all of them."""
        if len(tuned) != len(self.projectors):
            raise ValueError(f"{len(tuned)} fine-tunes for the projectors of {len(self.projectors)} concepts")
        P = self.projectors.to(W_0)
        # As a change of W_0: where nothing was tuned, W_0 stays bit for bit.
        merged = W_0
        for W_n, P_n in zip(tuned, P, strict=True):
            merged = merged + (W_n - W_0) @ P_n
        return merged

    def tensors(
        self, base: Mapping[str, Tensor], tuned: Sequence[Mapping[str, Tensor]], keys_and_values: Sequence[str]
    ) -> dict[str, Tensor]:
        """Every tensor named in a fine-tune, merged: keys and values in closed form, the others as W_0 + mean_n (W_n - W_0)."""
        merged = {}
        for name in dict.fromkeys(name for part in tuned for name in part):
            parts = [part.get(name, base[name]) for part in tuned]
            if name in keys_and_values:
                merged[name] = self(base[name], parts)
            else:
                merged[name] = base[name] + torch.stack([part - base[name] for part in parts]).mean(0)
        return merged


def concept_features(model: DiffusionModel, concept: Concept) -> Tensor:
    """Token features (k, D) of a concept: its term alone and its first prompt, from the term's first token to the end token.

    Words before the term are left out: a causal text encoder gives them the same features for every concept.
    """
    texts = list(dict.fromkeys([concept.term, *concept.texts[:1]]))
    ids = model.tokenize(texts)
    states = embed_all(model, texts).states
    found, ends = find_term(model, ids, concept.term), (text_length(model, ids) + 1).tolist()
    pieces = [states[row, where[0] if where else 1 : end + 1] for row, (where, end) in enumerate(zip(found, ends, strict=True))]
    return torch.cat(pieces)


def text_features(model: DiffusionModel, prompts: Sequence[str]) -> Tensor:
    """Token features (r, D) of ordinary text, without the start token and without padding."""
    if not prompts:
        return model.vocabulary.new_zeros(0, model.embed([""]).states.shape[-1])
    states, ends = embed_all(model, prompts).states, (text_length(model, model.tokenize(prompts)) + 1).tolist()
    return torch.cat([states[row, 1 : end + 1] for row, end in enumerate(ends)])


def _distinct(rows: Tensor, cosine: float = 0.999) -> Tensor:
    """The rows without those that point where an earlier one does."""
    unit = torch.nn.functional.normalize(rows, dim=-1)
    same = (unit @ unit.T).tril(-1) > cosine
    kept: list[int] = []
    for row in range(len(rows)):
        if not kept or not bool(same[row, kept].any()):
            kept.append(row)
    return rows[kept]
