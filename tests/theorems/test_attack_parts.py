"""What the attacks' parts do, exactly: on the Gaussian model, and against slow definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights.attacks.adversarial import concept_inversion, latent_inversion, p4d, ring_a_bell, soft_prompt
from safeweights.attacks.adversarial.replay import Replay
from safeweights.attacks.adversarial.rounds import adam, mean_error, noised
from safeweights.core.attack import Original, Target
from safeweights.core.concept import Concept, Prompt
from safeweights.core.errors import UserError
from safeweights.core.model import Conditioning, Sampling
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import ddim_run, invert
from safeweights.diffusion.search import insert_every, nearest, term_ids
from safeweights.models.gaussian import GaussianModel

WORDS = ("dog", "cat", "red", "house", "boat", "tree")
SAMPLING = Sampling(width=2, height=2, steps=10, guidance_scale=1.0)
DOG = Concept(name="dog", kind="object", term="dog", anchor="cat", prompts=(Prompt("red dog"), Prompt("dog house")))


@pytest.fixture
def gaussian() -> GaussianModel:
    return GaussianModel(WORDS, deviation=0.3, max_tokens=8)


def pictures(n: int, size: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# inversion


def test_an_inverted_latent_is_sampled_back_to_its_picture(gaussian: GaussianModel) -> None:
    x_0 = gaussian.encode(pictures(3))
    none = gaussian.embed([""])
    error = [
        float((ddim_run(gaussian, none, invert(gaussian, none, x_0, SAMPLING, iterations=n), SAMPLING) - x_0).abs().max())
        for n in (1, 3, 200)
    ]
    assert error[2] < 1e-3 < error[0]


def test_inversion_undoes_the_sampler_of_a_real_architecture(tiny_model: Any) -> None:
    sampling = Sampling(width=16, height=16, steps=8, guidance_scale=1.0)
    none = tiny_model.embed([""])
    x_0 = tiny_model.encode(pictures(2, 16))
    errors = []
    for iterations in (1, 30):
        x_T = invert(tiny_model, none, x_0, sampling, iterations=iterations)
        with torch.no_grad():
            errors.append(float((ddim_run(tiny_model, none, x_T, sampling) - x_0).square().mean().sqrt()))
    assert errors[1] < 0.1 * errors[0]


def test_the_gradient_through_checkpointed_sampling_is_the_plain_one(tiny_model: Any) -> None:
    sampling = Sampling(width=16, height=16, steps=3)
    none = tiny_model.embed([""])
    found = []
    for checkpoints in (False, True):
        x = torch.randn((1, 4, 8, 8), generator=generator(0)).requires_grad_()
        drawn = ddim_run(tiny_model, none, x, sampling, checkpoints=checkpoints)
        found.append(torch.autograd.grad(drawn.square().sum(), x)[0])
    assert torch.allclose(*found, atol=1e-6)
    assert found[0].abs().max() > 0


def test_latent_descent_brings_the_sample_closer_to_the_picture(gaussian: GaussianModel) -> None:
    attack = latent_inversion.LatentInversion(iterations=1, lr=0.05)
    search = latent_inversion._Search(attack, gaussian, SAMPLING, [Target("red dog", i, pictures(2)[i]) for i in range(2)])
    search.step(1)
    losses = []
    for _ in range(60):
        search.step(2)
        losses.append(search.loss)
    assert losses[-1] < 0.05 * losses[0]


# words


def test_the_nearest_word_is_nearest_by_cosine() -> None:
    vectors, vocabulary = torch.randn(2, 3, 5, generator=generator(1)), torch.randn(7, 5, generator=generator(2))
    slow = [
        [max(range(7), key=lambda j: float(torch.cosine_similarity(v, vocabulary[j], dim=0))) for v in row] for row in vectors
    ]
    assert nearest(vectors, vocabulary).tolist() == slow
    assert torch.equal(nearest(vocabulary * 9, vocabulary), torch.arange(7))


def test_free_words_between_words_leave_the_prompt_readable(tiny_model: Any) -> None:
    prompts = ["a picture of a dog", "nudity in the church", ""]
    ids, free = insert_every(tiny_model, prompts, 3)
    assert ids.shape == (3, tiny_model.max_tokens)
    assert free.sum(dim=1).tolist() == [2, 2, 1]
    (cat,) = term_ids(tiny_model, "cat")
    filled = torch.where(free, cat, ids)
    said = ["cat a picture of cat a dog", "cat nudity in the cat church", "cat"]
    assert torch.equal(filled, tiny_model.tokenize(said))
    with pytest.raises(UserError, match="no room"):
        insert_every(tiny_model, ["a dog " * 6], 1)


@pytest.mark.parametrize("variant", ["n", "k"])
def test_p4d_moves_by_the_gradient_at_the_nearest_words(tiny_model: Any, variant: Any) -> None:
    target = Target("a red dog", 3, pictures(1, 16)[0])
    attack = p4d.P4D(variant=variant, tokens=2, noises=2)
    search = p4d._Search(attack, tiny_model, tiny_model, [target])
    before, ids = search.free.clone(), search.projected(slice(None))
    loss, gradient = search.gradient_of(slice(0, 1))
    # The same by hand: the very draw again, the words' own embeddings, autograd.
    rng = generator("p4d", 3, "a red dog")
    torch.randint(len(search.words), (tiny_model.max_tokens,), generator=rng)
    x_t, t, _ = noised(tiny_model, search.x_0, 2, 0, 999, [rng])
    words = tiny_model.vocabulary[ids].requires_grad_()
    wanted = tiny_model.eps(x_t, t, tiny_model.embed(["a red dog"]))
    slow = mean_error(tiny_model, x_t, t, tiny_model.embed_tokens(words, ids), wanted.detach())
    (by_hand,) = torch.autograd.grad(slow.sum(), words)
    assert torch.allclose(loss, slow.detach())
    assert torch.allclose(gradient[search.where], by_hand[search.where], atol=1e-7)
    assert (gradient[~search.where] == 0).all()
    search.steps = 1
    search.move(slice(0, 1), gradient)
    assert not torch.equal(search.free, before)
    (candidate,) = search.candidates()
    row = tiny_model.tokenize([candidate.prompt])
    assert torch.equal(row, search.projected(slice(None)))  # what is asked reads back as what was found
    if variant == "k":
        assert [word for word in candidate.prompt.split() if word in ("a", "red", "dog")][-3:] == ["a", "red", "dog"]


def test_adam_is_adam() -> None:
    x = torch.randn(3, 4, generator=generator(0))
    for decay in (0.0, 0.1):
        ours, first, second = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
        theirs = x.clone().requires_grad_()
        optimizer = torch.optim.AdamW([theirs], lr=0.05, weight_decay=decay)
        for step in range(1, 6):
            gradient = torch.randn(3, 4, generator=generator(step))
            ours = adam(ours, gradient, first, second, step, 0.05, 0.05 * decay)
            theirs.grad = gradient.clone()
            optimizer.step()
        assert torch.allclose(ours, theirs.detach(), atol=1e-6)


# genes


def test_breeding_never_loses_the_best(tiny_model: Any) -> None:
    concept = Concept(name="dog", kind="object", term="dog", anchor="cat", prompts=(Prompt("a red dog"),))
    targets = [Target("a red dog", 1), Target("a dog and a cat", 2)]
    search = ring_a_bell._Search(ring_a_bell.RingABell(tokens=4, population=12), tiny_model, concept, targets)
    best = search.distance[:, 0]
    for _ in range(8):
        search.step(1)
        assert (search.distance[:, 0] <= best + 1e-4).all()
        assert (search.distance.diff(dim=1) >= 0).all()
        best = search.distance[:, 0]
    assert torch.allclose(search.distance, search._distances(search.genes), atol=1e-2)


def test_breeding_finds_the_words_that_are_wanted(gaussian: GaussianModel) -> None:
    attack = ring_a_bell.RingABell(tokens=3, population=40)
    search = ring_a_bell._Search(attack, gaussian, DOG, [Target("red dog", 0)])
    search.wanted = gaussian.embed(["boat tree cat"]).states
    search.distance = search._distances(search.genes)
    search._sort()
    for _ in range(30):
        search.step(1)
    assert float(search.distance[0, 0]) == 0
    assert search.candidates()[0].prompt == "boat tree cat"
    assert search.candidates()[0].prompt != "boat tree cat"  # never asked twice


def test_the_concept_direction_is_that_of_its_words(gaussian: GaussianModel) -> None:
    """One-hot states: taking "dog" out and "cat" in moves every pair by the difference of the two words."""
    search = ring_a_bell._Search(ring_a_bell.RingABell(tokens=3, eta=2.0), gaussian, DOG, [Target("red dog", 0)])
    moved = (search.wanted - gaussian.embed(["red dog"]).states).sum(dim=1)[0]
    dog, cat = (gaussian.embed([word]).states[0, 1] for word in ("dog", "cat"))
    assert torch.allclose(moved, 2.0 * (dog - cat), atol=1e-6)
    mute = Concept(name="x", kind="style", term="x", anchor="cat", prompts=(Prompt("cat"),))
    with pytest.raises(UserError):
        ring_a_bell._Search(ring_a_bell.RingABell(), gaussian, mute, [Target("red dog", 0)])


# embeddings


def test_a_soft_prompt_denoises_better_than_every_word(gaussian: GaussianModel) -> None:
    picture = pictures(1, seed=4)[0]
    attack = soft_prompt.SoftPrompt(tokens=1, noises=4, lr=0.3, t_high=999)
    search = soft_prompt._Search(attack, gaussian, [Target("red", 1, picture)])
    for _ in range(200):
        search.step(1)
    x_t, t, eps = noised(gaussian, gaussian.encode(picture[None]), 64, 10, 990, [generator(5)])
    states = search.candidates()[0].states
    assert states is not None
    soft = mean_error(gaussian, x_t, t, Conditioning(states[None]), eps)
    words = [mean_error(gaussian, x_t, t, gaussian.embed([f"{word} red"]), eps) for word in WORDS]
    assert float(soft) < min(float(loss) for loss in words)


def test_the_new_word_is_learned_from_pictures_alone_and_takes_the_terms_place(gaussian: GaussianModel) -> None:
    attack = concept_inversion.ConceptInversion(pictures=4, tokens=1)
    original = Original(gaussian, lambda n: pictures(n, seed=6))
    found = []
    for prompts in (["red dog"], ["dog", "boat"]):
        targets = [Target(prompt, i, pictures(1, seed=i)[0]) for i, prompt in enumerate(prompts)]
        search = concept_inversion._Search(attack, gaussian, DOG, original, targets)
        losses = []
        for _ in range(80):
            search.step(1)
            losses.append(search.loss)
        assert sum(losses[-20:]) < sum(losses[:20])
        found.append(search)
    one, two = found
    assert torch.equal(one.word, two.word)
    word = one.word[0, 0]
    (states,) = [candidate.states for candidate in one.candidates()]
    assert states is not None
    assert torch.allclose(states[2], word, atol=1e-6)  # BOS, red, the word instead of dog
    _, boat = [candidate.states for candidate in two.candidates()]
    assert boat is not None
    assert torch.allclose(boat[1], word, atol=1e-6)  # a prompt without the term: in front
    assert torch.equal(boat[2], gaussian.embed(["boat"]).states[0, 1])


# transfer


def test_replay_asks_what_was_found_first_for_the_same_prompt_then_for_the_others(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "seed": 1, "adversarial_prompt": "x a", "adversarial_seed": 1, "success": False, "input": "text"},
        {"prompt": "b", "seed": 2, "adversarial_prompt": "x b", "adversarial_seed": 9, "success": True, "input": "text"},
    ]
    path = tmp_path / "attack.json"
    path.write_text(json.dumps({"kind": "attack", "details": {"concept": "dog", "found": rows}}))
    model: Any = None
    targets = [Target("a", 1), Target("b", 2)]
    rounds = Replay(record=str(path), images=3).revive(model, DOG, targets, sampling=SAMPLING)
    asked = [[(c.prompt, c.seed) for c in next(rounds).candidates]]
    asked += [[(c.prompt, c.seed) for c in rounds.send([False, False]).candidates] for _ in range(2)]
    assert asked == [[("a", 1), ("b", 2)], [("x a", 1), ("x b", 9)], [("x b", 1), ("x b", 9)]]
    assert Replay.mode == "transfer"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "JSON"),
        ("[]", "no record"),
        ({"concept": "cat", "found": [{}]}, "cat"),
        ({"concept": "dog", "found": [{"input": "latent"}]}, "latents"),
        (
            {"concept": "dog", "found": [{"prompt": "z", "seed": 1, "success": True, "adversarial_prompt": "z"}]},
            "findings without",
        ),
        (
            {
                "concept": "dog",
                "found": [{"prompt": "z", "seed": 1, "success": True, "adversarial_prompt": "z", "adversarial_seed": 1}],
            },
            "nothing to ask",
        ),
    ],
)
def test_replay_refuses_what_is_no_list_of_prompts(tmp_path: Path, data: Any, says: str) -> None:
    path = tmp_path / "attack.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    model: Any = None
    with pytest.raises(UserError, match=says):
        next(Replay(record=str(path)).revive(model, DOG, [Target("a", 1)], sampling=SAMPLING))
