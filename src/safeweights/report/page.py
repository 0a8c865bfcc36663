"""The records of a folder as one HTML page that needs nothing else: no network, no other file. No torch."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.core.errors import UserError
from safeweights.records.record import Record
from safeweights.records.store import gather
from safeweights.report import tables
from safeweights.report.curves import curve_plots
from safeweights.report.listing import listing
from safeweights.report.pictures import PROMPTS_SHOWN, WEIGHT, Film, Grid, Picture, Studio, films_of, grid_of, picture_of
from safeweights.report.tables import Case

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


CASES_IN_FULL = 12
"""With more cases than this the summary is a table of concepts and methods, and the sentences stand with each concept."""
OTHERS = 40
"""Records of one further kind that are spelled out; the list of records holds all."""
LONGEST = 2000
"""Characters of any text that a record brings."""
KINDS = {"freeze": "Freezing", "leakage": "Leakage", "prune": "Pruning", "neurons": "Neurons", "event": "After release"}
"""Headings of the kinds of records that make up no case."""


@dataclass(frozen=True)
class Other:
    """A record of a kind that makes up no case, as it stands."""

    record: Record
    title: str
    note: str
    plots: tuple[Markup, ...]
    pictures: tuple[tuple[str, Picture], ...]
    veiled: bool


@dataclass(frozen=True)
class OtherKind:
    """All records of such a kind."""

    title: str
    anchor: str
    others: tuple[Other, ...]
    total: int


@dataclass(frozen=True)
class Rule:
    """A line of a policy and what became of it."""

    name: str
    passed: bool
    value: str
    bound: str
    why: str


@dataclass(frozen=True)
class Policy:
    """What a policy says of these records."""

    passed: bool
    rules: tuple[Rule, ...]


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
    films: tuple[Film, ...]
    plots: tuple[Markup, ...]
    records: int


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
    return write_page(target, render(records, folder))


def write_page(target: Path, text: str) -> Path:
    """Write the whole page or none of it; its path. Half a surrogate pair, which has no UTF-8, becomes a question mark."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def render(records: Sequence[Record], folder: Path) -> str:
    """The page as text."""
    from markupsafe import Markup

    found = tables.cases(records)
    studio = Studio(folder)
    sections = _sections(found, studio)
    verdicts = [case.verdict for case in found]
    return environment().get_template("report.html.j2").render(
        **own_files("report.js"),
        headline=headline(found) or f"{len(records)} record{'' if len(records) == 1 else 's'}, none of an erased concept.",
        cases=found,
        score=[(name, verdicts.count(name)) for name in ("safe", "not safe", "not shown")] if len(found) > 1 else [],
        worst_kept=_worst_kept(found),
        matrix=_matrix(found) if len(found) > CASES_IN_FULL else None,
        sections=sections,
        other_kinds=_others(records, studio),
        policy=_policy(folder),
        records=records,
        listing=Markup(listing(records)),
        references=sorted({tables.model_label(record.reference) for record in records if record.reference})[:12],
        measured=_measured(records),
        doubt_texts=tables.DOUBTS,
        thresholds={"gone": tables.GONE, "unsure": tables.UNSURE, "shown": tables.SHOWN},
        prompts_shown=PROMPTS_SHOWN,
    )  # fmt: skip


def environment() -> Environment:
    """Templates whose data is escaped, cut to a readable length and free of what could steer the reader's eye."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("safeweights.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_visible,
    )
    for name in ("percent", "span", "number", "duration", "attack_label", "method_label", "model_label"):
        made.filters[name] = getattr(tables, name)
    made.filters["at"] = _at
    made.filters["clip"] = tables.shortened
    return made


def own_files(script: str) -> dict[str, Any]:
    """Our own files, not data: the only text that is not escaped, and the only style and script the page may run."""
    from markupsafe import Markup

    templates = environment()
    assert templates.loader is not None
    style, code = (Markup(templates.loader.get_source(templates, name)[0]) for name in ("report.css", script))
    return {"style": style, "script": code, "style_hash": _hash(style), "script_hash": _hash(code)}


def headline(found: Sequence[Case]) -> str:
    """The page in one line: "2 of 4 come back under attack. 1 holds. 1 is not settled."."""
    if not found:
        return ""
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


def _worst_kept(found: Sequence[Case]) -> tuple[float, Case] | None:
    """The lowest share of the other concepts that any protection leaves, and whose it is."""
    kept = [
        (entry.value, case) for case in found if (entry := case.quality.get("retention_relative")) and entry.value is not None
    ]
    return min(kept, key=lambda pair: pair[0], default=None)


def _matrix(found: Sequence[Case]) -> tuple[list[str], list[tuple[str, str, list[Case | None]]]]:
    """Methods, and for each concept its anchor and its worst case under each of them."""
    methods = list(dict.fromkeys(case.title for case in sorted(found, key=lambda case: case.title)))
    rows = []
    for number, (concept, cases) in enumerate(tables.by_concept(found).items(), start=1):
        by_method: dict[str, Case] = {}
        for case in sorted(cases, key=lambda case: tables.STATES.index(case.state)):
            by_method.setdefault(case.title, case)
        rows.append((concept, f"concept-{number}", [by_method.get(method) for method in methods]))
    return methods, rows


def _sections(found: Sequence[Case], studio: Studio) -> list[Section]:
    sections = []
    grouped = tables.by_concept(found)
    grids, whole = [], studio.left
    for number, cases in enumerate(grouped.values(), start=1):
        # Each concept may use its share, and what those before it did not.
        studio.left = round(whole * number / len(grouped)) - sum(len(shown[0]) for shown in studio.cache.values() if shown)
        grids.append((grid_of(cases, studio), films_of(cases, studio)))
    for number, (concept, cases) in enumerate(grouped.items(), start=1):
        budgets = {row.images for case in cases for row in case.attacks if row.images and row.attack != "no-attack"}
        drawn = studio.draw(curve_plots(cases))
        for case in cases:
            for record in case.records:
                drawn += studio.draw(record.details.get("plots"))
        grid, films = grids[number - 1]
        sections.append(
            Section(
                name=concept,
                kind=next((case.kind for case in cases if case.kind), ""),
                anchor=f"concept-{number}",
                cases=tuple(cases),
                grid=grid,
                veiled=any(map(_veiled, (case.kind for case in cases))),
                budgets=tuple(sorted(budgets)),
                neighbours=tuple(sorted({neighbour.name for case in cases for neighbour in case.neighbours})),
                films=tuple(films),
                plots=tuple(drawn),
                records=sum(len(case.records) for case in cases),
            )
        )
    return sections


def _veiled(kind: str) -> bool:
    # An unknown kind may be anything, so it is veiled as well.
    return kind not in ("style", "object", "identity")


def _others(records: Sequence[Record], studio: Studio) -> list[OtherKind]:
    """The records that make up no case, kind by kind."""
    studio.left = max(studio.left, WEIGHT // 8)
    kinds: dict[str, list[Record]] = {}
    for record in records:
        if record.kind not in (*tables.MEASURED, "protect"):
            kinds.setdefault(record.kind, []).append(record)
    found = []
    for number, (kind, members) in enumerate(sorted(kinds.items(), key=lambda item: (item[0] not in KINDS, item[0])), start=1):
        others = []
        for record in members[:OTHERS]:
            pictures = [
                (entry.role + (f", after {entry.step} steps" if entry.step is not None else ""), picture)
                for entry in record.artefacts[: 2 * PROMPTS_SHOWN]
                if not (picture := picture_of(entry, entry.role, (entry.prompt, entry.seed), studio)).left_out
            ]
            what = [
                record.concept,
                tables.method_label(record.method) if record.method else "",
                tables.attack_label(record.attack),
            ]
            others.append(
                Other(
                    record=record,
                    title=", ".join(part for part in what if part) or tables.model_label(record.model) or kind,
                    note=f"{tables.model_label(record.model)}, seed {record.seed}",
                    plots=tuple(studio.draw(record.details.get("plots"))),
                    pictures=tuple(pictures),
                    veiled=_veiled(record.concept_kind),
                )
            )
        found.append(OtherKind(KINDS.get(kind, kind), f"kind-{number}", tuple(others), len(members)))
    return found


def _policy(folder: Path) -> Policy | None:
    """What ``policy.json`` in the folder says, as far as it is a policy's result."""
    try:
        data = json.loads((folder / "policy.json").read_bytes())
        rules = data["rules"]
        if not isinstance(data["passed"], bool) or not isinstance(rules, list):
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None

    def said(value: Any) -> str:
        if isinstance(value, float | int) and not isinstance(value, bool):
            return tables.number(value)
        return "" if value is None else _cut(value if isinstance(value, str) else json.dumps(value, default=str))

    found = [
        Rule(said(rule.get("rule")), rule.get("passed") is True, *(said(rule.get(name)) for name in ("value", "bound", "why")))
        for rule in rules[:500] if isinstance(rule, dict)
    ]  # fmt: skip
    return Policy(data["passed"], tuple(sorted(found, key=lambda rule: rule.passed)))


def _measured(records: Sequence[Record]) -> str:
    times = [record.provenance.get("time") for record in records]
    return max((str(time["date"])[:10] for time in times if isinstance(time, dict) and time.get("date")), default="")


def _visible(value: Any) -> Any:
    """Data loses what could steer the reader's eye and what is too long to read; our own markup passes."""
    from markupsafe import Markup

    return _cut(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _cut(text: str) -> str:
    return tables.printable(tables.shortened(text, LONGEST))


def _at(value: float) -> str:
    """A share as a horizontal place in a chart, with room for the marks at both ends."""
    return f"{2 + 96 * min(1.0, max(0.0, value)):.2f}%"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
