"""``safeweights compare``: two audits side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safeweights.cli import options
from safeweights.cli.common import speaking
from safeweights.core.errors import UserError

if TYPE_CHECKING:
    from safeweights.records.record import Record


def command(
    a: Annotated[Path, typer.Argument(metavar="DIR_A", help="Records from before.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="DIR_B", help="Records from after.", show_default=False)],
    as_json: options.Json = False,
) -> None:
    """Say what got better, what worse, and what the numbers cannot tell apart, with 95 % intervals."""
    from safeweights.report import comparison

    with speaking(as_json) as show:
        changes = comparison.compare(_records(a), _records(b))
        found = comparison.counts(changes)
        show(
            {"a": str(a), "b": str(b), **comparison.as_json(changes)},
            *comparison.table(changes),
            ", ".join(f"{number} {state}" for state, number in found.items() if number) or "nothing to compare",
        )


def _records(folder: Path) -> list[Record]:
    from safeweights.records.store import gather

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one that audit, run, attack or evaluate wrote")
    if not (found := gather(folder)):
        raise UserError(f"{folder} holds no records; give a folder that audit, run, attack or evaluate wrote")
    return found
