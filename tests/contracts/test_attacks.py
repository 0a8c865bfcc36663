"""What every registered attack must do, on a tiny Stable Diffusion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights.core.attack import Original, Target
from safeweights.core.concept import Concept, Prompt
from safeweights.core.errors import UserError
from safeweights.core.model import Sampling
from safeweights.core.table import ATTACKS, configure, resolve
from safeweights.core.workspace import Workspace

SHORT: dict[str, dict[str, Any]] = {
    "concept-inversion": {"images": 3, "steps": 2, "pictures": 3, "batch_size": 2},
    "latent-inversion": {"images": 3, "steps": 1, "iterations": 2},
    "mask-revival": {"images": 3, "iterations": 3},
    "no-attack": {},
    "p4d": {"images": 3, "steps": 2, "tokens": 3},
    "random": {"images": 3, "tokens": 2},
    "relearn": {"images": 3, "steps": 8, "pictures": 3, "rank": 1},
    "replay": {"images": 3},
    "ring-a-bell": {"images": 3, "steps": 2, "tokens": 3, "population": 8},
    "seed-search": {"images": 3},
    "soft-prompt": {"images": 3, "steps": 2, "tokens": 2, "noises": 2},
    "unlearndiffatk": {"timesteps": 2, "steps": 3, "tokens": 2},
}
CONCEPT = Concept(name="dog", kind="object", term="dog", prompts=(Prompt("a picture of a dog"),))
SAMPLING = Sampling(width=16, height=16, steps=2, guidance_scale=2.0)
PICTURES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TEXTS = ("a picture of a dog", "a red dog", "a dog and a cat")


@pytest.fixture(scope="module", autouse=True)
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an attack on some other model wrote."""
    rows = [
        {"prompt": text, "seed": 100 + i, "adversarial_prompt": f"house {text}", "adversarial_seed": 7 + i, "success": i != 1}
        for i, text in enumerate(TEXTS)
    ]
    path = tmp_path_factory.mktemp("found") / "attack.json"
    path.write_text(json.dumps({"concept": "dog", "found": rows}))
    SHORT["replay"]["record"] = str(path)
    return path


def attack(name: str, **settings: Any) -> Any:
    return configure(resolve(ATTACKS, name, "attack"), {**SHORT[name], **settings})


def targets(n: int = 3) -> list[Target]:
    rng = torch.Generator().manual_seed(0)
    return [Target(TEXTS[i], 100 + i, torch.rand(3, 16, 16, generator=rng)) for i in range(n)]


def play(model: Any, name: str, on: list[Target], falls: Any = lambda number, i: False, **settings: Any) -> list[list[Any]]:
    """All rounds of an attack; ``falls(round, index of the target)`` says what the judge sees."""
    rounds = attack(name, **settings).revive(
        model, CONCEPT, on, sampling=SAMPLING, original=Original(model, lambda n: PICTURES[:n])
    )
    standing, history = list(range(len(on))), []
    revival = next(rounds, None)
    while revival is not None:
        assert len(revival.candidates) == len(standing)
        history.append(list(zip(standing, revival.candidates, strict=True)))
        seen = [falls(len(history) - 1, i) for i in standing]
        standing = [i for i, fell in zip(standing, seen, strict=True) if not fell]
        try:
            revival = rounds.send(seen)
        except StopIteration:
            break
    return history


def alike(ours: Any, theirs: Any) -> bool:
    """The same candidate; embeddings and latents up to what the order of sums changes."""
    if (ours.prompt, ours.seed) != (theirs.prompt, theirs.seed):
        return False
    pairs = [(ours.states, theirs.states), (ours.latents, theirs.latents)]
    return all(a is b is None or torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs)


def test_every_attack_is_covered() -> None:
    assert set(SHORT) == set(ATTACKS)


@pytest.mark.parametrize("name", ATTACKS)
def test_asks_plainly_first_and_keeps_to_its_budget(tiny_model: Any, name: str) -> None:
    before = {key: value.detach().clone() for key, value in tiny_model.named_parameters()}
    history = play(tiny_model, name, targets())
    assert [(c.prompt, c.seed) for _, c in history[0]] == [(t.prompt, t.seed) for t in targets()]
    assert len(history) == attack(name).budget.images
    for key, value in tiny_model.named_parameters():
        assert torch.equal(value, before[key])
        assert value.grad is None


@pytest.mark.parametrize("name", ATTACKS)
def test_fallen_targets_leave(tiny_model: Any, name: str) -> None:
    history = play(tiny_model, name, targets(), falls=lambda number, i: i == 1 or number >= 1)
    assert len(history) <= 2
    if len(history) == 2:
        assert [i for i, _ in history[1]] == [0, 2]


@pytest.mark.parametrize("name", ATTACKS)
def test_all_fall_at_once_and_it_stops(tiny_model: Any, name: str) -> None:
    assert len(play(tiny_model, name, targets(), falls=lambda number, i: True)) == 1


@pytest.mark.parametrize("name", ATTACKS)
def test_a_batch_gives_what_one_prompt_at_a_time_gives(tiny_model: Any, name: str) -> None:
    together = play(tiny_model, name, targets())
    for i, target in enumerate(targets()):
        alone = play(tiny_model, name, [target])
        assert all(alike(ours[0][1], theirs[i][1]) for ours, theirs in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", ATTACKS)
def test_same_seed_same_candidates(tiny_model: Any, name: str) -> None:
    for ours, theirs in zip(play(tiny_model, name, targets()), play(tiny_model, name, targets()), strict=True):
        assert all(alike(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))


def test_search_moves_towards_the_picture(tiny_model: Any) -> None:
    """The relaxed loss falls below that of random tokens: the gradient has the right sign."""
    from safeweights.attacks.adversarial.unlearndiffatk import _Search

    def loss_after(steps: int) -> float:
        search = _Search(attack("unlearndiffatk", lr=0.1, weight_decay=0.0), tiny_model, targets())
        for _ in range(steps):
            search.step(1)
        # The same noise for both: a fresh generator for the judged loss.
        losses = []
        for seed in range(8):
            search.rngs = [torch.Generator().manual_seed(seed) for _ in search.targets]
            losses.append(search.gradient_of(slice(0, 3))[0])
        return float(torch.stack(losses).mean())

    assert loss_after(40) < loss_after(0)


def test_relaxed_tokens_stay_on_the_simplex(tiny_model: Any) -> None:
    from safeweights.attacks.adversarial.unlearndiffatk import _Search

    search = _Search(attack("unlearndiffatk"), tiny_model, targets())
    for number in (1, 2):
        search.step(number)
    assert torch.allclose(search.relaxed.sum(-1), torch.ones(3, 2), atol=1e-5)
    assert (search.relaxed >= 0).all()


def test_no_picture_and_wrong_timesteps_are_refused(tiny_model: Any) -> None:
    with pytest.raises(UserError, match="picture"):
        play(tiny_model, "unlearndiffatk", [Target("a dog", 1)])
    with pytest.raises(UserError, match="t_high"):
        play(tiny_model, "unlearndiffatk", targets(), t_high=5000)


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"no-attack"}))
def test_a_search_killed_and_resumed_finds_the_same(tiny_model: Any, name: str, tmp_path: Any) -> None:
    longer = {"timesteps": 4} if name == "unlearndiffatk" else {"images": 5}
    original = Original(tiny_model, lambda n: PICTURES[:n])

    def started() -> Any:
        return attack(name, **longer).revive(
            tiny_model, CONCEPT, targets(), sampling=SAMPLING, original=original, workspace=Workspace(tmp_path)
        )

    whole = play(tiny_model, name, targets(), falls=lambda number, i: (number, i) == (1, 0), **longer)
    rounds = started()
    next(rounds)
    rounds.send([False] * 3)
    rounds.send([True, False, False])
    rounds.close()  # killed after two of four rounds
    resumed = started()
    again, standing = [next(resumed).candidates], [False] * 3
    for number in range(1, 5):
        again.append(resumed.send(standing).candidates)
        standing = [True, False, False] if number == 1 else [False] * 2
    for row, back in zip(whole, again, strict=True):
        assert all(alike(c, d) for (_, c), d in zip(row, back, strict=True))


def test_other_settings_do_not_resume(tiny_model: Any, tmp_path: Any) -> None:
    """A search with another learning rate starts anew, though the folder holds the rounds of the first."""
    original = Original(tiny_model, lambda n: PICTURES[:n])

    def second_round(lr: float) -> Any:
        rounds = attack("soft-prompt", lr=lr).revive(
            tiny_model, CONCEPT, targets(), sampling=SAMPLING, original=original, workspace=Workspace(tmp_path)
        )
        next(rounds)
        return rounds.send([False] * 3).candidates

    first, other = second_round(0.1), second_round(1.0)
    assert all(alike(a, b) for a, b in zip(first, second_round(0.1), strict=True))
    assert not any(alike(a, b) for a, b in zip(first, other, strict=True))
