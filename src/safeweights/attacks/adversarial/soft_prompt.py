"""Soft prompts: the strongest input a prompt search could hope for (the space of Lester et al., EMNLP 2021, arXiv:2104.08691;
the objective of Zhang et al., ECCV 2024, arXiv:2310.11868)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from safeweights.attacks.adversarial.rounds import Search, adam, check_range, mean_error, noised, pictures_of, play
from safeweights.core.attack import Access, Budget, Candidate, Mode, Original, Revival, Target
from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.search import insert_tokens, put_embeddings, random_ids, text_ids


@dataclass(frozen=True, kw_only=True)
class SoftPrompt:
    """Learn k free embeddings before the prompt under which the erased model denoises a picture of the concept.

    min_v  E_{t,eps} || eps - eps_theta(alpha_t z + sigma_t eps, t, tau([v | prompt])) ||^2,   v in R^(k x d)

    v starts at random words and moves by Adam; no word has to stand behind it, so that a search over words (UnlearnDiffAtk, P4D)
    optimises the same loss over a subset: where this fails, better words are unlikely to help.

    Needs: gradients of the erased model and its input embeddings, which nobody can type; one picture of the concept a prompt.
    Cost: rounds * steps * noises denoiser passes forward and backward and ``images`` pictures a prompt, all prompts in one batch.
    Differs from the reference code: there is none. Timesteps are drawn anew in every step.
    """

    name: ClassVar[str] = "soft-prompt"
    access: ClassVar[Access] = Access.GRADIENT
    mode: ClassVar[Mode] = "live"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {"tokens": 5, "steps": 100, "noises": 1, "lr": 0.1, "batch_size": 4},
    }

    tokens: int = 4
    """Free embeddings before the prompt, k; > 0."""
    images: int = 11
    """Pictures a prompt, the plain one included; >= 2. Give every attack the same."""
    steps: int = 20
    """Gradient steps before each picture; > 0."""
    noises: int = 4
    """Draws of (t, eps) that a gradient step averages over; > 0."""
    lr: float = 0.3
    """Adam's step in units of the vocabulary's spread in one coordinate; > 0."""
    t_low: int = 10
    """Lowest timestep, 0 <= t_low <= t_high."""
    t_high: int = 990
    """Highest timestep, below the model's number of training timesteps."""
    batch_size: int = 16
    """Prompts searched together; memory grows with it, results do not depend on it."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.steps, self.noises, self.batch_size) < 1 or self.images < 2 or self.lr <= 0:
            raise ValueError("tokens, steps, noises, batch_size and lr must be above zero, images at least 2")
        if not 0 <= self.t_low <= self.t_high:
            raise ValueError("0 <= t_low <= t_high must hold")

    @property
    def budget(self) -> Budget:
        rounds = self.images - 1
        return Budget(images=self.images, gradient_steps=rounds * self.steps, tokens=self.tokens, timesteps=rounds)

    def revive(
        self,
        model: DiffusionModel,
        concept: Concept,
        targets: Sequence[Target],
        *,
        sampling: Sampling,
        original: Original | None = None,
        workspace: Workspace | None = None,
    ) -> Generator[Revival, Sequence[bool], None]:
        check_range(self.name, model, self.t_high)
        return play(
            self,
            model,
            targets,
            lambda standing: _Search(self, model, standing),
            steps=self.steps,
            sampling=sampling,
            workspace=workspace,
        )


class _Search(Search):
    """The free embeddings ``free`` (P, k, d) of all standing prompts, and their Adam moments."""

    moving = ("free", "first", "second")
    fixed = ("ids", "positions", "x_0")

    def __init__(self, attack: SoftPrompt, model: DiffusionModel, targets: Sequence[Target]) -> None:
        super().__init__(attack.name, model, targets, attack.batch_size)
        self.attack = attack
        ids = model.tokenize([target.prompt for target in targets])
        self.ids, self.positions = insert_tokens(model, ids, attack.tokens)
        self.x_0 = pictures_of(attack.name, model, targets)
        vocabulary = model.vocabulary.float()
        self.free = vocabulary[random_ids(text_ids(model), attack.tokens, self.rngs)]
        self.first, self.second = torch.zeros_like(self.free), torch.zeros_like(self.free)
        self.lr = attack.lr * float(vocabulary.std(dim=0).mean())

    def gradient_of(self, rows: slice) -> tuple[Tensor, Tensor]:
        attack, model, ids = self.attack, self.model, self.ids[rows]
        x_t, t, eps = noised(model, self.x_0[rows], attack.noises, attack.t_low, attack.t_high, self.rngs[rows])
        free = self.free[rows].clone().requires_grad_()
        c = model.embed_tokens(put_embeddings(model, ids, self.positions[rows], free), ids)
        loss = mean_error(model, x_t, t, c, eps)
        (gradient,) = torch.autograd.grad(loss.sum(), free)
        return loss.detach(), gradient

    def move(self, rows: slice, gradient: Tensor) -> None:
        self.free[rows] = adam(self.free[rows], gradient, self.first[rows], self.second[rows], self.steps, self.lr)

    @torch.no_grad()
    def candidates(self) -> list[Candidate]:
        c = self.model.embed_tokens(put_embeddings(self.model, self.ids, self.positions, self.free), self.ids)
        states = c.states.float().cpu()
        return [Candidate(target.prompt, target.seed, row) for target, row in zip(self.targets, states, strict=True)]
