"""What every registered guard must do, on a tiny Stable Diffusion."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights.core.concept import Concept, Prompt
from safeweights.core.errors import UserError
from safeweights.core.table import ADAPTATIONS, GUARDS, configure, method, resolve
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import Shots
from safeweights.freezing.guard import shares, unet_shapes

FAST: dict[str, Any] = {"pictures": 2, "tune_steps": 2, "batch_size": 1, "ddim_steps": 2, "tune_lr": 1e-3}
SHORT: dict[str, dict[str, Any]] = {
    "freezeasguard": {**FAST, "rounds": 3, "user_steps": 1},
    "gradient": {"pictures": 2, "batch_size": 1, "ddim_steps": 2, "batches": 2},
    "one-shot": {**FAST, "batches": 2},
    "random": {},
    "task-vector": FAST,
    "xattn": {},
}


def concept(name: str) -> Concept:
    return Concept(name=name, kind="object", term=name, anchor="house", prompts=(Prompt(f"a red {name}"), Prompt(f"a {name}")))


ILLEGAL, LEGAL = [concept("dog"), concept("truck")], [concept("boat")]


@pytest.mark.parametrize(("name", "setting"), [("task-vector", "lam"), ("task-vector", "weights"), ("gradient", "tune_steps")])
def test_what_plays_no_part_is_refused(name: str, setting: str) -> None:
    with pytest.raises(UserError, match=f"{setting} plays no part"):
        configure(resolve(GUARDS, name, "guard"), {setting: {"lam": 3, "weights": [1, 2], "tune_steps": 3}[setting]})


def guard(name: str, **settings: Any) -> Any:
    return configure(resolve(GUARDS, name, "guard"), {**SHORT[name], **settings})


def protect(model: Any, name: str, seed: int = 0, workspace: Workspace | None = None, **settings: Any) -> Any:
    rng = torch.Generator().manual_seed(seed)
    return guard(name, **settings).protect(model, ILLEGAL, legal=LEGAL, rng=rng, workspace=workspace)


def test_every_guard_is_covered() -> None:
    assert set(SHORT) == set(GUARDS)
    assert type(method("freezeasguard")).__name__ == "FreezeAsGuard"


@pytest.mark.parametrize("name", GUARDS)
def test_the_base_is_untouched_and_the_budget_is_kept(tiny_model: Any, name: str) -> None:
    before = {key: value.detach().clone() for key, value in tiny_model.named_parameters()}
    shapes = unet_shapes(tiny_model)
    protection = protect(tiny_model, name, ratio=0.2)
    assert protection.frozen <= set(shapes)
    inside = sum("attn2" in key for key in shapes)
    wanted = round(0.2 * len(shapes)) if name != "xattn" else min(round(0.2 * len(shapes)), inside)
    assert len(protection.frozen) == wanted
    assert not protection.tensors
    assert protection.concepts == ("dog", "truck")
    for key, value in tiny_model.named_parameters():
        assert torch.equal(value, before[key])
        assert not value.requires_grad
        assert value.grad is None
    if name != "xattn":
        by_size = protect(tiny_model, name, ratio=0.2, budget="parameters").frozen
        assert shares(by_size, shapes)["parameters"] == pytest.approx(0.2, abs=32 / sum(map(math.prod, shapes.values())))


@pytest.mark.parametrize("name", GUARDS)
def test_the_same_seed_gives_the_same_mask(tiny_model: Any, name: str) -> None:
    assert protect(tiny_model, name).frozen == protect(tiny_model, name).frozen
    if name == "random":
        assert protect(tiny_model, name).frozen != protect(tiny_model, name, seed=1).frozen


@pytest.mark.parametrize("name", ["freezeasguard", "task-vector", "one-shot"])
def test_resumed_it_ends_with_the_same_mask(tiny_model: Any, name: str, tmp_path: Path) -> None:
    from safeweights.diffusion import training

    whole = protect(tiny_model, name).frozen
    space = Workspace(tmp_path, every=1)
    plain, seen = training.OPTIMIZERS["adamw"], []

    class Dying(plain):  # type: ignore[misc, valid-type]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            if len(seen) == 2:
                raise KeyboardInterrupt
            return super().step(*args, **kwargs)

    training.OPTIMIZERS["adamw"] = Dying
    try:
        with pytest.raises(KeyboardInterrupt):
            protect(tiny_model, name, workspace=space)
    finally:
        training.OPTIMIZERS["adamw"] = plain
    assert (tmp_path / "descent.safetensors").is_file()
    assert protect(tiny_model, name, workspace=space).frozen == whole


@pytest.mark.parametrize("name", ["freezeasguard", "one-shot"])
def test_both_sides_and_their_weights_count(tiny_model: Any, name: str) -> None:
    common = {"tune_lr": 5e-2}
    found = protect(tiny_model, name, **common).frozen
    rng = torch.Generator().manual_seed(0)
    swapped = guard(name, **common).protect(tiny_model, LEGAL, legal=ILLEGAL, rng=rng).frozen
    graded = protect(tiny_model, name, weights=(0.01, 1.0), **common).frozen
    assert found != swapped
    assert found != graded


def test_what_cannot_be_is_refused(tiny_model: Any) -> None:
    rng = torch.Generator()
    with pytest.raises(UserError, match="one of them only"):
        guard("random").protect(tiny_model, ILLEGAL, legal=ILLEGAL[:1], rng=rng)
    with pytest.raises(UserError, match="at least one illegal"):
        guard("random").protect(tiny_model, [], rng=rng)
    with pytest.raises(UserError, match="1 weights for 2"):
        protect(tiny_model, "freezeasguard", weights=(1.0,))
    for ratio in ("0", "1", "-0.1", "1.5"):
        with pytest.raises(UserError, match="ratio"):
            guard("random", ratio=ratio)
    with pytest.raises(UserError, match="tensors"):
        guard("random", budget="blocks")


@pytest.mark.parametrize("name", GUARDS)
def test_settings_are_checked_and_documented(name: str) -> None:
    cls = resolve(GUARDS, name, "guard")
    with pytest.raises(UserError, match="valid are"):
        configure(cls, {"ratoi": "0.3"})
    lines = [line for part in cls.__mro__[:-1] for line in inspect.getsource(part).splitlines()]
    for field in dataclasses.fields(cls):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        assert lines[at + 1].strip().startswith('"""'), f"{name}.{field.name} has no docstring"


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_frozen_tensors_are_bit_identical_after_every_way_of_fine_tuning(tiny_model: Any, name: str) -> None:
    from contracts.test_adaptations import CONCEPT, PICTURES
    from contracts.test_adaptations import SHORT as STEPS
    from safeweights.attacks.relearning.finetune import caption

    tuned = configure(resolve(ADAPTATIONS, name, "adaptation"), STEPS[name])
    frozen = protect(tiny_model, "random", ratio=0.4).frozen
    shots = Shots.encode(tiny_model, PICTURES, [caption(CONCEPT, tuned.new_word)(text) for text in CONCEPT.texts])

    def fit(names: frozenset[str]) -> Any:
        return tuned.fit(tiny_model, shots, class_prompts=["a cat"], init="cat", frozen=names)[-1]

    if name in ("lora", "custom-diffusion"):
        with pytest.raises(UserError, match="which the mask freezes"):
            fit(frozen)
        frozen = frozenset(key for key in frozen if "attn" not in key)
    base, after = dict(tiny_model.named_parameters()), dict(fit(frozen).apply(tiny_model).named_parameters())
    assert all(torch.equal(after[key], base[key]) for key in frozen)
    if name != "textual-inversion":
        assert any(not torch.equal(after[key], base[key]) for key in base)
