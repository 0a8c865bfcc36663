"""Forget-Me-Not: Learning to Forget in Text-to-Image Diffusion Models (Zhang et al., CVPR workshops 2024, arXiv:2303.17591)."""

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
from safeweights.diffusion.drawn_set import DrawnSets, asking
from safeweights.diffusion.noise import generator
from safeweights.diffusion.search import find_term, text_length
from safeweights.diffusion.training import descend


@dataclass(frozen=True, kw_only=True)
class FMN:
    """Turn cross-attention away from the tokens that say the concept (attention re-steering).

    min  E_x || concat_l A_l[:, :, P] ||_2,   A_l = cross-attention maps of layer l on noised pictures of the concept,  (eq. 3)
    P = positions of the concept's tokens;   retaining adds  beta L_r(theta)

    Needs: cross-attention layers with to_q and to_k.   Cost: one student pass forward and backward a step, two when retaining,
    and the maps computed once more; pictures are made once.
    Differs from the reference code: pictures are the model's own instead of a folder; no textual inversion first; the norm is per
    picture and divided by the square root of the number of map rows, so that it does not grow with batch and picture size; beta.
    """

    name: ClassVar[str] = "fmn"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "parameters": "full", "positions": "term+end", "beta": 0.0, "lr": 2e-6, "steps": 35, "batch_size": 1,
            "weight_decay": 0.01, "pictures": 8, "noises": 20, "ddim_steps": 50, "guidance": 7.5,
        },
    }  # fmt: skip

    parameters: str = "xattn"
    """What is trained: full, xattn (styles in the reference code), or another parameter group."""
    positions: Literal["term", "term+end", "onwards"] = "term+end"
    """Positions attention leaves: the term's tokens, with the first end token, or all from the term on, padding included."""
    beta: float = 10.0
    """Weight of the base model's predictions on retained pictures; >= 0 (the paper has none)."""
    steps: int = 120
    """Optimiser steps; > 0."""
    lr: float = 1e-3
    """AdamW's learning rate; > 0."""
    batch_size: int = 4
    """Noisy latents a step, and as many retained ones; > 0."""
    weight_decay: float = 0.0
    """AdamW's weight decay; >= 0."""
    pictures: int = 27
    """Pictures drawn once for each concept, its term and prompts in turn; > 0."""
    retained: int = 40
    """Retained pictures drawn once, the prompts in turn; > 0."""
    noises: int = 20
    """Noisy latents made of each picture; > 0."""
    ddim_steps: int = 20
    """DDIM steps of a picture; > 0."""
    guidance: float = 4.0
    """Guidance of the pictures."""

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size, self.pictures, self.retained, self.noises, self.ddim_steps)
        if min(counts) < 1 or self.lr <= 0:
            raise ValueError("steps, batch_size, pictures, retained, noises, ddim_steps and lr must be above zero")
        if min(self.beta, self.weight_decay) < 0:
            raise ValueError("beta and weight_decay must not be below zero")

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
        sets = DrawnSets.draw(
            model, concepts, retain,
            pictures=self.pictures, retained=self.retained, noises=self.noises,
            sampling=Sampling(steps=self.ddim_steps, guidance_scale=self.guidance), seed=seed, workspace=workspace,
        )  # fmt: skip
        marked = self._positions(model, sets.forget.prompts, [concept.term for concept in concepts])
        student = model.fork(self.parameters)
        ask = asking(student, sets.forget.prompts)
        keep = sets.retaining(student, self.batch_size, "base", "fmn", seed)

        def loss_at(step: int) -> Tensor:
            batch = sets.forget.draw(self.batch_size, generator("fmn", seed, step))
            with attention_maps(student) as maps:
                student.eps(batch.x_t, batch.t, ask(batch))
            loss = resteering(list(maps.values()), marked[batch.prompt])
            return loss + self.beta * keep(step) if self.beta else loss

        losses = descend(
            student.trainable(),
            loss_at,
            steps=self.steps,
            lr=self.lr,
            weight_decay=self.weight_decay,
            optimizer="adamw",
            workspace=workspace,
            description="erasing (fmn)",
            facts={"seed": seed, "texts": [sets.forget.prompts, sets.retain.prompts], "settings": describe(self)},
        )
        return Protection(
            method=self.name,
            concepts=tuple(concept.name for concept in concepts),
            tensors=student.edited(),
            settings=describe(self),
            cost={"steps": self.steps, "eps_calls": model.calls.eps - calls, "loss": losses[-1]},
        )

    def _positions(self, model: DiffusionModel, prompts: Sequence[str], terms: Sequence[str]) -> Tensor:
        """True (prompts, L) at the positions attention shall leave; a prompt without a term is marked over its whole text."""
        ids = model.tokenize(prompts)
        marked = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        found = [find_term(model, ids, term) for term in terms]
        for row, end in enumerate((text_length(model, ids) + 1).tolist()):
            places = [where[row] for where in found if where[row]] or [range(1, end)]
            for place in places:
                marked[row, place.start : place.stop] = True
                if self.positions == "onwards":
                    marked[row, place.start :] = True
            if self.positions == "term+end":
                marked[row, end] = True
        return marked


def resteering(maps: Sequence[Tensor], marked: Tensor) -> Tensor:
    """Mean over pictures of the root mean square, over all heads and picture positions of all layers, of what they attend to at
    marked tokens: ``maps`` A_l (B, heads, N_l, L), ``marked`` (B, L). 0 where nothing is attended, 1 where one token takes all.
    """
    squares = torch.stack([(A.square() * marked[:, None, None]).sum((1, 2, 3)) for A in maps]).sum(0)
    rows = sum(A.shape[1] * A.shape[2] for A in maps)
    return (squares / rows).clamp(min=1e-12).sqrt().mean()
