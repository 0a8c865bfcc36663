"""Checkpoints of one ``.safetensors`` file in the original layout (A1111, ComfyUI): opening and writing, without the Hub."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.models.embedded import unpack

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
CLIP_WORDS = 49408
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZERS = {1: ("openai/clip-vit-large-patch14", ""), 2: ("stabilityai/stable-diffusion-2", "tokenizer")}


def read_checkpoint(path: Path, dtype: torch.dtype, *, config: Path | None, prediction: str | None) -> dict[str, Any]:
    """The parts of a Stable Diffusion 1.x or 2.x checkpoint.

    The architecture is that of the published models unless ``config``, a diffusers folder, or the file's own metadata tells
    another. The prediction type is taken from ``prediction``, ``config`` or the metadata; a 2.x file that says nothing is asked.
    """
    from safeweights.models.door import header

    shapes, metadata = header(path)
    version = _version(path, shapes)
    told = prediction or _told(metadata, shapes)
    with tempfile.TemporaryDirectory() as folder:
        if config is None:
            config = unpack(path, metadata, Path(folder))
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
            "vocab_size": CLIP_WORDS,
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


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def original_layout(model: Any) -> dict[str, Tensor]:
    """The tensors of an opened `StableDiffusion` under the names of the original layout, ready for ``save_file``.

    SD 2.x text encoders get OpenCLIP's names and fused query-key-value weights; what OpenCLIP has beyond the layers SD reads
    (the last layer and the projection) is not part of the model and is left out. Raises UserError for a UNet with parts that the
    original layout has no place for.
    """
    blocks = len(model.vae.config.block_out_channels)
    unet = {UNET + name: value for name, value in unet_layout(model.denoiser).items()}
    vae = {}
    for name, value in model.vae.state_dict().items():
        new = _vae_name(name, blocks)
        # The original attention layers are 1x1 convolutions.
        convolution = ".attn_1." in new and new.endswith(".weight") and ".norm." not in new
        vae["first_stage_model." + new] = value[:, :, None, None] if convolution else value
    text = {name.removeprefix("text_model."): value for name, value in model.text_encoder.state_dict().items()}
    text = _open_clip(text) if model.text_encoder.config.hidden_act == "gelu" else {
        f"{TEXT_1}text_model.{name}": value for name, value in text.items()
    }  # fmt: skip
    return {name: value.detach().contiguous() for name, value in {**unet, **vae, **text}.items()}


def unet_layout(unet: Any) -> dict[str, Tensor]:
    """The UNet's tensors by original name, without the prefix. Raises UserError for a part that has none."""
    layers = unet.config.layers_per_block
    crossing = tuple("CrossAttn" in kind for kind in unet.config.up_block_types)
    if not isinstance(layers, int):
        raise UserError("the original layout has one number of layers for all blocks; export this model with --format diffusers")
    return {_unet_name(name, layers, crossing): value for name, value in unet.state_dict().items()}


def _unet_name(name: str, layers: int, crossing: Sequence[bool]) -> str:
    """The original name of a diffusers UNet parameter, for ``layers`` resnets a down block.

    ``crossing`` says which up blocks have attention: there the upsampler is the third part of its output block, else the second.
    """
    for ours, theirs in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ):
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    match = re.match(
        r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
    )
    if match is None:
        raise UserError(f"the original layout has no place for the UNet's {name}; export this model with --format diffusers")
    side, block, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        part, _, leaf = rest.rpartition(".")
        if part not in RESNET:
            raise UserError(f"the original layout has no place for the UNet's {name}; export this model with --format diffusers")
        rest = f"{RESNET[part]}.{leaf}"
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    if side == "down_blocks":
        first = 1 + block * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{first + index}.{int(kind == 'attentions')}.{rest}"
    first = block * (layers + 1)
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if crossing[block] else 1}.{rest}"
    return f"output_blocks.{first + index}.{int(kind == 'attentions')}.{rest}"


def _vae_name(name: str, blocks: int) -> str:
    """The original name of a diffusers VAE parameter, for ``blocks`` resolutions."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("conv_norm_out", "norm_out")
    name = name.replace("conv_shortcut", "nin_shortcut")
    for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    return name


def _open_clip(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformers text encoder under OpenCLIP's names."""
    new = {
        TEXT_2 + "token_embedding.weight": text["embeddings.token_embedding.weight"],
        TEXT_2 + "positional_embedding": text["embeddings.position_embedding.weight"],
        TEXT_2 + "ln_final.weight": text["final_layer_norm.weight"],
        TEXT_2 + "ln_final.bias": text["final_layer_norm.bias"],
    }
    for name, value in text.items():
        if (match := re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)) is None:
            continue
        block = f"{TEXT_2}transformer.resblocks.{match[1]}."
        if match[2] in OPEN_CLIP:
            new[f"{block}{OPEN_CLIP[match[2]]}.{match[3]}"] = value
        elif match[2] == "self_attn.q_proj":
            fused = [text[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            new[f"{block}attn.in_proj_{match[3]}"] = torch.cat(fused)
    return new


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

    from safeweights.models.door import open_tokenizer

    if config is not None:
        return open_tokenizer(config / "tokenizer")
    name, subfolder = TOKENIZERS[version]
    try:
        # 2.x pads with "!", 1.x with the end token; both read 77 positions.
        pad = "!" if version == 2 else "<|endoftext|>"
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder=subfolder, pad_token=pad, model_max_length=77)
        # Without its files transformers gives a tokenizer that knows no word, and says nothing.
        if len(tokenizer) < CLIP_WORDS:
            raise OSError("no vocabulary")
        return tokenizer
    except Exception as error:
        raise UserError(
            f"a single file holds no tokenizer, and that of {name} is neither cached nor reachable; "
            f"run '{fetch_tokenizer(version)}' once while online (its cache may be copied), or give the model's diffusers folder "
            "(in Python also open_model(file, config=FOLDER), any diffusers folder of that architecture)"
        ) from error


def fetch_tokenizer(version: int) -> str:
    """The command that puts the tokenizer of single files of SD ``version`` into the Hub's cache."""
    name, subfolder = TOKENIZERS[version]
    return f"hf download {name} " + " ".join(f"{subfolder}/{file}".lstrip("/") for file in TOKENIZER_FILES)


def tokenizer_cached(version: int) -> bool:
    """Whether single files of SD ``version`` can be opened offline without a config folder."""
    from huggingface_hub import try_to_load_from_cache

    name, subfolder = TOKENIZERS[version]

    def cached(file: str) -> bool:
        return isinstance(try_to_load_from_cache(name, f"{subfolder}/{file}".lstrip("/")), str)

    return cached("tokenizer.json") or (cached("vocab.json") and cached("merges.txt"))


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
