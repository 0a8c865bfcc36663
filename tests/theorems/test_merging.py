"""The merge is its constrained least-squares problem: its projectors, its constraint and its gradient, against the slow solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeweights.core.concept import Concept, Prompt
from safeweights.diffusion.merging import Merge, concept_features, text_features


def problem(seed: int, concepts: int = 3, d: int = 12, out: int = 5) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """Token features of each concept, of ordinary text, the old map and its fine-tunes."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    targets = [draw(int(torch.randint(1, 4, (), generator=rng)), d) for _ in range(concepts)]
    W_0 = draw(out, d)
    return targets, draw(40, d), W_0, [W_0 + 0.3 * draw(out, d) for _ in range(concepts)]


def exact(targets: Sequence[Tensor], regular: Tensor) -> Merge:
    return Merge.fit(targets, regular, ridge=0.0, prior=0.0)


def slow(W_0: Tensor, tuned: Sequence[Tensor], targets: Sequence[Tensor], regular: Tensor) -> Tensor:
    """The Karush-Kuhn-Tucker system of the constrained problem, solved as it stands."""
    C, A = torch.cat(list(targets)), regular.T @ regular
    wanted = torch.cat([C_n @ W_n.T for C_n, W_n in zip(targets, tuned, strict=True)])
    k, d = C.shape
    system = torch.zeros((d + k, d + k), dtype=A.dtype)
    system[:d, :d], system[:d, d:], system[d:, :d] = A, C.T, C
    solution: Tensor = torch.linalg.solve(system, torch.cat([A @ W_0.T, wanted]))
    return solution[:d].T


seeds = given(seed=st.integers(0, 10**6), concepts=st.integers(1, 4))


@seeds
@settings(max_examples=25, deadline=None)
def test_every_concepts_tokens_get_what_its_own_fine_tune_gives(seed: int, concepts: int) -> None:
    targets, regular, W_0, tuned = problem(seed, concepts)
    merged = exact(targets, regular)(W_0, tuned)
    for C_n, W_n in zip(targets, tuned, strict=True):
        assert not torch.allclose(C_n @ W_n.T, C_n @ W_0.T, atol=1e-2)  # there was something to keep
        assert (C_n @ merged.T - C_n @ W_n.T).abs().max() < 1e-8


@seeds
@settings(max_examples=25, deadline=None)
def test_it_is_the_slow_solution(seed: int, concepts: int) -> None:
    targets, regular, W_0, tuned = problem(seed, concepts)
    assert (exact(targets, regular)(W_0, tuned) - slow(W_0, tuned, targets, regular)).abs().max() < 1e-8


@seeds
@settings(max_examples=25, deadline=None)
def test_the_projectors_are_projectors_and_with_the_rest_add_up_to_one(seed: int, concepts: int) -> None:
    """P_n P_m = delta_nm P_n; with P_0 = I - sum_n P_n the identity is split: P_0 P_n = 0; and P_m C_n^T = delta_nm C_n^T."""
    targets, regular, _, _ = problem(seed, concepts)
    P = exact(targets, regular).projectors
    one = torch.eye(P.shape[-1], dtype=P.dtype)
    every = torch.cat([one[None] - P.sum(0, keepdim=True), P])
    assert (every.sum(0) - one).abs().max() < 1e-12
    for n, P_n in enumerate(every):
        for m, P_m in enumerate(every):
            assert (P_n @ P_m - (n == m) * P_n).abs().max() < 1e-8, (n, m)
    for n, C_n in enumerate(targets):
        assert torch.linalg.matrix_rank(P[n]) == len(C_n)
        # P_n acts on maps from the right: a row W C_n^T is W P_m C_n^T.
        for m in range(len(targets)):
            assert (P[m] @ C_n.T - (n == m) * C_n.T).abs().max() < 1e-8


@seeds
@settings(max_examples=15, deadline=None)
def test_its_gradient_is_that_through_the_slow_solve(seed: int, concepts: int) -> None:
    targets, regular, W_0, tuned = problem(seed, concepts)
    G = torch.randn(W_0.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    merge = exact(targets, regular)

    def gradients(function: Any) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_(True) for tensor in (W_0, *tuned)]
        return list(torch.autograd.grad((function(leaves[0], leaves[1:]) * G).sum(), leaves))

    ours, theirs = gradients(merge), gradients(lambda W, parts: slow(W, parts, targets, regular))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() < 1e-8
    for mine, P_n in zip(ours[1:], merge.projectors, strict=True):
        assert (mine - G @ P_n.T).abs().max() < 1e-12  # the vector-Jacobian product, as stated
    assert (ours[0] - G @ (torch.eye(len(P_n), dtype=G.dtype) - merge.projectors.sum(0)).T).abs().max() < 1e-8


def test_its_gradient_is_that_of_finite_differences() -> None:
    targets, regular, W_0, tuned = problem(1, 2, d=6, out=3)
    merge = exact(targets, regular)
    leaves = [tensor.clone().requires_grad_(True) for tensor in (W_0, *tuned)]
    assert torch.autograd.gradcheck(lambda W, *parts: merge(W, parts), leaves, eps=1e-6, atol=1e-8)
    # Once more through a curved function of the merge, forward over backward.
    assert torch.autograd.gradgradcheck(lambda W, *parts: merge(W, parts).square().sum(), leaves, eps=1e-6, atol=1e-6)


def test_concepts_that_share_a_token_meet_in_the_middle() -> None:
    """Contradictory constraints have no exact answer; the ridge gives the mean, and nothing blows up."""
    targets, regular, W_0, tuned = problem(3, 2)
    shared = targets[0][:1]
    for other in (shared, shared + 1e-9, 1.5 * shared):
        merged = Merge.fit([shared, other], regular, ridge=1e-6)(W_0, tuned[:2])
        assert (merged - W_0).norm() < 10 * sum((W_n - W_0).norm() for W_n in tuned[:2])
    merged = Merge.fit([shared, shared], regular, ridge=1e-6)(W_0, tuned[:2])
    assert (shared @ merged.T - shared @ (tuned[0] + tuned[1]).T / 2).abs().max() < 1e-5
    near = targets[0].repeat(2, 1)
    near[len(targets[0]) :] += 1e-7  # near-duplicates within a concept count once
    assert (Merge.fit([near], regular, ridge=0, prior=0).projectors - exact(targets[:1], regular).projectors).abs().max() < 1e-12


def test_a_small_ridge_stays_by_the_exact_merge() -> None:
    targets, regular, W_0, tuned = problem(5)
    want = exact(targets, regular)(W_0, tuned)
    gaps = [(Merge.fit(targets, regular, ridge=ridge)(W_0, tuned) - want).norm() / want.norm() for ridge in (1e-2, 1e-4, 1e-8)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[1] < 1e-2
    assert gaps[2] < 1e-5


def test_one_concept_gets_its_own_weights_and_leaves_ordinary_text() -> None:
    targets, regular, W_0, tuned = problem(7, 1)
    merged = exact(targets, regular)(W_0, tuned)
    assert (targets[0] @ (merged - tuned[0]).T).abs().max() < 1e-8
    # Directions that are A-orthogonal to the concept's tokens are read as before.
    A_inverse_C = torch.linalg.solve(regular.T @ regular, targets[0].T)
    away = torch.linalg.qr(A_inverse_C, mode="complete").Q[:, len(targets[0]) :]
    assert ((merged - W_0) @ away).abs().max() < 1e-8


def test_nothing_tuned_nothing_changed_and_the_rest_is_averaged() -> None:
    targets, regular, W_0, tuned = problem(9, 2)
    merge = exact(targets, regular)
    assert torch.equal(merge(W_0, [W_0, W_0]), W_0)
    bias = torch.ones(4)
    merged = merge.tensors({"k": W_0, "b": bias}, [{"k": tuned[0], "b": 3 * bias}, {"k": tuned[1]}], ["k"])
    assert torch.equal(merged["k"], merge(W_0, tuned))
    assert torch.equal(merged["b"], 2 * bias)


def test_nonsense_is_refused() -> None:
    targets, regular, W_0, tuned = problem(2, 2)
    with pytest.raises(ValueError, match="at least one token"):
        Merge.fit([], regular)
    with pytest.raises(ValueError, match="NaN"):
        Merge.fit([targets[0] * float("nan")], regular)
    with pytest.raises(ValueError, match="12 dimensions"):
        Merge.fit([torch.randn(13, 12, generator=torch.Generator().manual_seed(0))], regular, ridge=0)
    with pytest.raises(ValueError, match="fine-tunes"):
        exact(targets, regular)(W_0, tuned[:1])


def test_features_are_the_concepts_tokens_and_the_end(tiny_model: Any) -> None:
    dog = Concept(name="dog", kind="object", term="dog", anchor="cat", prompts=(Prompt("a picture of a dog in the house"),))
    features = concept_features(tiny_model, dog)
    states = tiny_model.embed(["dog", "a picture of a dog in the house"]).states
    assert torch.equal(features, torch.cat([states[0, 1:3], states[1, 5:10]]))
    assert torch.equal(text_features(tiny_model, ["dog"]), states[0, 1:3])
    assert text_features(tiny_model, []).shape == (0, states.shape[-1])
    P = Merge.fit([features], text_features(tiny_model, ["a red house", "a boat"])).projectors
    assert torch.isfinite(P).all()
