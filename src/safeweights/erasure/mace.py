"""MACE: Mass Concept Erasure in Diffusion Models (Lu et al., CVPR 2024, arXiv:2403.06135)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from safeweights.core.concept import Concept
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.attention import attention_maps, cross_attentions
from safeweights.diffusion.closed_form import edit
from safeweights.diffusion.latent_bank import LatentBank
from safeweights.diffusion.low_rank import LowRank
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parameters import select
from safeweights.diffusion.sampling import embed_all
from safeweights.diffusion.search import find_term, text_length
from safeweights.diffusion.text_pairs import Pair, paired_states, pairs_of, retainable, retained_states
from safeweights.diffusion.training import descend


@dataclass(frozen=True, kw_only=True)
class MACE:
    """Take the concept out of the words around it in closed form, turn attention from its own words, fuse all concepts in one.

    W' = argmin_W sum_j || W e_j - W_o e_j^anchor ||^2 + l1 sum_p || W e_p - W_o e_p ||^2,  e_j: tokens around the term    (eq. 1)
    dW_i = up_i down_i (rank 1) = argmin sum_l || A_l[:, term of concept i] ||_F^2 under W' + dW_i                       (eq. 4)
    W = argmin_W sum_i sum_j || W e_j^i - (W' + dW_i) e_j^i ||^2 + l2 sum_p || W e_p - W' e_p ||^2                       (eq. 6)

    Needs: cross-attention layers with to_q, to_k, to_v.   Cost: a pass with adapters forward and backward a step and concept, and
    two solves of d x d for every matrix.
    Differs from the reference code: no segmentation, so attention leaves the term over the whole picture; latents are states of
    the base model's trajectories (there noised pictures); e_j^i are the concept's prompts from the term on; the norm is divided
    by the number of map rows, so that it does not grow with batch and picture; retained prompts in place of a cache of captions.
    """

    name: ClassVar[str] = "mace"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "lr": 1e-4, "steps": 50, "batch_size": 1, "l1": 1e-4, "l2": 1e-4, "prompts": "prompts", "trajectories": 8,
            "ddim_steps": 50,
        },
    }  # fmt: skip

    l1: float = 1.0
    """Weight of a retained token in the first step, lambda_1; >= 0."""
    l2: float = 1.0
    """Weight of a retained token in the fusion, lambda_2; >= 0."""
    lam: float = 0.1
    """Ridge towards the weights before, in both; > 0."""
    rank: int = 1
    """Rank of a concept's adapters; > 0."""
    steps: int = 40
    """Optimiser steps for each concept's adapters; > 0."""
    lr: float = 3e-3
    """AdamW's learning rate; > 0."""
    batch_size: int = 4
    """Noisy latents a step; > 0."""
    focal: bool = True
    """Draw timesteps mostly from 200 to 400 of 1000, where a concept takes shape; off for nudity in the paper."""
    prompts: Literal["term", "prompts", "both"] = "both"
    """What stands for the concept: its term alone, its prompts, or both."""
    trajectories: int = 18
    """DDIM trajectories drawn once for each concept, its prompts in turn; > 0."""
    ddim_steps: int = 20
    """Steps of a trajectory; > 0."""
    guidance: float = 3.0
    """Guidance of the trajectories."""

    def __post_init__(self) -> None:
        counts = (self.rank, self.steps, self.batch_size, self.trajectories, self.ddim_steps)
        if min(counts) < 1 or min(self.lr, self.lam) <= 0 or min(self.l1, self.l2) < 0:
            raise ValueError(
                "rank, steps, batch_size, trajectories, ddim_steps, lr and lam must be above zero, l1 and l2 not below"
            )

    def protect(
        self,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        *,
        retain: Sequence[str] = (),
        rng: torch.Generator,
        workspace: Workspace | None = None,
    ) -> Protection:
        workspace = workspace or Workspace()
        seed, calls = rng.initial_seed(), model.calls.eps
        cross_attentions(model)  # a model that cannot be read is told before anything is drawn
        base = dict(model.named_parameters())
        names = select(base.items(), "xattn_kv")
        pairs = [pairs_of(concept, self.prompts) for concept in concepts]
        kept = retained_states(model, retainable(retain, concepts))
        around, guides = paired_states(model, [pair for own in pairs for pair in own], "around")
        refined = {
            name: edit(base[name], around, guides @ base[name].detach().to(guides).T, kept, beta=self.l1, lam=self.lam)
            for name in names
        }
        tuned = model.with_tensors(refined)
        keys, deltas, losses = [], [], [0.0]
        for concept, own in zip(concepts, pairs, strict=True):
            adapters, losses = self._suppress(model, tuned, names, concept, own, seed, workspace.child(concept.name))
            keys.append(paired_states(model, own, "all")[0])
            deltas.append(adapters.deltas())
        tensors = {
            name: fuse(refined[name], keys, [delta[name] for delta in deltas], kept, l2=self.l2, lam=self.lam) for name in names
        }
        return Protection(
            method=self.name,
            concepts=tuple(concept.name for concept in concepts),
            tensors=tensors,
            settings=describe(self),
            cost={"steps": self.steps * len(concepts), "eps_calls": model.calls.eps - calls, "loss": losses[-1]},
        )

    def _suppress(
        self,
        model: DiffusionModel,
        tuned: DiffusionModel,
        names: Sequence[str],
        concept: Concept,
        pairs: Sequence[Pair],
        seed: int,
        workspace: Workspace,
    ) -> tuple[LowRank, list[float]]:
        """Adapters of ``tuned`` under which nothing attends to the concept's own words, and their losses."""
        texts = [pair.text for pair in pairs]
        bank = LatentBank.sample(
            model,
            texts,
            n=max(self.trajectories, len(texts)),
            sampling=Sampling(steps=self.ddim_steps, guidance_scale=self.guidance),
            rng=generator("mace bank", seed, concept.name),
            workspace=workspace,
        )
        c, marked = embed_all(model, texts), term_positions(model, texts, concept.term)
        weights = focus(bank.t * (1000 / len(model.alpha))) if self.focal else torch.ones(len(bank))
        adapters = LowRank(tuned, names, rank=self.rank, seed=seed)

        def loss_at(step: int) -> Tensor:
            rng = generator("mace", seed, concept.name, step)
            batch = bank.at(torch.multinomial(weights, self.batch_size, replacement=True, generator=rng))
            # The adapters first: the maps are read off what they give.
            with adapters.on(tuned), attention_maps(tuned) as maps:
                tuned.eps(batch.x_t, batch.t, c[batch.prompt])
            at_term = marked[batch.prompt][:, None, None]
            return torch.stack([(A * at_term).square().sum(-1).mean() for A in maps.values()]).sum()

        losses = descend(
            adapters.parameters(),
            loss_at,
            steps=self.steps,
            lr=self.lr,
            optimizer="adamw",
            workspace=workspace,
            description="erasing (mace)",
            facts={"seed": seed, "texts": texts, "settings": describe(self)},
        )
        return adapters, losses


def fuse(W: Tensor, keys: Sequence[Tensor], deltas: Sequence[Tensor], kept: Tensor, *, l2: float, lam: float) -> Tensor:
    """The one matrix that does to each concept's keys (n_i, in) what W + its own delta does, and W to all others: eq. 6."""
    values = [e @ (W + delta).to(e).T for e, delta in zip(keys, deltas, strict=True)]
    return edit(W, torch.cat(list(keys)), torch.cat(values), kept, beta=l2, lam=lam)


def focus(t: Tensor) -> Tensor:
    """How often a timestep of 1000 is drawn, unnormalised: logistic(0.05 (t - 200)) - logistic(0.05 (t - 400)), never 0."""
    t = t.double()
    weight: Tensor = torch.sigmoid(0.05 * (t - 200)) - torch.sigmoid(0.05 * (t - 400))
    return weight.clamp(min=1e-6)


def term_positions(model: DiffusionModel, texts: Sequence[str], term: str) -> Tensor:
    """True (texts, L) at the term's tokens; at the whole text where the term is not in it."""
    ids = model.tokenize(texts)
    marked = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    ends = (text_length(model, ids) + 1).tolist()
    for row, (where, end) in enumerate(zip(find_term(model, ids, term), ends, strict=True)):
        place = where or range(1, end)
        marked[row, place.start : place.stop] = True
    return marked
