"""Pruning: exact budgets, the first step of a learned mask, gates in closed form, masks that come off bit for bit, statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from safeweights.core.model import Sampling
from safeweights.diffusion import masks
from safeweights.diffusion.completion import auc, complete, recover_positions
from safeweights.diffusion.criteria import concept_prune, input_norms, snip, wanda
from safeweights.diffusion.latent_bank import LatentBank
from safeweights.diffusion.neurons import (
    Activations,
    Neuron,
    activations,
    benjamini_hochberg,
    listening,
    locate,
    p_values,
    paired_t,
    slopes,
)
from safeweights.erasure.p_esd import PESD
from safeweights.erasure.pruning import Attacker, fork_weights


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# budgets


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=1, max_size=8), min_size=1, max_size=4), st.data())
def test_the_budget_is_exact_and_the_lowest_are_taken(values: list[list[int]], data: Any) -> None:
    scores = {str(i): torch.tensor(row, dtype=torch.float32) for i, row in enumerate(values)}
    total = sum(len(row) for row in values)
    count = data.draw(st.integers(0, total))
    chosen = masks.lowest(scores, count)
    assert sum(int(mask.sum()) for mask in chosen.values()) == count
    taken = [float(v) for name, mask in chosen.items() for v in scores[name][mask]]
    left = [float(v) for name, mask in chosen.items() for v in scores[name][~mask]]
    assert sorted(taken + left)[:count] == sorted(taken)


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be chosen"):
        masks.lowest({"a": torch.zeros(3)}, 4)


@pytest.mark.parametrize("how", ["random", "smallest", "largest"])
def test_control_masks_have_the_density_of_every_tensor(how: Any) -> None:
    weights = {name: torch.randn(6, 5, generator=generator(i)) for i, name in enumerate("ab")}
    pruned = {"a": torch.rand(6, 5, generator=generator(7)) < 0.3, "b": torch.zeros(6, 5, dtype=torch.bool)}
    control = masks.same_density(weights, pruned, how, seed=0)
    assert int(control["a"].sum()) == int(pruned["a"].sum()) > 0
    assert not control["b"].any()
    if how != "random":
        inside, outside = weights["a"][control["a"]].abs(), weights["a"][~control["a"]].abs()
        assert inside.max() <= outside.min() if how == "smallest" else inside.min() >= outside.max()


# learning


def test_the_first_step_of_a_learned_mask_is_snip(tiny_model: Any) -> None:
    """At m = 1 the score moves by -lr W dL/dW: its size is SNIP's sensitivity, entry by entry."""
    c, rng = tiny_model.embed(["a dog"]), generator()
    x_t, t = torch.randn(2, *tiny_model.latent_shape, generator=rng), torch.tensor([100, 600])
    target = torch.randn(x_t.shape, generator=rng)

    def loss_of(model: Any) -> torch.Tensor:
        return (model.eps(x_t, t, c) - target).square().mean()

    student = fork_weights(tiny_model, "neurons")
    weights = student.trainable()
    expected = snip(weights, [loss_of(student)])
    count = 50
    # After one step the scores are -W dL/dW alone, so the lowest are those whose loss to first order helps most.
    gradients = torch.autograd.grad(loss_of(student), list(weights.values()))
    signed = {name: -(p.detach() * g) for (name, p), g in zip(weights.items(), gradients, strict=True)}
    zeros, losses = masks.learn_mask(
        weights, lambda step: loss_of(student), count=count, steps=1, ramp=1, lr=1.0, optimizer="sgd"
    )
    assert len(losses) == 1
    for name, wanted in masks.lowest(signed, count).items():
        assert torch.equal(zeros[name], wanted)
        assert torch.allclose(expected[name], signed[name].abs(), rtol=1e-4, atol=1e-9)


def test_a_learned_mask_finds_the_weights_that_hurt_and_puts_the_rest_back() -> None:
    """y = sum of weights; two of five make it too large, and exactly those go."""
    weight = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, -1.0, 0.5]]))
    zeros, losses = masks.learn_mask(
        {"w": weight}, lambda step: (weight.sum() - 0.5).square(), count=2, steps=20, ramp=4, lr=0.1, optimizer="sgd"
    )
    assert zeros["w"].tolist() == [[False, True, True, False, False]]
    assert torch.equal(weight.detach(), torch.tensor([[1.0, 2.0, 3.0, -1.0, 0.5]]))
    assert losses[-1] < losses[0]


def test_hard_concrete_is_zero_as_often_as_its_closed_form_says() -> None:
    u = torch.rand(200_000, generator=generator(), dtype=torch.float64)
    for log_alpha in (-2.0, 0.0, 1.0, 3.0):
        level = torch.tensor(log_alpha, dtype=torch.float64)
        drawn = masks.hard_concrete(level, u)
        assert float((drawn == 0).double().mean()) == pytest.approx(float(masks.chance_of_zero(level)), abs=0.004)
        assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
    assert float(masks.chance_of_zero(torch.tensor(5.0))) == pytest.approx(0.0014, abs=2e-4)


def test_whole_neurons_go_and_never_more_weights_than_the_budget(tiny_model: Any) -> None:
    student = fork_weights(tiny_model, "neurons")
    weights = student.trainable()
    before = {name: p.detach().clone() for name, p in weights.items()}
    c, x_t = tiny_model.embed(["a dog"]), torch.randn(1, *tiny_model.latent_shape, generator=generator())
    zeros, _ = masks.learn_neuron_mask(
        weights, lambda step: student.eps(x_t, torch.tensor([500]), c).square().mean(), count=100, steps=2, lr=0.1, seed=0
    )
    assert 0 < sum(int(mask.sum()) for mask in zeros.values()) <= 100
    for name, mask in zeros.items():
        by_neuron = mask.float().mean(dim=0 if name.endswith("ff.net.2.weight") else 1)
        assert set(by_neuron.tolist()) <= {0.0, 1.0}
        assert torch.equal(weights[name].detach(), before[name])


def test_the_attack_asks_for_the_concept_better_than_random_words_do(tiny_model: Any) -> None:
    """Each of its rows lowers || eps_m(x_t, [v, c]) - eps_o(x_t, c) ||^2 over the whole bank."""
    bank = LatentBank.sample(
        tiny_model, ["a dog", "a red dog"], n=4, sampling=Sampling(steps=3, guidance_scale=3.0), rng=generator()
    )
    student = fork_weights(tiny_model, "neurons")
    with torch.no_grad():  # a mask that takes half of what the prompt goes through
        for p in student.trainable().values():
            p.mul_((torch.rand(p.shape, generator=generator(3)) < 0.5).to(p.dtype))

    def loss(steps: int, lr: float) -> list[float]:
        how = PESD(attack_steps=steps, attack_lr=lr, tokens=2)
        c = Attacker(how, student, bank, seed=0).attacked(torch.tensor([0, 1]), step=5)
        rows = [(bank.prompt == i).nonzero().flatten() for i in (0, 1)]
        batches = [bank.at(row) for row in rows]
        with torch.no_grad():
            told = [student.eps(b.x_t, b.t, c[torch.tensor([i]).expand(len(b.t))]) - b.eps_c for i, b in enumerate(batches)]
        return [float(error.square().mean()) for error in told]

    random, found = loss(1, 1e-9), loss(60, 0.05)
    assert all(after < before for after, before in zip(found, random, strict=True))


def test_what_the_attack_of_a_mask_refuses() -> None:
    with pytest.raises(ValueError, match="criterion=learned"):
        PESD(attack_steps=1, criterion="snip")
    with pytest.raises(ValueError, match="attack_steps"):
        PESD(attack_steps=-1)


# one-shot criteria


def test_input_norms_are_those_of_the_slow_definition(tiny_model: Any) -> None:
    name = next(n for n, _ in tiny_model.named_parameters() if n.endswith("attn2.to_v.weight"))
    c = tiny_model.embed(["a dog", "a red house"])
    x_t, t = torch.randn(2, *tiny_model.latent_shape, generator=generator()), torch.tensor([50, 900])
    norms = input_norms(tiny_model, [name], [(x_t, t, c)], bins=2)[name]
    for row, bin_ in ((1, 0), (0, 1)):  # bin 0 is the noisy half
        states = c.states[row].detach()
        slow = (states / states.norm(dim=-1, keepdim=True)).square().sum(0).sqrt()
        assert torch.allclose(norms[bin_], slow, rtol=1e-4)


def test_wanda_takes_the_same_share_of_every_row() -> None:
    weights = {"w": torch.randn(6, 10, generator=generator())}
    scores = wanda(weights, {"w": torch.rand(1, 10, generator=generator(1)) + 0.1})
    pruned = masks.lowest({"w": -scores["w"]}, 12)["w"]
    assert pruned.sum(1).tolist() == [2] * 6


def test_concept_prune_votes_for_weights_only_the_concept_needs() -> None:
    weights = {"w": torch.ones(2, 10)}
    base = torch.full((4, 10), 1.0)
    target = base.clone()
    target[:, 3] = 2.0
    votes = concept_prune(weights, {"w": target}, {"w": base}, top=0.1, first=3)["w"]
    assert votes[:, 3].tolist() == pytest.approx([3.999, 3.999], abs=2e-3)
    assert float(votes.sum() - votes[:, 3].sum()) == 0


# on and off again


@pytest.mark.parametrize("fill", ["zero", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mask_comes_off_bit_for_bit(fill: Any, dtype: torch.dtype) -> None:
    weights = {
        "w": torch.randn(7, 9, generator=generator()).to(dtype),
        "k": torch.randn(3, 2, 3, 3, generator=generator(1)).to(dtype),
    }
    pruned = {name: torch.rand(w.shape, generator=generator(2)) < 0.2 for name, w in weights.items()}
    mask = masks.make_mask(weights, pruned, fill=fill, seed=5)
    on = masks.pruned_tensors(weights, mask)
    for name, where in pruned.items():
        assert torch.equal(on[name][~where], weights[name][~where])
        assert not torch.equal(on[name][where], weights[name][where])
        if fill == "zero":
            assert not on[name][where].any()
    off = masks.restored_tensors(on, mask)
    for name, weight in weights.items():
        assert torch.equal(off[name].view(torch.uint8), weight.view(torch.uint8))
    assert all(torch.equal(a, b) for a, b in zip(on.values(), masks.pruned_tensors(off, mask).values(), strict=True))


def test_noise_has_the_distribution_of_its_row_and_zeros_show() -> None:
    """Laplace weights, which a normal fill would not look like: no score finds the concealed places, every score the zeros."""
    u = torch.rand(40, 500, generator=generator()) - 0.5
    weights = {"w": -u.sign() * (1 - 2 * u.abs()).log() * torch.linspace(0.5, 2, 40)[:, None]}
    pruned = {"w": torch.rand(40, 500, generator=generator(1)) < 0.1}
    where = masks.make_mask(weights, pruned).indices
    shown = {
        fill: recover_positions(masks.pruned_tensors(weights, masks.make_mask(weights, pruned, fill=fill, seed=3)), where)
        for fill in ("zero", "noise")
    }
    assert {found.score for found in shown["zero"] if found.auc == 1.0} >= {"small", "repeated"}
    assert all(abs(found.auc - 0.5) < 0.02 for found in shown["noise"])
    assert all(found.chance for found in shown["noise"])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_noise_is_rounded_as_its_neighbours_are(kind: torch.dtype) -> None:
    """Weights stored in half precision and opened in float32: a value between two of theirs would be told at once."""
    weights = {"w": torch.randn(20, 300, generator=generator()).to(kind).float()}
    pruned = {"w": torch.rand(20, 300, generator=generator(1)) < 0.1}
    filled = masks.pruned_tensors(weights, masks.make_mask(weights, pruned, fill="noise"))["w"]
    assert torch.equal(filled, filled.to(kind).float())


def test_noise_falls_onto_its_neighbours_as_seldom_as_they_onto_each_other() -> None:
    """Weights of few bits repeat by chance; a fill that repeats more often would be found by that."""
    weights = {"w": (0.05 * torch.randn(300, 200, generator=generator())).to(torch.bfloat16).float()}
    pruned = {"w": torch.rand(300, 200, generator=generator(1)) < 0.05}
    mask = masks.make_mask(weights, pruned, fill="noise", seed=2)
    found = {row.score: row.auc for row in recover_positions(masks.pruned_tensors(weights, mask), mask.indices)}
    # Drawn between next neighbours, as it once was, noise has .61 here.
    assert found["repeated"] == pytest.approx(0.5, abs=0.02)
    assert found["small"] == pytest.approx(0.5, abs=0.012)


def test_auc_counts_pairs() -> None:
    scores, positive = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([True, False, True, False])
    assert auc(scores, positive)[0] == pytest.approx((2 + 1 + 0.5) / 4)
    with pytest.raises(ValueError, match="both kinds"):
        auc(scores, torch.ones(4, dtype=torch.bool))


def test_completion_recovers_a_low_rank_matrix() -> None:
    matrix = torch.randn(30, 2, generator=generator()) @ torch.randn(2, 40, generator=generator(1))
    missing = torch.rand(30, 40, generator=generator(2)) < 0.1
    guess = complete(matrix * ~missing, missing, iterations=200, shrink=0.01)
    assert torch.equal(guess[~missing], matrix[~missing])
    assert (guess - matrix)[missing].norm() < 0.1 * matrix[missing].norm()


# neurons


def test_t_and_p_are_scipys() -> None:
    from scipy import stats

    a, b = torch.randn(12, 5, generator=generator()), torch.randn(12, 5, generator=generator(1))
    theirs = stats.ttest_rel(a.numpy(), b.numpy(), alternative="greater")
    t = paired_t(a - b)
    assert torch.allclose(t, torch.from_numpy(theirs.statistic).double(), rtol=1e-4)
    assert torch.allclose(p_values(t, 12), torch.from_numpy(theirs.pvalue).double(), rtol=1e-3)
    assert paired_t(torch.zeros(4, 2)).tolist() == [0.0, 0.0]


def test_benjamini_hochberg_on_known_p_values() -> None:
    """The example of the 1995 paper: 15 p-values, four rejected at 0.05."""
    p = torch.tensor(
        [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    )
    order = torch.randperm(15, generator=generator())
    assert int(benjamini_hochberg(p, 0.05).sum()) == 4
    assert torch.equal(benjamini_hochberg(p[order], 0.05), benjamini_hochberg(p, 0.05)[order])
    assert not benjamini_hochberg(torch.tensor([0.5, 0.9]), 0.05).any()


def test_located_neurons_are_those_that_answer_and_controls_match_them() -> None:
    rng = generator()
    base = {name: torch.rand(3, 20, 40, generator=rng) * 0.1 + torch.linspace(1, 5, 40) for name in ("deep", "shallow")}
    more = {name: value + 0.05 * torch.randn(value.shape, generator=rng) for name, value in base.items()}
    more["deep"][:, :, 7] += 1.0
    more["deep"][1:, :, 30] += 1.0
    found = locate(Activations(more, (900, 500, 100)), Activations(base, (900, 500, 100)), share=0.05)
    assert found.concept == (Neuron("deep", 7), Neuron("deep", 30)) or set(found.concept) == {
        Neuron("deep", 7),
        Neuron("deep", 30),
    }
    for neuron, control in zip(found.concept, found.control, strict=True):
        assert control.layer == neuron.layer
        assert control not in found.concept
        assert abs(control.channel - neuron.channel) <= 6  # levels rise with the channel
    assert found.depth["deep"][0] == pytest.approx(1 / 40)
    assert found.depth["deep"][1] == pytest.approx(2 / 40)
    plot = found.plot("where")
    assert plot["rows"] == ["deep", "shallow"]
    assert len(plot["values"][0]) == len(plot["columns"]) == 3


def test_without_an_effect_hardly_any_neuron_is_found() -> None:
    rng = generator()
    a, b = ({"l": torch.randn(2, 16, 2000, generator=rng)} for _ in range(2))
    assert locate(Activations(a, (1, 0)), Activations(b, (1, 0))).significant == 0


def test_activations_are_those_of_a_plain_call(tiny_model: Any) -> None:
    """With guidance 1 and one step the run asks the model once; its guided branch is the plain call."""
    c = tiny_model.embed(["a dog", "a red house"])
    run = activations(tiny_model, c, [3, 4], Sampling(steps=1, guidance_scale=1.0), batch_size=1)
    from safeweights.diffusion.noise import generator as seeded
    from safeweights.diffusion.sampling import ddim_timesteps

    x = torch.stack([torch.randn(tiny_model.latent_shape, generator=seeded("neurons", s)) for s in (3, 4)])
    t = ddim_timesteps(tiny_model, 1).expand(2)
    with torch.no_grad(), listening(tiny_model) as heard:
        tiny_model.eps(x, t, c)
    assert set(heard) == set(run.layers)
    for name, value in heard.items():
        assert torch.allclose(run.layers[name][0], value, atol=1e-5)
    assert any("ff.net.0" in name for name in heard)


def test_a_slope_is_the_length_of_the_gradient(tiny_model: Any) -> None:
    """Against finite differences along the gradient of a value neuron, which is linear in the text up to the sign."""
    c, x = tiny_model.embed(["a dog"]), torch.randn(1, *tiny_model.latent_shape, generator=generator())
    t = torch.tensor([500])
    with torch.no_grad(), listening(tiny_model) as heard:
        tiny_model.eps(x, t, c)
    layer = next(name for name in heard if name.endswith("attn2.to_v"))
    weight = dict(tiny_model.denoiser.named_modules())[layer].weight.detach()
    signs = (c.states[0] @ weight[5]).sign()
    exact = (signs[:, None] * weight[5][None] / len(signs)).norm()
    assert float(slopes(tiny_model, x, t, c.detach(), [Neuron(layer, 5)])[0]) == pytest.approx(float(exact), rel=1e-4)
