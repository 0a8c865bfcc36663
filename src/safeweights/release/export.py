"""A model in the form somebody else needs it, with the recipe of its protection beside it or inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.core.errors import UserError
from safeweights.core.text import plain
from safeweights.release.adapted import LORA
from safeweights.release.manifest import NAME, hash_files, make_manifest
from safeweights.release.output import write_json

if TYPE_CHECKING:
    from safeweights.core.model import DiffusionModel
    from safeweights.release.lora import Edit

FORMATS = ("diffusers", "single-file", "lora", "text-encoder")
SINGLE = "model.safetensors"
IN_FILES = ("single-file", "lora")
"""Formats that can be one file."""


def export(
    model: DiffusionModel,
    path: Path,
    form: str,
    *,
    command: Sequence[str],
    options: Mapping[str, Any],
    inputs: Mapping[str, str | None],
    protected: Mapping[str, Any],
    about: Mapping[str, str | None] | None = None,
    card: str | None = None,
    evaluations: str | None = None,
    base: DiffusionModel | None = None,
) -> dict[str, Any]:
    """Write ``model`` to ``path`` and return the manifest.

    "diffusers" fills a plain diffusers folder, "text-encoder" a CLIPTextModel folder, and "single-file" writes one
    ``.safetensors`` file of the original layout, its manifest inside. ``protected`` is the manifest of the protection that the
    weights come from, {} for none: method, concepts, settings, changed tensors and cost are handed on. ``about`` is title,
    description, license and author of a single file; ``card`` and ``evaluations`` are README.md and
    ``.eval_results/safeweights.yaml`` of a folder. A single file for a folder that is there becomes its ``model.safetensors``.
    "lora" is `export_lora` with its defaults, and needs the ``base``.
    Raises UserError for an unknown form and for a text encoder that its protection left alone.
    """
    changed = set(protected.get("changed", ()))
    if form == "text-encoder":
        changed = {name for name in changed if name.startswith("text_encoder.")}
        if protected and not changed:
            raise UserError(
                f"{plain(protected['method'])} changed nothing in this model's text encoder; export the whole model with "
                "--format diffusers, or erase with a method that trains the text encoder (advunlearn)"
            )
    if form == "lora" and base is not None:
        from safeweights.release.lora import measured_edit

        edit, errors = measured_edit(model, base, protected.get("concepts", ()))
        return export_lora(
            edit, base, path, layout="peft", command=command, options=options, inputs=inputs, protected=protected, errors=errors,
            about=about, card=card,
        )  # fmt: skip
    if form not in ("diffusers", "single-file", "text-encoder"):
        raise UserError(f"unknown format {form!r}; known are {', '.join(FORMATS)}")
    tensors = {name: parameter for name, parameter in model.named_parameters() if name in changed}
    manifest = _manifest(protected, command=command, options=options, inputs=inputs, tensors=tensors)
    if form == "single-file":
        from safeweights.release.checkpoint import write_checkpoint

        file = path / SINGLE if path.is_dir() else path
        write_checkpoint(model, file, manifest, about=about or {})
        return _complete(path, manifest, None, None) if path.is_dir() else manifest
    if form == "diffusers":
        model.save(path)
    else:
        save: Any = getattr(model, "save_text_encoder", None)
        if save is None:
            raise UserError(f"{model.name} has no text encoder of its own to write")
        save(path)
    return _complete(path, manifest, card, evaluations)


def with_encoder(model: Mapping[str, Any], encoder: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The protection of a model into which another one's text encoder was put: what each of the two left in the result.

    Raises UserError where the other one's protection never touched its text encoder, so that nothing of it comes along.
    """
    plugged = {key: digest for key, digest in encoder.get("changed", {}).items() if key.startswith("text_encoder.")}
    if encoder and not plugged:
        raise UserError(
            f"{plain(encoder['method'])} changed nothing in the text encoder of {plain(name)}: nothing of it would come along; "
            "take an encoder that was trained (advunlearn)"
        )
    own = {key: digest for key, digest in model.get("changed", {}).items() if not key.startswith("text_encoder.")}
    parts = [part | {"changed": kept} for part, kept in ((dict(model), own), (dict(encoder), plugged)) if kept]
    if len(parts) < 2:
        return parts[0] if parts else {}
    second = parts[1]
    steps = [step for part in parts for step in part.get("chain") or [part]]
    return {
        **second,
        "method": "+".join(dict.fromkeys(str(part["method"]) for part in parts)),
        "concepts": list(dict.fromkeys(concept for part in parts for concept in part.get("concepts", ()))),
        "options": {**second.get("options", {}), "settings": {
            str(part["method"]): part.get("options", {}).get("settings", {}) for part in parts
        }},
        "changed": own | plugged,
        "cost": {},
        "seconds": sum(float(part.get("seconds", 0.0)) for part in parts),
        "peak_memory_gb": max((part["peak_memory_gb"] for part in parts if part.get("peak_memory_gb")), default=None),
        "chain": steps,
    }  # fmt: skip


def export_lora(
    edit: Edit,
    base: DiffusionModel,
    path: Path,
    *,
    layout: str,
    command: Sequence[str],
    options: Mapping[str, Any],
    inputs: Mapping[str, str | None],
    protected: Mapping[str, Any],
    errors: Mapping[str, Any],
    about: Mapping[str, str | None] | None = None,
    card: str | None = None,
) -> dict[str, Any]:
    """Write an edit as a LoRA and return the manifest.

    ``path`` is a folder (``pytorch_lora_weights.safetensors`` and manifest.json) or one file, its manifest inside. ``errors`` say
    how near the LoRA comes (`release.lora.describe`).
    """
    from safeweights.release.lora import hashes, write_lora

    manifest = _manifest(protected, command=command, options=options, inputs=inputs, tensors={})
    manifest["changed"] = hashes(edit, layout)
    manifest["lora"] = {"layout": layout, **errors}
    write_lora(edit, base, path / LORA if path.is_dir() else path, manifest, layout=layout, about=about or {})
    return _complete(path, manifest, card, None) if path.is_dir() else manifest


def _manifest(protected: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """The manifest of an export: its own command and inputs, and what the protection was and took."""
    settings = protected.get("options", {}).get("settings", {})
    manifest = make_manifest(
        method=str(protected.get("method", "")),
        concepts=list(protected.get("concepts", ())),
        seed=int(protected.get("seed", 0)),
        cost=protected.get("cost", {}),
        seconds=float(protected.get("seconds", 0.0)),
        **{**facts, "options": {**facts["options"], "settings": settings}},
    )
    if protected:
        # What protecting took, not what copying took.
        manifest["peak_memory_gb"] = protected.get("peak_memory_gb")
        manifest["protection"] = dict(protected)
    return manifest


def _complete(folder: Path, manifest: dict[str, Any], card: str | None, evaluations: str | None) -> dict[str, Any]:
    """Card, evaluations and, last, the manifest with the hash of every other file."""
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    if evaluations is not None:
        (folder / ".eval_results").mkdir()
        (folder / ".eval_results" / "safeweights.yaml").write_text(evaluations, encoding="utf-8")
    manifest["files"] = hash_files(folder)
    write_json(folder / NAME, manifest)
    return manifest
