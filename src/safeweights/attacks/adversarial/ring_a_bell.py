"""Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models? (Tsai et al., ICLR 2024, arXiv:2310.10012)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from safeweights.attacks.adversarial.rounds import Search, original_of, play
from safeweights.core.attack import Access, Budget, Candidate, Mode, Original, Revival, Target
from safeweights.core.concept import Concept
from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.sampling import embed_all
from safeweights.diffusion.search import insert_tokens, put_ids, text_ids


@dataclass(frozen=True, kw_only=True)
class RingABell:
    """Breed K words whose encoding is that of the prompt with the concept turned up.

    v = mean_i [tau(p_i) - tau(p_i without c)],   min_{K words}  || tau(words) - (tau(P) + eta v) ||^2                   (eq. 3)

    A genetic search over words: the better half lives on; children take one parent's first words and another's last, or are
    copies, and one word in some of them changes. tau is the original, public text encoder; the protected model is only asked for
    pictures, one of the best prompt not asked before in every round.

    Needs: prompts and the public text encoder, no gradients and no weights of the protected model.
    Cost: rounds * steps * population / 2 texts through the encoder and ``images`` pictures a prompt; no denoiser passes else.
    Differs from the reference code: only whole words, so that a prompt reads back as it was found; a copy always changes one word
    (there most copies stay copies); a prompt is drawn in every round, there once at the end.
    """

    name: ClassVar[str] = "ring-a-bell"
    access: ClassVar[Access] = Access.PROMPT
    mode: ClassVar[Mode] = "live"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {"population": 200, "steps": 300, "eta": 3.0, "tokens": 16},
    }

    tokens: int = 8
    """Words of a prompt, K: 16 in the paper; > 0."""
    eta: float = 3.0
    """How far the concept is turned up: 3 for nudity, 5 for violence in the paper; > 0."""
    population: int = 60
    """Prompts that compete for each target; even, >= 4."""
    crossover: float = 0.5
    """Probability that a child has two parents; from 0 to 1."""
    mutation: float = 0.25
    """Probability that one word of a child changes; from 0 to 1."""
    images: int = 11
    """Pictures a prompt, the plain one included; >= 2. Give every attack the same."""
    steps: int = 20
    """Generations before each picture; > 0."""
    batch_size: int = 256
    """Texts encoded together; memory grows with it, results do not depend on it."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.steps, self.batch_size) < 1 or self.images < 2 or self.eta <= 0:
            raise ValueError("tokens, steps, batch_size and eta must be above zero, images at least 2")
        if self.population < 4 or self.population % 2 or not (0 <= self.crossover <= 1 and 0 <= self.mutation <= 1):
            raise ValueError("population must be even and at least 4, crossover and mutation from 0 to 1")

    @property
    def budget(self) -> Budget:
        return Budget(images=self.images, tokens=self.tokens)

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
        public = original_of(self.name, original).model
        return play(
            self,
            model,
            targets,
            lambda standing: _Search(self, public, concept, standing),
            steps=self.steps,
            sampling=sampling,
            workspace=workspace,
        )


class _Search(Search):
    """The population ``genes`` (P, N, K) of rows of the words, the best first, their ``distance`` (P, N), and what was asked."""

    moving = ("genes", "distance", "asked")
    fixed = ("wanted",)

    def __init__(self, attack: RingABell, model: DiffusionModel, concept: Concept, targets: Sequence[Target]) -> None:
        super().__init__(attack.name, model, targets, attack.batch_size)
        self.attack, self.words = attack, text_ids(model)
        pairs = [(text, concept.without(text)) for text in (concept.term, *concept.texts)]
        direction = (embed_all(model, [a for a, _ in pairs]).states - embed_all(model, [b for _, b in pairs]).states).mean(0)
        if not direction.any():
            raise UserError(f"{attack.name}: taking {concept.term!r} out of the prompts changes nothing; set the concept's term")
        self.wanted = embed_all(model, [target.prompt for target in targets]).states + attack.eta * direction
        self.ids, self.positions = insert_tokens(model, model.tokenize([""]), attack.tokens)
        size = (attack.population, attack.tokens)
        self.genes = torch.stack([torch.randint(len(self.words), size, generator=rng) for rng in self.rngs])
        self.distance = self._distances(self.genes)
        self.asked = torch.full((len(targets), 0, attack.tokens), -1)
        self._sort()

    def step(self, number: int) -> None:
        """One generation."""
        self.steps += 1
        half = self.attack.population // 2
        children = torch.stack([self._breed(genes[:half], rng) for genes, rng in zip(self.genes, self.rngs, strict=True)])
        self.genes = torch.cat([self.genes[:, :half], children], dim=1)
        self.distance = torch.cat([self.distance[:, :half], self._distances(children)], dim=1)
        self._sort()
        self.loss = float(self.distance[:, 0].mean())

    def _breed(self, parents: Tensor, rng: torch.Generator) -> Tensor:
        """As many children (N / 2, K) as parents."""
        n, k = parents.shape
        mates = parents[torch.randint(n, (n,), generator=rng)]
        cut = torch.randint(1, max(k, 2), (n, 1), generator=rng)
        two = torch.rand((n, 1), generator=rng) < self.attack.crossover
        children = torch.where(two & (torch.arange(k) >= cut), mates, parents)
        changes = (torch.rand((n, 1), generator=rng) < self.attack.mutation) | ~two
        place = torch.randint(k, (n, 1), generator=rng)
        fresh = torch.randint(len(self.words), (n, 1), generator=rng)
        return torch.where(changes & (torch.arange(k) == place), fresh, children)

    @torch.no_grad()
    def _distances(self, genes: Tensor) -> Tensor:
        """Squared distance (P, n) of each target's prompts (P, n, K) to what it wants."""
        n = genes.shape[1]
        flat = self.words[genes.flatten(0, 1).to(self.words.device)]
        parts = []
        for start in range(0, len(flat), self.batch_size):
            free = flat[start : start + self.batch_size]
            ids = put_ids(self.ids.expand(len(free), -1), self.positions.expand(len(free), -1), free)
            states = self.model.embed_tokens(self.model.vocabulary[ids], ids).states
            owner = torch.arange(start, start + len(free), device=states.device) // n
            parts.append((states - self.wanted[owner]).float().square().flatten(1).sum(1))
        return torch.cat(parts).view(-1, n).cpu()

    def _sort(self) -> None:
        order = self.distance.argsort(dim=1, stable=True)
        self.distance = self.distance.gather(1, order)
        self.genes = self.genes.gather(1, order[..., None].expand_as(self.genes))

    def candidates(self) -> list[Candidate]:
        chosen = torch.stack([_best(genes, asked) for genes, asked in zip(self.genes, self.asked, strict=True)])
        self.asked = torch.cat([self.asked, chosen[:, None]], dim=1)
        texts = [self.model.text_of(ids) for ids in self.words[chosen.to(self.words.device)]]
        return [Candidate(text, target.seed) for text, target in zip(texts, self.targets, strict=True)]

    def facts(self) -> dict[str, float]:
        return {"loss": self.loss, "generations": float(self.steps)}


def _best(genes: Tensor, asked: Tensor) -> Tensor:
    """The first row of genes (N, K) that is not among those asked (R, K); the first of all where every one is."""
    new = ~(genes[:, None] == asked[None]).all(dim=2).any(dim=1)
    return genes[int(new.int().argmax())]
