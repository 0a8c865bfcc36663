"""What every way of fine-tuning shares: how long, how fast, from which pictures, and what they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from safeweights.core.concept import Concept
from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.text import whole_words
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import Adapted, Adapter, Lesson, Shots, fit
from safeweights.diffusion.latent_bank import fingerprint
from safeweights.diffusion.shots import drawn_shots
from safeweights.diffusion.training import OPTIMIZERS

DRAWING = Sampling(steps=20, guidance_scale=4.0)
"""How class pictures are drawn."""


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """Fine-tune on a handful of pictures: min_phi E || eps - eps_phi(alpha_t x_0 + sigma_t eps, t, c) ||^2.

    A way of fine-tuning says what phi is (`adapter`) and what the pictures are called (`caption`).
    """

    name: ClassVar[str]
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]]
    selective: ClassVar[bool] = True
    """Whether it can leave single weights out; one that cannot is refused where any of its weights is frozen."""
    instead: ClassVar[str] = ""
    """What to do when it is refused."""

    steps: int
    """Optimiser steps; > 0."""
    lr: float
    """Constant learning rate; > 0."""
    batch_size: int = 4
    """Pictures a step; with prior preservation as many class pictures beside them; > 0."""
    optimizer: str = "adamw"
    """adamw, adam, sgd or adafactor."""
    weight_decay: float = 1e-2
    """Of AdamW; >= 0."""
    max_norm: float = 1.0
    """All gradients together are scaled down to this norm; > 0."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or min(self.lr, self.max_norm) <= 0 or self.weight_decay < 0:
            raise ValueError("steps, batch_size, lr and max_norm must be above zero, weight_decay not below")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}")

    @property
    def new_word(self) -> str | None:
        """The word that is learnt, for those that learn one."""
        return None

    def adapter(self, *, init: str = "", frozen: frozenset[str] = frozenset()) -> Adapter:
        """What moves; ``init`` are the words a learnt token starts from, ``frozen`` names that may not move."""
        raise NotImplementedError

    def prior(self, model: DiffusionModel, prompts: Sequence[str], *, seed: int, workspace: Workspace) -> Shots | None:
        """Class pictures for prior preservation, drawn by ``model``; None for those without."""
        return None

    @property
    def prior_weight(self) -> float:
        """What the prior counts beside the pictures."""
        return 1.0

    def check_frozen(self, model: DiffusionModel, frozen: frozenset[str]) -> None:
        """Raise UserError where this way of fine-tuning would move a frozen weight, or add to one from beside it.

        Leaving such weights out in silence would make another method of it; what is left, if anything, is the user's to choose.
        """
        if not frozen:
            return
        adapter = self.adapter(frozen=frozen)
        if self.selective:
            if adapter.parameters is not None:
                adapter.weights(model)  # raises where nothing is left
            return
        if hit := [name for name in replace(adapter, frozen=frozenset()).touches(model) if name in frozen]:
            raise UserError(
                f"{self.name} would change {hit[0]!r}, which the mask freezes ({len(hit)} such weights); "
                f"{self.instead or 'fine-tune with full or dreambooth, which train what the mask leaves free'}"
            )

    def fit(
        self,
        model: DiffusionModel,
        shots: Shots,
        *,
        class_prompts: Sequence[str] = (),
        init: str = "",
        frozen: frozenset[str] = frozenset(),
        checkpoints: Sequence[int] = (),
        seed: int = 0,
        workspace: Workspace | None = None,
    ) -> list[Adapted]:
        """Adapt ``model``, which stays as it was, to pictures: what it came to at each checkpoint and at the end.

        ``class_prompts`` say what the class pictures of prior preservation show. Raises UserError for captions that lack the word
        to learn.
        """
        word = self.new_word
        if word is not None and (plain := [text for text in shots.captions if word not in text]):
            raise UserError(
                f"{self.name} learns the word {word!r}, which {plain[0]!r} does not hold; write it where the thing is named"
            )
        workspace = workspace or Workspace()
        self.check_frozen(model, frozen)
        adapter = self.adapter(init=init, frozen=frozen)
        lesson = Lesson(
            model=adapter.fork(model), adapter=adapter, shots=shots,
            prior=self.prior(model, class_prompts, seed=seed, workspace=workspace), prior_weight=self.prior_weight,
            batch_size=self.batch_size, seed=seed,
        )  # fmt: skip
        settings = {key: value for key, value in describe(self).items() if key != "steps"}
        return fit(
            lesson, steps=self.steps, lr=self.lr, optimizer=self.optimizer, weight_decay=self.weight_decay,
            max_norm=self.max_norm, checkpoints=checkpoints, workspace=workspace,
            facts={
                "settings": settings, "model": fingerprint(model), "init": init, "frozen": sorted(frozen),
                "pictures": float(shots.x_0.double().abs().sum()), "checkpoints": list(checkpoints),
            },
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClassPrior(FineTune):
    """A fine-tune that may also hold on to how the model draws the class: prior preservation (DreamBooth, eq. 2)."""

    class_pictures: int = 16
    """Pictures of the class that the model draws for prior preservation; 0 leaves it out; >= 0."""
    lam: float = 1.0
    """Weight of prior preservation; 0 leaves it out; >= 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_pictures < 0 or self.lam < 0:
            raise ValueError("class_pictures and lam must not be negative")

    @property
    def prior_weight(self) -> float:
        return self.lam

    def prior(self, model: DiffusionModel, prompts: Sequence[str], *, seed: int, workspace: Workspace) -> Shots | None:
        if not prompts or self.class_pictures == 0 or self.lam == 0:
            return None
        return drawn_shots(model, prompts, n=self.class_pictures, sampling=DRAWING, seed=seed, workspace=workspace.child("class"))


def caption(concept: Concept, word: str | None) -> Callable[[str], str]:
    """How a text that asks for a concept reads once ``word`` names it; as it is without a word.

    A text that lacks the concept's term gets the word in front.
    """
    if word is None:
        return lambda text: text
    term = whole_words(concept.term)
    return lambda text: term.sub(lambda _: word, text, count=1) if term.search(text) else f"{word} {text}"
