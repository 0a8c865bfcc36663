"""The two levels: an unrolled step equals its closed form, look-ahead leaves no trace, order 1 is order 2 without curvature."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from safeweights.core.concept import Concept, Prompt
from safeweights.core.table import method
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import twice_differentiable, unroll
from safeweights.diffusion.merging import Merge
from safeweights.immunization.bilevel import Episode, Game, named_once

CONCEPTS = (
    Concept(name="dog", kind="object", term="dog", anchor="cat", prompts=(Prompt("a picture of a dog"), Prompt("a red dog"))),
    Concept(name="boat", kind="object", term="boat", anchor="house", prompts=(Prompt("a boat"),)),
)
SHORT: dict[str, Any] = {
    "horizon": 3,
    "batch_size": 2,
    "pictures": 4,
    "retained": 4,
    "ddim_steps": 3,
    "keep": 0.0,
    "upper": "ascent",
    "parameters": "attention",
}


def game(model: Any, name: str = "mima", concepts: Any = CONCEPTS, **settings: Any) -> Game:
    return Game(method(name, **{**SHORT, **settings}), model, concepts, ["a red house", "a truck"], 0, Workspace())


def test_on_a_quadratic_the_unrolled_gradient_is_the_closed_form() -> None:
    """L_n = |W - T_n|_H^2 / 2: W'_n = W - a (W - T_n) H, phi = W - a sum_n (W - T_n) H P_n, dphi/dW = I - a sum_n H P_n."""
    rng = torch.Generator().manual_seed(0)
    a, d = 0.1, 6
    W, T_1, T_2, goal = (torch.randn(3, d, generator=rng, dtype=torch.float64) for _ in range(4))
    H = (root := torch.randn(d, d, generator=rng, dtype=torch.float64)) @ root.T
    features = [torch.randn(2, d, generator=rng, dtype=torch.float64) for _ in range(2)]
    merge = Merge.fit(features, torch.randn(20, d, generator=rng, dtype=torch.float64), ridge=0)
    P = merge.projectors

    def upper(W: Tensor, order: int) -> Tensor:
        tuned = []
        for T in (T_1, T_2):
            # phi is the user's offset from W, as in the game.
            phi = unroll(
                lambda phi, T=T: 0.5 * ((W + phi["W"] - T) @ H * (W + phi["W"] - T)).sum(), {"W": 0 * T}, lr=a, order=order
            )
            tuned.append(W + (phi["W"] if order == 2 else phi["W"].detach()))
        return 0.5 * (merge(W, tuned) - goal).square().sum()

    leaf = W.clone().requires_grad_()
    phi = W - a * sum((W - T) @ H @ P_n for T, P_n in zip((T_1, T_2), P, strict=True))
    exact = (phi - goal) @ (torch.eye(d, dtype=W.dtype) - a * sum(H @ P_n for P_n in P)).T
    (second,) = torch.autograd.grad(upper(leaf, 2), leaf)
    (first,) = torch.autograd.grad(upper(leaf, 1), leaf)
    assert (second - exact).abs().max() < 1e-10
    assert (first - (phi - goal)).abs().max() < 1e-10  # the merge alone has the identity for its Jacobian


@pytest.mark.parametrize("kind", ["lora", "full", "textual-inversion", "custom-diffusion"])
@pytest.mark.parametrize("order", [1, 2])
def test_look_ahead_leaves_no_trace(tiny_model: Any, order: int, kind: Any) -> None:
    """After any number of look-aheads the model predicts bit for bit as before, and its parameters are the very same."""
    play = game(tiny_model, order=order, adaptations=(kind,), benign=0.5)
    x, t, c = torch.ones(1, 4, 8, 8), torch.tensor([500]), tiny_model.embed(["a red dog"])
    held = dict(play.student.named_parameters())
    base = tiny_model.eps(x, t, c)
    before, values = play.student.eps(x, t, c).detach(), {name: value.detach().clone() for name, value in held.items()}
    for step in range(4):
        play.loss_at(step).backward()
    after = dict(play.student.named_parameters())
    assert all(after[name] is held[name] and torch.equal(after[name], values[name]) for name in held)
    assert torch.equal(play.student.eps(x, t, c), before)
    assert torch.equal(tiny_model.eps(x, t, c), base)
    # But the users did move: what is carried is not where they started.
    assert any(value.abs().sum() > 0 for name, value in play.state.items() if "/phi/" in name)


@pytest.mark.parametrize("inner", ["sgd", "adam"])
@pytest.mark.parametrize("kind", ["lora", "full", "custom-diffusion"])
def test_order_one_is_order_two_with_the_users_step_taken_for_a_constant(tiny_model: Any, kind: Any, inner: str) -> None:
    """The same value; the same gradient once phi is detached before the merge, and another one when it is not."""
    gradients = {}
    for order in (1, 2, 0):
        play = game(tiny_model, order=order or 2, adaptations=(kind,), inner=inner, inner_lrs=(1e-2,))
        if order == 0:
            ahead = play.look_ahead
            play.look_ahead = lambda *args, ahead=ahead: {k: v.detach() for k, v in ahead(*args).items()}  # type: ignore[method-assign]
        with twice_differentiable() if order == 1 else nullcontext():  # the same attention kernel, so that values can be compared
            loss = play.loss_at(0)
        loss.backward()
        grads = torch.cat([value.grad.flatten() for value in play.student.trainable().values() if value.grad is not None])
        gradients[order] = (float(loss), grads)
    assert abs(gradients[1][0] - gradients[2][0]) < 1e-5
    assert torch.allclose(gradients[1][1], gradients[0][1], atol=1e-6, rtol=1e-4)
    if inner == "sgd":  # Adam's first step is a sign, without a derivative: see below
        assert not torch.allclose(gradients[1][1], gradients[2][1], atol=1e-6, rtol=1e-4)


def test_the_second_order_gradient_is_that_of_finite_differences(tiny_model: Any) -> None:
    play = game(tiny_model, order=2, adaptations=("full",), inner="sgd", inner_lrs=(1.0,), parameters="xattn")
    moving = play.student.trainable()
    way = {name: torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) for name, value in moving.items()}
    play.loss_at(0).backward()
    ours = sum(float((value.grad * way[name]).sum()) for name, value in moving.items() if value.grad is not None)
    values, h = [], 3e-3
    for sign in (1, -1):
        with torch.no_grad():
            for name, value in moving.items():
                value.add_(sign * h * way[name])
        values.append(float(play.loss_at(0)))
        with torch.no_grad():
            for name, value in moving.items():
                value.sub_(sign * h * way[name])
    assert ours == pytest.approx((values[0] - values[1]) / (2 * h), rel=0.03)


def test_one_concept_alone_is_imma_whatever_the_method(tiny_model: Any) -> None:
    losses = [float(game(tiny_model, name, CONCEPTS[:1], order=1).loss_at(0)) for name in ("imma", "jt", "mima")]
    assert losses[0] == losses[1] == losses[2]


def test_users_start_anew_every_episode_and_are_dealt_in_turn(tiny_model: Any) -> None:
    play = game(
        tiny_model, adaptations=("lora", "full"), inner_lrs=(1e-3, 1e-5), lr_scales=(0.1, 10.0), captions=("own", "without")
    )
    seen = [play.episode(step) for step in range(60)]
    assert [episode.kind for episode in seen[:9]] == ["lora"] * 3 + ["full"] * 3 + ["lora"] * 3
    assert {round(episode.lr, 8) for episode in seen} == {1e-4, 1e-2, 1e-6}
    assert {episode.captions for episode in seen} == {"own", "without"}
    plain = Episode(0, "full", 1e-4, "own")
    for step in range(3):
        play.look_ahead(0, step, plain)
    moved = {name: value.clone() for name, value in play.state.items() if name.startswith("0/phi/unet")}
    play.look_ahead(0, 3, plain)  # a new episode: one step from nothing is shorter than three
    assert sum(float(play.state[name].abs().sum()) for name in moved) < sum(float(value.abs().sum()) for value in moved.values())
    assert "dog" not in " ".join(play.lesson("lower", 0, Episode(0, "lora", 1e-3, "without")).captions)


def test_users_have_some_of_the_pictures_and_others_in_another_episode(tiny_model: Any) -> None:
    play = game(tiny_model, pictures=16, user_pictures=(2, 3))
    assert len(play.lower[0]) == 8
    seen = []
    for number in range(6):
        episode = play.episode(3 * number)
        lesson = play.lesson("lower", 0, episode)
        assert lesson is play.lesson("lower", 0, episode)
        seen.append(tuple(x.sum().item() for x in lesson.shots.x_0))
    assert {len(some) for some in seen} == {2, 3}
    assert len(set(seen)) == 6
    assert {value for some in seen for value in some} <= {x.sum().item() for x in play.lower[0].x_0}
    assert len(play.lesson("upper", 0, play.episode(0)).shots) == 8


def test_all_that_is_retained_is_held_whoever_learns_half_of_it(tiny_model: Any) -> None:
    """A benign user and what is asked of the model after them have a half each; holding a half would leave prompts out."""
    alone, beside = game(tiny_model, keep=1.0), game(tiny_model, keep=1.0, benign=1.0)
    plain = Episode(0, "full", 0.0, "own")
    held, shared = (play.lesson("keep", None, plain).shots for play in (alone, beside))
    assert held.captions == shared.captions
    assert torch.equal(held.x_0, shared.x_0)
    parts = [beside.lesson(level, None, plain).shots for level in ("lower", "upper")]
    assert sorted(caption for part in parts for caption in part.captions) == sorted(held.captions)


def test_concepts_of_one_class_stay_separate(tiny_model: Any) -> None:
    """Two concepts that share every word of their class are two lessons with pictures of their own."""
    twins = [
        Concept(name=name, kind="style", term=name, anchor="a picture", prompts=(Prompt(f"a {name} picture"),))
        for name in ("red", "blue")
    ]
    play = game(tiny_model, concepts=twins)
    lessons = [play.lesson("lower", n, play.episode(0)) for n in range(2)]
    assert [lesson.captions[0] for lesson in lessons] == ["a red picture", "a blue picture"]
    assert not torch.equal(lessons[0].shots.x_0, lessons[1].shots.x_0)
    # The two levels share no picture.
    for n in range(2):
        upper, lower = play.upper[n].x_0, play.lower[n].x_0
        assert not any(torch.equal(a, b) for a in upper for b in lower)


def test_a_bounded_loss_stops_rising(tiny_model: Any) -> None:
    """Past the bound nothing is gained: no gradient; below it, that of the plain ascent."""
    tight, wide, plain = (
        game(tiny_model, **more) for more in ({"upper": "bounded", "bound": 1e-4}, {"upper": "bounded", "bound": 1e4}, {})
    )
    for play in (tight, wide, plain):
        play.loss_at(0).backward()

    def grads(play: Game) -> Tensor:
        return torch.cat(
            [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in play.student.trainable().values()]
        )

    assert float(grads(tight).abs().max()) == 0
    assert torch.equal(grads(wide), grads(plain))
    assert float(grads(plain).abs().max()) > 0


def test_the_first_step_of_adam_has_no_derivative(tiny_model: Any) -> None:
    """It is the sign of the gradient whatever its size, so that order 2 is order 1 there; later steps do depend on it."""
    apart = []
    for step in (0, 2):
        gradients = []
        for order in (1, 2):
            play = game(tiny_model, order=order, adaptations=("lora",), inner_lrs=(1e-2,))
            with twice_differentiable():
                for before in range(step):
                    play.look_ahead(0, before, play.episode(before))
                    play.look_ahead(1, before, play.episode(before))
                play.loss_at(step).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in play.student.trainable().values() if p.grad is not None]))
        apart.append(float((gradients[0] - gradients[1]).norm() / gradients[0].norm()))
    assert apart[0] < 0.02 < apart[1]
    assert apart[1] < 1


def test_the_merge_of_users_is_not_blown_up_by_directions_that_text_hardly_uses() -> None:
    """Ordinary text spans few directions, as text encoders' features do: what concepts have outside them is not blown up."""
    rng = torch.Generator().manual_seed(0)
    fall = 10.0 ** -torch.arange(0, 8, 0.5, dtype=torch.float64)
    regular, *features = (torch.randn(n, 16, generator=rng, dtype=torch.float64) * fall.sqrt() for n in (200, 3, 3))
    exact = {"ridge": 1e-4, "prior": 1e-6}
    for name in ("mima", "compose"):
        ours, papers = (
            method(name, **settings).fuse(features, regular).projectors.norm()  # type: ignore[attr-defined]
            for settings in ({}, exact)
        )
        assert 5 * ours < papers


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("art of a party", "art of a party"),
        ("a party", "a party art"),
        ("Art after art", "art after"),
        ("", "art"),
    ],
)
def test_a_learnt_word_has_one_place_in_every_caption(caption: str, expected: str) -> None:
    assert named_once(caption, "art") == expected
