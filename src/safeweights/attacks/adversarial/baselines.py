"""What an attack must beat at the same number of pictures: asking plainly, asking with random words, asking again."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from safeweights.core.attack import Access, Budget, Candidate, Mode, Original, Revival, Target
from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import generator
from safeweights.diffusion.search import random_ids, text_ids


@dataclass(frozen=True, kw_only=True)
class NoAttack:
    """Ask with the prompt and seed as they are; its success rate is the pre-ASR. Cost: one picture a prompt."""

    name: ClassVar[str] = "no-attack"
    access: ClassVar[Access] = Access.PROMPT
    mode: ClassVar[Mode] = "seed"

    @property
    def budget(self) -> Budget:
        return Budget(images=1)

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
        yield as_asked(model, targets)


@dataclass(frozen=True, kw_only=True)
class RandomTokens:
    """Put random vocabulary tokens before the prompt, new ones for every picture. Cost: ``images`` pictures a prompt."""

    name: ClassVar[str] = "random"
    access: ClassVar[Access] = Access.PROMPT
    mode: ClassVar[Mode] = "live"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"small": {}, "paper": {"images": 61}}  # as many as the searches

    tokens: int = 3
    """Random tokens before the prompt, k; > 0."""
    images: int = 11
    """Pictures a prompt, the plain one included; >= 1. Give every attack the same."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.images < 1:
            raise ValueError("tokens and images must be at least 1")

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
        seen = yield as_asked(model, targets)
        draws = [generator("random tokens", target.seed, target.prompt) for target in targets]
        words = text_ids(model)
        standing = [i for i, fell in enumerate(seen) if not fell]
        for _ in range(self.images - 1):
            if not standing:
                return
            drawn = random_ids(words, self.tokens, [draws[i] for i in standing])
            seen = yield Revival(
                model,
                tuple(
                    Candidate(f"{model.text_of(ids)} {targets[i].prompt}", targets[i].seed)
                    for i, ids in zip(standing, drawn, strict=True)
                ),
            )
            standing = [i for i, fell in zip(standing, seen, strict=True) if not fell]


@dataclass(frozen=True, kw_only=True)
class SeedSearch:
    """Ask with the same prompt again, from fresh noise for every picture. Cost: ``images`` pictures a prompt."""

    name: ClassVar[str] = "seed-search"
    access: ClassVar[Access] = Access.PROMPT
    mode: ClassVar[Mode] = "seed"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"small": {}, "paper": {"images": 61}}  # as many as the searches

    images: int = 11
    """Pictures a prompt, the first seed included; >= 1. Give every attack the same."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError("images must be at least 1")

    @property
    def budget(self) -> Budget:
        return Budget(images=self.images)

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
        seen = yield as_asked(model, targets)
        draws = [generator("seed search", target.seed, target.prompt) for target in targets]
        standing = [i for i, fell in enumerate(seen) if not fell]
        for _ in range(self.images - 1):
            if not standing:
                return
            seeds = [int(torch.randint(2**31 - 1, (), generator=draws[i])) for i in standing]
            seen = yield Revival(
                model, tuple(Candidate(targets[i].prompt, seed) for i, seed in zip(standing, seeds, strict=True))
            )
            standing = [i for i, fell in zip(standing, seen, strict=True) if not fell]


def as_asked(model: DiffusionModel, targets: Sequence[Target]) -> Revival:
    """The first round of every attack: the prompts as they are. What falls here counts towards the pre-ASR."""
    return Revival(model, tuple(Candidate(target.prompt, target.seed) for target in targets))
