"""A freeze in the weights computes the same, bit for bit where it says so, and stiffens what it says it does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights.core.errors import UserError
from safeweights.freezing.rescale import apply_in_weights, deviation, level, rescale, scaled
from safeweights.models.door import open_model

PAIRS = {
    "self-attention query against its norm": r"attn1\.to_q\.weight",
    "self-attention key": r"attn1\.to_k\.weight",
    "self-attention value": r"attn1\.to_v\.weight",
    "self-attention output against the values": r"attn1\.to_out\.0\.weight",
    "value and output together": r"attn1\.(to_v|to_out\.0)\.weight",
    "cross-attention query": r"attn2\.to_q\.weight",
    "cross-attention keys and values against the text norm": r"attn2\.to_[kv]\.weight",
    "all of cross-attention": r"attn2\.to_(q|k|v|out\.0)\.weight",
    "cross-attention keys alone, against their queries": r"attn2\.to_k\.weight",
    "feed-forward input": r"ff\.net\.0\.proj\.weight",
    "feed-forward output against the value half": r"ff\.net\.2\.weight",
    "both of feed-forward": r"ff\.net\.(0\.proj|2)\.weight",
    "projection in against the group norm": r"proj_in\.weight",
    "everything": r"(attn\d|ff|proj_in).*weight",
}


@pytest.fixture(scope="module", params=["1.5", "2.1"])
def model(request: Any, tiny_sd: Callable[..., Path]) -> Any:
    return open_model(str(tiny_sd(version=request.param)), device="cpu")


def held(model: Any, pattern: str) -> frozenset[str]:
    found = frozenset(name for name, _ in model.named_parameters() if name.startswith("unet.") and re.search(pattern, name))
    assert found
    return found


def predict(model: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn((2, *model.latent_shape), generator=rng)
    with torch.no_grad():
        return model.eps(x, torch.tensor([40, 700]), model.embed(["a red dog", "a boat by vincent"]))


@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_leaves_every_prediction_as_it_was(model: Any, pair: str) -> None:
    frozen = held(model, PAIRS[pair])
    # Half of all keys and values are keys: a share of one leaves them to their queries.
    share = 0.9 if pair.startswith("cross-attention keys alone") else 0.5
    protection, rescaling = apply_in_weights(model, frozen, share=share)
    assert set(rescaling.stiff) == frozen
    assert not rescaling.unreached
    named = dict(model.named_parameters())
    for name in frozen:
        assert min(rescaling.exponents[name]) >= 6
        assert protection.tensors[name].abs().sum() >= 60 * named[name].abs().sum()
    # In a layer of its own scale powers of two commute with every rounding.
    assert torch.equal(predict(protection.apply(model)), predict(model))


def test_cross_attention_is_reached_by_the_text_norm_only_if_enough_is_frozen(model: Any) -> None:
    names = [name for name, _ in model.named_parameters()]
    values = sorted(held(model, r"attn2\.to_v\.weight"))
    lonely = rescale(names, [values[0], *held(model, r"proj_in\.weight")])
    assert lonely.unreached == (values[0],)
    assert not any(name.startswith("text_encoder.") for name in lonely.exponents)
    shared = rescale(names, values)
    assert set(shared.beside) == held(model, r"attn2\.to_k\.weight")
    assert any("final_layer_norm" in name for name in shared.partners)


def test_first_convolutions_change_no_more_than_the_eps_of_their_norm(model: Any) -> None:
    frozen = held(model, r"conv1\.weight|time_emb_proj\.weight")
    protection, rescaling = apply_in_weights(model, frozen)
    apart = deviation(model, protection.apply(model))
    assert 0 < apart < 1e-3
    assert set(rescaling.stiff) == frozen
    assert not rescaling.partners
    with pytest.raises(UserError, match="nothing in this mask"):
        apply_in_weights(model, frozen, nearly=False)


def test_in_half_precision_the_difference_stays_below_its_rounding(tiny_sd: Callable[..., Path]) -> None:
    whole, half = (open_model(str(tiny_sd()), device="cpu", dtype=kind) for kind in ("float32", "float16"))
    frozen = held(half, r"(attn\d|ff|proj_in|conv1).*weight")
    protection, _ = apply_in_weights(half, frozen)
    protected = protection.apply(half)
    assert all(torch.isfinite(value).all() for value in protection.tensors.values())
    rounding = float((predict(half) - predict(whole)).abs().max())
    assert float((predict(protected) - predict(half)).abs().max()) < 2 * rounding


def test_what_half_precision_cannot_hold_is_refused(tiny_sd: Callable[..., Path]) -> None:
    half = open_model(str(tiny_sd()), device="cpu", dtype="float16")
    name = next(name for name, _ in half.named_parameters() if name.endswith("attn1.to_q.weight"))
    dict(half.named_parameters())[name].data[0, 0] = 60000.0
    with pytest.raises(UserError, match="overflows float16"):
        apply_in_weights(half, frozenset({name}))


def test_biases_and_norms_cannot_be_reached(model: Any) -> None:
    names = [name for name, _ in model.named_parameters()]
    extra = held(model, r"to_out\.0\.bias|conv_out|norm1\.weight")
    rescaling = rescale(names, extra | held(model, r"attn1\.to_q\.weight"))
    assert set(rescaling.unreached) == extra
    for power in (0, 13):
        with pytest.raises(UserError, match="power"):
            rescale(names, extra, power=power)


def test_one_step_moves_the_function_by_that_much_less(model: Any) -> None:
    """AdamW at the same rate: what its first step does to predictions shrinks with the scale."""
    frozen = held(model, r"attn1\.to_[qkv]\.weight")
    protected = apply_in_weights(model, frozen, power=6)[0].apply(model)

    def moved(start: Any) -> float:
        student = start.fork(sorted(frozen))
        optimizer = torch.optim.AdamW(student.trainable().values(), lr=1e-3, weight_decay=0)
        x = torch.randn((2, *start.latent_shape), generator=torch.Generator().manual_seed(1))
        loss = student.eps(x, torch.tensor([300, 500]), start.embed(["a dog", "a cat"])).square().mean()
        loss.backward()
        # Adam's own eps must not decide, or tiny gradients of this toy would.
        for value in student.trainable().values():
            value.grad = value.grad.sign()
        optimizer.step()
        return float((predict(student) - predict(start)).abs().max())

    assert moved(protected) < moved(model) / 20


def test_an_attacker_who_levels_the_weights_undoes_it(model: Any) -> None:
    frozen = held(model, PAIRS["everything"]) | held(model, r"conv1\.weight")
    protected = apply_in_weights(model, frozen)[0].apply(model)
    levelled = protected.with_tensors(level(protected))
    assert float((predict(levelled) - predict(protected)).abs().max()) < 1e-4
    usual, base = dict(levelled.named_parameters()), dict(model.named_parameters())
    for name in frozen:
        ratio = float(usual[name].square().mean().sqrt() / base[name].square().mean().sqrt())
        assert 1 / 16 < ratio < 16, name


def test_halves_of_a_tensor_take_their_own_powers() -> None:
    found = scaled({"x": torch.ones(4, 1)}, {"x": (1, -1)})
    assert found["x"].flatten().tolist() == [2, 2, 0.5, 0.5]
