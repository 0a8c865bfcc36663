"""Did a fine-tune respect a mask? Tensor by tensor, adapters and merged adapters included."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel
from safeweights.models.door import PICKLED, header, open_model

LORA_FILE = "pytorch_lora_weights.safetensors"
# What adapter files call a layer's tensors: peft, diffusers, kohya; DoRA's magnitudes; OFT, LoHa, LoKr and plain differences.
ENDINGS = re.compile(
    r"\.(?:lora_[AB](?:\.default)?(?:\.weight)?|lora\.(?:down|up)\.weight|lora_(?:down|up|mid)\.weight|alpha|dora_scale"
    r"|lora_magnitude_vector(?:\.default)?(?:\.weight)?|hada_\w+|lokr_\w+|oft_\w+|diff(?:_b)?)$"
)
OLD_PROCESSOR = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.(?:down|up)\.weight$")


@dataclass(frozen=True)
class Violation:
    """One frozen tensor that a fine-tune touched, and how."""

    tensor: str
    kind: str
    """changed, missing, shape, extra (a UNet tensor the base lacks), or adapter (one stands beside it, not merged)."""
    why: str


@dataclass(frozen=True)
class Compliance:
    """What looking at a fine-tune found."""

    checked: int
    """Frozen tensors looked at."""
    rounded: int
    """Of them, those equal to the base only after rounding to the half precision they were stored in."""
    violations: tuple[Violation, ...]

    @property
    def complied(self) -> bool:
        """No frozen tensor was touched."""
        return not self.violations

    def as_json(self) -> dict[str, Any]:
        """Plain data: complied, checked, rounded, first (a violation or null) and all violations."""
        told = [asdict(violation) for violation in self.violations]
        return {
            "complied": self.complied, "checked": self.checked, "rounded": self.rounded,
            "first": told[0] if told else None, "violations": told,
        }  # fmt: skip


def verify(
    base: DiffusionModel, finetuned: str | Path, frozen: frozenset[str], *, config: Path | None = None, device: str = "cpu"
) -> Compliance:
    """Compare a fine-tune of ``base`` with it: a diffusers folder, a checkpoint, or the folder or file of a LoRA.

    ``config`` is the base's own diffusers folder where it has one: a single file tells neither its architecture nor its
    tokenizer, and a fine-tune has those of its base. A tensor may differ from the base by the rounding of a whole file to half
    precision. A learnt word touches no tensor.
    Every variant of a folder's UNet (fp16, bf16) is compared.
    Raises UserError for names the base lacks, for what is neither a model nor an adapter, and for a folder that holds further
    weights which nothing here would look at.
    """
    known = dict(base.named_parameters())
    if strangers := sorted(frozen - set(known)):
        raise UserError(f"the mask freezes {strangers[0]!r}, which the base does not have; it is a mask of another model")
    path = Path(finetuned).expanduser()
    whole = path.is_dir() and (path / "model_index.json").is_file()
    if path.is_dir():
        _check_tree(path, whole=whole)
    adapters = list(_adapter_files(path))
    violations = [
        violation for file in adapters for violation in beside_frozen(header(file)[0], list(known), frozen, str(file.name))
    ]
    if whole or not adapters:
        if any(_is_word(file) for file in ([path] if path.is_file() else path.glob("*.safetensors"))) and not whole:
            return Compliance(len(frozen), 0, ())
        if path.is_dir() and not whole:
            raise UserError(f"{path} holds neither a model (model_index.json) nor an adapter ({LORA_FILE}); give one of them")
        opened = open_model(finetuned, device=device, config=config if path.is_file() else None)
        found = compare(known, dict(opened.named_parameters()), frozen)
        violations += found.violations
        for variant, tensors in _variants(path / "unet") if whole else ():
            for other in compare(known, tensors, frozenset(name for name in frozen if name.startswith("unet."))).violations:
                # One of the variants is the model that was opened; what was told of it is not told again.
                if other not in found.violations:
                    violations.append(Violation(other.tensor, other.kind, f"{variant}: {other.why}"))
        return Compliance(found.checked, found.rounded, tuple(dict.fromkeys(violations)))
    return Compliance(len(frozen), 0, tuple(violations))


def compare(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], frozen: frozenset[str]) -> Compliance:
    """Frozen tensors of two models, in the base's order, then tensors that were built into the UNet beside them."""
    violations, rounded = [], 0
    for name in (name for name in base if name in frozen):
        if name not in tuned:
            violations.append(Violation(name, "missing", "the fine-tune has no tensor of that name"))
            continue
        ours, theirs = base[name].detach().cpu().float(), tuned[name].detach().cpu().float()
        if ours.shape != theirs.shape:
            violations.append(Violation(name, "shape", f"{tuple(theirs.shape)} instead of {tuple(ours.shape)}"))
        elif torch.equal(ours, theirs):
            continue
        elif any(torch.equal(ours.to(kind).float(), theirs) for kind in (torch.float16, torch.bfloat16)):
            rounded += 1
        else:
            apart = (ours - theirs).abs()
            share = float((apart > 0).float().mean())
            told = f"{100 * share:.1f} % of its entries changed, by up to {float(apart.max()):.3g}"
            violations.append(Violation(name, "changed", told))
    # A layer that the base lacks can do what a frozen one was not allowed to.
    for name in tuned:
        if name not in base and name.startswith("unet."):
            violations.append(Violation(name, "extra", "the base's UNet has no such tensor"))
    return Compliance(sum(name in frozen for name in base), rounded, tuple(violations))


def beside_frozen(
    keys: Iterable[str], known: Sequence[str], frozen: frozenset[str], file: str = "the adapter"
) -> list[Violation]:
    """The frozen weights that an adapter file with these tensor names puts something beside, in the model's order.

    ``known`` are the names of the base's parameters. Raises UserError for a name that belongs to none of its layers: what cannot
    be read cannot be said to comply.
    """
    layers = {name.rpartition(".")[0]: name for name in sorted(known, key=lambda name: name.endswith(".weight"))}
    flat = {_flat(layer): layer for layer in layers}
    touched: dict[str, None] = {}
    for key in keys:
        layer = _layer(key, flat)
        if layer is None:
            raise UserError(f"{file}: {key!r} names no layer of the base; this adapter was made for another model")
        # An adapter adds to the weight and leaves the bias as it is, unless it brings the bias's difference.
        touched[f"{layer}.{'bias' if key.endswith('.diff_b') else 'weight'}"] = None
    found = [
        Violation(name, "adapter", f"{file} adds to this frozen {name.rpartition('.')[2]}") for name in touched if name in frozen
    ]
    order = {name: place for place, name in enumerate(known)}
    return sorted(found, key=lambda violation: order.get(violation.tensor, 0))


def is_adapter(names: Sequence[str]) -> bool:
    """Whether tensors of these names are an adapter's, not a model's."""
    return bool(names) and all(ENDINGS.search(name) or OLD_PROCESSOR.search(name) for name in names)


def _check_tree(folder: Path, *, whole: bool) -> None:
    """Raise UserError for a weight file in ``folder`` that is no part of its model, no adapter and no learnt word.

    ``whole``: the folder is a diffusers model, whose parts but the UNet a mask says nothing of.
    """
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", *PICKLED)):
        place = file.relative_to(folder)
        if whole and len(place.parts) > 1 and (folder / place.parts[0] / "config.json").is_file():
            if place.parts[0] != "unet" or (file.suffix == ".safetensors" and len(place.parts) == 2):
                continue
        elif file.suffix == ".safetensors" and len(place.parts) == 1:
            names, metadata = header(file)
            if is_adapter([*names]) or _is_word(file) or (file.name == "mask.safetensors" and "mask" in metadata):
                continue
        raise UserError(f"{folder} also holds {place}, neither its model's nor an adapter's; verify it alone, or remove it")


def _variants(unet: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of every set of weight files in a UNet's folder, by what the set is called, shards put together."""
    from safetensors.torch import load_file

    sets: dict[str, list[Path]] = {}
    for file in sorted(unet.glob("*.safetensors")):
        sets.setdefault(re.sub(r"-\d{5}-of-\d{5}", "", file.name), []).append(file)
    # A single set is the model that was opened.
    for name, files in sets.items() if len(sets) > 1 else ():
        yield name, {f"unet.{key}": value for file in files for key, value in load_file(file).items()}


def _adapter_files(path: Path) -> Iterator[Path]:
    """The adapter files among a fine-tune: the file itself, or those of a folder."""
    files = [path] if path.is_file() and path.suffix == ".safetensors" else []
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
    for file in files:
        if is_adapter([*header(file)[0]]):
            yield file


def _is_word(file: Path) -> bool:
    """Whether a file is a learnt embedding: its tensors are called by words, not by layers."""
    names = [*header(file)[0]] if file.suffix == ".safetensors" else []
    return bool(names) and all("." not in name for name in names)


def _flat(layer: str) -> str:
    """A layer's name as kohya's files write it."""
    part, _, path = layer.partition(".")
    return f"lora_{'unet' if part == 'unet' else 'te'}_{path.replace('.', '_')}"


def _layer(key: str, flat: Mapping[str, str]) -> str | None:
    """The layer of the base, ``unet.…`` or ``text_encoder.…``, that an adapter's tensor belongs to."""
    if old := OLD_PROCESSOR.search(key):
        # diffusers' first form: attention processors beside the layers; to_out was what is to_out.0 now.
        name = f"{key[: old.start()]}.{'to_out.0' if old[1] == 'to_out' else old[1]}"
    else:
        name = ENDINGS.sub("", key)
    name = name.removeprefix("base_model.model.")
    if name in flat:
        return flat[name]
    for candidate in (name, f"unet.{name}", name.replace("text_encoder.", "text_encoder.text_model.", 1),
                      name.replace("text_encoder.text_model.", "text_encoder.", 1)):  # fmt: skip
        if _flat(candidate) in flat and candidate in flat.values():
            return candidate
    # Text encoders are called with or without their wrapper.
    for candidate in (name.replace("lora_te_text_model_", "lora_te_", 1), name.replace("lora_te_", "lora_te_text_model_", 1)):
        if candidate in flat:
            return flat[candidate]
    return None
