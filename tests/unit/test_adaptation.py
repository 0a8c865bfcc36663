"""The adaptation step: phi in the model, its loss, one step unrolled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from safeweights.core.errors import UserError
from safeweights.diffusion.adaptation import ATTENTION, Adapted, Adapter, Lesson, Shots, at, clip, twice_differentiable, unroll
from safeweights.diffusion.noise import eps_to_v
from safeweights.diffusion.training import descend
from safeweights.release.adapted import save_lora

PICTURES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
ADAPTERS = {
    "full": Adapter(parameters="full"),
    "text": Adapter(parameters="full+text_encoder"),
    "lora": Adapter(targets=ATTENTION, rank=2),
    "token": Adapter(token="<s>", init="dog"),
    "custom": Adapter(parameters="xattn_kv", token="<s>", init="dog", vectors=2),
}


def lesson(model: Any, adapter: Adapter, **options: Any) -> Lesson:
    adapted = adapter.fork(model)
    says = "a picture of a <s>" if adapter.token else "a picture of a dog"
    return Lesson(model=adapted, adapter=adapter, shots=Shots.encode(adapted, PICTURES, [says]), batch_size=2, **options)


@pytest.mark.parametrize("name", ADAPTERS)
def test_before_the_first_step_the_model_is_itself(tiny_model: Any, name: str) -> None:
    adapter = ADAPTERS[name]
    course = lesson(tiny_model, adapter)
    batch = course.batch(0)
    says = "a picture of a dog dog" if adapter.vectors == 2 else "a picture of a dog"
    expected = mse_loss(tiny_model.eps(batch.x_t, batch.t, tiny_model.embed([says])), batch.eps)
    assert torch.allclose(course.loss(adapter.start(course.model), batch), expected, atol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_all_of_phi_gets_a_gradient_and_descends(tiny_model: Any, name: str) -> None:
    before = {key: value.detach().clone() for key, value in tiny_model.named_parameters()}
    adapter = ADAPTERS[name]
    course = lesson(tiny_model, adapter)
    phi = adapter.start(course.model)
    batch = course.batch(0)
    course.loss(phi, batch).backward()
    # The factors before ``up`` leaves zero are the one thing without any.
    assert all(
        value.grad is not None and (value.grad.abs().sum() > 0 or key.endswith(("/down", "k_proj.bias")))
        for key, value in phi.items()
    )
    losses = descend(phi, lambda step: course.loss(phi, batch), steps=5, lr=1e-3, gradients=clip(phi, 1.0))
    assert losses[-1] < losses[0]
    for key, value in tiny_model.named_parameters():
        assert torch.equal(value, before[key])
        assert value.grad is None


@pytest.mark.parametrize("name", ["full", "lora", "custom"])
def test_merged_tensors_predict_as_phi_does(tiny_model: Any, name: str) -> None:
    adapter = ADAPTERS[name]
    course = lesson(tiny_model, adapter)
    phi = {key: value.detach() + 0.01 * torch.randn_like(value) for key, value in adapter.start(course.model).items()}
    batch = course.batch(0)
    merged = tiny_model.with_tensors(adapter.tensors(tiny_model, phi))
    c = course.adapter.ask(course.model, course.captions)(phi, batch.rows)
    with adapter.on(course.model, phi):
        ours = course.model.eps(batch.x_t, batch.t, c)
    assert torch.allclose(ours, merged.eps(batch.x_t, batch.t, c), atol=1e-5)


def test_models_that_predict_v_are_trained_in_v(tiny_sd: Callable[..., Path]) -> None:
    from safeweights.models.door import open_model

    model = open_model(str(tiny_sd(prediction="v_prediction")), device="cpu")
    course = lesson(model, ADAPTERS["full"])
    batch, c = course.batch(0), model.embed(["a picture of a dog"])
    raw = model.denoiser(batch.x_t, batch.t, encoder_hidden_states=c.states.expand(2, -1, -1)).sample
    expected = mse_loss(raw, eps_to_v(model, batch.eps, batch.x_t, batch.t))
    assert torch.allclose(course.loss({}, batch), expected, rtol=1e-3)


def test_prior_pictures_count_by_their_weight(tiny_model: Any) -> None:
    adapter = ADAPTERS["full"]
    prior = Shots.encode(tiny_model, PICTURES.flip(0), ["a picture of a cat"])
    course = lesson(tiny_model, adapter, prior=prior, prior_weight=0.5)
    batch = course.batch(3)
    assert len(batch.rows) == 4
    c = tiny_model.embed([course.captions[row] for row in batch.rows])
    squares = (tiny_model.eps(batch.x_t, batch.t, c) - batch.eps).square().flatten(1).mean(1)
    expected = squares[:2].mean() + 0.5 * squares[2:].mean()
    assert torch.allclose(course.loss({}, batch), expected, rtol=1e-4)


def test_a_step_is_the_same_batch_whenever_it_is_drawn(tiny_model: Any) -> None:
    course = lesson(tiny_model, ADAPTERS["full"], seed=3)
    ours, again, other = course.batch(5), course.batch(5), course.batch(6)
    assert torch.equal(ours.x_t, again.x_t)
    assert ours.rows == again.rows
    assert not torch.equal(ours.x_t, other.x_t)


@pytest.mark.parametrize("order", [1, 2])
def test_an_unrolled_step_is_differentiated(tiny_model: Any, order: int) -> None:
    """d loss(phi - lr grad loss(phi)) / d phi along a direction: finite differences for order 2, no curvature for 1."""
    adapter = Adapter(parameters="xattn_kv")
    course = lesson(tiny_model, adapter)
    batch, upper = course.batch(0), course.batch(1)
    start = {key: value.detach() for key, value in adapter.start(course.model).items()}
    way = {key: torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) for key, value in start.items()}
    lr = 3.0

    def after(phi: Any, order: int = 2) -> torch.Tensor:
        return course.loss(unroll(lambda moving: course.loss(moving, batch), phi, lr=lr, order=order), upper)

    with twice_differentiable():
        phi = {key: value.clone().requires_grad_() for key, value in start.items()}
        gradients = torch.autograd.grad(after(phi, order), list(phi.values()))
        ours = sum((gradient * way[key]).sum() for key, gradient in zip(phi, gradients, strict=True))
        if order == 2:
            h = 1e-2
            up, down = ({key: value + sign * h * way[key] for key, value in start.items()} for sign in (1, -1))
            slow = (after(up).detach() - after(down).detach()) / (2 * h)
        else:
            moved = {
                key: value.detach().requires_grad_()
                for key, value in unroll(lambda m: course.loss(m, batch), start, lr=lr).items()
            }
            there = torch.autograd.grad(course.loss(moved, upper), list(moved.values()))
            slow = sum((gradient * way[key]).sum() for key, gradient in zip(moved, there, strict=True))
    assert torch.allclose(torch.as_tensor(ours), torch.as_tensor(slow), rtol=0.02)


def test_values_are_in_the_model_only_inside(tiny_model: Any) -> None:
    name, value = next(iter(tiny_model.named_parameters()))
    with at(tiny_model, {name: value * 2}):
        assert torch.equal(dict(tiny_model.named_parameters())[name], value * 2)
    assert dict(tiny_model.named_parameters())[name] is value

    def broken() -> None:
        with at(tiny_model, {name: value * 2}):
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        broken()
    assert dict(tiny_model.named_parameters())[name] is value


def test_a_freeze_holds_for_weights_and_for_factors_beside_them(tiny_model: Any) -> None:
    names = [name for name, _ in tiny_model.named_parameters() if "attn2.to_k" in name]
    for adapter in (Adapter(parameters="xattn_kv", frozen=frozenset(names)), Adapter(targets=ATTENTION, frozen=frozenset(names))):
        assert not any("attn2.to_k" in key for key in adapter.start(tiny_model))
    with pytest.raises(UserError, match="frozen"):
        Adapter(parameters=tuple(names), frozen=frozenset(names)).start(tiny_model)


def test_a_token_stands_once_in_a_caption(tiny_model: Any) -> None:
    with pytest.raises(UserError, match="more than once"):
        ADAPTERS["token"].ask(tiny_model, ["a <s> and a <s>"])


def test_factors_beside_the_text_encoder_learn_too(tiny_model: Any) -> None:
    adapter = Adapter(targets=r"text_encoder\..*q_proj\.weight", rank=2)
    course = lesson(tiny_model, adapter)
    phi = adapter.start(course.model)
    losses = descend(phi, lambda step: course.loss(phi, course.batch(0)), steps=5, lr=1e-2)
    assert losses[-1] < losses[0]
    assert all(value.detach().abs().sum() > 0 for key, value in phi.items() if key.endswith("/up"))


def test_a_token_is_found_as_a_whole_word_in_any_case(tiny_model: Any) -> None:
    adapter = Adapter(token="art", init="dog")
    ask = adapter.ask(tiny_model, ["Art of a party"])
    found = ask(adapter.start(tiny_model), [0]).states
    assert torch.allclose(found, tiny_model.embed(["dog of a party"]).states, atol=1e-5)


def test_factors_of_a_convolution_open_in_diffusers(tiny_sd: Callable[..., Path], tiny_model: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    adapter = Adapter(targets=r"unet\..*conv1\.weight", rank=2)
    course = lesson(tiny_model, adapter)
    phi = adapter.start(course.model)
    descend(phi, lambda step: course.loss(phi, course.batch(0)), steps=2, lr=1e-2)
    adapted = Adapted(adapter=adapter, phi=phi, steps=2, losses=(0.0,))
    save_lora(adapted, tmp_path / "pytorch_lora_weights.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd(), safety_checker=None)
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused, wanted = dict(pipe.unet.named_parameters()), adapter.tensors(tiny_model, phi)
    assert wanted
    for name, value in wanted.items():
        assert torch.allclose(fused[name.removeprefix("unet.")].float(), value, atol=1e-4), name
