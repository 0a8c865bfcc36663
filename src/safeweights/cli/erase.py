"""``safeweights erase``: remove concepts from a model's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from safeweights.cli import options
from safeweights.cli.common import concept_file, speaking
from safeweights.cli.protect import protect
from safeweights.core.concept import ConceptFile
from safeweights.core.table import ERASERS, parse_settings
from safeweights.release.output import check_target


def command(
    model: options.Model,
    concept: options.Concepts,
    output: options.Output,
    method: Annotated[str, typer.Option("--method", help=f"One of {', '.join(ERASERS)}.", show_default=False)],
    settings: options.Settings = None,
    concepts_file: options.ConceptsFile = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    owner: Annotated[
        Path | None,
        typer.Option("--owner", help="A new folder for what undoes pruning: owner.safetensors and the mask. Do not release it."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Remove concepts from a model: a plain diffusers folder with manifest.json comes out."""
    with speaking(as_json) as show:
        check_target(output, overwrite)
        file = concept_file(concepts_file, model)
        manifest = erase(
            model, concept, file, method, parse_settings(settings or ()),
            output=output, seed=seed, device=device, dtype=dtype, overwrite=overwrite, resume=resume,
            owner=owner,
        )  # fmt: skip
        show(
            {"output": str(output), **manifest},
            f"{method} erased {', '.join(manifest['concepts'])}: {len(manifest['changed'])} tensors changed in "
            f"{manifest['seconds']:.0f} s",
            f"protected model: {output}",
        )


def erase(
    model: str,
    names: Sequence[str],
    file: ConceptFile,
    method: str,
    settings: Mapping[str, Any],
    *,
    output: Path,
    command: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    owner: Path | None = None,
) -> dict[str, Any]:
    """Erase, write the folder and return its manifest. Raises UserError for whatever the user gave wrong."""
    return protect(
        model, names, file, method, settings, registry=ERASERS, doing="erasing", output=output, command=command, seed=seed,
        device=device, dtype=dtype, overwrite=overwrite, resume=resume, owner=owner,
    )  # fmt: skip
