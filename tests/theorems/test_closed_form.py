"""What the closed-form edit promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeweights.diffusion.closed_form import edit


def problem(seed: int = 0, n: int = 3, m: int = 4, d_in: int = 6, d_out: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    W, C, V, K = (
        torch.randn(shape, generator=rng, dtype=torch.float64) for shape in [(d_out, d_in), (n, d_in), (n, d_out), (m, d_in)]
    )
    return W, C, V, K


@given(seed=st.integers(0, 10**6), n=st.integers(1, 8), m=st.integers(0, 8), lam=st.floats(1e-3, 10))
@settings(max_examples=50, deadline=None)
def test_solves_its_normal_equations(seed: int, n: int, m: int, lam: float) -> None:
    W_o, C, V, K = problem(seed, n, m)
    rng = torch.Generator().manual_seed(seed + 1)
    alpha, beta = torch.rand(n, generator=rng) + 0.1, torch.rand(m, generator=rng) + 0.1
    W = edit(W_o, C, V, K, alpha=alpha, beta=beta, lam=lam)
    a, b, eye = alpha.double(), beta.double(), torch.eye(6, dtype=torch.float64)
    left = W @ ((C.T * a) @ C + (K.T * b) @ K + lam * eye)
    right = (V.T * a) @ C + W_o @ ((K.T * b) @ K) + lam * W_o
    assert torch.allclose(left, right, atol=1e-9)


def test_is_the_minimum_found_by_descent() -> None:
    W_o, C, V, K = problem()
    target = edit(W_o, C, V, K, alpha=2.0, beta=0.5, lam=0.3)
    W = W_o.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([W], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = 2 * (C @ W.T - V).square().sum() + 0.5 * (K @ (W - W_o).T).square().sum() + 0.3 * (W - W_o).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    assert torch.allclose(W.detach(), target, atol=1e-6)


def test_infinite_beta_leaves_the_retained_keys() -> None:
    W_o, C, V, K = problem()
    W = edit(W_o, C, V, K, beta=1e12)
    assert torch.allclose(K @ W.T, K @ W_o.T, atol=1e-5)
    assert (C @ W.T - V).norm() < (C @ W_o.T - V).norm()


def test_infinite_lam_changes_nothing() -> None:
    W_o, C, V, K = problem()
    assert torch.allclose(edit(W_o, C, V, K, lam=1e14), W_o, atol=1e-10)


def test_nothing_to_edit_leaves_the_weights_bit_for_bit() -> None:
    W_o, C, _, K = problem()
    half = W_o.to(torch.float16)
    assert torch.equal(edit(half, C, C @ half.double().T, K), half)


def test_small_lam_reaches_the_values_and_zero_gives_the_smallest_change() -> None:
    W_o, C, V, _ = problem(n=3)
    assert torch.allclose(C @ edit(W_o, C, V, lam=1e-10).T, V, atol=1e-6)
    exact = edit(W_o, C, V, lam=0.0)
    assert torch.allclose(C @ exact.T, V, atol=1e-9)
    assert torch.allclose(exact, edit(W_o, C, V, lam=1e-10), atol=1e-6)


def test_retained_values_of_ones_own() -> None:
    W_o, C, V, K = problem(m=2)
    values = torch.randn(2, 5, dtype=torch.float64)
    assert torch.allclose(K @ edit(W_o, C[:1], V[:1], K, values_retain=values, beta=1e9, lam=1e-6).T, values, atol=1e-5)


def test_refuses_nonsense() -> None:
    W_o, C, V, K = problem()
    with pytest.raises(ValueError, match="negative"):
        edit(W_o, C, V, K, lam=-1)
    with pytest.raises(ValueError, match="NaN"):
        edit(W_o, C * float("nan"), V, K)
