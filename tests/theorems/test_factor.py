"""Truncated SVD: no matrix of that rank is nearer (Eckart & Young)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeweights.diffusion.low_rank import factor


@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 12), fan=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_it_is_the_truncated_svd(out: int, fan: int, rank: int, seed: int) -> None:
    change = torch.randn(out, fan, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = factor(change, rank=rank)
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    r = min(rank, len(s))
    assert found.rank == r
    assert torch.allclose(found.delta.double(), u[:, :r] * s[:r] @ v[:r], atol=1e-5)
    assert found.error == pytest.approx(float(s[r:].norm()), abs=1e-5)
    assert found.norm == pytest.approx(float(s.norm()), rel=1e-9)
    assert torch.allclose(found.up.norm(dim=0), found.down.norm(dim=1), atol=1e-4), "both factors carry the scale evenly"


def test_the_rank_is_the_smallest_that_holds_the_energy() -> None:
    change = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))  # squares 9, 4, 1, 0.25 of 14.25
    assert [factor(change, energy=e).rank for e in (0.5, 0.64, 0.92, 0.99, 1.0)] == [1, 2, 3, 4, 4]
    kept = factor(change, energy=0.92)
    assert (kept.error / kept.norm) ** 2 <= 0.08


def test_rounding_is_no_rank_and_convolutions_keep_their_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    change = (torch.randn(8, 2, generator=generator) @ torch.randn(2, 27, generator=generator)).view(8, 3, 3, 3)
    found = factor(change.double())
    assert found.rank == 2
    assert found.down.shape == (2, 3, 3, 3)
    assert torch.allclose(found.delta, change, atol=1e-5)


def test_no_change_is_rank_one_of_nothing() -> None:
    found = factor(torch.zeros(3, 4))
    assert (found.rank, found.error, found.norm) == (1, 0.0, 0.0)
    assert torch.isfinite(found.up).all()
    assert torch.isfinite(found.down).all()
