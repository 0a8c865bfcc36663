"""``safeweights report``: one HTML page from the records of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeweights.cli import options
from safeweights.cli.common import speaking
from safeweights.core.errors import UserError


def command(
    folder: Annotated[Path, typer.Argument(help="A folder that holds records.", show_default=False)],
    as_json: options.Json = False,
) -> None:
    """Write FOLDER/report.html from the records in FOLDER."""
    from safeweights.report.page import write_report

    with speaking(as_json) as show:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; give one that attack, evaluate or demo wrote")
        path = write_report(folder)
        show({"report": str(path)}, f"report: {path}")
