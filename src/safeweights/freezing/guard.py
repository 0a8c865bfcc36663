"""What all guards share: a budget of frozen tensors, kept exactly; pictures of both sides; the fine-tune behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from safeweights.core.concept import Concept
from safeweights.core.errors import UserError
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import Adapter, Lesson, Shots
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parameters import select
from safeweights.diffusion.shots import concept_shots
from safeweights.records.mask import Mask, architecture

BudgetUnit = Literal["tensors", "parameters"]


@dataclass(frozen=True)
class Unit:
    """What is frozen or left as a whole: one tensor, or a module's tensors tied together; ``size`` is what it costs."""

    names: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Budget:
    """Which units there are, and how many may be frozen: sum_i n_i m_i = ratio * sum_i n_i."""

    units: tuple[Unit, ...]
    ratio: float

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]], ratio: float, unit: BudgetUnit = "tensors", *, tie: bool = False) -> Budget:
        """The units of tensors with these shapes by name, counted in tensors or in parameters.

        With ``tie`` the tensors of one module (a weight with its bias, a norm's gain with its shift) are one unit.
        """
        groups: dict[str, list[str]] = {}
        for name in shapes:
            groups.setdefault(name.rpartition(".")[0] if tie else name, []).append(name)
        if not groups:
            raise UserError("this model has no tensors to freeze")

        def size(names: Sequence[str]) -> int:
            return len(names) if unit == "tensors" else sum(math.prod(shapes[name]) for name in names)

        return cls(tuple(Unit(tuple(names), size(names)) for names in groups.values()), ratio)

    @property
    def sizes(self) -> Tensor:
        """n_i, float64."""
        return torch.tensor([unit.size for unit in self.units], dtype=torch.float64)

    def soft(self, w: Tensor, temperature: float) -> Tensor:
        """m_i = sigmoid((w_i - tau) / T), float64, with the one tau that meets the budget exactly, found by bisection."""
        w, sizes = w.double(), self.sizes.to(w.device)
        wanted = self.ratio * float(sizes.sum())
        # At these ends every m_i is within 1e-17 of zero or one.
        low, high = float(w.min()) - 40 * temperature, float(w.max()) + 40 * temperature
        for _ in range(200):
            tau = (low + high) / 2
            if float((sizes * torch.sigmoid((w - tau) / temperature)).sum()) > wanted:
                low = tau
            else:
                high = tau
            if high - low <= 1e-15 * max(1.0, abs(tau)):
                break
        return torch.sigmoid((w - (low + high) / 2) / temperature)

    def hard(self, scores: Tensor) -> frozenset[str]:
        """The names to freeze: units by falling score, each that still fits; never more than the budget.

        Counted in tensors without ties that is the top k, k = round(ratio * M). Otherwise what is left over is smaller than any
        unit left out.
        """
        total = sum(unit.size for unit in self.units)
        left = max(round(self.ratio * total), 1)
        chosen: list[str] = []
        # Equal scores go by name, so that a mask does not hang on the order of sorting.
        order = sorted(range(len(self.units)), key=lambda i: (-float(scores[i]), self.units[i].names[0]))
        for i in order:
            if self.units[i].size <= left:
                chosen += self.units[i].names
                left -= self.units[i].size
        return frozenset(chosen)


def shares(frozen: frozenset[str], shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """{"tensors", "parameters"}: the share of the tensors with these shapes, and of their entries, that is frozen."""
    kept = [name for name in shapes if name in frozen]
    entries = {name: math.prod(shape) for name, shape in shapes.items()}
    return {"tensors": len(kept) / len(shapes), "parameters": sum(entries[name] for name in kept) / sum(entries.values())}


def unet_shapes(model: DiffusionModel) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors a mask may freeze: every parameter of the denoiser by name."""
    wanted = set(select(model.named_parameters(), "full"))
    return {name: tuple(value.shape) for name, value in model.named_parameters() if name in wanted}


def mask_of(
    model: DiffusionModel,
    frozen: frozenset[str],
    method: str,
    settings: Mapping[str, Any],
    *,
    illegal: Sequence[str],
    legal: Sequence[str],
    base_sha256: str | None,
    made: Mapping[str, Any],
) -> Mask:
    """The record of a mask for ``model``: what a guard of these settings froze, the shares that came out, and how it was made."""
    return Mask(
        frozen=frozen, achieved=shares(frozen, unet_shapes(model)), architecture=architecture(model), method=method,
        settings=settings, ratio=settings["ratio"], budget=settings["budget"], illegal=tuple(illegal), legal=tuple(legal),
        base_sha256=base_sha256, made=made,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Guard:
    """The settings of every guard; a guard says how much each unit of the budget is worth freezing (`scores`)."""

    name: ClassVar[str]

    ratio: float = 0.3
    """Share to freeze, rho; above 0 and below 1."""
    budget: BudgetUnit = "tensors"
    """What the ratio counts: tensors (the paper) or parameters."""
    tie: bool = False
    """A bias or norm tensor is frozen with the rest of its module."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError("ratio must be above 0 and below 1")

    def protect(
        self,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        *,
        legal: Sequence[Concept] = (),
        retain: Sequence[str] = (),
        rng: torch.Generator,
        workspace: Workspace | None = None,
    ) -> Protection:
        """The names of ``model`` to freeze against fine-tuning on ``concepts``, so that ``legal`` ones are still learnt.

        Raises UserError for a concept on both sides and for pictures too few to be split.
        """
        if not concepts:
            raise UserError(f"{self.name} needs at least one illegal concept")
        if both := {concept.name for concept in concepts} & {concept.name for concept in legal}:
            raise UserError(f"{sorted(both)[0]!r} is given as illegal and as legal; it can be one of them only")
        workspace, seed, calls = workspace or Workspace(), rng.initial_seed(), model.calls.eps
        budget = Budget.of(unet_shapes(model), self.ratio, self.budget, tie=self.tie)
        scores, cost = self.scores(model, budget, concepts, legal, seed=seed, workspace=workspace)
        return Protection(
            method=self.name,
            concepts=tuple(concept.name for concept in concepts),
            frozen=self.choose(budget, scores),
            settings=describe(self),
            cost={**cost, "eps_calls": model.calls.eps - calls},
        )

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
        """What freezing each unit is worth (any scale, the larger the better), and the counted work."""
        raise NotImplementedError

    def choose(self, budget: Budget, scores: Tensor) -> frozenset[str]:
        """The names to freeze, within the budget."""
        return budget.hard(scores)


@dataclass(frozen=True, kw_only=True)
class TunedGuard(Guard):
    """A guard that looks at pictures of the concepts and at how fine-tuning on them moves the weights."""

    UNUSED: ClassVar[tuple[str, ...]] = ()
    """Settings that play no part in a guard of this kind, and are refused where they are given."""

    pictures: int = 16
    """Pictures of each concept, half to fine-tune on and half to judge with; > 1."""
    tune_steps: int = 60
    """Steps of the fine-tune that shows where adaptation goes; > 0."""
    tune_lr: float = 2e-4
    """AdamW's learning rate of that fine-tune; > 0."""
    batch_size: int = 4
    """Noisy pictures a step, and of each concept where sides are judged; > 0."""
    lam: float = 1.0
    """What the legal side counts beside the illegal one, lambda; >= 0."""
    weights: tuple[float, ...] = ()
    """What each illegal concept counts, in their order, for graded classes; empty is one each; > 0."""
    ddim_steps: int = 20
    """DDIM steps of a drawn picture; > 0."""
    guidance: float = 4.0
    """Guidance of drawn pictures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        usual = {field.name: field.default for field in fields(self)}
        if given := [name for name in self.UNUSED if getattr(self, name) != usual[name]]:
            raise ValueError(f"{given[0]} plays no part in this guard; leave it out")
        if min(self.tune_steps, self.batch_size, self.ddim_steps) < 1 or self.tune_lr <= 0 or self.pictures < 2:
            raise ValueError("tune_steps, batch_size, ddim_steps and tune_lr must be above zero, pictures at least two")
        if self.lam < 0 or any(weight <= 0 for weight in self.weights):
            raise ValueError("lam must not be negative, and weights must be above zero")

    def sides(
        self, model: DiffusionModel, illegal: Sequence[Concept], legal: Sequence[Concept], *, seed: int, workspace: Workspace
    ) -> Sides:
        """Pictures of all concepts, and the lessons on them."""
        if self.weights and len(self.weights) != len(illegal):
            raise UserError(f"{self.name}: {len(self.weights)} weights for {len(illegal)} illegal concepts; give one for each")
        sampling = Sampling(steps=self.ddim_steps, guidance_scale=self.guidance)
        lower: list[Shots] = []
        upper: list[Shots] = []
        for concept in (*illegal, *legal):
            rng = generator("freezing pictures", seed, concept.name)
            shots = concept_shots(
                model,
                concept,
                n=self.pictures,
                sampling=sampling,
                seed=rng.initial_seed(),
                workspace=workspace.child(concept.name),
            )
            if len(shots) < 2:
                raise UserError(f"{self.name} needs at least two pictures of {concept.name!r}, one for each level; give more")
            order = torch.randperm(len(shots), generator=rng).tolist()
            for half, rows in ((lower, order[: len(order) // 2]), (upper, order[len(order) // 2 :])):
                half.append(Shots(shots.x_0[rows], tuple(shots.captions[row] for row in rows)))
        adapter = Adapter(parameters="full")
        student = adapter.fork(model)

        def lesson(shots: Shots) -> Lesson:
            return Lesson(model=student, adapter=adapter, shots=shots, batch_size=self.batch_size, seed=seed)

        pooled = Shots(torch.cat([shots.x_0 for shots in lower]), tuple(text for shots in lower for text in shots.captions))
        counts = self.weights or (1.0,) * len(illegal)
        judged = [lesson(shots) for shots in upper]
        return Sides(lesson(pooled), tuple(judged[: len(illegal)]), tuple(judged[len(illegal) :]), counts, self.lam)


@dataclass(frozen=True)
class Sides:
    """The user's lesson on everything, and what each concept, illegal or legal, says of weights (on pictures of its own)."""

    user: Lesson
    illegal: tuple[Lesson, ...]
    legal: tuple[Lesson, ...]
    weights: tuple[float, ...]
    lam: float

    def start(self) -> dict[str, nn.Parameter]:
        """The denoiser's weights, to be fine-tuned."""
        return self.user.adapter.start(self.user.model)

    def upper(self, theta: Mapping[str, Tensor], *key: int | str) -> Tensor:
        """1/2 [-L_illegal(theta) + lambda L_legal(theta)] on a batch of every concept, fixed by ``key``; differentiable in theta.

        L_illegal is the weighted mean over the illegal concepts, L_legal the mean over the legal ones.
        """
        total = sum(self.weights)
        loss = torch.zeros((), device=self.user.model.device)
        for weight, lesson in zip(self.weights, self.illegal, strict=True):
            loss = loss - weight / total * lesson.loss(theta, lesson.batch("upper", *key))
        for lesson in self.legal:
            loss = loss + self.lam / len(self.legal) * lesson.loss(theta, lesson.batch("upper", *key))
        return loss / 2

    def slopes(self, theta: Mapping[str, Tensor], *key: int | str) -> dict[str, Tensor]:
        """The gradient of `upper` in each tensor; zero for one that the model does not use."""
        moving = {name: value.detach().requires_grad_() for name, value in theta.items()}
        with torch.enable_grad():
            value = self.upper(moving, *key)
            found = torch.autograd.grad(value, list(moving.values()), allow_unused=True)
        pairs = zip(moving.items(), found, strict=True)
        return {name: torch.zeros_like(start) if slope is None else slope for (name, start), slope in pairs}


def blend(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], budget: Budget, m: Tensor) -> dict[str, Tensor]:
    """theta_i(m) = m_i theta_i^pre + (1 - m_i) theta_i^ft, as theta^ft + m (theta^pre - theta^ft)."""
    return {
        name: tuned[name] + float(share) * (start[name] - tuned[name])
        for unit, share in zip(budget.units, m.tolist(), strict=True)
        for name in unit.names
    }


@torch.no_grad()
def signal(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], slopes: Mapping[str, Tensor], budget: Budget) -> Tensor:
    """s_i = d objective / d m_i = <theta_i^pre - theta_i^ft, g_i>, float64, summed over the tensors of a unit."""
    return torch.tensor(
        [
            sum(float(((start[name] - tuned[name]) * slopes[name]).sum(dtype=torch.float64)) for name in unit.names)
            for unit in budget.units
        ],
        dtype=torch.float64,
    )


def facts_of(guard: Guard, illegal: Sequence[Concept], legal: Sequence[Concept], seed: int) -> dict[str, Any]:
    """What tells two runs of a guard apart, for checkpoints."""
    return {
        "method": guard.name, "settings": describe(guard), "seed": seed,
        "illegal": [[concept.name, *concept.texts] for concept in illegal],
        "legal": [[concept.name, *concept.texts] for concept in legal],
    }  # fmt: skip
