"""What the door opens, and what it refuses with one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeweights.core.errors import UserError
from safeweights.models.door import open_model, pick_device, pick_dtype
from safeweights.models.single_file import original_layout, predicts_v, write_config


@pytest.fixture
def folder(tiny_sd: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd(), tmp_path / "model"))


def refused(path: str | Path, words: str, **options: Any) -> None:
    with pytest.raises(UserError, match=words) as caught:
        open_model(path, device="cpu", **options)
    assert "\n" not in str(caught.value)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()} | dict(model.vae.named_parameters())


def test_opens_a_folder_by_string_and_path(folder: Path) -> None:
    one, other = open_model(folder, device="cpu"), open_model(str(folder), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(weights_of(one).values(), weights_of(other).values(), strict=True))
    assert one.latent_shape == (4, 8, 8)
    assert one.latent_stride == 2
    assert not any(p.requires_grad for _, p in one.named_parameters())


def test_the_sandbox_is_opened_like_any_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEWEIGHTS_SANDBOX", str(folder.parent))
    model: Any = open_model("sandbox", device="cpu")
    assert model.name == "sandbox"
    monkeypatch.setenv("SAFEWEIGHTS_SANDBOX", str(folder.parent / "nowhere"))
    refused("sandbox", "sandbox model is not at")


def test_schedule_comes_from_the_folder(tiny_sd: Callable[..., Path]) -> None:
    model: Any = open_model(tiny_sd(version="2.1", prediction="v_prediction"), device="cpu")
    assert model.prediction == "v_prediction"
    assert model.grid.offset == 1
    assert model.grid.final_alpha == pytest.approx(float(model.alpha[0]))
    assert torch.allclose(model.alpha**2 + model.sigma**2, torch.ones(1000))
    assert float(model.alpha[999] ** 2) == pytest.approx(0.0047, abs=1e-4)
    overridden: Any = open_model(tiny_sd(), device="cpu", prediction="v_prediction")
    assert overridden.prediction == "v_prediction"


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path / name, "is a pickle")


def test_a_folder_of_pickles_is_refused(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
    refused(folder, "only pickled weights")


def test_missing_things(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "does not exist")
    refused(tmp_path / "nothing.safetensors", "does not exist")
    (tmp_path / "text.txt").write_text("hello")
    refused(tmp_path / "text.txt", "is no model")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is no diffusers folder")
    for file in (folder / "tokenizer").glob("*"):
        file.rename(folder / file.name)
    refused(folder, "holds no vocabulary")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        if (folder / name).is_file():
            (folder / name).rename(folder / "tokenizer" / name)
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    refused(folder, "holds no weights")
    shutil.rmtree(folder / "vae")
    refused(folder, "lacks the subfolder 'vae'")


def test_a_hub_id_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    refused("nobody/no-such-model-anywhere", "no local path and cannot be had from the Hub")


@pytest.mark.parametrize("keep", [0, 4, 5000, -100])
def test_truncated_weights(folder: Path, keep: int) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "damaged or cut short")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("part", "name"),
    [("unet", "conv_in.weight"), ("text_encoder", "final_layer_norm.bias"), ("vae", "decoder.conv_in.weight")],
)
def test_broken_numbers_name_the_tensor(folder: Path, part: str, name: str, value: float) -> None:
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(name))
    tensors[key].view(-1)[3] = value
    save_file(tensors, file, {"format": "pt"})
    refused(folder, f"{part}.{name} holds NaN or infinite")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_missing_tensors_are_not_filled_with_noise(folder: Path, part: str) -> None:
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[sorted(tensors)[5]]
    save_file(tensors, file, {"format": "pt"})
    refused(folder, "lack")


def test_misshaped_tensors(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :2].clone()
    save_file(tensors, file, {"format": "pt"})
    refused(folder, "conv_in.weight|cannot be opened")


def test_other_families(folder: Path) -> None:
    index = folder / "model_index.json"
    change(index, _class_name="StableDiffusionXLPipeline")
    refused(folder, "StableDiffusionXLPipeline; only Stable Diffusion 1.x and 2.x")
    change(index, _class_name="FluxPipeline")
    refused(folder, "FluxPipeline")
    change(index, _class_name="StableDiffusionPipeline")
    change(folder / "unet/config.json", addition_embed_type="text_time")
    refused(folder, "this UNet is not of Stable Diffusion 1.x or 2.x")
    change(folder / "unet/config.json", addition_embed_type=None)
    change(folder / "text_encoder/config.json", architectures=["T5EncoderModel"])
    refused(folder, "text encoder is a T5EncoderModel")


def test_broken_json(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")
    refused(folder, "cannot be read")
    (folder / "model_index.json").write_text("[]")
    refused(folder, "no JSON object")


def test_unknown_prediction(folder: Path) -> None:
    refused(folder, "must be epsilon or v_prediction", prediction="x")
    change(folder / "scheduler/scheduler_config.json", prediction_type="sample")
    refused(folder, "'sample' is not supported")


def test_half_variants_are_found(folder: Path) -> None:
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part / f"{name}.safetensors").rename(folder / part / f"{name}.fp16.safetensors")
    assert open_model(folder, device="cpu").dtype == torch.float32


def test_mixed_dtypes_open_alike(folder: Path, tiny_model: Any) -> None:
    """The sandbox ships its UNet and VAE in half precision and its text encoder in full."""
    for part in ("unet", "vae"):
        file = folder / part / "diffusion_pytorch_model.safetensors"
        save_file({key: value.half() for key, value in load_file(file).items()}, file, {"format": "pt"})
    model: Any = open_model(folder, device="cpu")
    assert {p.dtype for p in weights_of(model).values()} == {torch.float32}
    for name, value in weights_of(tiny_model).items():
        assert torch.allclose(weights_of(model)[name], value, atol=1e-3, rtol=1e-3)


def test_devices_and_dtypes() -> None:
    assert pick_device("cpu").type == "cpu"
    for device in ("quantum", "cuda:99"):
        with pytest.raises(UserError, match="not available"):
            pick_device(device)
    assert pick_dtype("bf16") == torch.bfloat16
    assert pick_dtype(None) == torch.float32
    with pytest.raises(UserError, match="float32, fp32"):
        pick_dtype("int8")


@pytest.mark.parametrize(("version", "prediction"), [("1.5", "epsilon"), ("2.1", "v_prediction")])
def test_a_single_file_holds_the_whole_model(tiny_sd: Callable[..., Path], tmp_path: Path, version: str, prediction: str) -> None:
    """Written in the original layout and read back by diffusers' own converter."""
    source = tiny_sd(version=version, prediction=prediction)
    model: Any = open_model(source, device="cpu")
    file = tmp_path / "model.safetensors"
    save_file(original_layout(model), file)
    again: Any = open_model(file, device="cpu", config=source)
    old, new = weights_of(model), weights_of(again)
    assert set(old) == set(new)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert again.prediction == prediction
    assert torch.equal(again.embed(["a red house"]).states, model.embed(["a red house"]).states)


def test_single_files_that_are_something_else(tiny_model: Any, tiny_sd: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    whole = original_layout(tiny_model)
    for extra, family in (
        ("conditioner.embedders.0.x", "SDXL"),
        ("model.diffusion_model.joint_blocks.0.x", "Stable Diffusion 3"),
        ("double_blocks.0.x", "Flux"),
        ("lora_unet_down.x", "a LoRA"),
    ):
        save_file({**whole, extra: torch.zeros(1)}, file)
        refused(file, family)
    save_file({key: value for key, value in whole.items() if not key.startswith("first_stage")}, file)
    refused(file, "lacks the VAE")
    save_file({key: value for key, value in whole.items() if not key.startswith("model.")}, file)
    refused(file, "holds no UNet")
    save_file({key: value for key, value in whole.items() if "middle_block.0.in_layers.2.weight" not in key}, file)
    refused(file, "lack unet.mid_block|does not fit", config=tiny_sd())
    file.write_bytes(file.read_bytes()[:-10])
    refused(file, "damaged or cut short")
    save_file(whole, file)
    refused(file, r"no tokenizer.*hf download openai/clip-vit-large-patch14 vocab\.json.*config=FOLDER")
    refused(file, "is no diffusers folder", config=tmp_path)


def test_v_models_are_told_by_asking() -> None:
    class Says:
        def __init__(self, v: bool) -> None:
            self.v, self.dtype = v, torch.float32
            self.config = type("C", (), {"sample_size": 64, "in_channels": 4, "cross_attention_dim": 8})()

        def __call__(self, x_t: torch.Tensor, t: int, encoder_hidden_states: torch.Tensor) -> Any:
            assert t == 999
            return type("O", (), {"sample": (-0.3 if self.v else 0.97) * x_t + 0.1 * torch.randn_like(x_t)})()

    scheduler = type("S", (), {"alphas_cumprod": torch.zeros(1000)})()
    assert predicts_v(Says(v=True), scheduler)
    assert not predicts_v(Says(v=False), scheduler)


def test_written_config_describes_the_published_model(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    write_config(tmp_path, 1, {}, "epsilon")
    assert StableDiffusionPipeline.load_config(tmp_path)["_class_name"] == "StableDiffusionPipeline"
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.00466, abs=1e-5)
