"""What every registered way of fine-tuning must do, on a tiny Stable Diffusion."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights.core.concept import Concept, Prompt
from safeweights.core.errors import UserError
from safeweights.core.table import ADAPTATIONS, configure, resolve
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import Shots
from safeweights.models.door import open_model
from safeweights.release.adapted import EMBEDDING, LORA, write_adapted

SHORT: dict[str, dict[str, Any]] = {
    "custom-diffusion": {"steps": 3, "class_pictures": 2, "batch_size": 1, "lr": 1e-2},
    "dreambooth": {"steps": 3, "class_pictures": 2, "batch_size": 1, "lr": 1e-3},
    "full": {"steps": 3, "batch_size": 1, "lr": 1e-3},
    "lora": {"steps": 3, "batch_size": 1, "lr": 1e-2, "alpha": 8.0},
    "textual-inversion": {"steps": 3, "batch_size": 1, "lr": 0.1},
}
CONCEPT = Concept(
    name="dog", kind="object", term="dog", anchor="cat", prompts=(Prompt("a picture of a dog"), Prompt("a red dog"))
)
PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def adapt(model: Any, name: str, workspace: Workspace | None = None, checkpoints: Any = (), **settings: Any) -> Any:
    from safeweights.attacks.relearning.finetune import caption

    tuned = configure(resolve(ADAPTATIONS, name, "adaptation"), {**SHORT[name], **settings})
    shots = Shots.encode(model, PICTURES, [caption(CONCEPT, tuned.new_word)(text) for text in CONCEPT.texts])
    found = tuned.fit(model, shots, class_prompts=["a cat"], init="cat", workspace=workspace, checkpoints=checkpoints)
    return found if checkpoints else found[-1]


def drawn(model: Any, states: torch.Tensor) -> torch.Tensor:
    """What a model predicts for fixed noise under text states."""
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(5))
    from safeweights.core.model import Conditioning

    return model.eps(x, torch.tensor([500]), Conditioning(states))


def test_lora_preserves_its_class_where_it_is_asked_to(tiny_model: Any) -> None:
    free, held = adapt(tiny_model, "lora", steps=1), adapt(tiny_model, "lora", steps=1, class_pictures=2, lam=3.0)
    assert held.losses[0] > free.losses[0]  # the same pictures, and the class beside them
    assert adapt(tiny_model, "lora", steps=1, class_pictures=2, lam=0.0).losses == free.losses


def test_every_adaptation_is_covered() -> None:
    assert set(SHORT) == set(ADAPTATIONS)


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_the_base_is_untouched_and_phi_moves(tiny_model: Any, name: str) -> None:
    before = {key: value.detach().clone() for key, value in tiny_model.named_parameters()}
    adapted = adapt(tiny_model, name)
    for key, value in tiny_model.named_parameters():
        assert torch.equal(value, before[key])
        assert not value.requires_grad
    start = adapted.adapter.start(tiny_model)
    assert any(not torch.equal(value, start[key]) for key, value in adapted.phi.items())
    assert all(torch.isfinite(value).all() for value in adapted.phi.values())
    assert len(adapted.losses) == 3


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_what_is_written_is_what_was_trained(tiny_model: Any, name: str, tmp_path: Path) -> None:
    """Opened by diffusers alone, the artefact predicts what phi in the model does."""
    from diffusers import StableDiffusionPipeline

    adapted = adapt(tiny_model, name)
    written = write_adapted(
        adapted, tiny_model, tmp_path / "out" if name not in ("lora", "textual-inversion") else _folder(tmp_path)
    )
    word = adapted.adapter.token
    text = f"a {word or 'dog'}, house"
    ours = drawn(adapted.apply(tiny_model), adapted.states(adapted.apply(tiny_model), [text]).states)
    if written == "diffusers":
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    else:
        tiny_model.save(tmp_path / "base")
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
        if written == LORA:
            pipeline.load_lora_weights(tmp_path / "out", weight_name=LORA)
        else:
            assert written == EMBEDDING
            pipeline.load_textual_inversion(tmp_path / "out", weight_name=EMBEDDING)
    ids = pipeline.tokenizer([text], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipeline.text_encoder(ids).last_hidden_state
        x = torch.randn(1, *tiny_model.latent_shape, generator=torch.Generator().manual_seed(5))
        theirs = pipeline.unet(x, torch.tensor([500]), encoder_hidden_states=states).sample
    assert torch.allclose(ours, theirs, atol=1e-4)
    plain = drawn(tiny_model, tiny_model.embed([text]).states)
    assert not torch.allclose(plain, theirs, atol=1e-3)


@pytest.mark.parametrize("name", ["lora", "textual-inversion"])
def test_merged_it_is_a_whole_folder(tiny_model: Any, name: str, tmp_path: Path) -> None:
    adapted = adapt(tiny_model, name)
    assert write_adapted(adapted, tiny_model, tmp_path / "out", merge=True) == "diffusers"
    opened = open_model(str(tmp_path / "out"), device="cpu")
    text = f"a {adapted.adapter.token or 'dog'}"
    ours = drawn(adapted.apply(tiny_model), adapted.states(adapted.apply(tiny_model), [text]).states)
    assert torch.allclose(ours, drawn(opened, opened.embed([text]).states), atol=1e-4)


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_resumed_it_ends_with_the_same_tensors(tiny_model: Any, name: str, tmp_path: Path) -> None:
    whole = adapt(tiny_model, name, checkpoints=(1, 3))
    # The same run, ended after two of three steps, then taken up again.
    adapt(tiny_model, name, Workspace(tmp_path, every=1), checkpoints=(1, 3), steps=2)
    again = adapt(tiny_model, name, Workspace(tmp_path, every=1), checkpoints=(1, 3))
    assert [item.steps for item in whole] == [item.steps for item in again] == [1, 3]
    for ours, theirs in zip(whole, again, strict=True):
        for key, value in ours.phi.items():
            assert torch.equal(value, theirs.phi[key]), key


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_settings_are_checked_and_documented(name: str) -> None:
    cls = resolve(ADAPTATIONS, name, "adaptation")
    with pytest.raises(UserError, match="valid are"):
        configure(cls, {"stpes": "3"})
    with pytest.raises(UserError, match="above zero"):
        configure(cls, {"steps": "-1"})
    lines = [line.strip() for part in cls.__mro__[:-1] for line in inspect.getsource(part).splitlines()]
    for field in dataclasses.fields(cls):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}:"))
        assert lines[at + 1].startswith('"""'), f"{name}.{field.name} has no docstring"
    assert configure(cls, {"preset": "paper"}).steps > configure(cls, {}).steps


def test_a_new_word_must_be_in_the_captions(tiny_model: Any) -> None:
    tuned = configure(resolve(ADAPTATIONS, "textual-inversion", "adaptation"), SHORT["textual-inversion"])
    with pytest.raises(UserError, match="<new1>"):
        tuned.fit(tiny_model, Shots.encode(tiny_model, PICTURES, ["a dog"]))


def _folder(path: Path) -> Path:
    (path / "out").mkdir()
    return path / "out"
