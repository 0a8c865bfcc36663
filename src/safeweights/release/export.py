"""A model in the form somebody else needs it, with the recipe of its protection beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.core.errors import UserError
from safeweights.release.manifest import NAME, write_manifest
from safeweights.release.output import write_json

if TYPE_CHECKING:
    from safeweights.core.model import DiffusionModel

FORMATS = ("diffusers", "text-encoder")


def export(
    model: DiffusionModel,
    folder: Path,
    form: str,
    *,
    command: Sequence[str],
    options: Mapping[str, Any],
    inputs: Mapping[str, str | None],
    protected: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``model`` as a plain diffusers folder or its text encoder alone as a CLIPTextModel folder; returns the manifest.

    ``protected`` is the manifest of the protection that the weights come from, {} for none: method, concepts, settings, changed
    tensors and cost are handed on. Raises UserError for an unknown form and for a text encoder that its protection left alone.
    """
    changed = set(protected.get("changed", ()))
    if form == "diffusers":
        model.save(folder)
    elif form == "text-encoder":
        changed = {name for name in changed if name.startswith("text_encoder.")}
        if protected and not changed:
            raise UserError(
                f"{protected['method']} changed nothing in this model's text encoder; export the whole model with "
                "--format diffusers, or erase with a method that trains the text encoder (advunlearn)"
            )
        save: Any = getattr(model, "save_text_encoder", None)
        if save is None:
            raise UserError(f"{model.name} has no text encoder of its own to write")
        save(folder)
    else:
        raise UserError(f"unknown format {form!r}; known are {', '.join(FORMATS)}")
    settings = protected.get("options", {}).get("settings", {})
    manifest = write_manifest(
        folder,
        command=command,
        method=str(protected.get("method", "")),
        concepts=list(protected.get("concepts", ())),
        options={**options, "settings": settings},
        seed=int(protected.get("seed", 0)),
        inputs=inputs,
        tensors={name: parameter for name, parameter in model.named_parameters() if name in changed},
        cost=protected.get("cost", {}),
        seconds=float(protected.get("seconds", 0.0)),
    )
    if protected:
        # What protecting took, not what copying took.
        manifest["peak_memory_gb"] = protected.get("peak_memory_gb")
        manifest["protection"] = dict(protected)
        write_json(folder / NAME, manifest)
    return manifest
