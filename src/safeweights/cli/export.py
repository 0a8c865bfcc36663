"""``safeweights export``: a model, or its text encoder alone, in the form somebody else needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from safeweights.cli import options
from safeweights.cli.common import SANDBOX, hash_of, is_sandbox, speaking
from safeweights.core.errors import UserError
from safeweights.release.export import FORMATS, export
from safeweights.release.manifest import hash_input, read_manifest
from safeweights.release.output import check_target, output_folder


def command(
    model: options.Model,
    output: options.Output,
    form: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.", show_default=False)],
    text_encoder: Annotated[
        Path | None,
        typer.Option("--text-encoder", help="A CLIPTextModel or diffusers folder whose text encoder takes the place of its own."),
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a model as a diffusers folder, or its text encoder alone; --text-encoder drops an erased one into another model."""
    from safeweights.models.door import open_model

    with speaking(as_json) as show:
        check_target(output, overwrite)
        if form not in FORMATS:
            raise UserError(f"unknown format {form!r}; known are {', '.join(FORMATS)}")
        opened = open_model(model, device=device, dtype=dtype, text_encoder=text_encoder)
        # The protection that the result carries is that of the encoder that was put in.
        protected = read_manifest(str((text_encoder or Path(model)).expanduser()))
        chosen: dict[str, Any] = {
            "model": model,
            "base": SANDBOX if is_sandbox(model) else model,
            "format": form,
            "text_encoder": str(text_encoder) if text_encoder else None,
        }
        inputs = {
            "model": hash_of(model, opened),
            **({"text_encoder": hash_input(text_encoder.expanduser())} if text_encoder else {}),
        }
        with output_folder(output, overwrite=overwrite, options={**chosen, "inputs": inputs}) as out:
            manifest = export(
                opened, out.folder, form,
                command=["safeweights", *sys.argv[1:]], options=chosen, inputs=inputs, protected=protected,
            )  # fmt: skip
        what = "text encoder" if form == "text-encoder" else "model"
        show({"output": str(output), **manifest}, f"{what} written: {output}")
