"""LoRA files as people share them: PEFT, diffusers and kohya names, and what the header tells besides."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel
from safeweights.core.text import plain
from safeweights.leakage.canonical import Factors

Layout = Literal["peft", "diffusers", "kohya"]
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What a folder's LoRA is usually called, the first found counts."""
# The end of a key says which factor it is; what stands before it is the layer.
_ENDS: tuple[tuple[str, str, Layout], ...] = (
    (r"\.lora_A(?:\.[^.]+)?\.weight", "a", "peft"), (r"\.lora_B(?:\.[^.]+)?\.weight", "b", "peft"),
    (r"(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight", "a", "diffusers"),
    (r"(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight", "b", "diffusers"),
    (r"\.lora_down\.weight", "a", "kohya"), (r"\.lora_up\.weight", "b", "kohya"),
)  # fmt: skip
_OTHERS = {
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "oft_": "OFT",
    "lora_mid": "Tucker LoCon", "ia3_": "IA3",
}  # fmt: skip
SCANNED, ENTRIES, TOLD = 100_000, 2_000, 50
"""Characters of one entry and entries of a header that are searched, and how many are told; a header may hold megabytes."""


@dataclass(frozen=True)
class Told:
    """One thing the header gives away: ``kind`` is captions, names, paths, comment, picture, count, time or size."""

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
    ignored: tuple[str, ...] = ()
    """Tensors that are no factors and no scales; they are not read."""

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
            if any(item.suffix.lower() in PICKLED for item in path.iterdir()):
                raise UserError(f"{path} holds only pickled weights, which can run code when opened; convert them to safetensors")
            raise UserError(f"{path} holds no LoRA (*.safetensors); name the file or the folder that does")
        return found[0]
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a LoRA file (.safetensors) or a folder with one")
    if path.suffix.lower() in PICKLED:
        raise UserError(f"{path} is a pickle, which can run code when opened; convert it to .safetensors first")
    return path


def read(path: Path, model: DiffusionModel) -> LoraFile:
    """Read a LoRA for ``model``. Raises UserError for a file that is none, is for another model, or holds NaN."""
    from safetensors import SafetensorError, safe_open

    path = find(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            wanted = _wanted(path, names)  # before tensors are loaded: the file may be a whole model
            tensors = {key: file.get_tensor(key) for key in wanted}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file or is damaged ({plain(error, 120)}); get it again") from None
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
        if name in factors:
            raise UserError(f"{path} changes {name} twice; it holds more than one adapter, give a file with one")
        alpha = alphas.get(layer)
        down, up = a.float().flatten(1), b.float().flatten(1)
        shape = named[name].shape
        if down.shape[0] != up.shape[1] or up.shape[0] != shape[0] or down.shape[1] != shape[1:].numel():
            raise UserError(
                f"{path}: the factors of {plain(layer)} make a {up.shape[0]}x{down.shape[1]} update, and {name} of {model.name} "
                f"is {shape[0]}x{shape[1:].numel()}; this LoRA is for another base model"
            )
        up = up * (told(name, len(a)) if alpha is None else alpha / len(a))
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise UserError(
                f"{path}: the factors of {plain(layer, 120)} hold NaN or infinite values; this LoRA is broken, get it again"
            )
        factors[name] = down, up
    if unknown:
        raise UserError(
            f"{path}: {model.name} has no layer '{plain(unknown[0], 120)}' ({len(unknown)} of {len(pairs)} unknown); "
            "this LoRA is for another base model, name its own with --base"
        )
    return LoraFile(path, layout, factors, metadata, tuple(sorted(set(names) - set(wanted))))


def write(
    factors: Factors,
    path: Path,
    *,
    layout: Layout = "peft",
    metadata: Mapping[str, str] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write factors in one of the three layouts; ``shapes`` of weights by name give those beside convolutions their kernels."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        layer = name.removesuffix(".weight")
        a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
        if shapes and len(shape := shapes[name]) == 4:
            a, b = a.view(len(a), *shape[1:]), b.view(*b.shape, 1, 1)
        if layout == "peft":
            tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        elif layout == "diffusers":
            tensors |= {f"{layer}.lora.down.weight": a, f"{layer}.lora.up.weight": b}
        else:
            key = _kohya(name)
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(float(len(a)))}
    save_file(tensors, path, {"format": "pt", **(metadata or {})})


def telling(metadata: Mapping[str, str]) -> list[Told]:
    """What a header gives away about who or what the adapter was trained on, the plainest first.

    At most ``TOLD`` entries, each on one line. Of a very large header only a part is searched, and that is told as well.
    """
    found = []
    for key, value in islice(metadata.items(), ENTRIES):
        kind = _kind(key[:SCANNED], value[:SCANNED])
        if kind is not None:
            found.append(Told(plain(key, 100), kind, plain(value)))
    order = ("captions", "names", "picture", "comment", "paths", "count", "time")
    found.sort(key=lambda item: (order.index(item.kind), item.key))
    size = sum(len(key) + len(value) for key, value in metadata.items())
    cut = [len(metadata) > ENTRIES, any(len(value) > SCANNED for value in metadata.values()), len(found) > TOLD]
    if any(cut):
        found = [
            *found[:TOLD],
            Told("(header)", "size", f"{len(metadata)} entries of {size} characters; only a part is told here"),
        ]
    return found


def image_count(metadata: Mapping[str, str]) -> int | None:
    """The number of training pictures, where the header states it."""
    for key in ("ss_num_train_images", "num_train_images", "num_images"):
        if re.fullmatch(r"[0-9]{1,9}", metadata.get(key, "").strip()):
            return int(metadata[key]) or None
    try:
        folders = json.loads(metadata.get("ss_dataset_dirs", ""))
        count = sum(int(entry["img_count"]) for entry in folders.values())
        return count if 0 < count < 10**9 else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


_PATH = re.compile(
    r"(?:^|[\s\"'=:,\[({])(?:[A-Za-z]:[\\/]|~/|/(?:home|Users|mnt|media|data|root|workspace|content|tmp|var|opt)/)\S+"
)
# Bounded, or a long text without an @ would take a time that grows with its square.
_MAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,64}\.\w")
_NUMBER = re.compile(r"[-+\d.,e_: ]*")


def _kind(key: str, value: str) -> str | None:
    name, text = key.lower(), value.strip()
    if not text or text in ("None", "null", "{}", "[]", "true", "false", "True", "False", "pt"):
        return None
    if re.search(r"num_train_images|num_images|img_count", name):
        return "count"
    if re.search(r"(started|finished)_at$|(?:^|[._])date$|session_id$", name):
        return "time"
    if "thumbnail" in name or text.startswith("data:image"):
        return "picture"
    if _NUMBER.fullmatch(text):
        return None  # a rate or a size, whatever its name: caption_dropout_rate
    if re.search(r"tag_frequency|caption|prompt|trigger|instance", name):
        return "captions"
    if re.search(r"dataset_dirs|datasets|train_data|data_dir|author|user|name$", name) and "sd_model" not in name:
        return "names"
    if re.search(r"comment|description|note|title", name):
        return "comment"
    if _PATH.search(text) or _MAIL.search(text):
        return "paths"
    return None


def _wanted(path: Path, names: Sequence[str]) -> list[str]:
    """The factors and scales among a file's tensors. Raises UserError where there are none, and for another kind of adapter."""
    if not names:
        raise UserError(f"{path} holds no tensors at all; get it again")
    for mark, what in _OTHERS.items():
        if any(mark in key for key in names):
            raise UserError(f"{path} is a {what} adapter; only LoRA (up and down factors) is supported")
    factors = [key for key in names if _end(key) is not None]
    if not factors:
        raise UserError(
            f"{path} holds no LoRA factors (lora_A/lora_B, lora.down/lora.up or lora_down/lora_up); "
            "give a LoRA, not a whole model"
        )
    return [*factors, *(key for key in names if key.endswith(".alpha"))]


def _end(key: str) -> tuple[str, str, Layout] | None:
    """(layer, a or b, layout) of a factor's name; None for another."""
    for end, which, layout in _ENDS:
        if match := re.search(end + "$", key):
            return key[: match.start()], which, layout
    return None


def _pairs(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], Layout, dict[str, float]]:
    parts: dict[str, dict[str, Tensor]] = {}
    layouts: set[Layout] = set()
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        found = _end(key)
        if found is None:
            value = float(tensor.float()) if tensor.numel() == 1 else float("nan")
            if not abs(value) < float("inf"):
                raise UserError(f"{path}: the scale {plain(key)} is no single finite number; this LoRA is broken, get it again")
            alphas[key.removesuffix(".alpha")] = value
            continue
        layer, which, layout = found
        if tensor.ndim < 2 or not tensor.numel():
            raise UserError(f"{path}: {plain(key, 120)} is no matrix ({list(tensor.shape)}); this LoRA is broken, get it again")
        if which in parts.setdefault(layer, {}):
            raise UserError(f"{path} changes {plain(layer, 120)} twice; it holds more than one adapter, give a file with one")
        parts[layer][which] = tensor
        layouts.add(layout)
    if half := [layer for layer, pair in parts.items() if len(pair) != 2]:
        raise UserError(f"{path}: {plain(half[0], 120)} has one factor only, up or down; the file is incomplete, get it again")
    return {layer: (pair["a"], pair["b"]) for layer, pair in parts.items()}, sorted(layouts)[0], alphas


def _config_alphas(path: Path, metadata: Mapping[str, str]) -> Callable[[str, int], float]:
    """(weight name, rank) -> scale, as peft's config beside the file or diffusers' in the header says; else 1."""
    beside = path.with_name("adapter_config.json")
    broken = f"the settings of {path} ({beside.name if beside.is_file() else 'in its header'}) cannot be read"
    try:
        if beside.is_file():
            config = {f"unet.{key}": value for key, value in json.loads(beside.read_text(encoding="utf-8")).items()}
        else:
            config = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")).items())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{broken}: {plain(error, 120)}; get the file again, or write it again without them") from None

    def scale(name: str, rank: int) -> float:
        part, _, layer = name.removesuffix(".weight").partition(".")
        pattern = config.get(f"{part}.alpha_pattern") or {}
        try:
            own = next((value for key, value in pattern.items() if layer == key or layer.endswith("." + key)), None)
            value = own if own is not None else config.get(f"{part}.lora_alpha")
            alpha = float(rank if value is None else value)
        except (TypeError, ValueError, AttributeError, OverflowError):
            alpha = float("nan")
        if not abs(alpha) < float("inf"):
            raise UserError(f"{broken}: its alpha for {name} is no number; get the file again")
        return alpha / (rank**0.5 if config.get(f"{part}.use_rslora") else rank)

    return scale


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
