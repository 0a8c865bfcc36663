"""What every registered immunizer must do, on a tiny Stable Diffusion."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from safeweights.core.concept import Concept, Prompt
from safeweights.core.errors import UserError
from safeweights.core.table import IMMUNIZERS, configure, resolve
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parameters import select
from safeweights.models.door import open_model

SHORT: dict[str, Any] = {
    "steps": 3, "horizon": 2, "batch_size": 2, "pictures": 4, "retained": 4, "ddim_steps": 3, "lr": 1e-3, "keep": 1.0,
    "parameters": "attention",
}  # fmt: skip
"""Settings that make one run take well under five seconds."""
CONCEPTS = (
    Concept(
        name="mosaic",
        kind="style",
        term="mosaic",
        anchor="a picture of a house",
        prompts=(Prompt("a mosaic picture"), Prompt("mosaic house")),
    ),
    Concept(name="dog", kind="object", term="dog", anchor="cat", prompts=(Prompt("a picture of a dog"),)),
)
RETAIN = ("a picture of a boat", "a red house")
KINDS = ("lora", "full", "textual-inversion", "custom-diffusion")


def protect(model: Any, name: str, seed: int = 0, workspace: Workspace | None = None, **settings: Any) -> Any:
    method = configure(resolve(IMMUNIZERS, name, "method"), {**SHORT, **settings})
    concepts = CONCEPTS[:1] if name == "imma" else CONCEPTS
    return method.protect(model, concepts, retain=RETAIN, rng=generator(seed), workspace=workspace)


@pytest.mark.parametrize("name", IMMUNIZERS)
def test_base_is_untouched_and_every_changed_tensor_is_there(tiny_model: Any, name: str) -> None:
    before = {key: value.detach().clone() for key, value in tiny_model.named_parameters()}
    protection = protect(tiny_model, name)
    for key, value in tiny_model.named_parameters():
        assert torch.equal(value, before[key]), key
    assert set(protection.tensors) == set(select(before.items(), protection.settings["parameters"]))
    changed = dict(protection.apply(tiny_model).named_parameters())
    for key, value in changed.items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, before[key]) == (
            key not in protection.tensors or torch.equal(protection.tensors[key], before[key])
        )
    assert sum(not torch.equal(changed[key], before[key]) for key in before) > 0.8 * len(protection.tensors)


@pytest.mark.parametrize("name", IMMUNIZERS)
def test_same_seed_same_tensors(tiny_model: Any, name: str) -> None:
    first, second = protect(tiny_model, name, seed=3), protect(tiny_model, name, seed=3)
    for key in first.tensors:
        assert torch.equal(first.tensors[key], second.tensors[key])


@pytest.mark.parametrize("name", IMMUNIZERS)
def test_saved_and_opened_again_it_is_the_same_model(tiny_model: Any, name: str, tmp_path: Path) -> None:
    protected = protect(tiny_model, name).apply(tiny_model)
    protected.save(tmp_path / "model")
    opened = dict(open_model(str(tmp_path / "model"), device="cpu").named_parameters())
    for key, value in protected.named_parameters():
        assert torch.equal(opened[key].float(), value.float()), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["jt", "mima"])
def test_every_adaptation_can_be_unrolled(tiny_model: Any, name: str, order: int, kind: str) -> None:
    protection = protect(tiny_model, name, order=order, adaptations=(kind,), benign=0.5)
    assert protection.settings["order"] == order
    assert all(torch.isfinite(value).all() for value in protection.tensors.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"upper": "ascent"},
        {"upper": "still"},
        {"self_destruct": 0.5},
        {"horizon": 0},
        {"inner": "sgd", "inner_steps": 2},
        {"adaptations": KINDS, "inner_lrs": (1e-3, 1e-4, 1e-2, 1e-3), "lr_scales": (0.1, 1.0, 10.0),
         "captions": ("own", "without"), "horizon": 1, "steps": 5},
        {"keep": 0.0, "parameters": "xattn"},
        {"parameters": "full"},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_every_option_changes_the_outcome(tiny_model: Any, settings: dict[str, Any]) -> None:
    plain, other = protect(tiny_model, "mima"), protect(tiny_model, "mima", **settings)
    shared = set(plain.tensors) & set(other.tensors)
    assert any(not torch.equal(plain.tensors[key], other.tensors[key]) for key in shared)


@pytest.mark.parametrize("name", IMMUNIZERS)
def test_wrong_settings_are_refused(name: str) -> None:
    cls = resolve(IMMUNIZERS, name, "method")
    for wrong in ({"stpes": "3"}, {"steps": "many"}, {"steps": "-1"}, {"order": "3"}, {"adaptations": "qlora"}, {"pictures": 1},
                  {"inner_lrs": "1e-3,1e-4"}, {"keep": "-1"}):  # fmt: skip
        with pytest.raises(UserError):
            configure(cls, wrong)
    for preset in cls.PRESETS:
        assert configure(cls, {"preset": preset})


@pytest.mark.parametrize("name", IMMUNIZERS)
def test_settings_are_documented(name: str) -> None:
    cls = resolve(IMMUNIZERS, name, "method")
    lines = [line.strip() for part in cls.__mro__[:-1] for line in inspect.getsource(part).splitlines()]
    for field in dataclasses.fields(cls):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}:"))
        assert lines[at + 1].startswith('"""'), f"{name}.{field.name} has no docstring"


@pytest.mark.parametrize("name", IMMUNIZERS)
def test_killed_and_resumed_it_ends_with_the_same_tensors(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also in the middle of an episode: how far the simulated users were is kept too."""
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
    settings = {"steps": 5, "horizon": 3, "benign": 0.3, "adaptations": ("lora", "custom-diffusion")}
    whole = protect(tiny_model, name, **settings)
    undisturbed, count, killed_at = count, 0, 4
    with pytest.raises(MemoryError):
        protect(tiny_model, name, workspace=workspace, **settings)
    resumed = protect(tiny_model, name, workspace=workspace, **settings)
    assert count == 4 + undisturbed - 2  # from the checkpoint after two steps
    for key in whole.tensors:
        assert torch.equal(whole.tensors[key], resumed.tensors[key])


def test_imma_takes_one_concept(tiny_model: Any) -> None:
    method = configure(resolve(IMMUNIZERS, "imma", "method"), SHORT)
    with pytest.raises(UserError, match="mima"):
        method.protect(tiny_model, CONCEPTS, rng=generator(0))


def test_the_text_encoder_is_refused(tiny_model: Any) -> None:
    with pytest.raises(UserError, match="group of the UNet"):
        protect(tiny_model, "mima", parameters="text_encoder")


def test_pictures_of_a_folder_are_used_with_their_captions(tiny_model: Any, tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (20 + i, 17), (40 * i, 90, 10)).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text(
        "file_name,prompt\n0.png,a red dog\n1.png,a red dog\n2.png,a red dog\n3.png,a red dog\n", encoding="utf-8"
    )
    dog = dataclasses.replace(CONCEPTS[1], images=tmp_path)
    method = configure(resolve(IMMUNIZERS, "imma", "method"), SHORT)
    drawn = method.protect(tiny_model, [CONCEPTS[1]], retain=RETAIN, rng=generator(0))
    given = method.protect(tiny_model, [dog], retain=RETAIN, rng=generator(0))
    assert any(not torch.equal(drawn.tensors[key], given.tensors[key]) for key in drawn.tensors)
    (tmp_path / "metadata.csv").write_text("name,prompt\n0.png,x\n", encoding="utf-8")
    with pytest.raises(UserError, match="file_name"):
        method.protect(tiny_model, [dog], retain=RETAIN, rng=generator(0))
