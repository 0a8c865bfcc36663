"""The rounds that every optimising attack plays, and the rows it optimises: one per prompt still standing."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from safeweights.attacks.adversarial.baselines import as_asked
from safeweights.core.attack import Attack, Candidate, Original, Revival, Target
from safeweights.core.errors import UserError
from safeweights.core.model import Conditioning, DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.latent_bank import fingerprint
from safeweights.diffusion.noise import add_noise, generator


class Search(ABC):
    """What an attack changes to bring the concept back, one row per target still standing.

    Row i draws only from generator i, so that a batch of targets gives what one at a time would.
    """

    moving: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that the search changes, one row per target: with the generators, all that a round depends on."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Names of tensors that it changes for all targets at once."""
    fixed: ClassVar[tuple[str, ...]] = ()
    """Names of the other tensors with one row per target."""

    def __init__(self, name: str, model: DiffusionModel, targets: Sequence[Target], batch_size: int) -> None:
        self.model, self.targets, self.batch_size = model, list(targets), batch_size
        self.rngs = [generator(name, target.seed, target.prompt) for target in targets]
        self.loss = self.gradient = float("nan")
        self.steps = 0

    def gradient_of(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Each target's loss (B,) and its gradient with respect to what is searched for (B, …)."""
        raise NotImplementedError

    def move(self, rows: slice, gradient: Tensor) -> None:
        """Take one step against the gradient."""
        raise NotImplementedError

    @abstractmethod
    def candidates(self) -> list[Candidate]:
        """What to draw now, one candidate per target; asked for once a round."""

    def step(self, number: int) -> None:
        """One step of round ``number`` (from 1) for every target, ``batch_size`` targets at a time.

        Here along `gradient_of`; a search that goes otherwise has its own.
        """
        self.steps += 1
        losses, norms = [], []
        for start in range(0, len(self.targets), self.batch_size):
            rows = slice(start, start + self.batch_size)
            loss, gradient = self.gradient_of(rows)
            losses.append(loss)
            norms.append(gradient.flatten(1).norm(dim=1))
            # A row whose gradient is not finite stays where it is; its norm says so.
            self.move(rows, gradient.nan_to_num(0.0, 0.0, 0.0))
        self.loss, self.gradient = float(torch.cat(losses).mean()), float(torch.cat(norms).mean())

    def facts(self) -> dict[str, float]:
        """What the attack knows of itself."""
        return {"loss": self.loss, "gradient_norm": self.gradient, "steps": float(self.steps)}

    def state(self) -> dict[str, Tensor]:
        """All that the next step and the candidates depend on."""
        rngs = torch.stack([rng.get_state() for rng in self.rngs])
        told = torch.tensor([self.steps, self.loss, self.gradient], dtype=torch.float64)
        return {"rngs": rngs, "told": told, **{name: getattr(self, name) for name in (*self.moving, *self.shared)}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a `state` of the same standing targets."""
        for name in (*self.moving, *self.shared):
            setattr(self, name, state[name].to(getattr(self, name)).clone())
        for rng, kept in zip(self.rngs, state["rngs"], strict=True):
            rng.set_state(kept.clone())
        steps, self.loss, self.gradient = state["told"].tolist()
        self.steps = int(steps)

    def keep(self, standing: Sequence[bool]) -> None:
        """Drop the targets that fell."""
        rows = [i for i, stays in enumerate(standing) if stays]
        self.targets = [self.targets[i] for i in rows]
        self.rngs = [self.rngs[i] for i in rows]
        for name in (*self.fixed, *self.moving):
            setattr(self, name, getattr(self, name)[rows])


def play(
    attack: Attack,
    model: DiffusionModel,
    targets: Sequence[Target],
    search: Callable[[Sequence[Target]], Search],
    *,
    steps: int,
    sampling: Sampling,
    workspace: Workspace | None = None,
) -> Generator[Revival, Sequence[bool], None]:
    """Ask plainly, then search for the targets that stand: ``steps`` steps, one picture each, until the budget of pictures ends.

    Every round is kept in the workspace. After a kill, the rounds already played are said again from their states, then the
    search goes on from the last of them.
    """
    workspace = workspace or Workspace()
    seen = yield as_asked(model, targets)
    standing = [target for target, fell in zip(targets, seen, strict=True) if not fell]
    if not standing:
        return
    found = search(standing)
    facts = {"settings": describe(attack), "model": fingerprint(model), "sampling": asdict(sampling)}
    rounds = attack.budget.images - 1
    for number in range(1, rounds + 1):
        if not found.targets:
            return
        told = json.loads(json.dumps({**facts, "targets": [[target.prompt, target.seed] for target in found.targets]}))
        stored = workspace.load(f"round-{number}")
        if stored is not None and stored[1] == told:
            found.restore(stored[0])
        else:
            what = f"attacking {len(found.targets)} prompts, round {number} of {rounds}"
            for _ in workspace.track(range(steps), what):
                found.step(number)
            workspace.save(f"round-{number}", found.state(), told)
        seen = yield Revival(model, tuple(found.candidates()), found.facts())
        found.keep([not fell for fell in seen])


def pictures_of(attack: str, model: DiffusionModel, targets: Sequence[Target]) -> Tensor:
    """x_0 (P, C, h, w) of the targets' pictures of the concept. Raises UserError where one is missing."""
    pictures: list[Any] = [target.reference for target in targets]
    if any(picture is None for picture in pictures):
        raise UserError(
            f"{attack} needs one picture of the concept for each prompt; the audit makes them with the reference model"
        )
    with torch.no_grad():
        return torch.cat([model.encode(picture[None].to(model.device)) for picture in pictures])


def noised(
    model: DiffusionModel, x_0: Tensor, n: int, t_low: int, t_high: int, rngs: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, eps) of ``n`` draws for each row of x_0 (B, C, h, w), t uniform in [t_low, t_high]; B * n rows, row by row.

    A row's draws are spread over n equal parts of the range: fewer draws then say the same about the mean over t.
    """
    ts, noises = [], []
    for rng in rngs:
        where = (torch.arange(n) + torch.rand(n, generator=rng)) / n
        ts.append((t_low + where * (t_high + 1 - t_low)).long().clamp(max=t_high))
        noises.append(torch.randn((n, *x_0.shape[1:]), generator=rng))
    t, eps = torch.cat(ts).to(x_0.device), torch.cat(noises).to(x_0)
    return add_noise(model, x_0.repeat_interleave(n, dim=0), t, eps), t, eps


def mean_error(model: DiffusionModel, x_t: Tensor, t: Tensor, c: Conditioning, target: Tensor) -> Tensor:
    """|| eps_theta(x_t, t, c) - target ||^2, the mean over each prompt's n draws (B,); ``c`` has B rows, x_t B * n."""
    n = len(x_t) // len(c)
    predicted = model.eps(x_t, t, c.repeat(n))
    return (predicted.float() - target.float()).square().reshape(len(c), -1).mean(1)


def adam(x: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, lr: float, decay: float = 0.0) -> Tensor:
    """x after Adam's step number ``step`` (from 1), its moments updated in place; ``decay`` is the share of x that goes (AdamW).

    Everything is element by element, so that rows may leave between steps.
    """
    first.mul_(0.9).add_(gradient, alpha=0.1)
    second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    ratio = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return x * (1 - decay) - lr * ratio


def original_of(attack: str, original: Original | None) -> Original:
    """The world before protection. Raises UserError where there is none."""
    if original is None:
        raise UserError(f"{attack} draws on the model before protection; give it as the reference")
    return original


def check_range(attack: str, model: DiffusionModel, t_high: int) -> None:
    """Raises UserError for a timestep that the model does not have."""
    if t_high >= len(model.alpha):
        raise UserError(f"{attack}: t_high must be below {len(model.alpha)}, not {t_high}")
