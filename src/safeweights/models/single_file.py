"""Opening one ``.safetensors`` checkpoint in the original layout (A1111, ComfyUI) without asking the Hub for its config."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from safeweights.core.errors import UserError

# Keys that only models of another family have, and what they are.
STRANGERS = {
    "conditioner.embedders.": "SDXL",
    "model.diffusion_model.label_emb.": "SDXL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "lora_unet_": "a LoRA",
    "unet.": "a LoRA or a part of a pipeline",
    "control_model.": "a ControlNet",
}
UNET = "model.diffusion_model."
TEXT_1, TEXT_2 = "cond_stage_model.transformer.", "cond_stage_model.model."
TOKENIZERS = {1: ("openai/clip-vit-large-patch14", ""), 2: ("stabilityai/stable-diffusion-2", "tokenizer")}


def read_checkpoint(path: Path, dtype: torch.dtype, *, config: Path | None, prediction: str | None) -> dict[str, Any]:
    """The parts of a Stable Diffusion 1.x or 2.x checkpoint.

    The architecture is that of the published models unless ``config``, a diffusers folder, tells another. The prediction type is
    taken from ``prediction``, ``config`` or the file's own metadata; a 2.x file that says nothing is asked once.
    """
    from safeweights.models.door import header

    shapes, metadata = header(path)
    version = _version(path, shapes)
    told = prediction or _told(metadata, shapes)
    with tempfile.TemporaryDirectory() as folder:
        source = config or write_config(Path(folder), version, shapes, told or "epsilon")
        if config is not None and not (config / "model_index.json").is_file():
            raise UserError(f"{config} is no diffusers folder; config must hold model_index.json and the parts' configs")
        pipeline = _open(path, source, dtype, _tokenizer(version, config))
    parts = {
        "unet": pipeline.unet,
        "text_encoder": pipeline.text_encoder,
        "vae": pipeline.vae,
        "tokenizer": pipeline.tokenizer,
        "scheduler": pipeline.scheduler,
    }
    if config is None and told is None and version == 2 and predicts_v(parts["unet"], parts["scheduler"]):
        scheduler = parts["scheduler"]
        parts["scheduler"] = scheduler.from_config(scheduler.config, prediction_type="v_prediction")
        told = "v_prediction"
    if config is None and version == 2 and told == "v_prediction":
        # The v-prediction models of the 2.x line are the 768-pixel ones.
        parts["unet"].register_to_config(sample_size=96)
    return parts


def predicts_v(unet: Any, scheduler: Any) -> bool:
    """Does this UNet predict v rather than eps? At the last timestep x_t is almost pure noise: eps is x_t again, v is not."""
    size = min(int(unet.config.sample_size), 32)
    x_t = torch.randn((1, unet.config.in_channels, size, size), generator=torch.Generator().manual_seed(0)).to(unet.dtype)
    states = torch.zeros((1, 77, unet.config.cross_attention_dim), dtype=unet.dtype)
    with torch.no_grad():
        out = unet(x_t, len(scheduler.alphas_cumprod) - 1, encoder_hidden_states=states).sample
    return bool(torch.corrcoef(torch.stack([out.flatten().float(), x_t.flatten().float()]))[0, 1] < 0.5)


def write_config(folder: Path, version: int, shapes: Mapping[str, list[int]], prediction: str) -> Path:
    """A diffusers folder without weights or tokenizer that describes the published SD 1.x or 2.x architecture."""
    two = version == 2
    width = 1024 if two else 768
    files: dict[str, dict[str, Any]] = {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 2,
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "cross_attention_dim": width,
            "attention_head_dim": [5, 10, 20, 20] if two else 8,
            "use_linear_projection": len(shapes.get(UNET + "input_blocks.1.1.proj_in.weight", [0, 0, 0, 0])) == 2,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "sample_size": 512,
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
            "scaling_factor": 0.18215,
        },
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": 49408,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            # 2.x reads the second-last of 24 layers, so its text encoder has 23.
            "num_hidden_layers": 23 if two else 12,
            "num_attention_heads": 16 if two else 12,
            "max_position_embeddings": 77,
            "projection_dim": 512 if two else 768,
            "hidden_act": "gelu" if two else "quick_gelu",
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 0 if two else 49407,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": prediction,
        },
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def _version(path: Path, keys: Iterable[str]) -> int:
    names = list(keys)
    for prefix, family in STRANGERS.items():
        if any(name.startswith(prefix) for name in names):
            raise UserError(f"{path} looks like {family}; only whole Stable Diffusion 1.x and 2.x checkpoints are supported")
    if not any(name.startswith(UNET) for name in names):
        raise UserError(f"{path} holds no UNet of a Stable Diffusion checkpoint; give a whole checkpoint or a diffusers folder")
    for prefix, what in (("first_stage_model.", "the VAE"), ("cond_stage_model.", "the text encoder")):
        if not any(name.startswith(prefix) for name in names):
            raise UserError(f"{path} lacks {what}; give a whole checkpoint or a diffusers folder")
    return 2 if any(name.startswith(TEXT_2) for name in names) else 1


def _told(metadata: Mapping[str, str], keys: Iterable[str]) -> str | None:
    said = metadata.get("modelspec.prediction_type", "")
    if said in ("v", "v_prediction") or "v_pred" in keys:
        return "v_prediction"
    return "epsilon" if said == "epsilon" else None


def _tokenizer(version: int, config: Path | None) -> Any:
    """CLIP's tokenizer: from the config folder, or from the Hub and its cache. The checkpoint itself does not hold one."""
    from transformers import CLIPTokenizer

    if config is not None:
        return CLIPTokenizer.from_pretrained(config / "tokenizer", local_files_only=True)
    name, subfolder = TOKENIZERS[version]
    try:
        # 2.x pads with "!", 1.x with the end token; both read 77 positions.
        pad = "!" if version == 2 else "<|endoftext|>"
        return CLIPTokenizer.from_pretrained(name, subfolder=subfolder, pad_token=pad, model_max_length=77)
    except Exception as error:
        raise UserError(
            f"a single file holds no tokenizer and {name} is neither cached nor reachable; go online once, "
            "or open a diffusers folder"
        ) from error


def _open(path: Path, config: Path, dtype: torch.dtype, tokenizer: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    try:
        return StableDiffusionPipeline.from_single_file(
            str(path), config=str(config), torch_dtype=dtype, local_files_only=True, tokenizer=tokenizer,
            safety_checker=None, feature_extractor=None,
        )  # fmt: skip
    except Exception as error:  # whatever the converter raises, the checkpoint does not fit the architecture
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} does not fit the Stable Diffusion architecture ({reason}); give its diffusers folder") from error
