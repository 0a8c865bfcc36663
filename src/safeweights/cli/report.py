"""``safeweights report``: one HTML page from the records of a folder, and on demand a table of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeweights.cli import options
from safeweights.cli.common import speaking
from safeweights.core.errors import UserError


def command(
    folder: Annotated[Path, typer.Argument(help="A folder that holds records.", show_default=False)],
    export: Annotated[
        Path | None,
        typer.Option("--export", help="Write the records as a table as well: FILE.csv or FILE.parquet.", show_default=False),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write FOLDER/report.html from the records in FOLDER."""
    from safeweights.records.store import export as write_table
    from safeweights.report.page import write_report

    with speaking(as_json) as show:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; give one that attack, evaluate or demo wrote")
        # The table first: where its name is no good, nothing is written.
        rows = None if export is None else write_table(folder, export)
        path = write_report(folder)
        told = {"report": str(path)} if rows is None else {"report": str(path), "export": str(export), "rows": rows}
        show(told, f"report: {path}", *([] if rows is None else [f"table: {export}, {rows} rows"]))
