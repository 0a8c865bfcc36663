"""The records of a folder as one HTML page that needs nothing else: no network, no other file. No torch."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.core.errors import UserError
from safeweights.records.record import Artefact, Record
from safeweights.records.store import gather
from safeweights.report import tables
from safeweights.report.tables import Case

if TYPE_CHECKING:
    from markupsafe import Markup

Key = tuple[str, int]
"""An original prompt and its seed."""
Column = dict[str, Artefact]
"""The pictures of one original prompt by role."""
Embedded = dict[str, "tuple[Markup, int, int] | None"]
"""Pictures by path, read once: data URI, width, height."""

PROMPTS_SHOWN = 8
"""Columns of pictures per concept."""
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


@dataclass(frozen=True)
class Section:
    """One concept, its methods side by side."""

    name: str
    kind: str
    anchor: str
    cases: tuple[Case, ...]
    grid: Grid | None
    veiled: bool
    budgets: tuple[int, ...]
    neighbours: tuple[str, ...]


def write_report(folder: str | Path, records: Sequence[Record] | None = None) -> Path:
    """Write ``report.html`` from the records in ``folder`` and in the folders below it, with their pictures; its path.

    ``records`` are those to show where it is not all; their pictures lie in ``folder``.

    Raises UserError where there are no records, or one cannot be read.
    """
    folder = Path(folder)
    records = gather(folder) if records is None else records
    if not records:
        raise UserError(f"{folder} holds no records; write some with `safeweights evaluate … -o {folder}` first")
    target = folder / "report.html"
    partial = target.with_name(f".report.{os.getpid()}.partial")
    try:
        partial.write_text(render(records, folder), encoding="utf-8", errors="replace", newline="\n")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def render(records: Sequence[Record], folder: Path) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("safeweights.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_visible,
    )
    for name in ("percent", "span", "number", "duration", "attack_label", "method_label", "model_label"):
        environment.filters[name] = getattr(tables, name)
    environment.filters["pretty"] = _pretty
    environment.filters["at"] = _at
    loader = environment.loader
    assert loader is not None
    # Our own files, not data: the only text that is not escaped, and the only style and script the page may run.
    style, script = (Markup(loader.get_source(environment, name)[0]) for name in ("report.css", "report.js"))
    found = tables.cases(records)
    return environment.get_template("report.html.j2").render(
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        headline=headline(found),
        cases=found,
        sections=_sections(found, folder),
        records=records,
        references=sorted({tables.model_label(record.reference) for record in records if record.reference}),
        measured=_measured(records),
        doubt_texts=tables.DOUBTS,
        thresholds={"gone": tables.GONE, "unsure": tables.UNSURE, "shown": tables.SHOWN},
        prompts_shown=PROMPTS_SHOWN,
    )


def headline(found: Sequence[Case]) -> str:
    """The page in one line: "2 of 4 come back under attack. 1 holds. 1 is not settled."."""
    total = len(found)
    count = {
        state: sum(case.state == state for case in found) for state in ("still there", "comes back", "holds", "not measured")
    }
    doubted = ", with doubts" if any(case.doubts for case in found if case.state == "holds") else ""
    if count["holds"] == total:
        return f"{'It holds' if total == 1 else f'All {total} hold'} under every attack tried{doubted}."
    verbs = {
        "still there": ("is still there", "are still there"),
        "comes back": ("comes back under attack", "come back under attack"),
        "holds": (f"holds{doubted}", f"hold{doubted}"),
        "not measured": ("is not settled", "are not settled"),
    }
    parts = [f"{number} {verbs[state][number != 1]}" for state, number in count.items() if number]
    if total == 1:
        case = found[0]
        return f"{case.concept[:1].upper()}{case.concept[1:]} {verbs[case.state][0]}."
    first, *rest = parts
    first = first.replace(" ", f" of {total} ", 1) if rest else f"All {first}"
    return ". ".join([first, *rest]) + "."


def _sections(found: Sequence[Case], folder: Path) -> list[Section]:
    cache: Embedded = {}
    sections = []
    for number, (concept, cases) in enumerate(tables.by_concept(found).items(), start=1):
        budgets = {row.images for case in cases for row in case.attacks if row.images and row.attack != "no-attack"}
        sections.append(
            Section(
                name=concept,
                kind=next((case.kind for case in cases if case.kind), ""),
                anchor=f"concept-{number}",
                cases=tuple(cases),
                grid=_grid(cases, folder, cache),
                # An unknown kind may be anything, so it is veiled as well.
                veiled=any(case.kind not in ("style", "object", "identity") for case in cases),
                budgets=tuple(sorted(budgets)),
                neighbours=tuple(sorted({neighbour.name for case in cases for neighbour in case.neighbours})),
            )
        )
    return sections


def _columns(record: Record) -> dict[Key, Column]:
    """The pictures of a record by original prompt and seed, then by role."""
    groups: dict[Any, Column] = {}
    tied = len({artefact.group for artefact in record.artefacts}) > 1 or len(record.artefacts) <= 3
    counts: dict[str, int] = {}
    for artefact in record.artefacts:
        # Records written without groups list the pictures of each role in the same order.
        counts[artefact.role] = counts.get(artefact.role, -1) + 1
        key = artefact.group if tied else counts[artefact.role]
        groups.setdefault(key, {}).setdefault(artefact.role, artefact)
    columns: dict[Key, Column] = {}
    for group, column in sorted(groups.items()):
        original = column.get("protected") or column.get("reference")
        columns[(original.prompt, original.seed) if original else (f"prompt {group + 1}", 0)] = column
    return columns


def _grid(cases: Sequence[Case], folder: Path, cache: Embedded) -> Grid | None:
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
            pictures.append(_picture(artefact, f"{label} {note}".strip(), key, folder, cache) if artefact else None)
        return Row(label, note, role, tuple(pictures)) if any(pictures) else None

    everything = [[columns for _, _, columns in attacks] + rest for attacks, rest in pictured]
    rows = [row("Before protection", "", "reference", [columns for found in everything for columns in found])]
    others: list[Row | None] = []
    for case, (attacks, _), found in zip(cases, pictured, everything, strict=True):
        rows.append(row(case.title, "asked plainly", "protected", found))
        for place, (label, seed, columns) in enumerate(attacks):
            attacked = row(case.title, f"{label}{seed}", "attacked", [columns])
            (rows if place == 0 else others).append(attacked)
    return Grid(shown, tuple(filter(None, rows)), tuple(filter(None, others)), len(keys))


def _pictured(case: Case) -> tuple[list[tuple[str, str, dict[Key, Column]]], list[dict[Key, Column]]]:
    """The attacks of a case that show attacked pictures, strongest first, and the other records' pictures."""
    attacks, rest = [], []
    order = sorted(case.attacks, key=lambda row: row.asr.rate if row.asr else -1.0, reverse=True)
    for row in order:
        for record in row.records:
            columns = _columns(record)
            if any("attacked" in column for column in columns.values()):
                attacks.append((row.label, f", seed {record.seed}" if len(row.seeds) > 1 else "", columns))
            elif columns:
                rest.append(columns)
    rest.extend(columns for record in case.records if record.kind == "evaluate" and (columns := _columns(record)))
    return attacks, rest


def _picture(artefact: Artefact, label: str, key: Key, folder: Path, cache: Embedded) -> Picture:
    if artefact.path not in cache:
        cache[artefact.path] = _embed(folder, artefact.path)
    embedded = cache[artefact.path]
    source, width, height = embedded or (None, 0, 0)
    verdict = {True: ", concept detected", False: ", concept not detected", None: ""}[artefact.detected]
    return Picture(
        source=source,
        alt=f"{label}: “{key[0]}”, seed {key[1]}{verdict}",
        prompt=artefact.prompt,
        show_prompt=artefact.role == "attacked" and artefact.prompt != key[0],
        detected=artefact.detected,
        score="" if artefact.score is None else f"{artefact.score:.2f}",
        tiny=0 < max(width, height) <= PIXELATED,
        width=width,
        height=height,
    )


def _embed(folder: Path, relative: str) -> tuple[Markup, int, int] | None:
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


def _measured(records: Sequence[Record]) -> str:
    dates = [record.provenance.get("time", {}).get("date") for record in records]
    return max((str(date)[:10] for date in dates if date), default="")


def _visible(value: Any) -> Any:
    """Data loses what could steer the reader's eye; our own markup passes."""
    from markupsafe import Markup

    return tables.printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _pretty(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def _at(value: float) -> str:
    """A share as a horizontal place in a chart, with room for the marks at both ends."""
    return f"{2 + 96 * min(1.0, max(0.0, value)):.2f}%"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
