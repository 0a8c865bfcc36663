"""Leakage: a bank equals separate runs, canonical tokens know no gauge, closed forms equal their slow definitions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import adapters_like
from safeweights.core.errors import UserError
from safeweights.core.model import Conditioning
from safeweights.diffusion.adaptation import ATTENTION, Adapter, Lesson, Shots, errors, fit, twice_differentiable
from safeweights.diffusion.noise import add_noise
from safeweights.leakage import defences, dp
from safeweights.leakage.canonical import canonical, effective_rank, factors_of, norm, phi_of
from safeweights.leakage.encoders import ridge
from safeweights.leakage.encoders.gram import Gram, gram, products
from safeweights.leakage.encoders.vnae import kl
from safeweights.leakage.lora_bank import bank_on, fit_bank, stack_of
from safeweights.leakage.matching import Matching, mismatch, sides
from safeweights.leakage.metrics import auc, copy_scores, holm, percentile_ranks, permutation_p, retrieval, tpr_at


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lesson(model: Any, seed: int, *, n: int = 3, prior: bool = False) -> Lesson:
    adapter = Adapter(targets=ATTENTION, rank=2, alpha=4.0)
    shots = Shots(torch.randn(n, *model.latent_shape, generator=rng(seed)), ("a dog", "a red cat", "a boat")[:n])
    return Lesson(model=model, adapter=adapter, shots=shots, batch_size=2, seed=seed)


def test_a_bank_is_separate_training(tiny_model: Any) -> None:
    """Different pictures, captions, lengths and rates; clipping at work in some adapters and not in others."""
    lessons = [lesson(tiny_model, seed) for seed in (1, 2, 3)]
    lengths, rates = (3, 5, 4), (1e-3, 3e-3, 1e-2)
    together = fit_bank(lessons, steps=lengths, lr=rates, checkpoints=(2,), max_norm=0.05)
    for one, found, steps, lr in zip(lessons, together, lengths, rates, strict=True):
        alone = fit(one, steps=steps, lr=lr, checkpoints=(2,), max_norm=0.05)
        assert [item.steps for item in found] == [item.steps for item in alone] == [2, steps]
        for ours, theirs in zip(found, alone, strict=True):
            for name, value in theirs.phi.items():
                assert torch.allclose(ours.phi[name], value, atol=1e-5), name
        assert found[-1].losses == pytest.approx(alone[-1].losses, abs=1e-5)
        start = one.adapter.start(tiny_model, one.seed)
        assert any((found[-1].phi[name] - value).abs().max() > 1e-3 for name, value in start.items())


def test_a_bank_gives_every_row_its_own_adapter(tiny_model: Any) -> None:
    adapter = Adapter(targets=ATTENTION, rank=2)
    phis = [{k: torch.randn(v.shape, generator=rng(i)) * 0.3 for k, v in adapter.start(tiny_model).items()} for i in (1, 2)]
    x = torch.randn(4, *tiny_model.latent_shape, generator=rng())
    t, c = torch.tensor([100, 300, 500, 700]), tiny_model.embed(["a dog"])
    rows = torch.tensor([1, 0, 0, 1])
    with torch.no_grad():
        with bank_on(tiny_model, stack_of(phis), rows):
            found = tiny_model.eps(x, t, c)
            twice = tiny_model.eps(torch.cat([x, x]), torch.cat([t, t]), c)
        for row, which in enumerate(rows.tolist()):
            with adapter.on(tiny_model, phis[which]):
                assert torch.allclose(found[row], tiny_model.eps(x[row : row + 1], t[row : row + 1], c)[0], atol=1e-5)
    assert torch.allclose(twice, torch.cat([found, found]), atol=1e-5)


def test_canonical_tokens_know_no_gauge() -> None:
    a, b = torch.randn(3, 9, generator=rng(1)).double(), torch.randn(7, 3, generator=rng(2)).double()
    turn = torch.randn(3, 3, generator=rng(3)).double() + 2 * torch.eye(3)
    one, two = canonical(a, b), canonical(torch.linalg.inv(turn) @ a, b @ turn)
    for part in ("u", "s", "v"):
        assert torch.allclose(getattr(one, part), getattr(two, part), atol=1e-10), part
    assert torch.allclose(one.u * one.s @ one.v.mT, b @ a, atol=1e-10)
    assert norm(a, b) == pytest.approx(float((b @ a).norm()))
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3.0, abs=1e-5)


def test_gram_is_the_full_inner_product() -> None:
    items = adapters_like(4, ranks=(2, 3), seed=5)
    for name in items[0]:
        full = torch.stack([(pair[1] @ pair[0]).flatten() for pair in (item[name] for item in items)]).double()
        assert torch.allclose(products(items, items, name), full @ full.mT, atol=1e-4)
    weights = dict.fromkeys(items[0], 0.5)
    turned = [defences.refactor(item) for item in items]
    for kind in ("update", "cosine", "left"):
        one = gram(items, layers=[*weights], kind=kind, weights=weights)  # type: ignore[arg-type]
        two = gram(turned, items, layers=[*weights], kind=kind, weights=weights)  # type: ignore[arg-type]
        assert torch.allclose(one, two, atol=1e-4), kind


def test_leave_one_out_is_leaving_one_out() -> None:
    x, y = torch.randn(9, 4, generator=rng(1)).double(), torch.randn(9, 2, generator=rng(2)).double()
    whole = ridge.fit(ridge.linear(x), y, lambdas=(0.3,))
    for i in range(9):
        rest = [j for j in range(9) if j != i]
        # The same lambda, not the same factor: its unit is the kernel of what is left.
        part = x[rest]
        kernel = ridge.linear(part)
        centred = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
        factor = whole.lam / float(torch.linalg.eigvalsh(centred).clamp(min=0).mean())
        fitted = ridge.fit(kernel, y[rest], lambdas=(factor,))
        assert torch.allclose(fitted.predict(ridge.linear(x[i : i + 1], part))[0], whole.loo[i], atol=1e-8)


def test_ridge_finds_a_line_and_a_compressed_gram_is_the_same_function() -> None:
    items = adapters_like(30, ranks=(2,), seed=3)
    hidden = torch.randn(6, 5, 2, generator=rng(9))
    name = next(iter(items[0]))
    y = torch.stack([torch.einsum("oi,oid->d", item[name][1] @ item[name][0], hidden) for item in items])
    fitted = Gram.fit(items[:25], y[:25], kinds=("update",))
    assert ridge.loo_error(fitted.ridge, y[:25]) < 0.9
    assert ridge.loo_cosine(fitted.ridge, y[:25]) > 0.4
    for size in (8, 20):
        assert torch.allclose(fitted.compress(size).predict(items[25:]), fitted.predict(items[25:]), atol=1e-3)
    cosine = Gram.fit(items[:25], y[:25], kinds=("cosine",))
    small = cosine.compress(8)
    assert torch.allclose(type(small).from_tensors(small.tensors()).predict(items[25:]), cosine.predict(items[25:]), atol=1e-3)


def test_per_sample_gradients_are_autograds(tiny_model: Any) -> None:
    one = lesson(tiny_model, 4)
    phi = {name: value.detach() + 0.1 for name, value in one.adapter.start(tiny_model, 4).items()}
    stack = stack_of([phi])
    batch = one.batch(0)
    states = tiny_model.embed([one.captions[row] for row in batch.rows]).states
    found, each = dp.per_sample(one, stack, batch, states)
    for row in range(len(batch.t)):
        moving = {name: value.clone().requires_grad_() for name, value in phi.items()}
        with one.adapter.on(tiny_model, moving):
            part = slice(row, row + 1)
            eps = tiny_model.eps(batch.x_t[part], batch.t[part], Conditioning(states[part]))
        alone = type(batch)(batch.x_t[part], batch.t[part], batch.eps[part], batch.rows[part], batch.weight[part])
        loss = errors(tiny_model, eps, alone).sum()
        wanted = torch.autograd.grad(loss, list(moving.values()))
        assert float(loss.detach()) == pytest.approx(float(each[row]), abs=1e-5)
        for name, gradient in zip(moving, wanted, strict=True):
            assert torch.allclose(found[name.removeprefix("lora/")][row], gradient, atol=1e-5), name


def test_the_private_step_is_the_clipped_mean_without_noise(tiny_model: Any) -> None:
    """sigma 0 and everybody joining: one step of Adam on clipped gradients, whose first step is lr times the sign."""
    one = lesson(tiny_model, 4)
    privacy = dp.Privacy(epsilon=1.0, delta=1e-5, sigma=0.0, rate=1.0, steps=1, clip=1e-3)
    start = one.adapter.start(tiny_model, one.seed)
    moved = dp.fit_private(one, privacy, lr=1e-2, rng=rng(3)).phi
    for name, value in moved.items():
        change = (value - start[name].detach()).abs()
        # Adam's first step is lr, or nothing where the gradient is nothing (A while B is zero).
        assert change.max() <= 1e-2 + 1e-6
        assert name.endswith("down") or change.max() > 5e-3
    again = dp.fit_private(one, dp.Privacy(1.0, 1e-5, 5.0, 1.0, 1, 1e-3), lr=1e-2, rng=rng(3)).phi
    assert any(not torch.equal(again[name], value) for name, value in moved.items())


def test_a_private_step_gets_clipped_pictures_over_the_expected_number_and_calibrated_noise(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the optimiser is handed: sum_i g_i min(1, C / |g_i|) / (q N) + N(0, (sigma C / (q N))^2)."""
    one = lesson(tiny_model, 4)
    count = len(one.shots)
    handed: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(dp.AdamW, "step", lambda self, stack, gradients: handed.append(gradients))
    stack = stack_of([one.adapter.start(tiny_model, one.seed)])
    draws = rng(3)
    torch.rand(count, generator=draws)  # who joins: everybody at rate 1
    batch = dp._batch(one, torch.arange(count), draws)
    found, _ = dp.per_sample(one, stack, batch, tiny_model.embed(one.captions).states.float())
    norms = torch.stack([value.flatten(1).square().sum(1) for value in found.values()]).sum(0).sqrt()
    for clip in (1e9, float(norms.median()), 1e-3):
        dp.fit_private(one, dp.Privacy(1.0, 1e-5, 0.0, 1.0, 1, clip), lr=1e-2, rng=rng(3))
        factor = (clip / norms).clamp(max=1)
        for name, value in found.items():
            wanted = (value * factor.view(-1, *[1] * (value.dim() - 1))).sum(0) / count
            assert torch.allclose(handed[-1][name][0], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())), (clip, name)
    clip, sigma = 0.5, 2.0
    for amount in (0.0, sigma):
        dp.fit_private(one, dp.Privacy(1.0, 1e-5, amount, 1.0, 1, clip), lr=1e-2, rng=rng(3))
    noise = torch.cat([(handed[-1][name] - handed[-2][name]).flatten() for name in found])
    assert len(noise) > 500
    assert float(noise.std()) == pytest.approx(sigma * clip / count, rel=0.1)
    assert abs(float(noise.mean())) < 4 * sigma * clip / count / len(noise) ** 0.5


@pytest.mark.parametrize(("pictures", "batch", "steps", "epsilon"), [(5, 1, 200, 10.0), (16, 4, 100, 2.0), (4, 4, 20, 50.0)])
def test_the_accounted_epsilon_is_opacus(pictures: int, batch: int, steps: int, epsilon: float) -> None:
    from opacus.accountants import RDPAccountant

    plan = dp.plan(epsilon=epsilon, delta=1e-5, pictures=pictures, batch_size=batch, steps=steps)
    accountant = RDPAccountant()
    for _ in range(steps):
        accountant.step(noise_multiplier=plan.sigma, sample_rate=batch / pictures)
    assert plan.epsilon == pytest.approx(accountant.get_epsilon(delta=1e-5))
    assert 0.95 * epsilon < plan.epsilon <= epsilon


def test_permutation_p_is_exact_for_all_permutations() -> None:
    scores = torch.randn(4, 4, generator=rng(1)).double()
    scores[torch.arange(4), torch.arange(4)] += 1.0
    observed = float(percentile_ranks(scores, range(4)).mean())
    every = [float(percentile_ranks(scores, order).mean()) for order in itertools.permutations(range(4))]
    exact = sum(value >= observed - 1e-12 for value in every) / len(every)
    assert permutation_p(scores, range(4), permutations=4000) == pytest.approx(exact, abs=0.03)


def test_retrieval_counts() -> None:
    best = retrieval(torch.eye(20).double(), range(20), permutations=200)
    assert (best.top1, best.top5, best.mrr, best.rank) == (20, 20, 1.0, 1.0)
    assert best.p == pytest.approx(1 / 201)
    nobody = retrieval(torch.zeros(20, 20).double(), range(20), permutations=200)
    assert (nobody.top1, nobody.top5, nobody.rank, nobody.p) == (0, 0, 0.5, 1.0)
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_membership_counts_and_copies() -> None:
    inside, outside = torch.tensor([3.0, 4.0, 1.0]), torch.arange(100).double() / 100
    assert auc(inside, outside) == 1.0
    assert tpr_at(inside, outside) == (3, 0.01)
    assert auc(outside, outside) == 0.5
    picture, other = torch.eye(3)[:1], torch.eye(3)[1:2]
    assert copy_scores(picture[None], picture[None], other[None]) == pytest.approx(torch.tensor([1.0]))


def test_kl_is_that_of_normal_distributions() -> None:
    mu, logvar = torch.randn(2, 3, 4, generator=rng(1)), torch.randn(2, 3, 4, generator=rng(2)) * 0.3
    ours = torch.distributions.Normal(mu, (logvar / 2).exp())
    wanted = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    assert torch.allclose(kl(mu, logvar), wanted, atol=1e-5)
    assert torch.allclose(kl(torch.zeros(1, 2), torch.zeros(1, 2), free=0.05), torch.tensor([0.1]))


def test_defences_do_what_they_say(tiny_model: Any) -> None:
    item = adapters_like(1, ranks=(3,), seed=1)[0]

    def full(factors: Any, name: str) -> Tensor:
        return (factors[name][1] @ factors[name][0]).double()

    for name in item:
        u, s, v = torch.linalg.svd(full(item, name), full_matrices=False)
        best = u[:, :1] * s[:1] @ v[:1]
        assert torch.allclose(full(defences.truncate(item, 1), name), best, atol=1e-4)
        assert torch.allclose(full(defences.refactor(item), name), full(item, name), atol=1e-4)
        blind = defences.random_directions(item)
        assert torch.allclose(torch.linalg.svdvals(full(blind, name))[:3], s[:3], atol=1e-3)
        assert abs(float((full(blind, name) * full(item, name)).sum() / s.square().sum())) < 0.8
        assert float(full(defences.scale(item, 2.0), name).norm()) == pytest.approx(2.0, rel=1e-4)
        assert len(full(defences.quantise(item, 2), name).unique()) < full(item, name).numel() / 2
        worst = [float((full(defences.quantise(item, bits), name) - full(item, name)).norm()) for bits in (3, 6, 8)]
        assert worst == sorted(worst, reverse=True)
        assert torch.equal(full(defences.add_noise(item, 0.0), name), full(item, name))
    phi = phi_of(item)
    again = factors_of(phi, scale=2.0)
    assert all(torch.equal(again[name][1], 2 * item[name][1]) for name in item)


def test_a_bank_beside_a_convolution_is_the_merged_weight(tiny_model: Any) -> None:
    """Two adapters beside a 3x3 and a strided convolution, in one batch, against weights with the update added."""
    from safeweights.diffusion.adaptation import at

    named = dict(tiny_model.named_parameters())
    names = [name for name, value in named.items() if name.startswith("unet.") and value.ndim == 4][:4]
    names += [name for name, value in named.items() if "downsamplers" in name and value.ndim == 4][:1]
    items = []
    for row in range(2):
        draw = rng(row)
        items.append(
            {
                name: (
                    torch.randn(2, named[name][0].numel(), generator=draw),
                    torch.randn(len(named[name]), 2, generator=draw) * 0.05,
                )
                for name in names
            }
        )
    x, t = torch.randn(4, *tiny_model.latent_shape, generator=rng(7)), torch.tensor([300] * 4)
    c = tiny_model.embed(["a dog"])
    for rows in (torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 0, 1])):
        with torch.no_grad(), bank_on(tiny_model, stack_of([phi_of(item) for item in items]), rows):
            found = tiny_model.eps(x, t, c)
        for place, row in enumerate(rows.tolist()):
            merged = {name: named[name] + (b @ a).view_as(named[name]) for name, (a, b) in items[row].items()}
            with torch.no_grad(), at(tiny_model, merged):
                wanted = tiny_model.eps(x[place : place + 1], t[:1], c)
            assert torch.allclose(found[place], wanted[0], atol=1e-3)
            assert not torch.allclose(found[place], tiny_model.eps(x[place : place + 1], t[:1], c)[0], atol=1e-2)


def test_spectra_of_many_adapters_are_those_of_each() -> None:
    from safeweights.leakage.encoders.spectrum import KEPT, features

    items = adapters_like(3, ranks=(2, 5), seed=3)
    layers = [*items[0], "absent"]
    found = features(items, layers).view(3, len(layers), KEPT + 1)
    for row, item in enumerate(items):
        for place, name in enumerate(items[0]):
            a, b = item[name]
            s = torch.linalg.svdvals((b @ a).double())[: min(KEPT, len(a))].float()
            wanted = torch.cat([s.square().sum()[None].sqrt(), s, torch.zeros(KEPT - len(s))]).clamp(min=1e-8).log()
            assert torch.allclose(found[row, place, : len(s) + 1], wanted[: len(s) + 1], atol=1e-4)
            assert found[row, place, len(s) + 1 :].max() < -15 if len(s) < KEPT else True
    assert torch.allclose(found[:, -1], torch.tensor(1e-8).log())


def test_permutations_count_as_one_by_one() -> None:
    """Ties among scores, and a gallery larger than the adapters, against a plain loop over permutations."""
    import numpy as np

    scores, own = torch.randn(6, 9, generator=rng(4)).round(decimals=0), [8, 0, 3, 2, 5, 7]
    observed, draw = float(percentile_ranks(scores, own).mean()), np.random.default_rng(1)
    plain = [float(percentile_ranks(scores, draw.permutation(own)).mean()) >= observed - 1e-12 for _ in range(3000)]
    assert permutation_p(scores, own, permutations=20_000) == pytest.approx(sum(plain) / len(plain), abs=0.04)


def one_step_of_sgd(model: Any, x_0: Tensor, text: str, t: Tensor, eps: Tensor, *, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors that LoRA has after one step from B = 0 on these very pictures, times and noises; by plain autograd."""
    adapter = Adapter(targets=ATTENTION, rank=2)
    phi = {name: value.clone().requires_grad_() for name, value in adapter.start(model, seed).items()}
    with adapter.on(model, phi):
        predicted = model.eps(add_noise(model, x_0, t, eps), t, model.embed([text]))
    loss = (predicted - eps).square().mean()
    slopes = dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))
    return factors_of({name: (value - 0.1 * slopes[name]).detach() for name, value in phi.items()})


def test_gradient_matching_is_zero_at_the_truth(tiny_model: Any) -> None:
    """Two adapters in one pass, each of its own pictures and words; the factors' start is anything."""
    t, eps = torch.tensor([200, 700]), torch.randn(2, *tiny_model.latent_shape, generator=rng(9))
    x_0 = torch.randn(2, 2, *tiny_model.latent_shape, generator=rng(8))
    texts = ("a dog", "a red cat")
    made = [one_step_of_sgd(tiny_model, x_0[i], text, t, eps, seed=i) for i, text in enumerate(texts)]
    states = torch.cat([tiny_model.embed([text]).states for text in texts]).detach()
    with twice_differentiable():
        right = mismatch(tiny_model, *sides(made), x_0, states, t, eps)
        swapped = mismatch(tiny_model, *sides(made), x_0.flip(0), states.flip(0), t, eps)
    assert right.abs().max() < 1e-5
    assert swapped.min() > 0.01
    turn = torch.tensor([[2.0, 0.7], [-0.4, 1.5]])
    turned = [{name: (torch.linalg.inv(turn) @ a, b @ turn) for name, (a, b) in item.items()} for item in made]
    # What a merged update tells depends neither on its factors, nor on rows of zeros, nor on who is beside it.
    blank = [
        {name: (torch.cat([a, torch.zeros_like(a)]), torch.cat([b, torch.zeros_like(b)], 1)) for name, (a, b) in item.items()}
        for item in made
    ]
    beside = [made[0], {name: (torch.randn(5, a.shape[1]), torch.randn(len(b), 5)) for name, (a, b) in made[1].items()}]
    with twice_differentiable():
        plain = mismatch(tiny_model, *sides(made, merged=True), x_0, states, t, eps)
        for other in (turned, blank):
            assert torch.allclose(mismatch(tiny_model, *sides(other, merged=True), x_0, states, t, eps), plain, atol=1e-3)
        apart = mismatch(tiny_model, *sides(beside, merged=True), x_0, states, t, eps)
        assert torch.allclose(apart[0], plain[0], atol=1e-3)
        assert plain.max() < 0.2
        one = next(iter(made[1]))
        fewer = mismatch(tiny_model, *sides([made[0], {one: made[1][one]}]), x_0, states, t, eps)
    assert fewer.abs().max() < 1e-5
    for odd, part in (([{}], "no layers"), ([{"text_encoder.x.weight": made[0][one]}], "no layer of it")):
        with pytest.raises(UserError, match=part):
            sides(odd)


def test_gradient_matching_descends_its_own_objective(tiny_model: Any) -> None:
    """The slope in the dummies against central differences (in the reference code they have none), and a descent."""
    t, eps = torch.tensor([300, 600]), torch.randn(2, *tiny_model.latent_shape, generator=rng(7))
    truth = torch.randn(2, *tiny_model.latent_shape, generator=rng(6))
    made = [one_step_of_sgd(tiny_model, truth, "a dog", t, eps, seed=4)]
    states = tiny_model.embed(["a dog"]).states.detach()
    start = torch.randn(1, 2, *tiny_model.latent_shape, generator=rng(5))

    def value(x_0: Tensor) -> Tensor:
        with twice_differentiable():
            return mismatch(tiny_model, *sides(made), x_0, states, t, eps).sum()

    dummy = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(dummy), dummy)
    way = slope / slope.norm()
    numeric = (value(start + 0.05 * way) - value(start - 0.05 * way)) / 0.1
    assert float(numeric.detach()) == pytest.approx(float((slope * way).sum()), rel=0.05)
    short = [Matching(pictures=2, noises=1, steps=steps, lr=0.1).invert(tiny_model, made, "a boat") for steps in (1, 25)]
    assert short[0][0].shape == (1, 2, *tiny_model.latent_shape)
    assert short[1][1] < short[0][1] - 0.02
    both = Matching(pictures=2, noises=1, steps=3).invert(tiny_model, made * 2, "a boat")
    assert torch.allclose(both[0][0], both[0][1], atol=1e-5)
