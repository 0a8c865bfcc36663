"""Forks, edits and saving: what is shared, what is copied, and in which dtype."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights.core.errors import UserError
from safeweights.core.model import Conditioning, Sampling
from safeweights.diffusion.sampling import candidates_of, generate
from safeweights.diffusion.training import descend
from safeweights.models.door import open_model

SMALL = Sampling(width=16, height=16, steps=4, guidance_scale=3.0)


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def picture(model: Any, seed: int = 1) -> torch.Tensor:
    return generate(model, candidates_of(["a red house"], [seed]), SMALL)[0]


@pytest.fixture
def half(tiny_sd: Callable[..., Path]) -> Any:
    return open_model(tiny_sd(), device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("group", ["xattn", "text_encoder:1", "full"])
def test_a_fork_owns_what_it_trains_and_shares_the_rest(tiny_model: Any, group: str) -> None:
    before = snapshot(tiny_model)
    fork = tiny_model.fork(group)
    base, own = dict(tiny_model.named_parameters()), dict(fork.named_parameters())
    trainable = fork.trainable()
    assert trainable
    for name, parameter in own.items():
        assert (parameter is base[name]) == (name not in trainable)
        assert parameter.requires_grad == (name in trainable)
        assert not base[name].requires_grad
    assert torch.equal(picture(fork), picture(tiny_model))
    x = torch.randn(2, 4, 8, 8)
    c = fork.embed(["a red house"])
    fork.eps(x, torch.tensor([10, 500]), c).square().sum().backward()
    # The last layer's part of a text encoder may not feel anything, but no gradient may leak into the base.
    assert sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trainable.values()) > len(trainable) // 2
    assert all(p.grad is None for p in tiny_model.denoiser.parameters())
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.add_(0.1)
    assert all(torch.equal(p, before[name]) for name, p in tiny_model.named_parameters())
    assert not torch.allclose(picture(fork), picture(tiny_model), atol=1e-3)
    assert set(fork.edited()) == set(trainable)
    assert all(torch.equal(value, trainable[name]) for name, value in fork.edited().items())


def test_parts_without_trained_parameters_are_shared_whole(tiny_model: Any) -> None:
    assert tiny_model.fork("xattn").text_encoder is tiny_model.text_encoder
    assert tiny_model.fork("text_encoder").denoiser is tiny_model.denoiser
    assert tiny_model.fork("xattn").vae is tiny_model.vae


def test_forks_of_forks_do_not_touch_each_other(tiny_model: Any) -> None:
    first = tiny_model.fork("xattn")
    second = first.fork("selfattn")
    assert all(p.requires_grad for p in first.trainable().values())
    assert {name for name, p in second.named_parameters() if p.requires_grad} == set(second.trainable())
    held = snapshot(second)
    with torch.no_grad():
        for parameter in first.trainable().values():
            parameter.zero_()
    assert all(torch.equal(p, held[name]) for name, p in second.named_parameters())


def test_explicit_names(tiny_model: Any) -> None:
    assert list(tiny_model.fork(["unet.conv_in.bias"]).trainable()) == ["unet.conv_in.bias"]
    with pytest.raises(UserError, match="no parameter"):
        tiny_model.fork(["unet.nothing"])


def test_with_tensors(tiny_model: Any) -> None:
    name = "unet.conv_in.weight"
    value = torch.zeros_like(dict(tiny_model.named_parameters())[name])
    edited = tiny_model.with_tensors({name: value})
    assert torch.equal(dict(edited.named_parameters())[name], value)
    assert not torch.equal(dict(tiny_model.named_parameters())[name], value)
    assert torch.equal(picture(tiny_model.with_tensors({})), picture(tiny_model))
    with pytest.raises(UserError, match="made for another model"):
        tiny_model.with_tensors({"unet.nothing": value})
    with pytest.raises(UserError, match="made for another model"):
        tiny_model.with_tensors({name: value[:1]})


def test_small_updates_of_half_models_are_not_rounded_away(half: Any) -> None:
    """A hundred steps of 1e-5 vanish one by one in bfloat16; the fork trains in float32 and rounds once."""
    assert half.dtype == torch.bfloat16
    before = snapshot(half)
    fork = half.fork("xattn")
    assert all(p.dtype == torch.float32 for p in fork.trainable().values())
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), half.embed(["a red house"])
    with torch.no_grad():
        target = half.eps(x, t, half.embed([""]))
    descend(
        fork.trainable(), lambda step: (fork.eps(x, t, c) - target).square().mean(), steps=100, lr=1e-5
    )  # fmt: skip
    moved = [(p - before[name].float()).abs().mean() for name, p in fork.trainable().items()]
    assert min(moved) > 1e-4
    assert all(value.dtype == torch.bfloat16 for value in fork.edited().values())
    assert all(torch.equal(p, before[name]) for name, p in half.named_parameters())
    assert all(p.dtype == torch.bfloat16 for _, p in half.with_tensors(fork.edited()).named_parameters())


def test_half_models_draw_and_follow_the_full_one(half: Any, tiny_model: Any) -> None:
    drawn = picture(half)
    assert drawn.dtype == torch.float32
    assert torch.isfinite(drawn).all()
    assert (drawn - picture(tiny_model)).abs().mean() < 0.05


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_saved_folder_opens_without_arguments(tiny_sd: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    """A folder of mixed dtypes would open with parts that do not multiply."""
    import diffusers
    from safetensors import safe_open

    model: Any = open_model(tiny_sd(), device="cpu", dtype=dtype)
    model.save(tmp_path / "saved")
    with safe_open(tmp_path / "saved/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_tensor("conv_in.weight").dtype == getattr(torch, dtype)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        "a red house", width=16, height=16, num_inference_steps=4, guidance_scale=3.0, output_type="np",
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    again = open_model(tmp_path / "saved", device="cpu")
    assert torch.allclose(torch.tensor(out.images[0]).permute(2, 0, 1), picture(again), atol=1e-4)
    assert not list((tmp_path / "saved").rglob("*.bin"))
    assert (tmp_path / "saved/unet/diffusion_pytorch_model.safetensors").stat().st_mode & 0o044 == 0o044


def test_saving_changes_no_weight(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model.save(tmp_path / "copy")
    again = snapshot(open_model(tmp_path / "copy", device="cpu"))
    assert set(again) == set(snapshot(tiny_model))
    assert all(torch.equal(value, again[name]) for name, value in snapshot(tiny_model).items())
    shutil.rmtree(tmp_path / "copy")


def test_a_fork_saves_in_the_dtype_of_its_base(half: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    half.fork("xattn").save(tmp_path / "fork")
    with safe_open(tmp_path / "fork/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_one_row_of_text_serves_a_batch_and_calls_are_counted(tiny_model: Any) -> None:
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 50, 999])
    c = tiny_model.embed(["a dog"])
    before = tiny_model.calls.eps
    with torch.no_grad():
        one, many = tiny_model.eps(x, t, c), tiny_model.eps(x, t, Conditioning(c.states.repeat(3, 1, 1)))
        tiny_model.fork("xattn").eps(x, t, c)
    assert torch.allclose(one, many, atol=1e-6)
    assert tiny_model.calls.eps - before == 9


def test_a_new_word_is_one_that_the_tokenizer_does_not_know(tiny_model: Any) -> None:
    """CLIP's vocabulary holds a word with the mark of its end and in lower case."""
    known = next(word for word in tiny_model.tokenizer.get_vocab() if word.endswith("</w>") and len(word) > 6).removesuffix(
        "</w>"
    )
    row = tiny_model.vocabulary[0]
    for word in (known, known.title()):
        with pytest.raises(UserError, match="knows"):
            tiny_model.with_words({word: row})
    assert tiny_model.with_words({"<new>": row}).tokenizer.convert_tokens_to_ids("<new>") == len(tiny_model.tokenizer)
