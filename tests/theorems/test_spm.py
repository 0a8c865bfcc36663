"""SPM: adapters equal their merged weights, erase, anchor, and open as wide as a prompt says the concept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safeweights.core.concept import Concept, Prompt
from safeweights.core.model import Conditioning
from safeweights.core.table import method
from safeweights.diffusion.low_rank import LowRank, layer_weights
from safeweights.diffusion.noise import generator
from safeweights.erasure.spm import anchor, facilitated, permeability
from safeweights.models.gaussian import GaussianModel

DOG = Concept(name="dog", kind="object", term="dog", anchor="cat", prompts=(Prompt("a picture of a dog"),))
MOSAIC = Concept(name="mosaic", kind="style", term="mosaic", prompts=(Prompt("mosaic"),))
SHORT = {"steps": 8, "ddim_steps": 3, "trajectories": 3, "batch_size": 2, "anchors": 2}


@pytest.mark.parametrize("group", ["transformer", "full", "text_encoder"])
def test_adapters_are_the_same_as_their_merged_weights(tiny_model: Any, group: str) -> None:
    names = layer_weights(tiny_model, group)
    adapters = LowRank(tiny_model, names, rank=2)
    x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    t, weights = torch.tensor([100, 700]), dict(tiny_model.named_parameters())

    @torch.no_grad()
    def ask(model: Any) -> Any:
        return model.eps(x, t, model.embed(["a dog", "a red house"]))

    with adapters.on(tiny_model):
        assert torch.equal(ask(tiny_model), ask(tiny_model))
        assert torch.allclose(ask(tiny_model), ask(tiny_model.with_tensors({})), atol=0)  # nothing at first
    with torch.no_grad():
        for i, up in enumerate(adapters.up.values()):
            up.copy_(0.1 * torch.randn(up.shape, generator=torch.Generator().manual_seed(i)))
    merged = tiny_model.with_tensors({name: weights[name] + delta for name, delta in adapters.deltas().items()})
    before = ask(tiny_model)
    with adapters.on(tiny_model):
        hung = ask(tiny_model)
    assert torch.allclose(hung, ask(merged), atol=1e-4)
    assert not torch.allclose(hung, before, atol=1e-3)
    assert torch.equal(ask(tiny_model), before)  # the hooks are gone


def test_only_one_dimension_of_every_layer_changes(tiny_model: Any) -> None:
    protection = method("spm", **SHORT, lr=1e-2).protect(tiny_model, [DOG], retain=["a red truck"], rng=generator(0))
    base = dict(tiny_model.named_parameters())
    ranks = {int(torch.linalg.matrix_rank((W - base[n]).flatten(1).double(), rtol=1e-2)) for n, W in protection.tensors.items()}
    assert ranks <= {0, 1}
    assert 1 in ranks


def test_erases_and_anchors_on_the_gaussian() -> None:
    """The concept moves to -mu_c as ESD's does, while the anchored word stays; without anchoring it is free to go."""
    model = GaussianModel(["mosaic", "red", "house"], deviation=0.3)
    settings = {
        "parameters": "xattn", "prompts": "term", "steps": 600, "lr": 0.03, "batch_size": 16, "anchors": 16, "ddim_steps": 10,
        "trajectories": 16, "anchor_with": "retain",
    }  # fmt: skip
    gaps = {}
    for lam in (0.0, 10.0):
        protected = method("spm", **settings, lam=lam).protect(model, [MOSAIC], retain=["house"], rng=generator(0)).apply(model)
        gaps[lam] = [
            float((protected.mean(word) - sign * model.mean(word)).norm() / model.mean(word).norm())
            for word, sign in (("mosaic", -1), ("house", 1))
        ]
    assert gaps[0.0][0] < 0.2  # erased
    assert gaps[10.0][1] < min(0.2, gaps[0.0][1])  # anchored


def test_anchors_are_as_long_as_the_concept_and_unlike_it() -> None:
    c = Conditioning(torch.randn((64, 5, 8), generator=torch.Generator().manual_seed(1)))
    drawn = anchor(c, None, generator(0)).states.flatten(1)
    ratio = drawn.norm(dim=1) / c.states.flatten(1).norm(dim=1)
    assert ((ratio > 0.8) & (ratio < 1.2)).all()
    # From a pool of the concept itself and its opposite, the opposite is taken.
    pool = Conditioning(torch.cat([c.states[:1], -c.states[:1]]))
    taken = anchor(Conditioning(c.states[:1].expand(200, -1, -1)), pool, generator(0)).states
    assert float((taken == -c.states[0]).flatten(1).all(1).float().mean()) > 0.95


def test_the_membrane_opens_for_prompts_that_say_the_concept(tiny_model: Any) -> None:
    width = permeability(tiny_model, ["dog", "a red dog", "church"], DOG)
    assert float(width[0]) == pytest.approx(1)
    assert float(width[1]) == pytest.approx(1)  # the term's tokens are all there
    assert float(width[2]) < 1
    protection = method("spm", **SHORT, lr=1e-2).protect(tiny_model, [DOG], rng=generator(0))
    name = next(iter(protection.tensors))
    base, merged = dict(tiny_model.named_parameters())[name], protection.tensors[name]
    open_ = dict(facilitated(tiny_model, protection, DOG, "a dog").named_parameters())[name]
    assert torch.allclose(open_, merged, atol=1e-6)
    part = dict(facilitated(tiny_model, protection, DOG, "church").named_parameters())[name]
    assert torch.allclose(part - base, float(width[2]) * (merged - base), atol=1e-6)
