"""What adversarial unlearning promises, on a model with known answers and on a tiny Stable Diffusion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from safeweights.core.concept import Concept, Prompt
from safeweights.core.errors import UserError
from safeweights.core.table import method
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parameters import select
from safeweights.diffusion.retain_set import filter_retain, object_prompts, relatedness
from safeweights.diffusion.search import insert_tokens, text_length
from safeweights.erasure import advunlearn
from safeweights.erasure.advunlearn import AdvUnlearn, later, word_sliced
from safeweights.models.gaussian import GaussianModel

MOSAIC = Concept(name="mosaic", kind="style", term="mosaic", anchor="", prompts=(Prompt("mosaic house"),))
TINY = {
    "steps": 4, "warm_up": 1, "attack_steps": 2, "ddim_steps": 4, "trajectories": 4, "retain_trajectories": 2, "batch_size": 2,
    "retain_batch": 2, "lr": 1e-3,
}  # fmt: skip
RETAIN = ["a picture of a boat", "a red truck"]


@pytest.fixture
def gaussian() -> GaussianModel:
    return GaussianModel(["mosaic", "red", "house"], size=2, deviation=0.3)


def tiny(model: Any, workspace: Workspace | None = None, **settings: Any) -> Any:
    return method("advunlearn", **{**TINY, **settings}).protect(
        model, [MOSAIC], retain=RETAIN, rng=generator(0), workspace=workspace
    )


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_text_encoder_reaches_esds_target_and_holds_the_rest(gaussian: GaussianModel) -> None:
    """Without attack it is ESD: the erased prompt becomes the Gaussian at -mu_c, the retained one stays where it was."""
    assert gaussian.mean("mosaic").norm() > 0.5
    eraser = method(
        "advunlearn", steps=300, lr=0.02, batch_size=16, retain_batch=4, attack_steps=0, prompts="term", retain="unfiltered",
        trajectories=16, retain_trajectories=16, ddim_steps=10, gamma=1.0,
    )  # fmt: skip
    protected = eraser.protect(gaussian, [MOSAIC], retain=["house"], rng=generator(0)).apply(gaussian)
    assert torch.allclose(protected.mean("mosaic"), -gaussian.mean("mosaic"), atol=0.15)
    assert torch.allclose(protected.mean("house"), gaussian.mean("house"), atol=0.15)
    assert protected.mean("").abs().max() < 0.15


def aim(model: Any, **settings: Any) -> Any:
    return advunlearn._Aim(AdvUnlearn(**settings), model, MOSAIC, 0, Workspace())


def test_the_attack_brings_the_erased_gaussian_back(gaussian: GaussianModel) -> None:
    """One free token can restore any mean, so the lower level's minimum is 0 on an erased model."""
    eraser = method("esd", steps=400, lr=0.02, batch_size=16, trajectories=16, ddim_steps=10, prompts="term")
    erased = eraser.protect(gaussian, [MOSAIC], rng=generator(0)).apply(gaussian)
    attack = aim(gaussian, prompts="term", attack_steps=300, attack_lr=0.05, trajectories=16, ddim_steps=10)
    losses = [loss for _, loss in attack.attack(erased, torch.zeros(8, dtype=torch.long), attack.start, 0)][:-1]
    assert sum(losses[-10:]) < 0.05 * sum(losses[:10])


def test_the_inner_loss_falls(tiny_model: Any) -> None:
    erased = tiny(tiny_model, attack_steps=0, steps=20, lr=3e-3, gamma=0.0).apply(tiny_model)
    attack = aim(tiny_model, attack_steps=60, attack_lr=0.05, tokens=2, trajectories=4, ddim_steps=4)
    losses = [loss for _, loss in attack.attack(erased, torch.tensor([0, 1, 1, 0]), attack.start, 0)][:-1]
    assert sum(losses[-15:]) < sum(losses[:15])


@pytest.mark.parametrize("where", ["prefix", "suffix", "insert", "replace"])
@pytest.mark.parametrize("fast_at", [False, True])
def test_every_place_and_scheme_runs(tiny_model: Any, where: str, fast_at: bool) -> None:
    protection = tiny(tiny_model, where=where, fast_at=fast_at, steps=2)
    assert all(torch.isfinite(tensor).all() for tensor in protection.tensors.values())


def test_a_fast_step_is_one_real_signed_step(tiny_model: Any) -> None:
    attack = aim(tiny_model, fast_at=True, attack_steps=7, attack_lr=0.01, trajectories=4, ddim_steps=4)
    student = tiny(tiny_model, attack_steps=0, steps=3).apply(tiny_model)
    path = list(attack.attack(student, torch.tensor([0, 1]), attack.start, 0))
    moved = (path[-1][0] - path[0][0]).abs()
    assert len(path) == 2
    assert torch.allclose(moved, torch.full_like(moved, 0.07), rtol=1e-2)


def test_without_attack_it_is_esd_with_retained_prompts(tiny_model: Any) -> None:
    """No attack and nothing but warm-up are the same run, and both are the plain loss written out with separate calls."""
    none, all_ = tiny(tiny_model, attack_steps=0), tiny(tiny_model, warm_up=4)
    assert same(none, all_)
    eraser = method("advunlearn", **{**TINY, "attack_steps": 0})
    goal = advunlearn._Aim(eraser, tiny_model, MOSAIC, generator(0).initial_seed(), Workspace())
    held = eraser._held(tiny_model, RETAIN, goal.seed, Workspace())
    student = tiny_model.fork("text_encoder")
    adam = torch.optim.Adam(student.trainable().values(), lr=1e-3)
    for step in range(4):
        batch = goal.bank.draw(2, generator("advunlearn", goal.seed, step))
        eps = student.eps(batch.x_t, batch.t, student.embed([goal.texts[i] for i in batch.prompt.tolist()]))
        loss = mse_loss(eps, 2 * batch.outputs["eps_without"] - batch.eps_c)
        other = held.draw(3, generator("advunlearn retain", goal.seed, step))
        texts = [*(RETAIN[i] for i in other.prompt[:2].tolist()), ""]
        teacher = torch.cat([other.eps_c[:2], other.eps_none[2:]])
        loss = loss + mse_loss(student.eps(other.x_t, other.t, student.embed(texts)), teacher)
        adam.zero_grad()
        loss.backward()
        adam.step()
    for name, tensor in student.edited().items():
        # Attention does not see a bias of its keys: its gradient is rounding, which Adam blows up.
        assert "k_proj.bias" in name or torch.allclose(tensor, none.tensors[name], atol=1e-4), name


def test_at_esd_retains_nothing(tiny_model: Any) -> None:
    first = tiny(tiny_model, retain="none")
    second = tiny(tiny_model, retain="unfiltered", gamma=0.0)
    assert same(first, second)
    assert first.cost["retained_prompts"] == 0


def test_a_users_function_decides_what_is_retained(tiny_model: Any) -> None:
    def keep(prompt: str, concept: Concept) -> bool:
        return prompt == RETAIN[0] and concept == MOSAIC

    made = tiny(tiny_model, keep=keep)
    assert made.cost["retained_prompts"] == 1
    assert "keep" in made.settings["keep"]
    json.dumps(made.settings)
    assert tiny(tiny_model).settings["keep"] is None
    with pytest.raises(UserError, match="keep"):
        method("advunlearn", keep="a")


def test_an_iteration_costs_only_what_depends_on_theta(tiny_model: Any) -> None:
    """2 latents of the concept, 2 retained and 1 under the empty prompt, and 2 attacks of 2 latents in 3 of 4 steps."""
    cost = tiny(tiny_model).cost
    assert cost["calls_per_step"] == pytest.approx(2 + 3 + 3 / 4 * 2 * 2)
    assert cost["eps_calls"] == cost["bank_calls"] + 4 * cost["calls_per_step"]


def test_naive_cost_is_the_released_schedules() -> None:
    """With the paper's settings: 25.48 guided DDIM steps a draw, 1937.8 samples an attacked iteration."""
    settings = {**AdvUnlearn.PRESETS["paper"], "warm_up": 0}
    draw = 2 * 25.48
    expected = 31 * (draw + 3) + 5 * (draw + 2)
    assert AdvUnlearn(**settings).naive_calls_per_step(243) == pytest.approx(expected)


@pytest.mark.parametrize("layers", [1, 2])
def test_first_layers_are_counted_by_whole_numbers(tiny_sd: Any, layers: int) -> None:
    from safeweights.models.door import open_model

    model = open_model(str(tiny_sd(layers=11)), device="cpu")
    protection = tiny(model, parameters=f"text_encoder:{layers}", steps=1, retain="none")
    numbers = {int(name.split("layers.")[1].split(".")[0]) for name in protection.tensors}
    assert numbers == set(range(layers))
    assert set(protection.tensors) == set(select(model.named_parameters(), f"text_encoder:{layers}"))


@pytest.mark.parametrize("init", ["random", "last"])
def test_killed_and_resumed_ends_with_the_same_tensors(tiny_model: Any, tmp_path: Path, monkeypatch: Any, init: str) -> None:
    whole = tiny(tiny_model, init=init, steps=6)
    workspace = Workspace(tmp_path, every=2)
    real, count = advunlearn._Aim.attacked, 0

    def attacked(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise MemoryError  # as sudden as a kill
        return real(self, *args)

    monkeypatch.setattr(advunlearn._Aim, "attacked", attacked)
    with pytest.raises(MemoryError):
        tiny(tiny_model, workspace, init=init, steps=6)
    monkeypatch.setattr(advunlearn._Aim, "attacked", real)
    assert same(whole, tiny(tiny_model, workspace, init=init, steps=6))


# The text-free side


def test_under_the_empty_prompt_latents_of_the_concept_go_the_other_way(gaussian: GaussianModel) -> None:
    """With nothing to hold it back the empty prompt's Gaussian, once at 0, ends at -mu_c, as the concept's does."""
    assert gaussian.mean("").abs().max() < 1e-6
    protected = method(
        "advunlearn", steps=400, lr=0.02, batch_size=16, attack_steps=0, prompts="term", retain="none", gamma=0.0,
        trajectories=16, ddim_steps=10, latent_weight=1.0, latent_steps=0,
    ).protect(gaussian, [MOSAIC], rng=generator(0)).apply(gaussian)  # fmt: skip
    for text in ("", "mosaic"):
        assert torch.allclose(protected.mean(text), -gaussian.mean("mosaic"), atol=0.2), text


def test_moved_latents_are_nearer_to_the_concept_and_stay_within_reach(tiny_model: Any, monkeypatch: Any) -> None:
    goal = aim(
        tiny_model, latent_weight=1.0, latent_steps=8, latent_lr=0.02, latent_radius=0.06, trajectories=4, ddim_steps=4, warm_up=0
    )
    student = tiny_model.fork("xattn")
    batch, seen = goal.bank.draw(3, generator(0)), []
    monkeypatch.setattr(
        advunlearn, "predictions", lambda model, x, *rest: seen.append(x) or (torch.zeros_like(x), torch.zeros_like(x))
    )
    goal.text_free(tiny_model, student, batch, 0).backward()
    moved = seen[0] - batch.x_t
    assert 0 < moved.abs().max() <= 0.06 + 1e-6
    none = tiny_model.embed([""])
    with torch.no_grad():
        before, after = (mse_loss(tiny_model.eps(x, batch.t, none), batch.eps_c) for x in (batch.x_t, seen[0]))
    assert after < before
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.trainable().values())


def test_the_text_free_side_is_off_by_default_and_changes_the_unet(tiny_model: Any) -> None:
    first, second = (tiny(tiny_model, parameters="full", latent_weight=weight, steps=2) for weight in (0.0, 1.0))
    assert same(first, tiny(tiny_model, parameters="full", steps=2))
    assert not same(first, second)


# What the released code does otherwise


def test_compat_cuts_prompts_to_their_number_of_words(tiny_model: Any) -> None:
    texts = ["nudity", "a picture of a tench", "church"]
    ids = tiny_model.tokenize(texts)
    assert text_length(tiny_model, ids).tolist() == [3, 6, 1]
    cut = word_sliced(tiny_model, ids, texts)
    assert text_length(tiny_model, cut).tolist() == [1, 5, 1]
    assert torch.equal(cut[2], ids[2])
    assert tiny_model.text_of(cut[0]) == "nu"
    assert cut.shape == ids.shape
    room, _ = insert_tokens(tiny_model, cut, 1)
    assert text_length(tiny_model, room).tolist() == [2, 6, 2]


def test_compat_gathers_gradients_and_discards_the_last_step(tiny_model: Any) -> None:
    student = tiny(tiny_model, attack_steps=0, steps=3).apply(tiny_model)
    rows = torch.tensor([0, 1])
    clear, compat, one = (
        aim(tiny_model, attack_steps=n, attack_lr=0.05, trajectories=4, ddim_steps=8, reference_compat=flag)
        for n, flag in ((3, False), (3, True), (1, True))
    )
    compat.bank, compat.ids, compat.positions, compat.start = clear.bank, clear.ids, clear.positions, clear.start
    plain = [v for v, _ in clear.attack(student, rows, clear.start, 0)]
    kept = [v for v, _ in compat.attack(student, rows, clear.start, 0)]
    assert (len(plain), len(kept)) == (4, 3)
    # Adam's first step has no history; from the second on the gathered gradient points elsewhere.
    assert torch.equal(plain[1], kept[1])
    assert not torch.equal(plain[2], kept[2])
    # A single step is thrown away: what comes back is where it started.
    ((only, _),) = one.attack(student, rows, one.start, 0)
    assert torch.equal(only, one.random_words(student, 2, 0))


def test_compat_asks_two_to_three_ddim_steps_later(gaussian: GaussianModel) -> None:
    exact = aim(gaussian, prompts="term", trajectories=4, ddim_steps=50)
    compat = aim(gaussian, prompts="term", trajectories=4, ddim_steps=50, reference_compat=True)
    bank = later(gaussian, exact.bank, 50, generator(0))
    fits = (exact.bank.t - 1 + 40 + 19) < 1000
    gap = bank.t[: int(fits.sum())].double().mean() - exact.bank.t[fits][: len(bank)].double().mean()
    assert float(gap) == pytest.approx(48.5, abs=4)
    assert bank.t.max() < 1000
    c = gaussian.embed(["mosaic"])
    batch = compat.bank.at(torch.arange(5))
    assert torch.allclose(batch.eps_c, gaussian.eps(batch.x_t, batch.t, c))
    assert torch.allclose(batch.eps_none, gaussian.eps(batch.x_t, batch.t, gaussian.embed([""])))


def test_compat_runs_and_differs(tiny_model: Any) -> None:
    assert not same(tiny(tiny_model, ddim_steps=8), tiny(tiny_model, ddim_steps=8, reference_compat=True))


# Retained prompts


def test_filtered_prompts_say_nothing_of_the_concept(tiny_model: Any) -> None:
    prompts = ["a Mosaic boat", "a picture of a boat", "a red truck", "a red truck", "mosaics"]
    kept = filter_retain(tiny_model, prompts, [MOSAIC], threshold=10)
    assert kept == ["a picture of a boat", "a red truck", "mosaics"]
    assert filter_retain(tiny_model, prompts, [MOSAIC], threshold=10, drop=["truck"]) == ["a picture of a boat", "mosaics"]
    assert filter_retain(tiny_model, prompts, [MOSAIC], keep=lambda prompt, _: "red" in prompt) == ["a red truck"]


def test_relatedness_is_one_for_the_concept_itself(tiny_model: Any) -> None:
    prompts = ["a picture of a boat", "a red truck", "church"]
    related = relatedness(tiny_model, [*prompts, "mosaic"], [MOSAIC])
    assert float(related[-1, 0]) == pytest.approx(1)
    assert float(related.mean()) == pytest.approx(0, abs=1e-6)
    kept = filter_retain(tiny_model, prompts, [MOSAIC], threshold=-10)
    assert kept == []


def test_a_file_that_names_nothing_to_retain_is_given_objects(tiny_model: Any, monkeypatch: Any) -> None:
    assert len(set(object_prompts())) == 80
    assert "a photo of an apple" in object_prompts()
    monkeypatch.setattr(advunlearn, "object_prompts", lambda: ("a photo of a cat", "a photo of a dog", "a photo of a house"))
    cat = Concept(name="cat", kind="object", term="cat", prompts=(Prompt("a cat"),))
    assert "a photo of a cat" not in method("advunlearn", retain_related=10).retained(tiny_model, [cat], [])
    assert len(method("advunlearn", retain="unfiltered").retained(tiny_model, [cat], [])) == 3
    assert method("advunlearn", retain="none").retained(tiny_model, [cat], []) == []
    with pytest.raises(UserError, match="retained prompt"):
        method("advunlearn", retain_related=-10).retained(tiny_model, [MOSAIC], RETAIN)
