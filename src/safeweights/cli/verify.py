"""``safeweights verify``: are released weights still what was released, and by whom?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeweights.cli import options
from safeweights.cli.common import speaking


def command(
    path: Annotated[Path, typer.Argument(help="An exported folder or .safetensors file.", show_default=False)],
    key: Annotated[
        Path | None, typer.Option("--key", help="The PEM public key of who signed. [default: only the manifest is checked]")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Hold a model against its manifest's hashes and, with --key, its signature; ends with 1 where something does not fit."""
    from safeweights.release.verify import verify as verify_model

    with speaking(as_json) as show:
        verdict = verify_model(path.expanduser(), key.expanduser() if key else None)
        said = {
            "valid": "the signature holds",
            "invalid": "the signature does not hold",
            "absent": "no signature",
            "not checked": "a signature is there; --key PUBLIC.pem checks it",
        }[verdict.signature]
        lines = [*verdict.problems[:50], *([f"… and {len(verdict.problems) - 50} more"] if len(verdict.problems) > 50 else [])]
        show(
            {"path": str(path), **verdict.to_json()},
            *lines,
            f"{'verified' if verdict.ok else 'NOT VERIFIED'}: {verdict.files} files and {verdict.tensors} changed tensors "
            f"against the manifest; {said}",
        )
    if not verdict.ok:
        raise typer.Exit(1)
