"""The one door: a name, a folder, a checkpoint or a Hub id in, a model in noise-prediction form out."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel
from safeweights.models.quiet import quiet
from safeweights.models.stable_diffusion import StableDiffusion

SANDBOX = "sandbox"
PICKLED = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip
WEIGHTED = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionPipelineSafe")


def open_model(
    name_or_path: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    prediction: str | None = None,
    config: str | Path | None = None,
    text_encoder: str | Path | None = None,
) -> DiffusionModel:
    """Open "sandbox", a diffusers folder, a single ``.safetensors`` checkpoint or a Hub id: Stable Diffusion 1.x or 2.x.

    ``device`` "auto" takes cuda, then mps, then cpu. ``dtype`` defaults to float32, in which protections are made.
    ``prediction`` ("epsilon" or "v_prediction") overrides what the files say. ``config`` is a diffusers folder that tells
    the architecture of a single-file checkpoint of non-standard size. ``text_encoder`` is a CLIPTextModel folder (or a diffusers
    folder that holds one) put in place of the model's own.

    Raises UserError for pickled, missing, damaged, non-finite or incomplete weights and for models of another family.
    """
    place, kind = pick_device(device), pick_dtype(dtype)
    if prediction not in (None, "epsilon", "v_prediction"):
        raise UserError(f"prediction must be epsilon or v_prediction, not {prediction!r}")
    name = str(name_or_path)
    # Resolved late: the sandbox stands above the door, and nothing of it is needed for other models.
    path = import_module("safeweights.sandbox.files").model_folder() if name == SANDBOX else Path(name).expanduser()
    with quiet():
        if path.is_dir():
            parts = _from_folder(path, kind)
        elif path.suffix in PICKLED:
            raise UserError(f"{path} is a pickle, which can run code when opened; convert it to .safetensors first")
        elif path.is_file() and path.suffix != ".safetensors":
            raise UserError(f"{path} is no model; give a diffusers folder or a .safetensors checkpoint")
        elif path.is_file():
            from safeweights.models.single_file import read_checkpoint

            parts = read_checkpoint(path, kind, config=Path(config) if config else None, prediction=prediction)
        elif path.suffix == ".safetensors" or name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise UserError(f"{name} does not exist; give a diffusers folder, a .safetensors file, a Hub id or 'sandbox'")
        else:
            parts = _from_folder(_download(name), kind)
        if text_encoder is not None:
            parts["text_encoder"] = _fitting(Path(text_encoder).expanduser(), parts["text_encoder"], kind)
    if prediction is not None:
        scheduler = parts["scheduler"]
        parts["scheduler"] = scheduler.from_config(scheduler.config, prediction_type=prediction)
    check_weights(name, {part: parts[part] for part in WEIGHTED})
    for part in WEIGHTED:
        parts[part].to(place)
    return StableDiffusion(name=name, **parts)


def pick_device(device: str) -> torch.device:
    """The device of a name; "auto" takes the best there is. Raises UserError for one that is absent."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {device!r} is not available here; use --device auto, cpu, cuda or mps") from None
    return chosen


def pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype of a name, float32 for None or "auto"."""
    if dtype is None or dtype == "auto":
        return torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_weights(name: str, modules: dict[str, nn.Module]) -> None:
    """Raise UserError naming the first tensor that is missing, NaN or infinite."""
    for part, module in modules.items():
        for key, parameter in module.named_parameters():
            if parameter.is_meta:
                raise UserError(f"{name}: the weights lack {part}.{key}; the file is incomplete, get it again")
            if not torch.isfinite(parameter).all():
                raise UserError(f"{name}: {part}.{key} holds NaN or infinite values; this model is broken, get it again")


def _download(name: str) -> Path:
    """The local snapshot of a Hub id: configs, tokenizer and safetensors only."""
    from diffusers import StableDiffusionPipeline

    try:
        return Path(StableDiffusionPipeline.download(name, use_safetensors=True, safety_checker=None, feature_extractor=None))
    except Exception as error:  # every way a download can fail ends in the same advice
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"{name} is no local path and cannot be had from the Hub with safetensors weights: {reason}") from error


def _from_folder(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    import diffusers
    import transformers

    index = _read_json(folder / "model_index.json", f"{folder} is no diffusers folder")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise UserError(f"{folder} is a {pipeline}; only Stable Diffusion 1.x and 2.x text-to-image models are supported")
    for part in (*WEIGHTED, "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder} lacks the subfolder {part!r}; save or download the whole pipeline")
    variants = {part: _check_files(folder / part) for part in WEIGHTED}
    config = _read_json(folder / "unet" / "config.json", "the UNet has no config")
    if config.get("addition_embed_type") or config.get("in_channels", 4) != config.get("out_channels", 4):
        raise UserError(f"{folder}: this UNet is not of Stable Diffusion 1.x or 2.x text-to-image (SDXL, inpainting or other)")
    encoder = _read_json(folder / "text_encoder" / "config.json", "the text encoder has no config")
    if encoder.get("architectures", ["CLIPTextModel"])[0] != "CLIPTextModel":
        raise UserError(f"{folder}: the text encoder is a {encoder['architectures'][0]}; only CLIPTextModel is supported")
    parts: dict[str, Any] = {}
    for part, class_name in WEIGHTED.items():
        cls = getattr(transformers if part == "text_encoder" else diffusers, class_name)
        parts[part] = _open_part(cls, folder / part, dtype, variants[part])
    try:
        parts["tokenizer"] = open_tokenizer(folder / "tokenizer")
        _, class_name = index.get("scheduler", ["diffusers", "DDIMScheduler"])
        parts["scheduler"] = getattr(diffusers, class_name).from_pretrained(folder / "scheduler", local_files_only=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder}: the tokenizer or the scheduler cannot be opened: {error}") from error
    return parts


def open_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer in a folder. Raises UserError for a folder without a vocabulary."""
    from transformers import CLIPTokenizer

    # Without its files transformers gives a tokenizer that knows no word, and says nothing.
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{folder} holds no vocabulary (vocab.json or tokenizer.json); save or download the whole pipeline")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _open_part(cls: Any, folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    try:
        module, info = cls.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, variant=variant, output_loading_info=True
        )
    except Exception as error:  # whatever the loaders raise, the folder is what is wrong
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder} cannot be opened: {reason}") from error
    wrong = sorted({*info["missing_keys"], *(str(key) for key in info.get("mismatched_keys", ()))})
    if wrong:
        raise UserError(f"{folder}: the weights lack or misshape {wrong[0]} ({len(wrong)} tensors); get the folder again")
    return module


def _fitting(folder: Path, own: Any, dtype: torch.dtype) -> Any:
    """The text encoder of a folder, if a model that has ``own`` can take it."""
    import transformers

    if (folder / "text_encoder").is_dir():
        folder = folder / "text_encoder"
    config = _read_json(folder / "config.json", f"{folder} is no text encoder's folder")
    if config.get("model_type") != "clip_text_model":
        raise UserError(f"{folder} is a {config.get('model_type')}; only a CLIPTextModel can be dropped in")
    found = _open_part(transformers.CLIPTextModel, folder, dtype, _check_files(folder))
    for key in ("hidden_size", "vocab_size", "max_position_embeddings"):
        if getattr(found.config, key) != getattr(own.config, key):
            raise UserError(
                f"{folder}: its {key} is {getattr(found.config, key)}, this model's {getattr(own.config, key)}; "
                "take a text encoder of the same family"
            )
    return found


def _check_files(folder: Path) -> str | None:
    """Look at the weight files of one part without reading them; the variant to open, if only that is there."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if any(file.suffix in PICKLED for file in folder.iterdir()):
            raise UserError(f"{folder} holds only pickled weights, which can run code when opened; convert them to safetensors")
        raise UserError(f"{folder} holds no weights (*.safetensors); save or download the whole pipeline")
    for file in files:
        header(file)
    plain = [file for file in files if not any(f".{variant}" in file.name for variant in ("fp16", "bf16", "non_ema"))]
    return None if plain else "fp16" if any(".fp16" in file.name for file in files) else "bf16"


def header(file: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """(shape by tensor name, metadata) of a safetensors file, weights unread. Raises UserError for a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_slice(key).get_shape() for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or cut short ({error}); copy or download it again") from None


def _read_json(file: Path, otherwise: str) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{otherwise}: {file.name} is missing in {file.parent}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); get it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} is no JSON object; get it again")
    return data
