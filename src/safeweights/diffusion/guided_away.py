"""Noisy latents of a concept and the prediction guided away from it (ESD: Gandikota et al., ICCV 2023, arXiv:2303.07345)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.latent_bank import Batch, LatentBank
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import embed_all

Prompts = Literal["term", "prompts", "both"]


def concept_texts(concept: Concept, prompts: Prompts) -> list[str]:
    """What stands for the concept: its term alone, its prompts, or both in turn."""
    return {"term": [concept.term], "prompts": [*concept.texts], "both": [concept.term, *concept.texts]}[prompts]


def away_bank(
    model: DiffusionModel, concept: Concept, prompts: Prompts, *, n: int, sampling: Sampling, seed: int, workspace: Workspace
) -> LatentBank:
    """Latents of ``n`` DDIM runs with the model's predictions "eps_c" and, for the prompts without the concept, "eps_without"."""
    texts = concept_texts(concept, prompts)
    bank = LatentBank.sample(
        model, texts, n=n, sampling=sampling, rng=generator("esd bank", seed, concept.name),
        workspace=workspace.child(concept.name),
    )  # fmt: skip
    if prompts == "term":
        bank.outputs["eps_without"] = bank.outputs["eps_none"]
    else:
        base = embed_all(model, ["" if text == concept.term else concept.without(text) for text in texts])
        bank.precompute("eps_without", lambda batch: model.eps(batch.x_t, batch.t, base[batch.prompt]))
    return bank


def away(batch: Batch, eta: float) -> Tensor:
    """eps_o(x_t) - eta [eps_o(x_t, c) - eps_o(x_t)] for rows of an `away_bank` (eq. 7)."""
    eps_0 = batch.outputs["eps_without"]
    return eps_0 - eta * (batch.eps_c - eps_0)
