"""Erasers that learn from drawn pictures, against what their papers promise on models whose answers are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from safeweights.core.concept import Concept, Prompt
from safeweights.core.errors import UserError
from safeweights.core.model import Sampling
from safeweights.core.table import method
from safeweights.core.workspace import Workspace
from safeweights.diffusion.attention import attention, attention_maps
from safeweights.diffusion.drawn_set import DrawnSets, draw_pictures, pseudo_prompts, retained_prompts
from safeweights.diffusion.noise import generator
from safeweights.erasure.erasediff import EraseDiff, after_inner_steps, constraint_weight
from safeweights.erasure.fmn import FMN, resteering
from safeweights.erasure.salun import saliency_mask
from safeweights.erasure.scissorhands import away_from_conflict, cut_entries, sensitivity
from safeweights.models.gaussian import GaussianModel

DRAWN: dict[str, Any] = {"pictures": 16, "noises": 10, "ddim_steps": 5, "guidance": 1.0, "batch_size": 16}


@pytest.fixture
def model() -> GaussianModel:
    return GaussianModel(["mosaic", "red", "house"], size=2, deviation=0.3)


def concept(term: str = "mosaic", anchor: str = "", kind: Any = "style") -> Concept:
    return Concept(name=term, kind=kind, prompts=(Prompt(term),), term=term, anchor=anchor)


# pictures


def test_a_concepts_own_pictures_are_what_is_forgotten(tiny_model: Any, tmp_path: Any) -> None:
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (16, 16), (80 * number,) * 3).save(tmp_path / f"{number}.png")
    own, drawn = replace(concept("dog", "cat", "object"), images=tmp_path), concept("red")
    options: dict[str, Any] = {"pictures": 2, "retained": 2, "noises": 3, "sampling": Sampling(steps=2), "seed": 0}
    sets = DrawnSets.draw(tiny_model, [drawn, own], ["a house"], **options)
    assert sets.forget.prompts[-1] == "dog"
    assert len(sets.forget) == 2 * 2 * 3
    rows = sets.forget.prompt == len(sets.forget.prompts) - 1
    assert int(rows.sum()) == 2 * 3  # the first two of three pictures
    grey = torch.stack([torch.full((3, 16, 16), 80.0 * i / 255) for i in range(2)])
    alpha, sigma = (level[sets.forget.t].view(-1, 1, 1, 1) for level in (tiny_model.alpha, tiny_model.sigma))
    x_0 = ((sets.forget.x - sigma * sets.forget.outputs["eps"]) / alpha)[rows].view(2, 3, -1)
    with torch.no_grad():
        known = tiny_model.encode(grey).flatten(1)
        told = tiny_model.eps(sets.forget.x[rows], sets.forget.t[rows], tiny_model.embed(["cat"] * 6))
    # Late timesteps divide by almost nothing.
    assert torch.allclose(x_0[:, 0], known, atol=1e-3)
    assert torch.allclose(sets.forget.outputs["eps_pseudo"][rows], told, atol=1e-5)


def test_pictures_are_noised_and_predicted_exactly(tiny_model: Any, tmp_path: Any) -> None:
    options: dict[str, Any] = {"n": 3, "noises": 4, "sampling": Sampling(steps=3, guidance_scale=2.0), "seed": 5, "batch_size": 2}
    prompts = ["a dog", "a red house"]
    bank = draw_pictures(tiny_model, prompts, workspace=Workspace(tmp_path), **options)
    assert len(bank) == 12
    assert (bank.t.view(3, 4) // 250).tolist() == [[0, 1, 2, 3]] * 3
    with torch.no_grad():
        told = tiny_model.eps(bank.x, bank.t, tiny_model.embed(prompts)[bank.prompt])
    assert torch.allclose(told, bank.outputs["eps_o"], atol=1e-5)
    # Every noising of a picture leads back to the same picture.
    alpha, sigma = (level[bank.t].view(-1, 1, 1, 1) for level in (tiny_model.alpha, tiny_model.sigma))
    x_0 = ((bank.x - sigma * bank.outputs["eps"]) / alpha).view(3, 4, -1)
    assert torch.allclose(x_0[:, :1].expand_as(x_0)[:, :3], x_0[:, :3], atol=1e-3)
    before = tiny_model.calls.eps
    again = draw_pictures(tiny_model, prompts, workspace=Workspace(tmp_path), **options)
    assert tiny_model.calls.eps == before
    assert torch.equal(again.x, bank.x)
    other = draw_pictures(tiny_model, prompts, workspace=Workspace(tmp_path), **{**options, "seed": 6})
    assert not torch.equal(other.x, bank.x)


def test_what_may_stay_names_no_concept() -> None:
    dog = concept("dog", "cat", "object")
    assert pseudo_prompts([dog]) == {"dog": "cat"}
    assert retained_prompts([dog], ["a red Dog", "a dogma", "a dogma"]) == ["a dogma"]
    assert retained_prompts([dog], ["a dog"]) == ["cat"]
    assert retained_prompts([concept()], []) == [""]
    assert retained_prompts([dog, concept("cat", "dog", "object")], []) == [""]


# on Gaussians, what is forgotten becomes its stand-in


def test_ac_sends_the_concept_to_its_anchor(model: GaussianModel) -> None:
    """eq. 5 is least when the concept's Gaussian is the anchor's."""
    assert (model.mean("house") - model.mean("red")).norm() > 0.5
    moved = {}
    for prior_weight in (0.0, 1.0):
        eraser = method("ac", parameters="xattn", steps=400, lr=0.02, prior_weight=prior_weight, **{**DRAWN, "pictures": 64})
        protected = eraser.protect(model, [concept("house", "red", "object")], rng=generator(0)).apply(model)
        assert torch.allclose(protected.mean("house"), model.mean("red"), atol=0.1 if prior_weight else 0.03)
        moved[prior_weight] = float((protected.mean("red") - model.mean("red")).norm())
    # Start and end tokens are shared with the anchor: only the prior keeps it where it was.
    assert moved[1.0] < 0.4 * moved[0.0]


def test_ac_by_noise_goes_to_the_mean_of_the_anchors_pictures(model: GaussianModel) -> None:
    eraser = method("ac", target="noise", parameters="xattn", steps=400, lr=0.02, **{**DRAWN, "pictures": 64, "batch_size": 64})
    protected = eraser.protect(model, [concept("house", "red", "object")], rng=generator(0)).apply(model)
    assert (protected.mean("house") - model.mean("red")).norm() < 0.25 * (model.mean("house") - model.mean("red")).norm()


def test_ac_with_the_concept_as_its_anchor_changes_nothing(model: GaussianModel) -> None:
    eraser = method("ac", parameters="xattn", steps=20, lr=0.02, **DRAWN)
    protection = eraser.protect(model, [concept("house", "house", "object")], rng=generator(0))
    assert protection.cost["loss"] == 0
    before = dict(model.named_parameters())
    for name, tensor in protection.tensors.items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("salun", {"share": 1.0}),
        ("erasediff", {}),
        ("erasediff", {"inner": 2}),
        ("scissorhands", {"share": 0.1, "cut": "xattn"}),
        ("scissorhands", {"share": 0.1, "project": True}),
    ],
)
def test_the_concept_becomes_its_stand_in_and_the_rest_stays(model: GaussianModel, name: str, settings: dict[str, Any]) -> None:
    eraser = method(name, parameters="xattn", steps=250, lr=0.04, retained=16, **DRAWN, **settings)
    protection = eraser.protect(model, [concept("mosaic", "")], retain=["red", "house"], rng=generator(0))
    protected = protection.apply(model)
    assert model.mean("mosaic").norm() > 0.5  # the concept was there
    assert torch.allclose(protected.mean("mosaic"), torch.zeros(model.latent_shape), atol=0.05)
    for kept in ("red", "house"):
        assert torch.allclose(protected.mean(kept), model.mean(kept), atol=0.05)


# SalUn


def test_the_mask_sums_with_signs_and_then_takes_the_top_share_of_all_tensors_together() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(1))}
    gradients = [(torch.tensor([3.0, -1.0, 0.5]), 4.0), (torch.tensor([-3.0, -1.0, 0.5]), 1.0)]
    losses = ((parameters["a"] * a).sum() + b * parameters["b"].sum() for a, b in gradients)
    # Sums: 0, -2, 1 and 5; the large entries that disagree cancel.
    mask = saliency_mask(parameters, losses, share=0.5)
    assert mask["a"].tolist() == [False, True, False]
    assert mask["b"].tolist() == [True]
    losses = ((parameters["a"] * a).sum() + b * parameters["b"].sum() for a, b in gradients)
    assert sum(int(m.sum()) for m in saliency_mask(parameters, losses, share=1.0).values()) == 3  # never without a gradient


def test_nothing_changes_outside_the_mask(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import safeweights.erasure.salun as salun

    masks: dict[str, torch.Tensor] = {}

    def kept(*args: Any) -> dict[str, torch.Tensor]:
        masks.update(saliency_mask(*args))
        return masks

    monkeypatch.setattr(salun, "saliency_mask", kept)
    short = {"steps": 4, "ddim_steps": 2, "pictures": 2, "retained": 2, "noises": 4, "batch_size": 2, "mask_batches": 2}
    protection = method("salun", share=0.2, parameters="xattn", **short).protect(
        tiny_model, [concept("dog", "cat", "object")], retain=["a boat"], rng=generator(0)
    )
    before, changed = dict(tiny_model.named_parameters()), 0
    for name, tensor in protection.tensors.items():
        assert torch.equal(tensor[~masks[name]], before[name][~masks[name]]), name
        changed += int((tensor != before[name]).sum())
    total = sum(tensor.numel() for tensor in protection.tensors.values())
    assert 0.1 * total < changed <= 0.2 * total + 1


# EraseDiff


@given(
    inner=st.integers(0, 4), lam=st.sampled_from([None, 0.0, 0.7]), eta=st.sampled_from([0.1, 1.0]), seed=st.integers(0, 10**6)
)
@settings(max_examples=60, deadline=None)
def test_the_bilevel_step_equals_its_closed_form_on_a_quadratic(inner: int, lam: float | None, eta: float, seed: int) -> None:
    """L_f = a/2 |theta - m|^2 and L_r = b/2 |theta - r|^2: theta_K - m = (1 - a rate)^K (theta - m)."""
    rng = torch.Generator().manual_seed(seed)
    theta = nn.Parameter(torch.randn(5, generator=rng, dtype=torch.float64))
    m, r = (torch.randn(5, generator=rng, dtype=torch.float64) for _ in range(2))
    a, b, rate, start = 2.0, 0.5, 0.1, theta.detach().clone()
    eraser = EraseDiff(inner=inner, inner_lr=rate, lam=lam, eta=eta)
    eraser._loss([theta], lambda: a / 2 * (theta - m).square().sum(), lambda: b / 2 * (theta - r).square().sum()).backward()
    left = (1 - a * rate) ** inner if inner else 0.0
    g_r, g_q = b * (start - r), a * (1 - left) * (start - m)
    expected = lam if lam is not None else max(0.0, eta - float(g_r @ g_q / (g_q @ g_q)))
    assert torch.equal(theta.detach(), start)
    assert torch.allclose(theta.grad, g_r + expected * g_q, atol=1e-10)
    if lam is None:
        assert float(theta.grad @ g_q) >= eta * float(g_q @ g_q) * (1 - 1e-9)


def test_the_constraint_weighs_nothing_where_nothing_is_left_to_forget() -> None:
    assert constraint_weight([torch.ones(3)], [torch.zeros(3)], 1.0) == 0
    assert constraint_weight([2 * torch.ones(3)], [torch.ones(3)], 1.0) == 0
    assert constraint_weight([-torch.ones(3)], [torch.ones(3)], 1.0) == 2


def test_inner_steps_come_back_bit_for_bit() -> None:
    p = nn.Parameter(torch.randn(7, generator=torch.Generator().manual_seed(0)))
    before = p.detach().clone()
    (g,) = after_inner_steps([p], lambda: (p**4).sum(), 3, 0.01)
    x = before
    for _ in range(3):
        x = x - 0.01 * 4 * x**3
    assert torch.equal(p.detach(), before)
    assert torch.allclose(g, 4 * x**3)


# Scissorhands


def test_sensitivity_is_the_weight_times_the_summed_absolute_gradients() -> None:
    parameters = {"w": nn.Parameter(torch.tensor([2.0, -1.0, 0.0]))}
    gradients = [torch.tensor([1.0, -3.0, 5.0]), torch.tensor([-1.0, 3.0, 5.0])]
    found = sensitivity(parameters, ((parameters["w"] * g).sum() for g in gradients))
    assert found["w"].tolist() == [4.0, 6.0, 0.0]


def test_only_the_most_sensitive_entries_are_cut_and_only_where_allowed() -> None:
    parameters = {name: nn.Parameter(torch.full((2, 4), 9.0)) for name in ("here.weight", "there.weight")}
    parameters["here.bias"] = nn.Parameter(torch.full((4,), 9.0))
    scores = {name: torch.zeros_like(p) for name, p in parameters.items()}
    scores["here.weight"][0, 1], scores["there.weight"][1, 2], scores["here.bias"][3] = 3.0, 2.0, 1.0
    cut = cut_entries(parameters, scores, 3 / 20, ["here.weight", "here.bias"], seed=0)
    assert cut == 2
    here = parameters["here.weight"].detach()
    assert abs(here[0, 1]) <= 4**-0.5
    assert int((here != 9).sum()) == 1
    assert (parameters["there.weight"] == 9).all()
    assert parameters["here.bias"].tolist() == [9.0, 9.0, 9.0, 0.0]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_projected_gradient_is_orthogonal_and_the_nearest(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    g = [torch.randn(n, generator=rng, dtype=torch.float64) for n in (3, 5)]
    g_f = [torch.randn(n, generator=rng, dtype=torch.float64) for n in (3, 5)]
    before, direction = torch.cat(g), torch.cat(g_f)
    away_from_conflict(g, g_f)
    after = torch.cat(g)
    if before @ direction >= 0:
        assert torch.equal(after, before)
    else:
        assert abs(float(after @ direction)) < 1e-9
        rest = before - after  # what was taken out lies along g_f alone
        assert torch.allclose(rest, (rest @ direction) / (direction @ direction) * direction, atol=1e-9)


# Forget-Me-Not


def test_resteering_on_maps_made_by_hand() -> None:
    """4 tokens, the second marked: nothing there, everything there, and an even spread, over layers of unequal size."""
    marked = torch.tensor([[False, True, False, False]])
    for share, expected in ((0.0, 0.0), (1.0, 1.0), (0.25, 0.25)):
        maps = []
        for rows in (16, 4):
            A = torch.full((1, 2, rows, 4), (1 - share) / 3)
            A[..., 1] = share
            maps.append(A)
        assert float(resteering(maps, marked)) == pytest.approx(expected, abs=1e-5)
    both = torch.cat([A, torch.eye(4)[1].expand(1, 2, 4, 4)])
    assert float(resteering([both], marked.expand(2, -1))) == pytest.approx((0.25 + 1) / 2, abs=1e-5)


def test_maps_equal_diffusers_own_and_leave_the_prediction_as_it_was(tiny_model: Any) -> None:
    x_t = torch.randn((2, *tiny_model.latent_shape), generator=torch.Generator().manual_seed(0))
    t, c = torch.tensor([500, 20]), tiny_model.embed(["a dog", "a red house"])
    plain = tiny_model.eps(x_t, t, c)
    with attention_maps(tiny_model) as maps:
        seen = tiny_model.eps(x_t, t, c)
    assert torch.equal(seen, plain)
    layers = {name: m for name, m in tiny_model.denoiser.named_modules() if name.endswith("attn2")}
    assert set(maps) == set(layers)
    for layer in layers.values():
        assert not layer._forward_hooks
        assert not layer.to_q._forward_hooks
        q = layer.to_q(torch.randn((2, 9, layer.to_q.in_features), generator=torch.Generator().manual_seed(1)))
        k = layer.to_k(c.states)
        theirs = layer.get_attention_scores(layer.head_to_batch_dim(q), layer.head_to_batch_dim(k))
        assert torch.allclose(attention(q, k, layer.heads).flatten(0, 1), theirs, atol=1e-6)
    for A in maps.values():
        assert torch.allclose(A.sum(-1), torch.ones_like(A[..., 0]), atol=1e-5)


def test_the_concepts_tokens_are_found_whole(tiny_model: Any) -> None:
    prompts = ["a picture of a mosaic house", "a red boat"]
    marked = {
        positions: FMN(positions=positions)._positions(tiny_model, prompts, ["mosaic"])
        for positions in ("term", "term+end", "onwards")
    }
    ids = tiny_model.tokenize(prompts)
    row = [int(i) for i in marked["term"][0].nonzero()]
    assert tiny_model.text_of(ids[0, row]) == "mosaic"
    assert len(row) > 1  # several tokens
    end = int((ids[0] == tiny_model.tokenizer.eos_token_id).int().argmax())
    assert marked["term+end"][0].nonzero().flatten().tolist() == [*row, end]
    assert marked["onwards"][0].nonzero().flatten().tolist() == list(range(row[0], ids.shape[1]))
    assert tiny_model.text_of(ids[1][marked["term"][1]]) == "a red boat"


def test_attention_leaves_the_concept(tiny_model: Any) -> None:
    dog = concept("dog", "cat", "object")
    short = {"ddim_steps": 2, "pictures": 2, "retained": 2, "noises": 4, "batch_size": 4, "beta": 0.0, "lr": 1e-2}
    losses = [method("fmn", steps=n, **short).protect(tiny_model, [dog], rng=generator(0)).cost["loss"] for n in (1, 12)]
    assert losses[1] < 0.5 * losses[0]


def test_a_model_without_cross_attention_is_told(model: GaussianModel) -> None:
    with pytest.raises(UserError, match="cross-attention"):
        method("fmn").protect(model, [concept()], rng=generator(0))


def test_the_text_encoder_can_be_trained(tiny_model: Any) -> None:
    sets = DrawnSets.draw(
        tiny_model, [concept("dog", "cat", "object")], ["a boat"],
        pictures=2, retained=2, noises=2, sampling=Sampling(steps=2, guidance_scale=1.0), seed=0,
    )  # fmt: skip
    student = tiny_model.fork("text_encoder")
    sets.forgetting(student, 2, 0)(0).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.trainable().values())
