"""``mask.safetensors`` (where a model was pruned) and ``owner.safetensors`` (what stood there): apply, undo, conceal, inspect."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.core.mask import Mask
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel
from safeweights.diffusion.masks import pruned_tensors, restored_tensors
from safeweights.models.stable_diffusion import follow_umask
from safeweights.release.manifest import hash_input, hash_tensor

MASK, OWNER = "mask.safetensors", "owner.safetensors"
_FORMAT = "safeweights-mask-1"
_INTEGERS = (torch.uint8, torch.uint16, torch.uint32, torch.int64)


@dataclass(frozen=True)
class MaskFile:
    """A mask as read from disk: ``mask`` without values until the owner's file is read, and what its header says."""

    mask: Mask
    shapes: Mapping[str, tuple[int, ...]]
    base: str
    """SHA-256 over the masked tensors before pruning …"""
    pruned: str
    """… and after."""
    facts: Mapping[str, Any]
    """Method, concepts, settings: what its maker told of it."""
    dtype: str = ""
    """In what the tensors were hashed, "float32"; empty in files of before it was noted."""

    @property
    def entries(self) -> int:
        """Entries of the masked tensors, pruned or not."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


def write_masks(protection: Protection, *, mask: Path | None = None, owner: Path | None = None) -> dict[str, Any]:
    """Write what a protection that pruned leaves: its mask to the file ``mask``, and mask and values to the folder ``owner``.

    Returns what a manifest says of it: how many weights were pruned, what stands there now, and the SHA-256 of the mask file.
    """
    made = protection.mask
    assert made is not None
    before = restored_tensors(protection.tensors, made)
    facts = {"method": protection.method, "concepts": list(protection.concepts), "settings": dict(protection.settings)}
    told: dict[str, Any] = {"pruned": made.count, "fill": made.fill}
    if mask is not None:
        write_mask(mask, made, before, facts)
        follow_umask([mask])
        told |= {"file": mask.name, "sha256": hash_input(mask)}
    if owner is not None:
        write_mask(owner / MASK, made, before, facts)
        write_owner(owner / OWNER, made, before)
    return told


def write_mask(path: Path, mask: Mask, before: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write where ``mask`` pruned the tensors ``before``: a list of flat places a tensor, in the smallest integers that do."""
    names = sorted(mask.indices)
    header = {
        "format": _FORMAT,
        "shapes": {name: list(before[name].shape) for name in names},
        "base": hash_tensors({name: before[name] for name in names}),
        "pruned": hash_tensors(pruned_tensors(before, mask)),
        "dtype": _dtype(before),
        "fill": mask.fill,
        "seed": mask.seed,
        "facts": dict(facts),
    }
    tensors = {name: mask.indices[name].to(_smallest(before[name].numel())) for name in names}
    # One entry: the order of several differs from file to file.
    save_file(tensors, path, {"mask": json.dumps(header)})


def write_owner(path: Path, mask: Mask, before: Mapping[str, Tensor]) -> None:
    """Write the values that stood in the pruned places. Whoever has this file and the mask can undo the pruning."""
    base = hash_tensors({name: before[name] for name in mask.indices})
    values = {name: mask.values[name].contiguous() for name in sorted(mask.values)}
    save_file(values, path, {"owner": json.dumps({"format": _FORMAT, "base": base})})


def read_mask(path: str | Path) -> MaskFile:
    """Read and check a mask file. Raises UserError for a missing, broken or foreign file and for places outside their tensors."""
    tensors, header = _read(path, "mask")
    try:
        shapes = {name: tuple(int(size) for size in shape) for name, shape in header["shapes"].items()}
        base, pruned, facts = str(header["base"]), str(header["pruned"]), dict(header["facts"])
        fill, seed, dtype = header["fill"], int(header["seed"]), str(header.get("dtype", ""))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is no mask of this program: its header cannot be read") from None
    if fill not in ("zero", "noise") or set(shapes) != set(tensors):
        raise UserError(f"{path} is broken: its header and its tensors do not agree")
    indices = {}
    for name, stored in tensors.items():
        where = stored.long().flatten() if not stored.is_floating_point() else torch.tensor([-1])
        size = torch.Size(shapes[name]).numel()
        if len(where) and (int(where.min()) < 0 or int(where.max()) >= size or bool((where[1:] <= where[:-1]).any())):
            raise UserError(f"{path} is broken: the places in {name} are out of range or not in order")
        indices[name] = where
    return MaskFile(Mask(indices=indices, values={}, fill=fill, seed=seed), shapes, base, pruned, facts, dtype)


def read_owner(path: str | Path, file: MaskFile) -> MaskFile:
    """The mask with its owner's values. Raises UserError for a broken file and for one that belongs to another mask."""
    values, header = _read(path, "owner")
    sizes = {name: len(where) for name, where in file.mask.indices.items()}
    if header.get("base") != file.base or {name: value.numel() for name, value in values.items()} != sizes:
        raise UserError(f"{path} does not belong to this mask; give the owner's file that was written with it")
    return replace(file, mask=replace(file.mask, values=values))


def apply(model: DiffusionModel, file: MaskFile) -> dict[str, Tensor]:
    """The tensors of the base model pruned. Raises UserError for a model that the mask was not made for."""
    weights = masked_tensors(model, file)
    state = state_of(weights, file)
    if state == "pruned":
        raise UserError(f"{model.name} is pruned by this mask already")
    if state != "base":
        raise UserError(f"this mask was made for another model than {model.name}: the tensors it names have other values here")
    tensors = pruned_tensors(weights, file.mask)
    if hash_tensors(tensors) != file.pruned:
        raise UserError("this version of the program fills other noise than the one that made the mask; use that version")
    return tensors


def undo(model: DiffusionModel, file: MaskFile) -> dict[str, Tensor]:
    """The tensors with their values back, equal to the base's bit for bit, whatever was filled in: zeros, noise, another's guess.

    Raises UserError where anything but the pruned places differs from the base.
    """
    tensors = restored_tensors(masked_tensors(model, file), file.mask)
    if hash_tensors(tensors) != file.base:
        raise UserError(
            f"{model.name} cannot be restored: outside the pruned places its tensors are not those the mask was made for; "
            "was it changed after pruning?"
        )
    return tensors


def conceal(model: DiffusionModel, file: MaskFile, seed: int) -> tuple[dict[str, Tensor], Mask]:
    """The pruned tensors with noise like the rest of their rows in the pruned places, and the mask that says so.

    Raises UserError for a model on which the mask does not lie: noise would overwrite weights that are at work.
    """
    weights = masked_tensors(model, file)
    zero = all(not weights[name].flatten()[where.to(weights[name].device)].any() for name, where in file.mask.indices.items())
    if not zero and state_of(weights, file) != "pruned":
        raise UserError(f"{model.name} is not pruned by this mask; prune it first with 'safeweights prune apply'")
    mask = replace(file.mask, fill="noise", seed=seed)
    return pruned_tensors(weights, mask), mask


def masked_tensors(model: DiffusionModel, file: MaskFile) -> dict[str, Tensor]:
    """The model's tensors that the mask names. Raises UserError for an unknown name, another shape and another precision."""
    known = dict(model.named_parameters())
    for name, shape in file.shapes.items():
        if name not in known or tuple(known[name].shape) != shape:
            raise UserError(f"this mask was made for another model than {model.name}: {name} is not there in this shape")
    weights = {name: known[name].detach() for name in file.shapes}
    if weights and file.dtype and _dtype(weights) != file.dtype:
        raise UserError(
            f"this mask was made of weights in {file.dtype}, {model.name} is open in {_dtype(weights)}; add --dtype {file.dtype}"
        )
    return weights


def state_of(weights: Mapping[str, Tensor], file: MaskFile) -> str:
    """``base``, ``pruned`` or ``other``: which of the mask's two states these tensors are in."""
    return {file.base: "base", file.pruned: "pruned"}.get(hash_tensors(weights), "other")


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{hash_tensor(tensors[name])} {name}\n".encode())
    return digest.hexdigest()


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    return next((str(value.dtype).removeprefix("torch.") for value in tensors.values()), "")


def _smallest(size: int) -> torch.dtype:
    """The smallest integers that count to ``size``."""
    return next(kind for kind in _INTEGERS if size - 1 <= torch.iinfo(kind).max)


def _read(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a ``mask`` or ``owner`` file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"the {what} file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(what, "null"))
            if not isinstance(header, dict) or header.get("format") != _FORMAT:
                raise UserError(f"{path} is no {what} file of this program")
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, ValueError) as error:
        raise UserError(f"the {what} file {path} cannot be read: {error}") from None
