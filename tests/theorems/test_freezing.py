"""The mask learner's mathematics: its gradient, its budget, and what it finds where the answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeweights.freezing.freezeasguard import FreezeAsGuard
from safeweights.freezing.guard import Budget, blend, shares, signal
from safeweights.records.mask import overlap

SHAPES = {"a.weight": (8, 4), "a.bias": (8,), "b.weight": (4, 8), "b.bias": (4,), "norm.weight": (4,), "norm.bias": (4,)}


def weights(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in SHAPES.items()}


def network(theta: Any) -> torch.Tensor:
    """Some smooth objective of all tensors."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    y = torch.tanh(x @ theta["a.weight"].T + theta["a.bias"]) @ theta["b.weight"].T + theta["b.bias"]
    return ((y * theta["norm.weight"] + theta["norm.bias"]).sin()).square().mean()


@pytest.mark.parametrize("tie", [False, True])
def test_the_mask_gradient_is_that_of_finite_differences(tie: bool) -> None:
    """dL/dw_i = s_i m_i (1 - m_i) / T with tau held, to 1e-4 and better."""
    start, tuned, T = weights(0), weights(1), 0.3
    budget = Budget.of(SHAPES, 0.4, tie=tie)
    w = torch.randn(len(budget.units), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tau = 0.2

    def masked(w: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid((w - tau) / T)

    m = masked(w)
    theta = {name: value.requires_grad_() for name, value in blend(start, tuned, budget, m).items()}
    slopes = dict(zip(theta, torch.autograd.grad(network(theta), list(theta.values())), strict=True))
    ours = signal(start, tuned, slopes, budget) * m * (1 - m) / T
    h = 1e-5
    for i in range(len(w)):
        ends = []
        for sign in (1, -1):
            moved = w.clone()
            moved[i] += sign * h
            ends.append(network(blend(start, tuned, budget, masked(moved))))
        slow = float(ends[0] - ends[1]) / (2 * h)
        assert float(ours[i]) == pytest.approx(slow, rel=1e-6, abs=1e-10)


def test_a_mask_of_ones_is_the_start_and_of_zeros_the_fine_tune() -> None:
    start, tuned, budget = weights(0), weights(1), Budget.of(SHAPES, 0.5)
    for value, expected in ((1.0, start), (0.0, tuned)):
        mixed = blend(start, tuned, budget, torch.full((6,), value, dtype=torch.float64))
        assert all(torch.allclose(mixed[name], expected[name], atol=1e-15) for name in SHAPES)


@settings(max_examples=60, deadline=None)
@given(
    w=st.lists(st.floats(-50, 50), min_size=6, max_size=6),
    ratio=st.floats(0.01, 0.99),
    temperature=st.floats(0.01, 5),
    unit=st.sampled_from(["tensors", "parameters"]),
)
def test_bisection_meets_the_budget_and_keeps_the_order(w: list[float], ratio: float, temperature: float, unit: Any) -> None:
    budget = Budget.of(SHAPES, ratio, unit)
    values = torch.tensor(w, dtype=torch.float64)
    m = budget.soft(values, temperature)
    assert float((budget.sizes * m).sum() / budget.sizes.sum()) == pytest.approx(ratio, abs=1e-7)
    assert bool(((m >= 0) & (m <= 1)).all())
    order = values.argsort()
    assert bool((m[order].diff() >= 0).all())
    # Only differences of w count.
    assert torch.allclose(budget.soft(values + 3, temperature), m, atol=1e-6)


def test_counted_in_tensors_a_mask_is_the_top_k() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0, 4.0])
    assert Budget.of(SHAPES, 0.5).hard(scores) == {"norm.weight", "norm.bias", "a.weight"}
    for ratio, k in ((0.1, 1), (0.34, 2), (0.66, 4), (0.99, 6)):
        assert len(Budget.of(SHAPES, ratio).hard(scores)) == k


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), ratio=st.floats(0.05, 0.95), tie=st.booleans())
def test_counted_in_parameters_nothing_left_out_would_have_fitted(seed: int, ratio: float, tie: bool) -> None:
    budget = Budget.of(SHAPES, ratio, "parameters", tie=tie)
    frozen = budget.hard(torch.rand(len(budget.units), generator=torch.Generator().manual_seed(seed)))
    total = sum(unit.size for unit in budget.units)
    used = round(shares(frozen, SHAPES)["parameters"] * total)
    assert used <= max(round(ratio * total), 1)
    left = round(ratio * total) - used
    assert all(unit.size > left for unit in budget.units if not set(unit.names) & frozen)


def test_tied_tensors_share_their_module() -> None:
    budget = Budget.of(SHAPES, 0.34, tie=True)
    assert {unit.names for unit in budget.units} == {
        ("a.weight", "a.bias"), ("b.weight", "b.bias"), ("norm.weight", "norm.bias"),
    }  # fmt: skip
    assert budget.hard(torch.tensor([0.0, 1.0, 0.5])) == {"b.weight", "b.bias"}


class Fixed:
    """Sides whose gradient is known: ``helps`` times the direction back to the start, and noise."""

    def __init__(self, start: Any, tuned: Any, helps: dict[str, float], noise: float) -> None:
        self.start, self.tuned, self.helps, self.noise = start, tuned, helps, noise

    def slopes(self, theta: Any, number: int) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(number)
        found = {}
        for name, value in self.start.items():
            way = value - self.tuned[name]
            scale = self.helps[name] + self.noise * float(torch.randn((), generator=rng))
            found[name] = -scale * way / way.square().sum()
        return found


@pytest.mark.parametrize("normalise", ["tensor", "all"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_learner_finds_what_helps_whatever_its_size(normalise: Any, seed: int) -> None:
    """Freezing the planted tensors lowers the objective, freezing others raises it or does nothing but noise."""
    shapes = {f"t{i}.weight": (1 + i % 5, 3) for i in range(40)}
    rng = torch.Generator().manual_seed(seed)
    start = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    tuned = {name: value + 0.1 * torch.randn(value.shape, generator=rng) for name, value in start.items()}
    planted = {name for i, name in enumerate(shapes) if i % 4 == seed}
    guard = FreezeAsGuard(ratio=0.25, normalise=normalise, rounds=80)
    budget = Budget.of(shapes, 0.25)
    sides = Fixed(start, tuned, {name: 1.0 if name in planted else -0.2 for name in shapes}, noise=0.5)
    empty = torch.zeros(40, dtype=torch.float64)
    state = {"w": empty, "mean": empty, "size": empty, "m": empty}
    for number in range(guard.rounds):
        guard._turn(number, budget, sides, start, tuned, state)
        assert float(state["m"].mean()) == pytest.approx(0.25, abs=1e-9)
    assert overlap(budget.hard(state["w"]), frozenset(planted)) >= 0.8


def test_overlap_of_masks() -> None:
    assert overlap(frozenset("abc"), frozenset("bcd")) == 0.5
    assert overlap(frozenset("ab"), frozenset("cd")) == 0


def test_stable_diffusion_has_686_tensors_of_which_most_hold_nothing() -> None:
    """The inventory that makes a ratio of tensors so different from one of parameters."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    shapes = {f"unet.{name}": tuple(value.shape) for name, value in unet.named_parameters()}
    assert len(shapes) == 686
    assert sum(value.numel() for value in unet.parameters()) == 859_520_964
    flat = frozenset(name for name, shape in shapes.items() if len(shape) == 1)
    assert len(flat) == 404
    assert shares(flat, shapes)["parameters"] < 1e-3
    assert len(Budget.of(shapes, 0.3, tie=True).units) == 391
    sizes = torch.tensor([float(torch.Size(shape).numel()) for shape in shapes.values()])
    largest = shares(Budget.of(shapes, 0.3).hard(sizes), shapes)
    assert largest["tensors"] == pytest.approx(0.3, abs=1e-3)
    assert largest["parameters"] > 0.97
    assert shares(Budget.of(shapes, 0.3, "parameters").hard(sizes), shapes)["parameters"] == pytest.approx(0.3, abs=1e-6)
