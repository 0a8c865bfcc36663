"""MACE: the fusion solves its normal equations, and its parts do what they are for."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeweights.core.concept import Concept, Prompt
from safeweights.core.table import method
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import generator
from safeweights.diffusion.text_pairs import paired_states, pairs_of
from safeweights.erasure.mace import focus, fuse, term_positions

DOG = Concept(name="dog", kind="object", term="dog", anchor="cat", prompts=(Prompt("a picture of a dog in the house"),))


@given(seed=st.integers(0, 10**6), concepts=st.integers(1, 4), l2=st.floats(1e-3, 10), lam=st.floats(1e-3, 1))
@settings(max_examples=25, deadline=None)
def test_fusion_solves_its_normal_equations(seed: int, concepts: int, l2: float, lam: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    W, *deltas = (torch.randn((5, 6), generator=rng, dtype=torch.float64) for _ in range(concepts + 1))
    keys = [torch.randn((3, 6), generator=rng, dtype=torch.float64) for _ in range(concepts)]
    kept = torch.randn((4, 6), generator=rng, dtype=torch.float64)
    fused = fuse(W, keys, deltas, kept, l2=l2, lam=lam)
    gap = sum(
        ((fused - W - delta) @ e.T @ e for e, delta in zip(keys, deltas, strict=True)),
        l2 * (fused - W) @ kept.T @ kept + lam * (fused - W),
    )
    assert gap.abs().max() < 1e-8


def test_one_concept_alone_keeps_its_adapters() -> None:
    rng = torch.Generator().manual_seed(0)
    W, delta = torch.randn((5, 6), generator=rng).double(), torch.randn((5, 6), generator=rng).double()
    e = torch.randn((9, 6), generator=rng).double()
    assert torch.allclose(fuse(W, [e], [delta], e[:0], l2=1.0, lam=1e-10), W + delta, atol=1e-6)


def test_attention_leaves_the_terms_own_words(tiny_model: Any) -> None:
    eraser = method("mace", steps=30, lr=0.05, trajectories=4, ddim_steps=4, focal=False)
    names = [name for name, _ in tiny_model.named_parameters() if ".attn2.to_k." in name or ".attn2.to_v." in name]
    pairs = pairs_of(DOG, "both")
    _, losses = eraser._suppress(tiny_model, tiny_model, names, DOG, pairs, 0, Workspace())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_words_around_the_term_are_paired_with_those_of_the_guide(tiny_model: Any) -> None:
    """Before the term the states are equal, as a causal encoder has not read it yet; after it they pair from the end."""
    (pair,) = pairs_of(DOG, "prompts")
    old, new = paired_states(tiny_model, [pair], "around")
    marked = term_positions(tiny_model, [pair.text], "dog")
    assert int(marked.sum()) == 1
    assert len(old) == tiny_model.max_tokens - 2
    assert torch.allclose(old[:4], new[:4], atol=1e-5)
    assert not torch.allclose(old[4:], new[4:], atol=1e-3)


def test_the_focus_is_where_concepts_take_shape() -> None:
    weight = focus(torch.arange(1000))
    assert 200 < float(weight.argmax()) < 400
    assert float(weight[200:400].sum() / weight.sum()) > 0.8
    assert bool((weight > 0).all())


def test_concepts_are_fused_in_any_number(tiny_model: Any) -> None:
    cat = Concept(name="cat", kind="object", term="cat", anchor="dog", prompts=(Prompt("a red cat"),))
    protection = method("mace", steps=2, ddim_steps=3, trajectories=3).protect(
        tiny_model, [DOG, cat], retain=["a red truck"], rng=generator(0)
    )
    assert protection.concepts == ("dog", "cat")
    assert protection.cost["steps"] == 4
