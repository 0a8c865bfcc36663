"""``manifest.json``: the exact recipe of a protected model, beside the model. No torch at import."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights import __version__
from safeweights.records.machine import peak_memory_gb, versions
from safeweights.release.output import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from safeweights.core.concept import ConceptFile
    from safeweights.core.model import DiffusionModel
    from safeweights.records.record import Record

NAME = "manifest.json"
SIGNATURE = "model.sig"
EMBEDDED = "safeweights.manifest"
"""The metadata entry of a single file that holds its manifest."""
LARGEST = 64 * 2**20
"""Bytes of a manifest or a file's header; larger ones are not ours."""
LONGEST = 10_000
"""Characters of a string that is handed on from somebody's manifest; prompts and paths are shorter."""
SHAPE: dict[str, Any] = {
    "safeweights": str, "command": list, "method": str, "concepts": list, "options": dict, "seed": int, "inputs": dict,
    "changed": dict, "cost": dict, "seconds": (int, float), "peak_memory_gb": (int, float), "versions": dict,
    "recipe": (dict, str),
    "chain": list,
}  # fmt: skip
"""The entries of a manifest that are handed on, and their types."""


def write_manifest(
    folder: Path,
    *,
    command: Sequence[str],
    method: str,
    concepts: Sequence[str],
    options: Mapping[str, Any],
    seed: int,
    inputs: Mapping[str, str | None],
    tensors: Mapping[str, Tensor],
    cost: Mapping[str, float],
    seconds: float,
    **more: Any,
) -> dict[str, Any]:
    """Write and return the manifest. ``tensors`` are the changed ones; ``inputs`` maps each input to its SHA-256.

    ``more`` are further entries: what a method leaves beside the model.
    """
    manifest = make_manifest(
        command=command, method=method, concepts=concepts, options=options, seed=seed, inputs=inputs, tensors=tensors, cost=cost,
        seconds=seconds,
    ) | more  # fmt: skip
    write_json(folder / NAME, manifest)
    return manifest


def make_manifest(
    *,
    command: Sequence[str],
    method: str,
    concepts: Sequence[str],
    options: Mapping[str, Any],
    seed: int,
    inputs: Mapping[str, str | None],
    tensors: Mapping[str, Tensor],
    cost: Mapping[str, float],
    seconds: float,
) -> dict[str, Any]:
    """What `write_manifest` writes."""
    return {
        "safeweights": __version__,
        "command": list(command),
        "method": method,
        "concepts": list(concepts),
        "options": dict(options),
        "seed": seed,
        "inputs": dict(inputs),
        "changed": {name: hash_tensor(tensor) for name, tensor in sorted(tensors.items())},
        "cost": dict(cost),
        "seconds": round(seconds, 3),
        "peak_memory_gb": peak_memory_gb(),
        "versions": versions(),
    }


def read_manifest(model: str | Path) -> dict[str, Any]:
    """The manifest of a protected model, beside it in its folder or inside its single file; {} for any other model."""
    path = Path(model)
    try:
        if path.is_file():
            text = read_metadata(path).get(EMBEDDED, "") if path.suffix == ".safetensors" else ""
        else:
            text = (path / NAME).read_text(encoding="utf-8") if (path / NAME).stat().st_size <= LARGEST else ""
        data = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file, read without torch. Raises ValueError or OSError for one that cannot be read."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > LARGEST:
            raise ValueError(f"{file} has a header of {size} bytes")
        header = json.loads(opened.read(size))
    found = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def read_protection(model: str | Path) -> dict[str, Any]:
    """The manifest of the protection that a model's weights come from, whoever wrote it: {} for none.

    Entries of another type than `make_manifest` writes are dropped, and strings of more than `LONGEST` characters cut, so that
    what is handed on is small and has the shape it is read with.
    """
    found = read_manifest(model)
    if isinstance(found.get("protection"), dict):
        found = found["protection"]  # an export of an export tells of the protection, not of the copying
    if not isinstance(found.get("method"), str) or not found["method"]:
        return {}
    kept: dict[str, Any] = {key: cut(found[key]) for key, kind in SHAPE.items() if isinstance(found.get(key), kind)}
    kept["concepts"] = [name for name in kept.get("concepts", []) if isinstance(name, str)]
    kept["chain"] = [step for step in kept.get("chain", []) if isinstance(step, dict)]
    kept["changed"] = {name: digest for name, digest in kept.get("changed", {}).items() if isinstance(digest, str)}
    if not isinstance(kept.get("options", {}).get("settings", {}), dict):
        kept["options"]["settings"] = {}
    return kept


def lineage(model: str) -> list[tuple[str, dict[str, Any]]]:
    """A model and what it was made from, newest first: (name, manifest), {} where there is none. The last is the base.

    Follows ``options.model`` of each manifest as far as manifests are there; a cycle ends it.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    while len(found) < 64 and model not in [name for name, _ in found]:
        manifest = read_manifest(Path(model).expanduser())
        found.append((model, manifest))
        options = manifest.get("options")
        before = options.get("model") if isinstance(options, dict) else None
        if not isinstance(before, str) or not before:
            break
        model = before
    return found


def cut(value: Any, longest: int | None = None) -> Any:
    """JSON data with every longer string cut, and the cut told."""
    limit = LONGEST if longest is None else longest
    if isinstance(value, str):
        return value if len(value) <= limit else f"{value[:limit]}… ({len(value) - limit} characters cut)"
    if isinstance(value, Mapping):
        return {str(cut(str(key), limit)): cut(item, limit) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cut(item, limit) for item in value]
    return value


def protection_records(manifest: Mapping[str, Any], file: ConceptFile, *, model: str, reference: str) -> list[Record]:
    """What a protection cost, as one record for each of its concepts that the file knows."""
    from safeweights.records.record import Measurement, Record

    cost = {"seconds": manifest["seconds"], "peak_memory_gb": manifest["peak_memory_gb"], **manifest["cost"]}
    units = {"seconds": "s", "peak_memory_gb": "GB"}
    measurements = tuple(
        Measurement(
            name=name, value=value, n=1, better="lower", unit=units.get(name, ""), why="" if value is not None else "not told"
        )
        for name, value in cost.items()
    )
    return [
        Record(
            kind="protect", status="ok", model=model, reference=reference, method=manifest["method"], concept=name,
            concept_kind=file.concepts[name].kind, attack="", seed=manifest["seed"],
            settings={"method": manifest["options"]["settings"]}, measurements=measurements,
            details={"command": " ".join(manifest["command"]), "tensors_changed": len(manifest["changed"])},
            provenance={"inputs": manifest["inputs"], "versions": manifest["versions"]},
        )
        for name in manifest["concepts"]
        if name in file.concepts
    ]  # fmt: skip


def hash_input(path: str | Path) -> str | None:
    """SHA-256 of a file, or of the names and digests of a folder's files; None for what is neither."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file_ in sorted(item for item in path.rglob("*") if item.is_file() and not _hidden(item.relative_to(path))):
        # A manifest holds times and a recipe what is measured later, so the same weights would have another hash; a mask beside
        # them holds this very hash.
        if file_.name not in (NAME, "MASK.json", "recipe.yaml"):
            digest.update(f"{hash_input(file_)} {file_.relative_to(path).as_posix()}\n".encode())
    return digest.hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 by relative path of every file of a folder but its manifest, its signature and what git keeps."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.as_posix() not in (NAME, SIGNATURE) and name.parts[0] not in (".git", ".cache"):
            found[name.as_posix()] = str(hash_input(path))
    return found


def hash_model(model: DiffusionModel, source: str | Path | None = None) -> str:
    """SHA-256 of a model's files, or of its tensors where it has no files here (a Hub id)."""
    if source is not None and (digest := hash_input(source)):
        return digest
    total = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        total.update(f"{hash_tensor(tensor)} {name}\n".encode())
    return total.hexdigest()


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    import torch

    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}\n".encode())
    digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
