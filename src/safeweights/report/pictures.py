"""Pictures and plots of a report: which are shown side by side, each read once, until the page is heavy enough. No torch."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.records.record import Artefact, Record
from safeweights.report import tables
from safeweights.report.plots import draw
from safeweights.report.tables import AttackRow, Case

if TYPE_CHECKING:
    from markupsafe import Markup

Key = tuple[str, int]
"""An original prompt and its seed."""
Column = dict[str, Artefact]
"""The pictures of one original prompt by role."""
Shown = tuple["Markup", int, int]
"""A picture: data URI, width, height."""
PROMPTS_SHOWN = 8
"""Columns of pictures per concept."""
FILM_PROMPTS = 4
"""Columns of pictures per checkpoint of re-learning."""
ROWS_SHOWN = 16
"""Rows of pictures in one table."""
WEIGHT = 9_000_000
"""Characters of all pictures together: a page that is heavier opens slowly and fits in no mail."""
PLOTS, PLOTS_TOGETHER = 24, 240
"""The most plots of one record, and of the page."""
LARGEST = 256
"""Pictures with a longer side are scaled down to this many pixels, or the page would weigh more than a mail may."""
PIXELATED = 128
"""Pictures up to this many pixels are enlarged without blurring, so that the detector's input is what is seen."""


@dataclass(frozen=True)
class Picture:
    """One cell of the grid."""

    source: Markup | None
    """A data URI; None where the file is missing or no picture. Written here, so it needs no escaping."""
    alt: str
    prompt: str
    show_prompt: bool
    detected: bool | None
    score: str
    tiny: bool
    width: int
    height: int
    left_out: bool = False
    """There is a picture, but the page is heavy enough."""


@dataclass(frozen=True)
class Row:
    """The pictures of one model (or attack), one per column."""

    label: str
    note: str
    role: str
    pictures: tuple[Picture | None, ...]


@dataclass(frozen=True)
class Grid:
    """Pictures of one concept: one original prompt and seed per column."""

    columns: tuple[tuple[str, int], ...]
    rows: tuple[Row, ...]
    others: tuple[Row, ...]
    """The attacks that are not their method's strongest."""
    total: int
    """How many prompts have pictures; the page shows the first ones."""
    dropped: int
    """Rows that are not shown."""


@dataclass(frozen=True)
class Frame:
    """Pictures after so many optimiser steps."""

    step: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Film:
    """What re-learning brings back, checkpoint by checkpoint: methods one below the other, prompts side by side."""

    title: str
    columns: tuple[tuple[str, int], ...]
    frames: tuple[Frame, ...]


class Studio:
    """Reads pictures, each once, until the page is heavy enough; draws plots and numbers them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.cache: dict[str, Shown | None] = {}
        self.left = WEIGHT
        self.plots = 0

    def embed(self, path: str) -> Shown | None:
        """The picture, or None where it is missing; raises FullError where the page can take no more."""
        if path not in self.cache:
            if self.left <= 0:
                raise FullError
            self.cache[path] = found = _embed(self.folder, path)
            self.left -= len(found[0]) if found else 0
        return self.cache[path]

    def draw(self, specs: Any) -> list[Markup]:
        """The plots that a record brings, or a note in place of one that cannot be drawn."""
        from markupsafe import Markup, escape

        if not isinstance(specs, list):
            return []
        drawn = []
        for spec in specs[:PLOTS]:
            if self.plots >= PLOTS_TOGETHER:
                break
            self.plots += 1
            try:
                drawn.append(draw(spec, f"plot-{self.plots}"))
            except ValueError as error:
                drawn.append(
                    Markup('<p class="aside">A plot could not be drawn: {}.</p>').format(escape(tables.printable(str(error))))
                )
        return drawn


class FullError(Exception):
    """The page is heavy enough."""


def films_of(cases: Sequence[Case], studio: Studio) -> list[Film]:
    """The pictures at every checkpoint, for each attack that keeps some."""
    by_attack: dict[str, list[tuple[Case, AttackRow, dict[tuple[Key, int], Artefact]]]] = {}
    for case in cases:
        for row in case.attacks:
            pictures = {
                ((entry.prompt, entry.seed), entry.step): entry
                for record in row.records[:1] for entry in record.artefacts if entry.step is not None
            }  # fmt: skip
            if pictures:
                by_attack.setdefault(row.title, []).append((case, row, pictures))
    films = []
    for title, found in by_attack.items():
        found = found[:ROWS_SHOWN]
        columns = tuple(dict.fromkeys(key for _, _, pictures in found for key, _ in pictures))[:FILM_PROMPTS]
        frames = []
        for step in sorted({step for _, _, pictures in found for _, step in pictures})[:24]:
            rows = []
            for case, _, pictures in found:
                shown = tuple(
                    picture_of(pictures[key, step], f"{case.title}, {title} after {step} steps", key, studio)
                    if (key, step) in pictures else None
                    for key in columns
                )  # fmt: skip
                if any(picture and not picture.left_out for picture in shown):
                    rows.append(Row(case.title, "", "relearned", shown))
            if rows:
                frames.append(Frame(step, tuple(rows)))
        if frames:
            films.append(Film(title, columns, tuple(frames)))
    return films


def _columns(record: Record) -> dict[Key, Column]:
    """The pictures of a record by original prompt and seed, then by role."""
    groups: dict[Any, Column] = {}
    artefacts = [artefact for artefact in record.artefacts if artefact.step is None]
    tied = len({artefact.group for artefact in artefacts}) > 1 or len(artefacts) <= 3
    counts: dict[str, int] = {}
    for artefact in artefacts:
        # Records written without groups list the pictures of each role in the same order.
        counts[artefact.role] = counts.get(artefact.role, -1) + 1
        key = artefact.group if tied else counts[artefact.role]
        groups.setdefault(key, {}).setdefault(artefact.role, artefact)
    columns: dict[Key, Column] = {}
    for group, column in sorted(groups.items()):
        original = column.get("protected") or column.get("reference")
        columns[(original.prompt, original.seed) if original else (f"prompt {group + 1}", 0)] = column
    return columns


def grid_of(cases: Sequence[Case], studio: Studio) -> Grid | None:
    """Reference, protected and attacked pictures of every method, the same prompt and seed below one another."""
    pictured = [_pictured(case) for case in cases]
    keys: dict[Key, None] = {}
    longest = max((len(columns) for attacks, _ in pictured for _, _, columns in attacks), default=0)
    sources = [[columns for _, _, columns in attacks] if longest else rest for attacks, rest in pictured]
    for columns_of_case in sources:
        for columns in columns_of_case:
            keys.update(dict.fromkeys(columns))
    if not keys:
        return None
    shown = tuple(keys)[:PROMPTS_SHOWN]

    def row(label: str, note: str, role: str, found: Iterable[dict[Key, Column]]) -> Row | None:
        pictures: list[Picture | None] = []
        found = list(found)
        for key in shown:
            artefact = next((columns[key][role] for columns in found if role in columns.get(key, {})), None)
            pictures.append(picture_of(artefact, f"{label} {note}".strip(), key, studio) if artefact else None)
        if not any(pictures):
            return None
        if all(picture is None or picture.left_out for picture in pictures):
            return Row("", "", "left out", ())
        return Row(label, note, role, tuple(pictures))

    everything = [[columns for _, _, columns in attacks] + rest for attacks, rest in pictured]
    rows = [row("Before protection", "", "reference", [columns for found in everything for columns in found])]
    others: list[Row | None] = []
    for case, (attacks, _), found in zip(cases, pictured, everything, strict=True):
        rows.append(row(case.title, "asked plainly", "protected", found))
        for label, seed, columns in attacks[:1]:
            rows.append(row(case.title, f"{label}{seed}", "attacked", [columns]))
    for case, (attacks, _) in zip(cases, pictured, strict=True):
        for label, seed, columns in attacks[1:]:
            if len(others) < ROWS_SHOWN:
                others.append(row(case.title, f"{label}{seed}", "attacked", [columns]))
    most = 1 + 2 * ROWS_SHOWN
    main, rest = ([found for found in some if found and found.role != "left out"] for some in (rows[:most], others))
    there = sum(row is not None for row in rows) + sum(len(attacks[1:]) for attacks, _ in pictured)
    return Grid(shown, tuple(main), tuple(rest), len(keys), there - len(main) - len(rest)) if main else None


def _pictured(case: Case) -> tuple[list[tuple[str, str, dict[Key, Column]]], list[dict[Key, Column]]]:
    """The attacks of a case that show attacked pictures, strongest first, and the other records' pictures."""
    attacks, rest = [], []
    order = sorted(case.attacks, key=lambda row: row.asr.rate if row.asr else -1.0, reverse=True)
    for row in order:
        for record in row.records:
            columns = _columns(record)
            if any("attacked" in column for column in columns.values()):
                attacks.append((row.title, f", seed {record.seed}" if len(row.seeds) > 1 else "", columns))
            elif columns:
                rest.append(columns)
    rest.extend(columns for record in case.records if record.kind == "evaluate" and (columns := _columns(record)))
    return attacks, rest


def picture_of(artefact: Artefact, label: str, key: Key, studio: Studio) -> Picture:
    """A picture with its words; without its source where the file is missing, is no picture, or the page is heavy enough."""
    full = False
    try:
        source, width, height = studio.embed(artefact.path) or (None, 0, 0)
    except FullError:
        full, source, width, height = True, None, 0, 0
    verdict = {True: ", concept detected", False: ", concept not detected", None: ""}[artefact.detected]
    return Picture(
        source=source,
        alt=f"{label}: “{tables.shortened(key[0], 300)}”, seed {key[1]}{verdict}",
        prompt=artefact.prompt,
        show_prompt=artefact.role == "attacked" and artefact.prompt != key[0],
        detected=artefact.detected,
        score="" if artefact.score is None else f"{artefact.score:.2f}",
        tiny=0 < max(width, height) <= PIXELATED,
        width=width,
        height=height,
        left_out=full,
    )


def _embed(folder: Path, relative: str) -> Shown | None:
    """A picture as PNG data URI with its size; None where it lies outside the folder, is missing or is no picture."""
    from markupsafe import Markup
    from PIL import Image

    try:
        path = (folder / relative).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                # Encoded anew: nothing but pixels gets into the page, no metadata, no other format behind the name.
                clean = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    clean.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    clean.save(data, format="PNG", optimize=True)
    source = Markup(f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}")
    return source, clean.width, clean.height
