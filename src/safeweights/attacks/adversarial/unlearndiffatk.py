"""To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images
(Zhang et al., ECCV 2024, arXiv:2310.11868)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from safeweights.attacks.adversarial.rounds import Search, adam, check_range, mean_error, pictures_of, play
from safeweights.core.attack import Access, Budget, Candidate, Mode, Original, Revival, Target
from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import add_noise
from safeweights.diffusion.search import insert_tokens, project_to_simplex, put_embeddings, sample_one_hot, text_ids


@dataclass(frozen=True, kw_only=True)
class UnlearnDiffAtk:
    """Search k prompt tokens under which the erased model itself denoises a picture of the concept.

    min_c'  E_eps || eps - eps_theta(alpha_t z + sigma_t eps, t, tau(c')) ||^2                (eq. 8)

    over c' = [k tokens | prompt]; each token is a distribution over the vocabulary on the simplex, drawn one-hot in the forward
    pass with a straight-through gradient clipped to [-1, 1], moved by Adam and projected back. z is the encoded picture of the
    concept; t stays for ``steps`` steps, then the most likely tokens are decoded to text and drawn once, then the next t.

    Needs: gradients of the erased model with respect to its prompt, one picture of the concept a prompt; no other model.
    Cost: timesteps * steps denoiser forward and backward passes and timesteps + 1 pictures a prompt, all prompts in one batch.
    Differs from the reference code: timesteps are spread evenly over [t_low, t_high] (50 there); only whole words can be chosen
    (there pieces too, which read back differently once decoded); random draws come from one private generator a prompt (the
    global one is re-seeded there, so stages repeat their noise).
    """

    name: ClassVar[str] = "unlearndiffatk"
    access: ClassVar[Access] = Access.GRADIENT
    mode: ClassVar[Mode] = "live"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "noises": 1,
            "tokens": 5,
            "timesteps": 50,
            "steps": 40,
            "lr": 0.01,
            "t_low": 10,
            "t_high": 990,
            "batch_size": 4,
        },
    }

    tokens: int = 3
    """Free tokens before the prompt, k: 3 for styles and objects, 5 for nudity in the paper; > 0."""
    timesteps: int = 10
    """Number of timesteps attacked in turn, each ends with one picture; > 0."""
    steps: int = 40
    """Gradient steps at each timestep; > 0."""
    lr: float = 0.01
    """Adam's step on the simplex; > 0."""
    noises: int = 2
    """Noise draws a gradient step averages over, 1 in the paper; small latents say less in one draw; > 0."""
    weight_decay: float = 0.1
    """L2 weight decay on the relaxed tokens; >= 0."""
    t_low: int = 300
    """First timestep, 0 <= t_low <= t_high."""
    t_high: int = 900
    """Last timestep, below the model's number of training timesteps."""
    batch_size: int = 16
    """Prompts searched together; memory grows with it, results do not depend on it."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.timesteps, self.steps, self.noises, self.batch_size) < 1 or self.lr <= 0:
            raise ValueError("tokens, timesteps, steps, noises, batch_size and lr must be above zero")
        if self.weight_decay < 0:
            raise ValueError("weight_decay must not be negative")
        if not 0 <= self.t_low <= self.t_high:
            raise ValueError("0 <= t_low <= t_high must hold")

    @property
    def budget(self) -> Budget:
        return Budget(
            images=self.timesteps + 1,
            gradient_steps=self.timesteps * self.steps,
            tokens=self.tokens,
            timesteps=self.timesteps,
        )

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
    """The relaxed tokens of all standing prompts: ``relaxed`` (P, k, V) on the simplex, and their Adam moments."""

    moving = ("relaxed", "first", "second")
    fixed = ("ids", "positions", "x_0")

    def __init__(self, attack: UnlearnDiffAtk, model: DiffusionModel, targets: Sequence[Target]) -> None:
        super().__init__(attack.name, model, targets, attack.batch_size)
        self.attack = attack
        self.stages = torch.linspace(attack.t_low, attack.t_high, attack.timesteps).round().long().tolist()
        self.t = self.stages[0]
        self.words = text_ids(model)
        self.vocabulary = model.vocabulary.float()[self.words]
        ids = model.tokenize([target.prompt for target in targets])
        self.ids, self.positions = insert_tokens(model, ids, attack.tokens)
        self.x_0 = pictures_of(attack.name, model, targets)
        size = (len(targets), attack.tokens, len(self.words))
        self.relaxed = torch.full(size, 1.0 / len(self.words), device=self.vocabulary.device)
        self.first, self.second = torch.zeros_like(self.relaxed), torch.zeros_like(self.relaxed)

    def step(self, number: int) -> None:
        self.t = self.stages[number - 1]
        super().step(number)

    def gradient_of(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Each prompt's loss (P,) and its gradient with respect to the drawn one-hot tokens (P, k, V), clipped to [-1, 1]."""
        model, rngs, x_0, ids = self.model, self.rngs[rows], self.x_0[rows], self.ids[rows]
        draws = self.attack.noises
        eps = torch.cat([torch.randn((draws, *x_0.shape[1:]), generator=rng) for rng in rngs]).to(x_0)
        t = torch.full((len(eps),), self.t, device=x_0.device)
        one_hot = sample_one_hot(self.relaxed[rows], rngs).requires_grad_()
        c = model.embed_tokens(put_embeddings(model, ids, self.positions[rows], one_hot @ self.vocabulary), ids)
        x_t = add_noise(model, x_0.repeat_interleave(draws, dim=0), t, eps)
        loss = mean_error(model, x_t, t, c, eps)
        (gradient,) = torch.autograd.grad(loss.sum(), one_hot)
        return loss.detach(), gradient.clamp(-1, 1)

    def move(self, rows: slice, gradient: Tensor) -> None:
        U, attack = self.relaxed[rows], self.attack
        gradient = gradient + attack.weight_decay * U
        moved = adam(U, gradient, self.first[rows], self.second[rows], self.steps, attack.lr)
        self.relaxed[rows] = project_to_simplex(moved)

    def candidates(self) -> list[Candidate]:
        """The most likely tokens of every prompt as text, before its prompt."""
        best = self.words[self.relaxed.argmax(dim=-1)]
        texts = [f"{self.model.text_of(ids)} {target.prompt}".strip() for ids, target in zip(best, self.targets, strict=True)]
        return [Candidate(text, target.seed) for text, target in zip(texts, self.targets, strict=True)]
