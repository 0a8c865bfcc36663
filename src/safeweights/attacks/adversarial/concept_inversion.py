"""Circumventing Concept Erasure Methods For Text-to-Image Generative Models (Pham et al., ICLR 2024, arXiv:2308.01508)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from safeweights.attacks.adversarial.rounds import Search, adam, check_range, mean_error, noised, original_of, play
from safeweights.core.attack import Access, Budget, Candidate, Mode, Original, Revival, Target
from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import generator
from safeweights.diffusion.search import find_term, insert_tokens, put_embeddings, random_ids, term_ids, text_ids


@dataclass(frozen=True, kw_only=True)
class ConceptInversion:
    """Learn one new word for the concept on the erased model, from a handful of pictures.

    min_v  E_{i,t,eps} || eps - eps_theta(alpha_t z_i + sigma_t eps, t, tau("… v …")) ||^2,   v in R^(k x d)             (eq. 2)

    z_i are pictures of the concept that the original model made for the concept's own prompts; v takes the place of the concept's
    term in them, and in every prompt under attack, where it stands before a prompt that lacks the term. It is one word for all
    prompts: what one learns about the concept, not about a picture.

    Needs: gradients of the erased model and its input embeddings, which nobody can type; ``pictures`` pictures of the concept.
    Cost: rounds * steps * batch_size denoiser passes forward and backward for the concept, ``images`` pictures a prompt.
    Differs from the reference code: Adam without weight decay, no accumulation, so the paper's lr of 5e-3, which it multiplies by
    pictures a step, is multiplied by 4 instead of 16; the captions of the pictures are their prompts (its image-to-prompt mode);
    lr counts in units of the vocabulary's spread, 0.014 in CLIP ViT-L/14.
    """

    name: ClassVar[str] = "concept-inversion"
    access: ClassVar[Access] = Access.GRADIENT
    mode: ClassVar[Mode] = "live"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {"tokens": 1, "pictures": 25, "steps": 500, "batch_size": 4, "lr": 1.4},
    }

    tokens: int = 4
    """Embeddings of the new word, k: 1 in the paper, whose embeddings are six times as wide as a small model's; > 0."""
    pictures: int = 8
    """Pictures of the concept to learn from; > 0."""
    init: str = ""
    """A word to start from ("art" in the paper); empty: a random one."""
    images: int = 11
    """Pictures a prompt, the plain one included; >= 2. Give every attack the same."""
    steps: int = 20
    """Gradient steps before each picture; > 0."""
    batch_size: int = 8
    """Noised pictures in a gradient step; > 0."""
    lr: float = 0.3
    """Adam's step in units of the vocabulary's spread in one coordinate; > 0."""
    t_low: int = 0
    """Lowest timestep, 0 <= t_low <= t_high."""
    t_high: int = 999
    """Highest timestep, below the model's number of training timesteps."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.pictures, self.steps, self.batch_size) < 1 or self.images < 2 or self.lr <= 0:
            raise ValueError("tokens, pictures, steps, batch_size and lr must be above zero, images at least 2")
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
        world = original_of(self.name, original)
        return play(
            self,
            model,
            targets,
            lambda standing: _Search(self, model, concept, world, standing),
            steps=self.steps,
            sampling=sampling,
            workspace=workspace,
        )


class _Search(Search):
    """The new word ``word`` (1, k, d), shared by all prompts, and its Adam moments."""

    shared = ("word", "first", "second")
    fixed = ("ids", "positions")

    def __init__(
        self, attack: ConceptInversion, model: DiffusionModel, concept: Concept, original: Original, targets: Sequence[Target]
    ) -> None:
        super().__init__(attack.name, model, targets, batch_size=1)
        self.attack, self.concept = attack, concept
        self.ids, self.positions = self._places([target.prompt for target in targets])
        texts = [concept.texts[i % len(concept.texts)] for i in range(attack.pictures)]
        self.captions, self.words = self._places(texts)
        with torch.no_grad():
            self.x_0 = torch.cat([model.encode(picture[None].to(model.device)) for picture in original.pictures(attack.pictures)])
        vocabulary = model.vocabulary.float()
        if attack.init:
            start = torch.tensor([term_ids(model, attack.init)[0]] * attack.tokens, device=vocabulary.device)[None]
        else:
            start = random_ids(text_ids(model), attack.tokens, [generator(attack.name, concept.name)])
        self.word = vocabulary[start]
        self.first, self.second = torch.zeros_like(self.word), torch.zeros_like(self.word)
        self.lr = attack.lr * float(vocabulary.std(dim=0).mean())

    def _places(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) with room for the new word, and its positions (B, k): where the term stood, else in front."""
        term, parts = term_ids(self.model, self.concept.term), []
        for prompt in prompts:
            ids = self.model.tokenize([prompt])
            there = bool(find_term(self.model, ids, self.concept.term)[0])
            parts.append(insert_tokens(self.model, ids, self.attack.tokens, "replace" if there else "prefix", term))
        return torch.cat([ids for ids, _ in parts]), torch.cat([places for _, places in parts])

    def step(self, number: int) -> None:
        """One step of the word; it learns from the pictures alone, whichever prompts still stand."""
        self.steps += 1
        attack, model = self.attack, self.model
        rng = generator(attack.name, self.concept.name, self.steps)
        rows = torch.randint(len(self.x_0), (attack.batch_size,), generator=rng).to(self.x_0.device)
        x_t, t, eps = noised(model, self.x_0[rows], 1, attack.t_low, attack.t_high, [rng] * attack.batch_size)
        word, ids = self.word.clone().requires_grad_(), self.captions[rows]
        free = word.expand(len(rows), -1, -1)
        c = model.embed_tokens(put_embeddings(model, ids, self.words[rows], free), ids)
        loss = mean_error(model, x_t, t, c, eps).mean()
        (gradient,) = torch.autograd.grad(loss, word)
        self.word = adam(self.word, gradient, self.first, self.second, self.steps, self.lr)
        self.loss, self.gradient = float(loss.detach()), float(gradient.norm())

    @torch.no_grad()
    def candidates(self) -> list[Candidate]:
        free = self.word.expand(len(self.ids), -1, -1)
        c = self.model.embed_tokens(put_embeddings(self.model, self.ids, self.positions, free), self.ids)
        states = c.states.float().cpu()
        return [Candidate(target.prompt, target.seed, row) for target, row in zip(self.targets, states, strict=True)]
