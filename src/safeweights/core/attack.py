"""What an attack takes and gives. The attack proposes; the audit samples, judges and tells it which prompts still resist."""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor


class Access(enum.StrEnum):
    """What an attacker needs: prompts and pictures only, gradients of the released weights, or permission to change them."""

    PROMPT = "prompt"
    GRADIENT = "gradient"
    WEIGHTS = "weights"


@dataclass(frozen=True)
class Target:
    """One prompt under attack.

    ``seed`` fixes the initial noise of its pictures and, with it, every random draw the attack makes for this prompt,
    so that a batch of prompts gives what one prompt at a time would. ``reference`` (3, H, W) in [0, 1] is a picture of the
    concept made by the reference model, disjoint from what the audit judges on.
    """

    prompt: str
    seed: int
    reference: Tensor | None = None


@dataclass(frozen=True)
class Original:
    """The world before protection, for attacks that draw on it: the public model, and what it knew of the concept.

    ``pictures(n)`` gives n pictures (n, 3, H, W) in [0, 1] of the concept: of its own folder where it has one, else made
    for its prompts in turn (``concept.texts[i % len(concept.texts)]``); no judged picture is among them.
    """

    model: DiffusionModel
    pictures: Callable[[int], Tensor]


@dataclass(frozen=True)
class Candidate:
    """What an attack wants drawn for one target.

    ``states`` (L, D), where given, replaces the encoded prompt; ``latents`` (C, h, w) replaces the seed's initial noise.
    """

    prompt: str
    seed: int
    states: Tensor | None = None
    latents: Tensor | None = None


@dataclass(frozen=True)
class Revival:
    """One round of an attack: one candidate per target still standing, to be drawn from ``model``."""

    model: DiffusionModel
    candidates: tuple[Candidate, ...]
    facts: dict[str, float] = field(default_factory=dict)
    """What the attack knows of itself in this round (loss, gradient norm): doubts are read off it, success never is."""


@dataclass(frozen=True)
class Budget:
    """What an attack may spend on a prompt. ``images`` counts pictures judged, ``gradient_steps`` optimiser steps."""

    images: int
    gradient_steps: int = 0
    tokens: int = 0
    timesteps: int = 0


Mode = Literal["seed", "live", "transfer"]
"""seed: the prompts as they are; live: optimised against the model it judges; transfer: found on another model."""


class Attack(Protocol):
    """An attack. Its dataclass fields are its settings."""

    name: ClassVar[str]
    access: ClassVar[Access]
    mode: ClassVar[Mode]

    @property
    def budget(self) -> Budget: ...

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
        """Propose candidates round by round.

        After each yield the audit sends back one bool per candidate of that round (True: the concept was seen); targets
        that fell are left out of the following rounds, the order of the rest stays.
        """
        ...
