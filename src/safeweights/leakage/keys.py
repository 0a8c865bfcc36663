"""LoRA files as people share them: PEFT, diffusers and kohya names, and what the header tells besides."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel
from safeweights.leakage.canonical import Factors

Layout = Literal["peft", "diffusers", "kohya"]
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What a folder's LoRA is usually called, the first found counts."""
# The end of a key says which factor it is; what stands before it is the layer.
_ENDS: tuple[tuple[str, str, Layout], ...] = (
    (r"\.lora_A(?:\.\w+)?\.weight", "a", "peft"), (r"\.lora_B(?:\.\w+)?\.weight", "b", "peft"),
    (r"(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight", "a", "diffusers"),
    (r"(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight", "b", "diffusers"),
    (r"\.lora_down\.weight", "a", "kohya"), (r"\.lora_up\.weight", "b", "kohya"),
)  # fmt: skip
_OTHERS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "oft_": "OFT"}


@dataclass(frozen=True)
class Told:
    """One thing the header gives away: ``kind`` is captions, names, paths, comment, count or time."""

    key: str
    kind: str
    value: str


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read: its factors by the base model's weight names, every scale multiplied into B."""

    path: Path
    layout: Layout
    factors: Factors
    metadata: Mapping[str, str]

    @property
    def rank(self) -> int:
        """The largest rank among its layers."""
        return max(len(a) for a, _ in self.factors.values())

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(a.numel() + b.numel() for a, b in self.factors.values())


def find(path: Path) -> Path:
    """The LoRA file that a file or folder names. Raises UserError where there is none, or only a pickle."""
    path = path.expanduser()
    if path.is_dir():
        named = [path / name for name in FILES if (path / name).is_file()]
        found = named[:1] or sorted(path.glob("*.safetensors"))
        if len(found) > 1:
            raise UserError(f"{path} holds {len(found)} safetensors files; name the LoRA itself")
        if not found:
            pickled = [item for item in path.iterdir() if item.suffix in PICKLED]
            why = "only pickled weights, which can run code when opened; convert them to safetensors" if pickled else "no LoRA"
            raise UserError(f"{path} holds {why}" if pickled else f"{path} holds no LoRA (*.safetensors)")
        return found[0]
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a LoRA file (.safetensors) or a folder with one")
    if path.suffix in PICKLED:
        raise UserError(f"{path} is a pickle, which can run code when opened; convert it to .safetensors first")
    return path


def read(path: Path, model: DiffusionModel) -> LoraFile:
    """Read a LoRA for ``model``. Raises UserError for a file that is none, is for another model, or holds NaN."""
    from safetensors import SafetensorError, safe_open

    path = find(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file or is damaged ({error}); get it again") from None
    if not tensors:
        raise UserError(f"{path} holds no tensors at all")
    for mark, what in _OTHERS.items():
        if any(mark in key for key in tensors):
            raise UserError(f"{path} is a {what} adapter; only LoRA (up and down factors) is supported")
    pairs, layout, alphas = _pairs(path, tensors)
    told = _config_alphas(path, metadata)
    named = {name: parameter for name, parameter in model.named_parameters() if name.endswith(".weight")}
    flat = {_kohya(name): name for name in named}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    unknown = []
    for layer, (a, b) in pairs.items():
        name = _resolve(layer, named, flat)
        if name is None:
            unknown.append(layer)
            continue
        alpha = alphas.get(layer, told(name, len(a)))
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise UserError(f"{path}: the factors of {layer} hold NaN or infinite values; this LoRA is broken, get it again")
        down, up = a.float().flatten(1), b.float().flatten(1)
        shape = named[name].shape
        if down.shape[0] != up.shape[1] or up.shape[0] != shape[0] or down.shape[1] != shape[1:].numel():
            raise UserError(
                f"{path}: the factors of {layer} make a {up.shape[0]}x{down.shape[1]} update, and {name} of {model.name} is "
                f"{shape[0]}x{shape[1:].numel()}; this LoRA is for another base model"
            )
        factors[name] = down, up * (alpha / len(a))
    if unknown:
        raise UserError(
            f"{path}: {model.name} has no layer {unknown[0]!r} ({len(unknown)} of {len(pairs)} unknown); "
            "this LoRA is for another base model, name its own with --base"
        )
    return LoraFile(path, layout, factors, metadata)


def write(factors: Factors, path: Path, *, layout: Layout = "peft", metadata: Mapping[str, str] | None = None) -> None:
    """Write factors in one of the three layouts."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        layer = name.removesuffix(".weight")
        a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
        if layout == "peft":
            tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        elif layout == "diffusers":
            tensors |= {f"{layer}.lora.down.weight": a, f"{layer}.lora.up.weight": b}
        else:
            key = _kohya(name)
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(float(len(a)))}
    save_file(tensors, path, {"format": "pt", **(metadata or {})})


def telling(metadata: Mapping[str, str]) -> list[Told]:
    """What a header gives away about who or what the adapter was trained on, the plainest first."""
    found = []
    for key, value in metadata.items():
        kind = _kind(key, value)
        if kind is not None:
            found.append(Told(key, kind, value if len(value) <= 200 else value[:197] + "…"))
    order = ("captions", "names", "comment", "paths", "count", "time")
    return sorted(found, key=lambda item: (order.index(item.kind), item.key))


def image_count(metadata: Mapping[str, str]) -> int | None:
    """The number of training pictures, where the header states it."""
    for key in ("ss_num_train_images", "num_train_images", "num_images"):
        if str(metadata.get(key, "")).strip().isdigit():
            return int(metadata[key])
    try:
        folders = json.loads(metadata.get("ss_dataset_dirs", ""))
        return sum(int(entry["img_count"]) for entry in folders.values()) or None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


_PATH = re.compile(
    r"(?:^|[\s\"'=:,\[({])(?:[A-Za-z]:[\\/]|~/|/(?:home|Users|mnt|media|data|root|workspace|content|tmp|var|opt)/)\S+"
)
_MAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.]+")


def _kind(key: str, value: str) -> str | None:
    name, text = key.lower(), value.strip()
    if not text or text in ("None", "null", "{}", "[]", "true", "false", "True", "False", "pt"):
        return None
    if re.search(r"tag_frequency|caption|prompt|trigger|instance", name):
        return "captions"
    if re.search(r"dataset_dirs|datasets|train_data|data_dir|author|user|name$", name) and "sd_model" not in name:
        return "names" if not re.fullmatch(r"[\d.]+", text) else None
    if re.search(r"comment|description|note|title", name):
        return "comment"
    if _PATH.search(text) or _MAIL.search(text):
        return "paths"
    if re.search(r"num_train_images|num_images|img_count", name):
        return "count"
    if re.search(r"(started|finished)_at|date|session_id", name):
        return "time"
    return None


def _pairs(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], Layout, dict[str, float]]:
    parts: dict[str, dict[str, Tensor]] = {}
    layouts: set[Layout] = set()
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(tensor)
            continue
        for end, which, layout in _ENDS:
            if match := re.search(end + "$", key):
                parts.setdefault(key[: match.start()], {})[which] = tensor
                layouts.add(layout)
                break
    if not parts:
        raise UserError(f"{path} holds no LoRA factors (lora_A/lora_B, lora.down/lora.up or lora_down/lora_up)")
    if half := [layer for layer, pair in parts.items() if len(pair) != 2]:
        raise UserError(f"{path}: {half[0]} has one factor only, up or down; the file is incomplete, get it again")
    return {layer: (pair["a"], pair["b"]) for layer, pair in parts.items()}, sorted(layouts)[0], alphas


def _config_alphas(path: Path, metadata: Mapping[str, str]) -> Any:
    """(weight name, rank) -> alpha, as peft's config beside the file or diffusers' in the header says; else the rank."""
    config: dict[str, Any] = {}
    beside = path.with_name("adapter_config.json")
    try:
        if beside.is_file():
            config = {f"unet.{key}": value for key, value in json.loads(beside.read_text(encoding="utf-8")).items()}
        elif "lora_adapter_metadata" in metadata:
            config = json.loads(metadata["lora_adapter_metadata"])
    except (OSError, ValueError) as error:
        raise UserError(f"the settings of {path} cannot be read: {error}") from None

    def alpha(name: str, rank: int) -> float:
        part, _, layer = name.removesuffix(".weight").partition(".")
        pattern = config.get(f"{part}.alpha_pattern") or {}
        own = next((value for key, value in pattern.items() if layer == key or layer.endswith("." + key)), None)
        value = own if own is not None else config.get(f"{part}.lora_alpha")
        return float(rank if value is None else value)

    return alpha


def _resolve(layer: str, named: Mapping[str, Any], flat: Mapping[str, str]) -> str | None:
    if layer in flat:
        return flat[layer]
    plain = re.sub(r"^base_model\.model\.", "", layer)
    # The first diffusers layout keeps factors in attention processors: attn1.processor.to_q_lora, to_out instead of to_out.0.
    plain = re.sub(r"\.processor\.(to_\w+)$", r".\1", plain)
    plain = re.sub(r"\.to_out$", ".to_out.0", plain)
    for part in ("", "unet.", "text_encoder."):
        if f"{part}{plain}.weight" in named:
            return f"{part}{plain}.weight"
        # With or without the text_model that transformers may or may not wrap its layers in.
        for other in (plain.replace("text_encoder.", "text_encoder.text_model."), plain.replace("text_model.", "")):
            if f"{part}{other}.weight" in named:
                return f"{part}{other}.weight"
    if layer.startswith("lora_te_"):
        for other in (layer.replace("lora_te_text_model_", "lora_te_"), layer.replace("lora_te_", "lora_te_text_model_")):
            if other in flat:
                return flat[other]
    return None


def _kohya(name: str) -> str:
    part, _, layer = name.removesuffix(".weight").partition(".")
    return f"lora_{'te' if part == 'text_encoder' else part}_{layer.replace('.', '_')}"


def layers_of(files: Sequence[LoraFile]) -> list[str]:
    """The layers that every one of these files changes, in the first one's order."""
    return [name for name in files[0].factors if all(name in file.factors for file in files)]
