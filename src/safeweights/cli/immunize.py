"""``safeweights immunize``: move a model's weights to where learning a concept does not help."""

from __future__ import annotations

from typing import Annotated

import typer

from safeweights.cli import options
from safeweights.cli.common import concept_file, speaking
from safeweights.cli.protect import protect
from safeweights.core.table import IMMUNIZERS, parse_settings
from safeweights.release.output import check_target


def command(
    model: options.Model,
    concept: options.Concepts,
    output: options.Output,
    method: Annotated[str, typer.Option("--method", help=f"One of {', '.join(IMMUNIZERS)}.", show_default=False)],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="Who draws concepts without pictures. [default: MODEL, or what it was before protection]"
        ),
    ] = None,
    settings: options.Settings = None,
    concepts_file: options.ConceptsFile = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Make a model resist being fine-tuned on concepts: a plain diffusers folder with manifest.json comes out."""
    with speaking(as_json) as show:
        check_target(output, overwrite)
        manifest = protect(
            model, concept, concept_file(concepts_file, model), method, parse_settings(settings or ()),
            registry=IMMUNIZERS, doing="immunizing", draws=True, reference=reference,
            output=output, seed=seed, device=device, dtype=dtype, overwrite=overwrite, resume=resume,
        )  # fmt: skip
        show(
            {"output": str(output), **manifest},
            f"{method} immunized against {', '.join(manifest['concepts'])}: {len(manifest['changed'])} tensors changed in "
            f"{manifest['seconds']:.0f} s",
            f"protected model: {output}",
        )
