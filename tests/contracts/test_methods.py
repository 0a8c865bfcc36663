"""What every registered eraser must do, on a tiny Stable Diffusion."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights.core.concept import Concept, Prompt
from safeweights.core.errors import UserError
from safeweights.core.table import ERASERS, configure, resolve
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parameters import select
from safeweights.models.door import open_model

SHORT: dict[str, dict[str, Any]] = {
    "ac": {"steps": 3, "ddim_steps": 3, "pictures": 3, "noises": 4, "batch_size": 2, "lr": 1e-3},
    "advunlearn": {
        "steps": 4,
        "warm_up": 1,
        "attack_steps": 2,
        "ddim_steps": 3,
        "trajectories": 4,
        "retain_trajectories": 2,
        "batch_size": 2,
        "retain_batch": 2,
        "lr": 1e-3,
    },
    "erasediff": {"steps": 3, "ddim_steps": 3, "pictures": 3, "retained": 2, "noises": 4, "batch_size": 2, "inner": 1},
    "esd": {"steps": 3, "ddim_steps": 3, "trajectories": 3, "batch_size": 2, "lr": 1e-3},
    "fmn": {"steps": 3, "ddim_steps": 3, "pictures": 3, "retained": 2, "noises": 4, "batch_size": 2},
    "salun": {"steps": 3, "ddim_steps": 3, "pictures": 3, "retained": 2, "noises": 4, "batch_size": 2, "mask_batches": 2},
    "scissorhands": {"steps": 3, "ddim_steps": 3, "pictures": 3, "retained": 2, "noises": 4, "batch_size": 2, "snip_batches": 2},
    "mace": {"steps": 2, "ddim_steps": 3, "trajectories": 3, "batch_size": 2},
    "p-ac": {"steps": 3, "ramp": 2, "ddim_steps": 3, "pictures": 3, "retained": 2, "noises": 4, "batch_size": 2},
    "p-esd": {"steps": 3, "ramp": 2, "ddim_steps": 3, "trajectories": 3, "retained": 2, "noises": 4, "batch_size": 2},
    "rece": {},
    "spm": {"steps": 3, "ddim_steps": 3, "trajectories": 3, "batch_size": 2, "anchors": 2},
    "uce": {},
}
"""Settings that make one run take well under five seconds."""

CONCEPTS = (
    Concept(
        name="mosaic",
        kind="style",
        term="mosaic",
        anchor="a picture",
        prompts=(Prompt("a mosaic picture"), Prompt("mosaic house")),
    ),
    Concept(name="dog", kind="object", term="dog", anchor="cat", prompts=(Prompt("a picture of a dog"),)),
)


def protect(model: Any, name: str, seed: int = 0, workspace: Workspace | None = None, **settings: Any) -> Any:
    method = configure(resolve(ERASERS, name, "method"), {**SHORT[name], **settings})
    return method.protect(model, CONCEPTS, retain=["a picture of a boat"], rng=generator(seed), workspace=workspace)


def test_every_eraser_is_covered() -> None:
    assert set(SHORT) == set(ERASERS)


@pytest.mark.parametrize("name", ERASERS)
def test_base_is_untouched_and_only_selected_tensors_change(tiny_model: Any, name: str) -> None:
    before = {key: value.detach().clone() for key, value in tiny_model.named_parameters()}
    protection = protect(tiny_model, name)
    for key, value in tiny_model.named_parameters():
        assert torch.equal(value, before[key]), key
    assert protection.tensors
    # Only what the method says it edits: its group of parameters, cross-attention where it has no choice.
    assert set(protection.tensors) <= set(select(before.items(), protection.settings.get("parameters", "xattn")))
    changed = dict(protection.apply(tiny_model).named_parameters())
    assert any(not torch.equal(changed[key], before[key]) for key in protection.tensors)
    for key, value in changed.items():
        assert torch.isfinite(value).all()
        if key not in protection.tensors:
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ERASERS)
def test_same_seed_same_tensors(tiny_model: Any, name: str) -> None:
    first, second = protect(tiny_model, name, seed=3), protect(tiny_model, name, seed=3)
    for key in first.tensors:
        assert torch.equal(first.tensors[key], second.tensors[key])


@pytest.mark.parametrize("name", ERASERS)
def test_saved_and_opened_again_it_is_the_same_model(tiny_model: Any, name: str, tmp_path: Path) -> None:
    protected = protect(tiny_model, name).apply(tiny_model)
    protected.save(tmp_path / "model")
    opened = dict(open_model(str(tmp_path / "model"), device="cpu").named_parameters())
    for key, value in protected.named_parameters():
        assert torch.equal(opened[key].float(), value.float()), key


@pytest.mark.parametrize("name", ERASERS)
def test_unknown_setting_and_wrong_type_are_refused(name: str) -> None:
    cls = resolve(ERASERS, name, "method")
    with pytest.raises(UserError, match="valid are"):
        configure(cls, {"stpes": "3"})
    number = next(f.name for f in dataclasses.fields(cls) if f.type in ("float", "int"))
    with pytest.raises(UserError, match="must be"):
        configure(cls, {number: "many"})
    with pytest.raises(UserError):
        configure(cls, {number: "-1"})


@pytest.mark.parametrize("name", ERASERS)
def test_settings_are_documented(name: str) -> None:
    import inspect

    cls = resolve(ERASERS, name, "method")
    lines = inspect.getsource(cls).splitlines()
    for field in dataclasses.fields(cls):
        at = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{field.name}:"))
        assert lines[at + 1].strip().startswith('"""'), f"{name}.{field.name} has no docstring"


@pytest.mark.parametrize("parameters", ["xattn", "noxattn", "selfattn", "full", "text_encoder", "text_encoder:1"])
def test_esd_trains_the_named_group_only(tiny_model: Any, parameters: str) -> None:
    from safeweights.diffusion.parameters import select

    protection = protect(tiny_model, "esd", parameters=parameters)
    names = select(tiny_model.named_parameters(), parameters)
    assert set(protection.tensors) == set(names)
    before = dict(tiny_model.named_parameters())
    assert any(not torch.equal(protection.tensors[name], before[name]) for name in names)


@pytest.mark.parametrize("name", [name for name in SHORT if "steps" in SHORT[name]])
def test_killed_and_resumed_it_ends_with_the_same_tensors(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    workspace = Workspace(tmp_path, every=2)
    real = torch.Tensor.backward
    count, killed_at = 0, 0

    def backward(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == killed_at:
            raise MemoryError  # as sudden as a kill: nothing gets a chance to save
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    whole = protect(tiny_model, name, steps=6)
    undisturbed, count, killed_at = count, 0, 4
    assert undisturbed in (6, 6 * len(CONCEPTS))  # one descent for all concepts, or one for each
    with pytest.raises(MemoryError):
        protect(tiny_model, name, workspace=workspace, steps=6)
    resumed = protect(tiny_model, name, workspace=workspace, steps=6)
    assert count == 4 + undisturbed - 2  # from the checkpoint after two steps
    for key in whole.tensors:
        assert torch.equal(whole.tensors[key], resumed.tensors[key])


def test_uce_sends_the_concept_to_its_anchor_and_keeps_what_is_retained(tiny_model: Any) -> None:
    """With a light ridge and heavy retention the edited keys become the anchor's and the retained ones stay."""
    concept = CONCEPTS[1]
    method = configure(resolve(ERASERS, "uce", "method"), {"lam": 1e-6, "beta": 1e-3, "tokens": "last", "prompts": "term"})
    retain = ["a picture of a boat"]
    protection = method.protect(tiny_model, [concept], retain=retain, rng=generator(0))
    name = next(key for key in protection.tensors if key.endswith("to_v.weight"))
    old, new = dict(tiny_model.named_parameters())[name], protection.tensors[name]
    dog, cat = (tiny_model.embed([text]).states[0, 1] for text in ("dog", "cat"))
    end = int((tiny_model.tokenize(retain)[0] == tiny_model.tokenizer.eos_token_id).int().argmax()) - 1
    boat = tiny_model.embed(retain).states[0, end]
    assert (new @ dog - old @ cat).norm() < 0.05 * (old @ dog - old @ cat).norm()
    assert (new @ boat - old @ boat).norm() < 0.05 * (old @ boat).norm()


@pytest.mark.parametrize("name", ["p-esd", "p-ac", "esd"])
def test_a_mask_learned_under_attack_has_the_same_budget_and_other_places(tiny_model: Any, name: str) -> None:
    settings: dict[str, Any] = {"budget": 0.01, "steps": 5, "ramp": 1}
    attack = {"attack_steps": 3, "attack_lr": 0.1}
    if name == "esd":  # pruning on top of another eraser
        settings, attack = {"prune": 0.01, "prune_steps": 5, "prune_ramp": 1, "prune_ddim_steps": 3}, {"prune_attack_steps": 3}
    plain, attacked = protect(tiny_model, name, **settings).mask, protect(tiny_model, name, **settings, **attack).mask
    assert plain.count == attacked.count
    places = [{(key, int(i)) for key, where in mask.indices.items() for i in where} for mask in (plain, attacked)]
    assert places[0] != places[1]
