"""A text encoder leaves one model and is dropped into another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights.cli.main import run
from safeweights.core.errors import UserError
from safeweights.models.door import open_model
from safeweights.release.export import export
from safeweights.release.manifest import read_manifest, write_manifest


def protected(folder: Path, source: Path, part: str) -> dict[str, torch.Tensor]:
    """A model with one changed tensor, as ``erase`` leaves it."""
    model = open_model(str(source), device="cpu")
    name = next(name for name, p in model.named_parameters() if name.startswith(part) and p.ndim == 2 and "embedding" not in name)
    tensors = {name: dict(model.named_parameters())[name] * 1.5}
    model.with_tensors(tensors).save(folder)
    write_manifest(
        folder, command=["erase"], method="advunlearn", concepts=["mosaic"], options={"settings": {"steps": 3}}, seed=1,
        inputs={}, tensors=tensors, cost={"eps_calls": 5}, seconds=7.0,
    )  # fmt: skip
    return tensors


def test_a_text_encoder_opens_with_transformers_and_fits_another_unet(tiny_sd: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    source, other = tiny_sd(), tiny_sd(seed=1)
    tensors = protected(tmp_path / "protected", source, "text_encoder.")
    assert run(["export", str(tmp_path / "protected"), "--format", "text-encoder", "-o", str(tmp_path / "encoder")]) == 0
    plain = CLIPTextModel.from_pretrained(tmp_path / "encoder")
    (name,) = tensors
    assert torch.equal(dict(plain.named_parameters())[name.removeprefix("text_encoder.")], tensors[name])
    assert list(read_manifest(str(tmp_path / "encoder"))["changed"]) == [name]

    target = tmp_path / "dropped"
    arguments = ["--format", "diffusers", "--text-encoder", str(tmp_path / "encoder"), "-o", str(target)]
    assert run(["export", str(other), *arguments]) == 0
    dropped, erased = open_model(str(target), device="cpu"), open_model(str(tmp_path / "protected"), device="cpu")
    base = dict(open_model(str(other), device="cpu").named_parameters())
    assert torch.equal(dropped.embed(["a dog"]).states, erased.embed(["a dog"]).states)
    for key, value in dropped.named_parameters():
        if key.startswith("unet."):
            assert torch.equal(value, base[key])
    manifest = json.loads((target / "manifest.json").read_text())
    assert (manifest["method"], manifest["concepts"], manifest["cost"]) == ("advunlearn", ["mosaic"], {"eps_calls": 5})
    assert manifest["inputs"]["text_encoder"]
    assert manifest["options"]["model"] == str(other)


def test_a_diffusers_folder_lends_its_text_encoder(tiny_sd: Callable[..., Path]) -> None:
    dropped = open_model(str(tiny_sd(seed=1)), device="cpu", text_encoder=tiny_sd())
    own = open_model(str(tiny_sd()), device="cpu")
    assert torch.equal(dropped.embed(["a dog"]).states, own.embed(["a dog"]).states)


def test_what_does_not_fit_is_refused(tiny_sd: Callable[..., Path], tmp_path: Path) -> None:
    model = str(tiny_sd())
    with pytest.raises(UserError, match="no text encoder's folder"):
        open_model(model, device="cpu", text_encoder=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="CLIPTextModel"):
        open_model(model, device="cpu", text_encoder=tmp_path)
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig.from_pretrained(tiny_sd() / "text_encoder")
    config.hidden_size = 64
    CLIPTextModel(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="hidden_size is 64"):
        open_model(model, device="cpu", text_encoder=tmp_path / "wide")


def test_an_untouched_text_encoder_is_not_sold_as_erased(tiny_sd: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    protected(tmp_path / "protected", tiny_sd(), "unet.")
    assert run(["export", str(tmp_path / "protected"), "--format", "text-encoder", "-o", str(tmp_path / "encoder")]) == 2
    assert "changed nothing in this model's text encoder" in capsys.readouterr().err
    assert not (tmp_path / "encoder").exists()
    # Nor is another model into which it was put.
    plug = ["export", str(tiny_sd()), "--text-encoder", str(tmp_path / "protected"), "--format", "diffusers"]
    assert run([*plug, "-o", str(tmp_path / "dropped")]) == 2
    assert "nothing of it would come along" in capsys.readouterr().err
    assert run(["export", str(tiny_sd()), "--format", "ckpt", "-o", str(tmp_path / "encoder")]) == 2
    with pytest.raises(UserError, match="unknown format"):
        export(open_model(str(tiny_sd()), device="cpu"), tmp_path, "ckpt", command=[], options={}, inputs={}, protected={})


def test_what_two_protections_left_is_told_of_both(tiny_sd: Callable[..., Path], tmp_path: Path) -> None:
    """A model with an erased UNet takes an erased text encoder: what either changed is there, and nothing else is claimed."""
    unet = protected(tmp_path / "unet", tiny_sd(), "unet.")
    encoder = protected(tmp_path / "encoder", tiny_sd(), "text_encoder.")
    manifest = json.loads((tmp_path / "encoder" / "manifest.json").read_text())
    manifest |= {"method": "uce", "concepts": ["emblem"]}
    (tmp_path / "encoder" / "manifest.json").write_text(json.dumps(manifest))
    plug = ["export", str(tmp_path / "unet"), "--text-encoder", str(tmp_path / "encoder"), "--format", "diffusers"]
    assert run([*plug, "-o", str(tmp_path / "both")]) == 0
    told = read_manifest(tmp_path / "both")
    assert told["concepts"] == ["mosaic", "emblem"]
    assert told["method"] == "advunlearn+uce"
    assert set(told["changed"]) == {*unet, *encoder}
    assert [step["method"] for step in told["protection"]["chain"]] == ["advunlearn", "uce"]
    assert run(["verify", str(tmp_path / "both")]) == 0
    # An encoder that replaces the protected one takes its protection's place.
    plug[1] = str(tmp_path / "encoder")
    assert run([*plug, "-o", str(tmp_path / "again")]) == 0
    assert read_manifest(tmp_path / "again")["concepts"] == ["emblem"]
