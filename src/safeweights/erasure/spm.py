"""One-Dimensional Adapter to Rule Them All: Concepts, Diffusion Models and Erasing Applications
(Lyu et al., CVPR 2024, arXiv:2312.16145)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss

from safeweights.core.concept import Concept
from safeweights.core.method import Protection
from safeweights.core.model import Conditioning, DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.latent_bank import LatentBank
from safeweights.diffusion.low_rank import LowRank, layer_weights
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import embed_all
from safeweights.diffusion.search import text_length
from safeweights.diffusion.text_pairs import pairs_of, retainable
from safeweights.diffusion.training import descend


@dataclass(frozen=True, kw_only=True)
class SPM:
    """Hang a membrane of one dimension on every layer that moves the concept away and lets everything else through.

    eps_on(x_t, c)  <-  eps_off(x_t, c_0) - eta [eps_off(x_t, c) - eps_off(x_t, c_0)]                  (eq. 4, erasing)
    eps_on(x_t, c') <-  eps_off(x_t, c'),   c' ~ (1 - cos(c', c))                                    (eq. 6, latent anchoring)
    on, off: with and without adapters W + up down of rank 1, each concept's own.

    Needs: linear or convolution layers.   Cost: one pass with adapters forward and backward on batch_size + anchors latents a
    step and one without on anchors.
    What is static: the paper weighs the adapters anew for every prompt by how much of the concept it says (`permeability`). A
    released folder has no such gate: its weights hold the adapters at weight 1 for every prompt, and that is what is audited.
    `facilitated` gives the model as the gate would have it for one prompt.
    Differs from the reference code: no warm-up and restarts of the learning rate; Adam of full precision; anchors are random
    embeddings and retained prompts in turn, all of them (there every second one is the empty prompt), and their latents are the
    concept's own; c_0 is the prompt without the concept, for the term alone the empty prompt.
    """

    name: ClassVar[str] = "spm"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "lam": 1000.0, "lr": 1e-4, "steps": 3000, "batch_size": 1, "anchors": 4, "anchor_with": "random", "prompts": "term",
            "trajectories": 64, "ddim_steps": 30,
        },
    }  # fmt: skip

    parameters: str = "transformer"
    """Where adapters hang: transformer (every layer of the UNet's transformer blocks), xattn, or another group."""
    lam: float = 20.0
    """Weight of latent anchoring, lambda in eq. 7; >= 0."""
    eta: float = 1.0
    """Strength of the negative guidance; unitless, > 0."""
    steps: int = 200
    """Optimiser steps for each concept; > 0."""
    lr: float = 3e-3
    """Adam's learning rate; > 0."""
    batch_size: int = 4
    """Noisy latents a step; > 0."""
    anchors: int = 4
    """Anchors a step; > 0."""
    anchor_with: Literal["random", "retain", "both"] = "both"
    """What anchors are: random embeddings as long as the concept's (the paper), retained prompts, or both in turn."""
    prompts: Literal["term", "prompts", "both"] = "both"
    """What stands for the concept: its term alone (the paper), its prompts, or both in turn."""
    trajectories: int = 27
    """DDIM trajectories drawn once for each concept, its prompts in turn; > 0."""
    ddim_steps: int = 20
    """Steps of a trajectory; > 0."""
    guidance: float = 3.0
    """Guidance of the trajectories."""

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size, self.anchors, self.trajectories, self.ddim_steps)
        if min(counts) < 1 or min(self.lr, self.eta) <= 0 or self.lam < 0:
            raise ValueError("steps, batch_size, anchors, trajectories, ddim_steps, lr and eta must be above zero, lam not below")

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
        weights = dict(model.named_parameters())
        names = layer_weights(model, self.parameters)
        kept = ["", *retainable(retain, concepts)]
        tensors = {name: weights[name].detach().float().clone() for name in names}
        losses = [0.0]
        for concept in concepts:
            adapters, losses = self._learn(model, concept, names, kept, seed, workspace.child(concept.name))
            for name, delta in adapters.deltas().items():
                tensors[name] += delta
        return Protection(
            method=self.name,
            concepts=tuple(concept.name for concept in concepts),
            tensors={name: tensor.to(weights[name].dtype) for name, tensor in tensors.items()},
            settings=describe(self),
            cost={"steps": self.steps * len(concepts), "eps_calls": model.calls.eps - calls, "loss": losses[-1]},
        )

    def _learn(
        self, model: DiffusionModel, concept: Concept, names: Sequence[str], kept: Sequence[str], seed: int, workspace: Workspace
    ) -> tuple[LowRank, list[float]]:
        """One concept's adapters and their losses."""
        pairs = pairs_of(concept, self.prompts)
        texts = [pair.text for pair in pairs]
        bank = LatentBank.sample(
            model,
            texts,
            n=max(self.trajectories, len(texts)),
            sampling=Sampling(steps=self.ddim_steps, guidance_scale=self.guidance),
            rng=generator("spm bank", seed, concept.name),
            workspace=workspace,
        )
        c, c_0 = embed_all(model, texts), embed_all(model, ["" if pair.text == pair.term else pair.guide for pair in pairs])
        bank.precompute("eps_without", lambda batch: model.eps(batch.x_t, batch.t, c_0[batch.prompt]))
        retained = embed_all(model, kept)
        adapters = LowRank(model, names, seed=seed)

        def loss_at(step: int) -> Tensor:
            rng = generator("spm", seed, concept.name, step)
            batch, other = bank.draw(self.batch_size, rng), bank.draw(self.anchors, rng)
            use = self.anchor_with if self.anchor_with != "both" else ("random", "retain")[step % 2]
            pool = retained if use == "retain" else None
            c_anchor = anchor(c[other.prompt], pool, rng)
            with torch.no_grad():
                off = model.eps(other.x_t, other.t, c_anchor)
            with adapters.on(model):
                x_t, t = torch.cat([batch.x_t, other.x_t]), torch.cat([batch.t, other.t])
                on = model.eps(x_t, t, Conditioning.cat([c[batch.prompt], c_anchor]))
            eps_0 = batch.outputs["eps_without"]
            erased = mse_loss(on[: self.batch_size], eps_0 - self.eta * (batch.eps_c - eps_0))
            return erased + self.lam * mse_loss(on[self.batch_size :], off)

        losses = descend(
            adapters.parameters(),
            loss_at,
            steps=self.steps,
            lr=self.lr,
            workspace=workspace,
            description="erasing (spm)",
            facts={"seed": seed, "texts": texts, "retain": list(kept), "settings": describe(self)},
        )
        return adapters, losses


def anchor(c: Conditioning, pool: Conditioning | None, rng: torch.Generator) -> Conditioning:
    """One anchor for each row of c (B, L, D), more often the less it is like that row: from ``pool``, or of random direction.

    A random one has 0.8 to 1.2 times the row's length. Each is accepted with probability 1 - cos; the tenth try always is.
    """
    chosen = c.states.clone()
    open_ = torch.ones(len(c), dtype=torch.bool)
    for attempt in range(10):
        if pool is None:
            direction = torch.randn(c.states.shape, generator=rng).to(c.states).flatten(1)
            length = c.states.flatten(1).norm(dim=1, keepdim=True) * (0.8 + 0.4 * torch.rand((len(c), 1), generator=rng)).to(
                c.states
            )
            tried = (direction / direction.norm(dim=1, keepdim=True) * length).view_as(c.states)
        else:
            tried = pool.states[torch.randint(len(pool), (len(c),), generator=rng).to(c.states.device)]
        alike = cosine_similarity(tried.flatten(1), c.states.flatten(1)).cpu()
        taken = open_ & ((torch.rand(len(c), generator=rng) < 1 - alike) | torch.tensor(attempt == 9))
        chosen[taken.to(chosen.device)] = tried[taken.to(chosen.device)]
        open_ = open_ & ~taken
    return Conditioning(chosen)


@torch.no_grad()
def permeability(model: DiffusionModel, prompts: Sequence[str], concept: Concept) -> Tensor:
    """How wide a concept's membrane is for each prompt, (B,) in [0, 1]: the paper's facilitated transport.

    The larger of two: the cosine of the prompt's and the term's text states, and the share of the term's tokens in the prompt.
    """
    states, term = embed_all(model, prompts).states, embed_all(model, [concept.term]).states
    alike = cosine_similarity(states.flatten(1), term.flatten(1)).clamp(0, 1)
    rows = model.tokenize([concept.term, *prompts])
    words = [set(row[1 : 1 + n]) for row, n in zip(rows.tolist(), text_length(model, rows).tolist(), strict=True)]
    shares = [len(words[0] & said) / len(words[0]) for said in words[1:]]
    return torch.maximum(alike, torch.tensor(shares, device=alike.device))


def facilitated(model: DiffusionModel, protection: Protection, concept: Concept, prompt: str) -> DiffusionModel:
    """``model`` with the membrane of ``protection``, made for this concept alone, as wide as the prompt asks for."""
    width, base = float(permeability(model, [prompt], concept)), dict(model.named_parameters())
    return model.with_tensors({name: torch.lerp(base[name].detach(), W, width) for name, W in protection.tensors.items()})
