"""``safeweights bench``: methods x concepts x attacks x seeds from one file, resumable, with a leaderboard."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeweights.cli import options
from safeweights.cli.common import speaking
from safeweights.core.errors import UserError

if TYPE_CHECKING:
    from safeweights.bench.runner import Job, Outcome

LIVE_SECONDS = 600.0
"""How often the leaderboard and the report of an unfinished benchmark are written."""


def command(
    spec: Annotated[Path, typer.Argument(metavar="BENCH.yaml", help="What to measure.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder of the benchmark: new, empty, or one to go on with.", show_default=False),
    ] = None,
    executor: Annotated[str, typer.Option("--executor", help="local or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option("--address", help="A running Ray cluster's address. [default: one is begun on this machine]")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Worker processes of the local executor.")] = 1,
    concept: Annotated[list[str] | None, typer.Option("--concept", help="Only this concept of the file; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option("--method", help="Only this method's label; repeatable.")] = None,
    attack: Annotated[list[str] | None, typer.Option("--attack", help="Only this attack's label; repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Only this seed of the file; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and measure nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on; the same command does so without it as well.")] = False,
    allow_python_detectors: options.AllowPython = False,
    as_json: options.Json = False,
) -> int:
    """Measure every method on every concept under every attack; a leaderboard and a report come out.

    A finished cell is never measured again: after an interrupt, a kill or an added method the same command does what is left.
    Exit 1 where a cell failed; the same command tries it again.
    """
    from safeweights.bench.spec import load_bench

    with speaking(as_json) as show:
        if executor not in ("local", "ray"):
            raise UserError(f"unknown executor {executor!r}; use local or ray")
        if output is None and not dry_run:
            raise UserError("the output folder is missing; name it with -o")
        wanted = load_bench(spec).narrowed(concepts=concept, methods=method, attacks=attack, seeds=seed)
        from safeweights.bench.runner import prepare, run

        job = prepare(wanted, output or Path("bench"), allow_python_detectors=allow_python_detectors)
        if dry_run:
            states = {cell.title: cell.key in job.finished for cell in job.cells}
            show(
                {"cells": len(job.cells), "finished": len(job.finished), "plan": list(states)},
                *(f"{'done' if done else 'open'}  {title}" for title, done in states.items()),
                f"{len(job.cells)} cells, {len(job.finished)} finished",
            )
            return 0
        failed, written = [], time.monotonic()
        try:
            for outcome in _told(job, run(job, executor=executor, jobs=jobs, address=address)):
                failed += [] if outcome.ok else [outcome]
                if time.monotonic() - written > LIVE_SECONDS:
                    _write(job)
                    written = time.monotonic()
        except KeyboardInterrupt:
            if job.records():
                _write(job)
            print("what was measured is kept; the same command goes on", file=sys.stderr)
            raise
        board, page = _write(job)
        show(
            {
                "cells": len(job.cells),
                "finished_before": len(job.finished),
                "measured": len(job.open_cells) - len(failed),
                "failed": [{"cell": outcome.cell.title, "error": outcome.said} for outcome in failed],
                "leaderboard": str(board),
                "report": str(page),
            },
            f"{len(job.cells)} cells: {len(job.finished)} finished before, {len(job.open_cells) - len(failed)} measured, "
            f"{len(failed)} failed",
            *(f"failed: {outcome.cell.title}: {outcome.said}" for outcome in failed),
            f"leaderboard: {board}",
            f"report: {page}",
        )
        return 1 if failed else 0


def _write(job: Job) -> tuple[Path, Path]:
    """The leaderboard, as text and as a page, and the report, from what is recorded by now."""
    from safeweights.bench.leaderboard import leaderboard, leaderboard_page
    from safeweights.report.page import write_page, write_report

    records = job.records()
    named: dict[str, Any] = {
        "methods": [entry.title for entry in job.spec.methods],
        "concepts": list(job.spec.concepts),
        "attacks": [entry.title for entry in job.spec.attacks],
    }
    board = write_page(
        job.folder / "leaderboard.md", leaderboard(records, **named, benign=job.spec.benign, baselines=job.spec.baselines())
    )
    more: dict[str, Any] = {"benign": job.spec.benign, "baselines": job.spec.baselines(), "total": len(job.cells)}
    write_page(job.folder / "leaderboard.html", leaderboard_page(records, **named, **more))
    return board, write_report(job.folder, records)


def _told(job: Job, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """Each outcome as a line on stderr, and a bar below them where a person looks."""
    total, done, began = len(job.open_cells), 0, time.perf_counter()

    def line(outcome: Outcome) -> str:
        width = len(str(total))
        said = outcome.said if outcome.ok else f"FAILED: {outcome.said}"
        return f"[{done:{width}}/{total}] {outcome.cell.title}: {said} ({outcome.seconds:.0f} s)"

    if not sys.stderr.isatty():
        for outcome in outcomes:
            done += 1
            left = (time.perf_counter() - began) / done * (total - done)
            print(f"{line(outcome)}; about {left / 60:.0f} min left", file=sys.stderr, flush=True)
            yield outcome
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("cells", total=total)
        for outcome in outcomes:
            done += 1
            bar.console.print(line(outcome), markup=False, highlight=False)
            bar.advance(task)
            yield outcome
