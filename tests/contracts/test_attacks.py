"""What every registered attack must do, on a tiny Stable Diffusion."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safeweights.core.attack import Target
from safeweights.core.concept import Concept, Prompt
from safeweights.core.errors import UserError
from safeweights.core.model import Sampling
from safeweights.core.table import ATTACKS, configure, resolve
from safeweights.core.workspace import Workspace

SHORT: dict[str, dict[str, Any]] = {
    "no-attack": {},
    "random": {"images": 3, "tokens": 2},
    "seed-search": {"images": 3},
    "unlearndiffatk": {"timesteps": 2, "steps": 3, "tokens": 2},
}
CONCEPT = Concept(name="dog", kind="object", term="dog", prompts=(Prompt("a picture of a dog"),))
SAMPLING = Sampling(width=16, height=16, steps=2, guidance_scale=2.0)
TEXTS = ("a picture of a dog", "a red dog", "a dog and a cat")


def attack(name: str, **settings: Any) -> Any:
    return configure(resolve(ATTACKS, name, "attack"), {**SHORT[name], **settings})


def targets(n: int = 3) -> list[Target]:
    rng = torch.Generator().manual_seed(0)
    return [Target(TEXTS[i], 100 + i, torch.rand(3, 16, 16, generator=rng)) for i in range(n)]


def play(model: Any, name: str, on: list[Target], falls: Any = lambda number, i: False, **settings: Any) -> list[list[Any]]:
    """All rounds of an attack; ``falls(round, index of the target)`` says what the judge sees."""
    rounds = attack(name, **settings).revive(model, CONCEPT, on, sampling=SAMPLING)
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
        assert [c for _, c in (row[0] for row in alone)] == [row[i][1] for row in together]


@pytest.mark.parametrize("name", ATTACKS)
def test_same_seed_same_candidates(tiny_model: Any, name: str) -> None:
    assert play(tiny_model, name, targets()) == play(tiny_model, name, targets())


def test_search_moves_towards_the_picture(tiny_model: Any) -> None:
    """The relaxed loss falls below that of random tokens: the gradient has the right sign."""
    from safeweights.attacks.adversarial.unlearndiffatk import _Search

    def loss_after(steps: int) -> float:
        search = _Search(attack("unlearndiffatk", lr=0.1, weight_decay=0.0), tiny_model, targets())
        for _ in range(steps):
            search.step(300)
        # The same noise for both: a fresh generator for the judged loss.
        losses = []
        for seed in range(8):
            search.rngs = [torch.Generator().manual_seed(seed) for _ in search.targets]
            losses.append(search._gradient(slice(0, 3), 300)[0])
        return float(torch.stack(losses).mean())

    assert loss_after(40) < loss_after(0)


def test_relaxed_tokens_stay_on_the_simplex(tiny_model: Any) -> None:
    from safeweights.attacks.adversarial.unlearndiffatk import _Search

    search = _Search(attack("unlearndiffatk"), tiny_model, targets())
    for t in (10, 500):
        search.step(t)
    assert torch.allclose(search.relaxed.sum(-1), torch.ones(3, 2), atol=1e-5)
    assert (search.relaxed >= 0).all()


def test_no_picture_and_wrong_timesteps_are_refused(tiny_model: Any) -> None:
    with pytest.raises(UserError, match="picture"):
        play(tiny_model, "unlearndiffatk", [Target("a dog", 1)])
    with pytest.raises(UserError, match="t_high"):
        play(tiny_model, "unlearndiffatk", targets(), t_high=5000)


def test_a_search_killed_and_resumed_finds_the_same(tiny_model: Any, tmp_path: Any) -> None:
    whole = play(tiny_model, "unlearndiffatk", targets(), falls=lambda number, i: (number, i) == (1, 0), timesteps=4)
    rounds = attack("unlearndiffatk", timesteps=4).revive(
        tiny_model, CONCEPT, targets(), sampling=SAMPLING, workspace=Workspace(tmp_path)
    )
    next(rounds)
    rounds.send([False] * 3)
    rounds.send([True, False, False])
    rounds.close()  # killed after two of four timesteps
    resumed = attack("unlearndiffatk", timesteps=4).revive(
        tiny_model, CONCEPT, targets(), sampling=SAMPLING, workspace=Workspace(tmp_path)
    )
    again, standing = [next(resumed).candidates], [False] * 3
    for number in range(1, 5):
        again.append(resumed.send(standing).candidates)
        standing = [True, False, False] if number == 1 else [False] * 2
    assert [tuple(c for _, c in row) for row in whole] == again
