"""E4: what an adapter changes in the model's predictions at fixed noisy inputs; the base is public, so this is weights only.

phi(adapter)_t = mean_k eps_{base + adapter}(x_t^k, t, c) - eps_base(x_t^k, t, c)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.core.model import Conditioning, DiffusionModel
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import add_noise, generator
from safeweights.leakage.canonical import Factors, phi_of
from safeweights.leakage.encoders import ridge
from safeweights.leakage.lora_bank import bank_on, stack_of


@dataclass(frozen=True)
class Probe:
    """The fixed inputs: ``inputs`` noisy latents at each of ``levels`` (shares of the schedule), under one prompt."""

    prompt: str
    levels: tuple[float, ...] = (0.95, 0.75, 0.5, 0.25)
    inputs: int = 4
    seed: int = 0

    @torch.no_grad()
    def ask(
        self, model: DiffusionModel, adapters: Sequence[Factors], *, together: int = 4, workspace: Workspace | None = None
    ) -> Tensor:
        """The mean change of the prediction at every level (n, levels, C, h, w).

        Raises UserError for adapters with layers that a bank cannot run.
        """
        x_t, t = self._points(model)
        c = model.embed([self.prompt])
        base = model.eps(x_t, t, c)
        found = []
        for start in (workspace or Workspace()).track(range(0, len(adapters), together), "probing adapters"):
            group = adapters[start : start + together]
            if any(set(item) != set(group[0]) for item in group):
                raise UserError("these adapters change different layers; probe them one at a time")
            stack = _stack(group)
            owner = torch.arange(len(group)).repeat_interleave(len(x_t))
            with bank_on(model, stack, owner):
                asked = model.eps(x_t.repeat(len(group), 1, 1, 1), t.repeat(len(group)), Conditioning(c.states))
            change = asked.view(len(group), *base.shape) - base
            found.append(change.view(len(group), len(self.levels), self.inputs, *base.shape[1:]).mean(2).float().cpu())
        return torch.cat(found)

    def _points(self, model: DiffusionModel) -> tuple[Tensor, Tensor]:
        rng = generator("leakage probe", self.seed)
        count = len(model.alpha)
        t = (
            torch.tensor([min(count - 1, int(level * count)) for level in self.levels])
            .repeat_interleave(self.inputs)
            .to(model.device)
        )
        noise = torch.randn((len(t), *model.latent_shape), generator=rng).to(model.device)
        # The grey picture, noised: an input that favours nobody.
        grey = torch.full((1, 3, model.latent_shape[1] * model.latent_stride, model.latent_shape[2] * model.latent_stride), 0.5)
        x_0 = model.encode(grey.to(model.device)).expand_as(noise)
        return add_noise(model, x_0, t, noise), t


def _stack(group: Sequence[Factors]) -> dict[str, Tensor]:
    from safeweights.leakage.encoders.gram import padded

    if len({len(a) for item in group for a, _ in item.values()}) == 1:
        return stack_of([phi_of(item) for item in group])
    found: dict[str, Tensor] = {}
    for name in group[0]:
        found[f"{name}/down"], found[f"{name}/up"] = padded(group, name)
    return found


@dataclass(frozen=True)
class Functional:
    """Ridge on the probe's answers, each level divided by its length so that lr and steps do not count.

    Needs: the base model.   Cost: levels * inputs calls an adapter.
    """

    name: ClassVar[str] = "functional"
    weight: Tensor
    """(F, D)."""
    offset: Tensor
    error: float
    """Leave-one-out squared error over the targets' variance."""
    known: Tensor | None = None
    """(n, F), the training adapters' rows minus their mean, of length 1; None in files of before they were kept."""
    middle: Tensor | None = None
    """(F,), that mean."""

    @classmethod
    def fit(cls, answers: Tensor, targets: Tensor) -> Functional:
        """``answers`` as `Probe.ask` gives them; targets (n, D), lambda by leave-one-out."""
        rows = unit(answers)
        fitted = ridge.fit(ridge.linear(rows), targets)
        centred = fitted.weight - fitted.weight.mean(0)
        weight = rows.double().mT @ centred
        offset = fitted.mean - rows.double().mean(0) @ weight
        middle = rows.mean(0)
        known = torch.nn.functional.normalize(rows - middle, dim=1)
        return cls(weight.float(), offset.float(), ridge.loo_error(fitted, targets), known, middle)

    def predict(self, answers: Tensor) -> Tensor:
        """Targets (m, D)."""
        return (unit(answers) @ self.weight + self.offset).double()

    def likeness(self, answers: Tensor) -> Tensor:
        """Largest cosine (m,) with a training adapter's answers, at least 0: low for adapters unlike any of a subject.

        An encoder has an answer to everything; what it says of an adapter of another kind is no reading. 1 where none are known.
        """
        if self.known is None or self.middle is None:
            return torch.ones(len(answers))
        rows = torch.nn.functional.normalize(unit(answers) - self.middle, dim=1)
        found: Tensor = (rows @ self.known.mT).amax(1).clamp(min=0)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Everything, ready for a safetensors file."""
        more = {"known": self.known, "middle": self.middle}
        return {"weight": self.weight, "offset": self.offset} | {name: value for name, value in more.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Functional:
        """The inverse of `tensors`."""
        parts = {name: tensors[name].float() for name in ("known", "middle") if name in tensors}
        return cls(tensors["weight"].float(), tensors["offset"].float(), float("nan"), **parts)


def unit(answers: Tensor) -> Tensor:
    """A probe's answers as rows (n, F), each level of length 1 / sqrt(levels)."""
    rows = answers.flatten(2)
    found: Tensor = (rows / rows.norm(dim=2, keepdim=True).clamp(min=1e-12)).flatten(1) / rows.shape[1] ** 0.5
    return found
