"""RECE's derivation minimises its objective, and its rounds leave less of the concept to be found."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeweights.core.concept import Concept, Prompt
from safeweights.core.table import method
from safeweights.diffusion.noise import generator
from safeweights.erasure.rece import derive
from safeweights.models.gaussian import GaussianModel

DOG = Concept(name="dog", kind="object", term="dog", anchor="cat", prompts=(Prompt("a picture of a dog"),))


@given(seed=st.integers(0, 10**6), lam=st.floats(1e-2, 10))
@settings(max_examples=25, deadline=None)
def test_the_derived_embedding_minimises_its_objective(seed: int, lam: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    W, W_o = ([torch.randn((n, 6), generator=rng, dtype=torch.float64) for n in (5, 3)] for _ in range(2))
    c = torch.randn((2, 6), generator=rng, dtype=torch.float64)
    found = derive(W, W_o, c, lam).requires_grad_()
    gaps = [(found @ new.T - c @ old.T).square().sum() for new, old in zip(W, W_o, strict=True)]
    (gradient,) = torch.autograd.grad(torch.stack(gaps).sum() + lam * found.square().sum(), found)
    assert gradient.abs().max() < 1e-8


def test_unedited_maps_derive_the_concept_itself() -> None:
    W = [torch.randn((7, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64)]
    c = torch.ones((1, 6), dtype=torch.float64)
    assert torch.allclose(derive(W, W, c, 1e-9), c, atol=1e-6)


def test_rounds_leave_less_to_be_found(tiny_model: Any) -> None:
    left = [
        method("rece", rounds=rounds, lam=0.01)
        .protect(tiny_model, [DOG], retain=["a red truck"], rng=generator(0))
        .cost["distance"]
        for rounds in (1, 3)
    ]
    assert left[1] > left[0]


def test_without_rounds_the_concept_goes_to_its_anchor() -> None:
    """With one-hot words and an empty anchor the erased word means nothing, the others what they did."""
    model = GaussianModel(["mosaic", "red", "house"], deviation=0.3)
    mosaic = Concept(name="mosaic", kind="style", term="mosaic", prompts=(Prompt("mosaic"),))
    eraser = method("rece", tokens="last", lam=1e-6, rounds=0)
    protected = eraser.protect(model, [mosaic], retain=["red house"], rng=generator(0)).apply(model)
    assert torch.allclose(protected.mean("mosaic"), torch.zeros(model.latent_shape), atol=1e-3)
    assert torch.allclose(protected.mean("red house"), model.mean("red house"), atol=1e-3)


def test_rounds_hold_what_was_edited_before() -> None:
    model = GaussianModel(["mosaic", "red", "house"], deviation=0.3)
    mosaic = Concept(name="mosaic", kind="style", term="mosaic", prompts=(Prompt("mosaic"),))
    left = {}
    for hold in (False, True):
        eraser = method("rece", tokens="last", lam=1e-3, rounds=2, hold_edited=hold)
        left[hold] = float(eraser.protect(model, [mosaic], rng=generator(0)).apply(model).mean("mosaic").norm())
    assert left[True] < 0.5 * left[False]
