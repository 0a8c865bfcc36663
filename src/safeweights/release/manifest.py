"""``manifest.json``: the exact recipe of a protected model, beside the model. No torch at import."""

from __future__ import annotations

import hashlib
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
) -> dict[str, Any]:
    """Write and return the manifest. ``tensors`` are the changed ones; ``inputs`` maps each input to its SHA-256."""
    manifest = {
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
    write_json(folder / NAME, manifest)
    return manifest


def read_manifest(model: str) -> dict[str, Any]:
    """The manifest of a protected model's folder; {} for any other model."""
    import json

    path = Path(model) / NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


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
        # A manifest holds times, so the same weights would have another hash; a mask beside them holds this very hash.
        if file_.name not in (NAME, "MASK.json"):
            digest.update(f"{hash_input(file_)} {file_.relative_to(path).as_posix()}\n".encode())
    return digest.hexdigest()


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
