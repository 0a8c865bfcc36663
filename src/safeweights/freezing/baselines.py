"""What a learned mask must beat: chance, the largest change or gradient, all of cross-attention, and a score without rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import clip
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parameters import select
from safeweights.diffusion.training import descend
from safeweights.freezing.guard import Budget, Guard, Sides, TunedGuard, facts_of, signal


@dataclass(frozen=True, kw_only=True)
class Random(Guard):
    """Freeze tensors at random: chance at the same ratio of tensors, or of parameters.

    P(mask) is the same for every order in which tensors are frozen until the budget is met.

    Needs: nothing.   Cost: none.
    Differs from the reference code: there a random mask is named but not among what was released.
    """

    name: ClassVar[str] = "random"

    def scores(
        self,
        model: DiffusionModel,
        budget: Budget,
        illegal: Sequence[Concept],
        legal: Sequence[Concept],
        *,
        seed: int,
        workspace: Workspace,
    ) -> tuple[Tensor, dict[str, float]]:
        return torch.rand(len(budget.units), generator=generator("random mask", seed), dtype=torch.float64), {}


@dataclass(frozen=True, kw_only=True)
class XAttn(Guard):
    """Freeze cross-attention, where words enter: all of it, or as much as the ratio allows, in random order.

    Needs: a denoiser with cross-attention.   Cost: none.
    Differs from the reference code: nothing known (a baseline of ours).
    """

    name: ClassVar[str] = "xattn"

    def scores(
        self,
        model: DiffusionModel,
        budget: Budget,
        illegal: Sequence[Concept],
        legal: Sequence[Concept],
        *,
        seed: int,
        workspace: Workspace,
    ) -> tuple[Tensor, dict[str, float]]:
        inside = set(select(model.named_parameters(), "xattn"))
        order = torch.rand(len(budget.units), generator=generator("random mask", seed), dtype=torch.float64)
        return order + torch.tensor([float(unit.names[0] in inside) for unit in budget.units], dtype=torch.float64), {}

    def choose(self, budget: Budget, scores: Tensor) -> frozenset[str]:
        # The rest of a larger budget stays unused: what lies outside cross-attention scores at most one.
        inside = {name for unit, score in zip(budget.units, scores.tolist(), strict=True) if score > 1 for name in unit.names}
        return budget.hard(scores) & inside


@dataclass(frozen=True, kw_only=True)
class TaskVector(TunedGuard):
    """Freeze what illegal fine-tuning moves most: || theta_i^ft - theta_i^pre ||, or its root mean square for a parameter budget.

    Needs: pictures of the illegal concepts, a folder's or drawn.   Cost: ``tune_steps`` passes forward and back.
    Differs from the reference code: nothing known (a baseline of ours).
    """

    name: ClassVar[str] = "task-vector"
    UNUSED: ClassVar[tuple[str, ...]] = ("lam", "weights")
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {},
        "paper": {"pictures": 100, "tune_steps": 2000, "tune_lr": 1e-5},
    }

    def scores(
        self,
        model: DiffusionModel,
        budget: Budget,
        illegal: Sequence[Concept],
        legal: Sequence[Concept],
        *,
        seed: int,
        workspace: Workspace,
    ) -> tuple[Tensor, dict[str, float]]:
        sides = self.sides(model, illegal, (), seed=seed, workspace=workspace)
        start, tuned, cost = _tuned(self, sides, illegal, (), seed, workspace)
        moved = [sum(float((tuned[n] - start[n]).square().sum()) for n in unit.names) for unit in budget.units]
        return _per_cost(torch.tensor(moved, dtype=torch.float64), budget, self.budget).sqrt(), cost


@dataclass(frozen=True, kw_only=True)
class Gradient(TunedGuard):
    """Freeze what the illegal loss pulls at most before any fine-tuning: || E dL_ill / dtheta_i ||.

    Needs: pictures of the illegal concepts, a folder's or drawn.   Cost: ``batches`` passes forward and back.
    Differs from the reference code: nothing known (a baseline of ours).
    """

    name: ClassVar[str] = "gradient"
    UNUSED: ClassVar[tuple[str, ...]] = ("lam", "tune_steps", "tune_lr")

    batches: int = 16
    """Batches of every concept that the gradient is the mean of; > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 1:
            raise ValueError("batches must be above zero")

    def scores(
        self,
        model: DiffusionModel,
        budget: Budget,
        illegal: Sequence[Concept],
        legal: Sequence[Concept],
        *,
        seed: int,
        workspace: Workspace,
    ) -> tuple[Tensor, dict[str, float]]:
        sides = self.sides(model, illegal, (), seed=seed, workspace=workspace)
        slopes = _mean_slopes(sides, dict(sides.start()), self.batches, workspace)
        pulled = [sum(float(slopes[name].square().sum()) for name in unit.names) for unit in budget.units]
        return _per_cost(torch.tensor(pulled, dtype=torch.float64), budget, self.budget).sqrt(), {}


@dataclass(frozen=True, kw_only=True)
class OneShot(TunedGuard):
    """Freeze what the learned mask's signal asks for at once, without rounds: the largest -s_i at theta^ft.

    s_i = <theta_i^pre - theta_i^ft, dL/dtheta_i>,   L = 1/2 [-L_ill + lambda L_leg]

    Needs: pictures of illegal and of legal concepts, a folder's or drawn.   Cost: ``tune_steps`` + ``batches`` passes.
    Differs from the reference code: nothing known (a baseline of ours).
    """

    name: ClassVar[str] = "one-shot"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = TaskVector.PRESETS

    batches: int = 16
    """Batches of every concept that the signal is the mean of; > 0."""
    normalise: Literal["tensor", "all"] = "all"
    """all ranks by the mean of the signal; tensor by its mean over its mean size, how sure it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 1:
            raise ValueError("batches must be above zero")

    def scores(
        self,
        model: DiffusionModel,
        budget: Budget,
        illegal: Sequence[Concept],
        legal: Sequence[Concept],
        *,
        seed: int,
        workspace: Workspace,
    ) -> tuple[Tensor, dict[str, float]]:
        sides = self.sides(model, illegal, legal, seed=seed, workspace=workspace)
        start, tuned, cost = _tuned(self, sides, illegal, legal, seed, workspace)
        steps = workspace.track(range(self.batches), "scoring tensors")
        seen = torch.stack([signal(start, tuned, sides.slopes(tuned, step), budget) for step in steps])
        if self.normalise == "tensor":
            return -seen.mean(0) / seen.abs().mean(0).clamp(min=1e-30), cost
        return _per_cost(-seen.mean(0), budget, self.budget), cost


def _tuned(
    guard: TunedGuard, sides: Sides, illegal: Sequence[Concept], legal: Sequence[Concept], seed: int, workspace: Workspace
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """(theta^pre, theta^ft, work): the weights before and after one fine-tune on all pictures."""
    start = {name: value.detach().clone() for name, value in sides.start().items()}
    tuned = sides.start()
    losses = descend(
        tuned, lambda step: sides.user.loss(tuned, sides.user.batch(step)),
        steps=guard.tune_steps, lr=guard.tune_lr, weight_decay=1e-2, optimizer="adamw", workspace=workspace,
        description=f"fine-tuning ({guard.name})", facts=facts_of(guard, illegal, legal, seed), gradients=clip(tuned, 1.0),
    )  # fmt: skip
    return start, {name: value.detach() for name, value in tuned.items()}, {"steps": len(losses), "loss": losses[-1]}


def _mean_slopes(sides: Sides, theta: dict[str, Any], batches: int, workspace: Workspace) -> dict[str, Tensor]:
    """The gradient of the objective, averaged over batches."""
    mean = {name: torch.zeros_like(value) for name, value in theta.items()}
    for step in workspace.track(range(batches), "scoring tensors"):
        for name, slope in sides.slopes(theta, step).items():
            mean[name] = mean[name] + slope / batches
    return mean


def _per_cost(scores: Tensor, budget: Budget, unit: str) -> Tensor:
    """What a unit is worth for what it costs: by the entry where the budget counts entries."""
    return scores / budget.sizes if unit == "parameters" else scores
