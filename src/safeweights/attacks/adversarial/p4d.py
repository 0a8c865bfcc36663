"""Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts
(Chin et al., ICML 2024, arXiv:2309.06135)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from safeweights.attacks.adversarial.rounds import Search, adam, check_range, mean_error, noised, original_of, pictures_of, play
from safeweights.core.attack import Access, Budget, Candidate, Mode, Original, Revival, Target
from safeweights.core.concept import Concept
from safeweights.core.model import Conditioning, DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.sampling import embed_all
from safeweights.diffusion.search import insert_every, insert_tokens, nearest, random_ids, text_ids, text_length


@dataclass(frozen=True, kw_only=True)
class P4D:
    """Search a prompt under which the erased model predicts what the original one predicts for the concept.

    min_c'  E_{t,eps} || eps_theta(x_t, t, tau(c')) - eps_o(x_t, t, tau_o(c)) ||^2,   c' = nearest words of P         (eq. 5)

    The gradient is taken at the words nearest to the free embeddings P by cosine and moves P itself (AdamW). variant "n" replaces
    the prompt by ``tokens`` free words (P4D-N); variant "k" keeps it and puts a free word before every ``every`` of its words
    (P4D-K). x_t is a noised picture of the concept.

    Needs: gradients of the erased model, the original model, one picture of the concept a prompt.
    Cost: rounds * steps * noises passes of the erased model forward and backward, as many forward of the original one, and
    ``images`` pictures a prompt, all prompts in one batch.
    Differs from the reference code: every prompt it checks is drawn and judged, so that none has to be chosen by CLIP similarity;
    only whole words can be chosen, and variant k counts words, not tokens, so that no word is torn; lr counts in units of the
    vocabulary's spread.
    """

    name: ClassVar[str] = "p4d"
    access: ClassVar[Access] = Access.GRADIENT
    mode: ClassVar[Mode] = "live"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {"images": 61, "steps": 50, "noises": 1, "lr": 7.0, "decay": 0.01, "batch_size": 4},
    }

    variant: Literal["n", "k"] = "n"
    """n: free words only; k: the prompt with free words in between."""
    tokens: int = 16
    """Free words of variant n; > 0."""
    every: int = 3
    """Words of the prompt after each free word of variant k; > 0."""
    images: int = 11
    """Pictures a prompt, the plain one included; >= 2. Give every attack the same."""
    steps: int = 20
    """Gradient steps before each picture; > 0."""
    noises: int = 2
    """Draws of (t, eps) that a gradient step averages over, 1 in the paper; > 0."""
    lr: float = 1.0
    """AdamW's step in units of the vocabulary's spread in one coordinate, 7 in the paper; > 0."""
    decay: float = 0.01
    """Share of the free embeddings that decays away in a step (lr times weight decay); >= 0."""
    t_low: int = 0
    """Lowest timestep, 0 <= t_low <= t_high."""
    t_high: int = 999
    """Highest timestep, below the model's number of training timesteps."""
    batch_size: int = 16
    """Prompts searched together; memory grows with it, results do not depend on it."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.every, self.steps, self.noises, self.batch_size) < 1 or self.images < 2 or self.lr <= 0:
            raise ValueError("tokens, every, steps, noises, batch_size and lr must be above zero, images at least 2")
        if not 0 <= self.t_low <= self.t_high or not 0 <= self.decay < 1:
            raise ValueError("0 <= t_low <= t_high and 0 <= decay < 1 must hold")

    @property
    def budget(self) -> Budget:
        rounds = self.images - 1
        tokens = self.tokens if self.variant == "n" else 0
        return Budget(images=self.images, gradient_steps=rounds * self.steps, tokens=tokens, timesteps=rounds)

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
        teacher = original_of(self.name, original).model
        return play(
            self,
            model,
            targets,
            lambda standing: _Search(self, model, teacher, standing),
            steps=self.steps,
            sampling=sampling,
            workspace=workspace,
        )


class _Search(Search):
    """The free embeddings of all standing prompts, ``free`` (P, L, d): those at ``where`` (P, L) count, and their moments."""

    moving = ("free", "first", "second")
    fixed = ("ids", "where", "x_0", "asked")

    def __init__(self, attack: P4D, model: DiffusionModel, teacher: DiffusionModel, targets: Sequence[Target]) -> None:
        super().__init__(attack.name, model, targets, attack.batch_size)
        self.attack, self.teacher = attack, teacher
        prompts = [target.prompt for target in targets]
        if attack.variant == "k":
            self.ids, self.where = insert_every(model, prompts, attack.every)
        else:
            self.ids, positions = insert_tokens(model, model.tokenize([""] * len(prompts)), attack.tokens)
            self.where = torch.zeros_like(self.ids, dtype=torch.bool).scatter(1, positions, True)
        self.x_0 = pictures_of(attack.name, model, targets)
        self.asked = embed_all(teacher, prompts).states
        self.words = text_ids(model)
        self.vocabulary = model.vocabulary.float()
        self.free = self.vocabulary[random_ids(self.words, self.ids.shape[1], self.rngs)]
        self.first, self.second = torch.zeros_like(self.free), torch.zeros_like(self.free)
        self.lr = attack.lr * float(self.vocabulary.std(dim=0).mean())

    def projected(self, rows: slice) -> Tensor:
        """Token ids (B, L) with the word nearest to each free embedding at its place."""
        words = self.words[nearest(self.free[rows], self.vocabulary[self.words])]
        return torch.where(self.where[rows], words, self.ids[rows])

    def gradient_of(self, rows: slice) -> tuple[Tensor, Tensor]:
        attack, model = self.attack, self.model
        x_t, t, _ = noised(model, self.x_0[rows], attack.noises, attack.t_low, attack.t_high, self.rngs[rows])
        with torch.no_grad():
            target = self.teacher.eps(x_t, t, Conditioning(self.asked[rows]).repeat(attack.noises))
        ids = self.projected(rows)
        at = self.vocabulary[ids].requires_grad_()
        loss = mean_error(model, x_t, t, model.embed_tokens(at, ids), target)
        (gradient,) = torch.autograd.grad(loss.sum(), at)
        return loss.detach(), gradient * self.where[rows][..., None]

    def move(self, rows: slice, gradient: Tensor) -> None:
        first, second = self.first[rows], self.second[rows]
        self.free[rows] = adam(self.free[rows], gradient, first, second, self.steps, self.lr, self.attack.decay)

    def candidates(self) -> list[Candidate]:
        ids = self.projected(slice(None))
        lengths = text_length(self.model, ids).tolist()
        texts = [self.model.text_of(row[1 : 1 + length]) for row, length in zip(ids, lengths, strict=True)]
        return [Candidate(text, target.seed) for text, target in zip(texts, self.targets, strict=True)]
