"""Fast formulas against slow definitions."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeweights.diffusion.search import project_to_simplex, sample_one_hot


def bisect(x: torch.Tensor) -> torch.Tensor:
    """The threshold at which the clipped entries add up to one, by halving an interval 100 times."""
    low, high = float(x.min()) - 1, float(x.max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (x - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (x - high).clamp(min=0)


@given(rows=st.integers(1, 3), width=st.integers(1, 40), scale=st.sampled_from([1e-3, 1.0, 100.0]), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_simplex_projection_equals_bisection(rows: int, width: int, scale: float, seed: int) -> None:
    x = scale * torch.randn(rows, 2, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    projected = project_to_simplex(x)
    slow = torch.stack([torch.stack([bisect(row) for row in pair]) for pair in x])
    assert torch.allclose(projected, slow, atol=1e-9 * max(scale, 1))
    assert torch.allclose(projected.sum(-1), torch.ones(rows, 2, dtype=torch.float64))
    assert torch.allclose(project_to_simplex(projected), projected, atol=1e-12)


def test_simplex_projection_of_a_whole_vocabulary_in_float32() -> None:
    projected = project_to_simplex(torch.full((2, 49408), 1 / 49408) - 1e-3 * torch.rand(2, 49408))
    assert torch.allclose(projected.sum(-1), torch.ones(2), atol=1e-4)


def test_one_hot_draws_follow_the_distribution() -> None:
    U = torch.tensor([0.1, 0.0, 0.6, 0.3])
    draws = sample_one_hot(U.expand(1, 20000, 4), [torch.Generator().manual_seed(0)])
    assert torch.equal(draws.sum(-1), torch.ones(1, 20000))
    assert torch.allclose(draws.mean(dim=(0, 1)), U, atol=0.02)
    assert draws[..., 1].sum() == 0


def test_one_hot_gradients_pass_straight_through() -> None:
    U = torch.full((2, 3, 5), 0.2, requires_grad=True)
    weights = torch.arange(5.0)
    (sample_one_hot(U, [torch.Generator().manual_seed(i) for i in range(2)]) * weights).sum().backward()
    assert torch.equal(U.grad, weights.expand(2, 3, 5))


def test_one_hot_rows_do_not_depend_on_the_batch() -> None:
    U = torch.softmax(torch.randn(3, 4, 50), dim=-1)
    together = sample_one_hot(U, [torch.Generator().manual_seed(i) for i in range(3)])
    for i in range(3):
        assert torch.equal(sample_one_hot(U[i : i + 1], [torch.Generator().manual_seed(i)])[0], together[i])
