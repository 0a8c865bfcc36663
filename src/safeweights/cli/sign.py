"""``safeweights sign``: who released these weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeweights.cli import options
from safeweights.cli.common import speaking


def command(
    path: Annotated[Path, typer.Argument(help="An exported folder or .safetensors file.", show_default=False)],
    key: Annotated[Path, typer.Option("--key", help="A PEM private key on P-256, P-384 or P-521.", show_default=False)],
    as_json: options.Json = False,
) -> None:
    """Sign every file of an export with a local key; model.sig (FILE.sig) is written beside them."""
    from safeweights.release.signing import sign as sign_model

    with speaking(as_json) as show:
        signature = sign_model(path.expanduser(), key.expanduser())
        show({"signed": str(path), "signature": str(signature)}, f"signature: {signature}")
