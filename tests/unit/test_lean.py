"""Under a mask, frozen layers keep no gradient, no optimiser state and no activations."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from safeweights.attacks.relearning.full import Full
from safeweights.diffusion import adaptation
from safeweights.diffusion.adaptation import Adapter, Lesson, Shots
from safeweights.diffusion.lean import lean


def test_a_frozen_convolution_gives_the_same_and_keeps_only_its_weight() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1, stride=2).requires_grad_(False)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    kept: list[Any] = []

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
            out = layer(x)
        return out, torch.autograd.grad(out.square().sum(), x)[0]

    plain = run()
    assert x.shape in kept
    with lean(layer):
        ours = run()
        assert x.shape not in kept
    assert torch.equal(plain[0], ours[0])
    assert torch.allclose(plain[1], ours[1], atol=1e-5)
    run()
    assert x.shape in kept  # as before


def test_a_trained_convolution_is_left_as_it_is() -> None:
    layer = nn.Conv2d(2, 2, 1)
    with lean(layer):
        layer(torch.randn(1, 2, 4, 4)).sum().backward()
    assert layer.weight.grad is not None


def test_a_mask_saves_activations_and_changes_no_gradient(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, _ in tiny_model.named_parameters() if name.startswith("unet.")]
    frozen = frozenset(name for name in names if "conv" in name or "ff" in name)
    shots = Shots.encode(tiny_model, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), ["a dog"])
    found, kept = {}, {}
    for what, held in (("none", frozenset[str]()), ("mask", frozen), ("fat", frozen - {"unet.conv_in.weight"})):
        if what == "fat":
            monkeypatch.setattr(adaptation, "lean", lambda module: nullcontext())
        adapter = Adapter(parameters="full", frozen=held)
        student = adapter.fork(tiny_model)
        assert not set(student.trainable()) & held
        lesson = Lesson(model=student, adapter=adapter, shots=shots, batch_size=2)
        phi = adapter.start(student)
        total = [0]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, total=total: (total.__setitem__(0, total[0] + t.numel()), t)[1], lambda t: t
        ):
            loss = lesson.loss(phi, lesson.batch(0))
        loss.backward()
        kept[what], found[what] = total[0], {name: value.grad for name, value in phi.items()}
    assert set(found["mask"]) == set(names) - frozen
    for name, slope in found["mask"].items():
        assert torch.allclose(slope, found["none"][name], rtol=1e-3, atol=1e-6), name
    assert kept["mask"] < 0.9 * kept["none"]
    assert kept["mask"] < 0.95 * kept["fat"]


def test_nothing_is_carried_for_what_is_frozen(tiny_model: Any) -> None:
    names = [name for name, _ in tiny_model.named_parameters() if name.startswith("unet.")]
    frozen = frozenset(names[::2])
    shots = Shots.encode(tiny_model, torch.rand(1, 3, 16, 16), ["a dog"])
    adapted = Full(steps=1, batch_size=1).fit(tiny_model, shots, frozen=frozen)[-1]
    assert set(adapted.phi) == set(names) - frozen


def test_a_trained_norm_behind_frozen_layers(tiny_model: Any) -> None:
    """PyTorch 2.13 dies of a signal there; the gradient must be the one of the whole model."""
    names = [name for name, _ in tiny_model.named_parameters() if name.startswith("unet.")]
    shots = Shots.encode(tiny_model, torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)), ["a dog"])
    first = "unet.down_blocks.0.resnets.0.norm1.weight"
    found = []
    for frozen in (frozenset(name for name in names if "conv_in" in name), frozenset[str]()):
        adapter = Adapter(parameters="full", frozen=frozen)
        student = adapter.fork(tiny_model)
        lesson = Lesson(model=student, adapter=adapter, shots=shots)
        phi = adapter.start(student)
        lesson.loss(phi, lesson.batch(0)).backward()
        found.append(phi[first].grad)
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-6)
