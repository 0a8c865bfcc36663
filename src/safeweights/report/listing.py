"""Every record of a report as compact data for its list of records: equal parts are kept once, long texts are cut. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from safeweights.records.record import Record
from safeweights.records.store import Store
from safeweights.report.tables import attack_label, method_label, model_label, number, percent, printable, shortened, span

WEIGHT = 9_000_000
"""About how many characters all texts may have together, or a browser would take long to read the page."""
LONGEST = 20_000
"""Characters of a single value."""
LISTED = 200
"""Measurements, doubts and pictures of one record."""

Pairs = list[tuple[str, str]]


def listing(records: Sequence[Record]) -> str:
    """JSON that may stand inside a ``<script>`` element: {"pool": [[title, [[name, text], …]], …], "rows": [[what, …], …]}.

    A row is kind, concept, method, attack, seed, status, result and the places in the pool of all that is known.
    """
    longest = max(160, min(LONGEST, WEIGHT // (24 * max(1, len(records)))))
    pool: dict[str, int] = {}
    rows = []
    name = Store(".").path

    def kept(title: str, pairs: Pairs) -> int:
        return pool.setdefault(json.dumps([title, pairs], ensure_ascii=False), len(pool))

    for record in records:
        parts = [
            kept("Measurements", _measurements(record)),
            kept("Doubts", [(_text(d.name, 80), _text(d.explanation, longest)) for d in record.doubts[:LISTED]]),
            kept("Error", [("error", _text(record.error, longest))] if record.error else []),
            kept("Cell", [
                ("model", model_label(_text(record.model, 400))), ("reference", model_label(_text(record.reference, 400))),
                ("status", record.status), ("schema", str(record.schema)),
            ]),
            kept("File", [("records/", name(record).name)]),
            kept("Settings", _facts(record.settings, longest)),
            kept("Detector", _facts(record.detector, longest)),
            kept("Sampling", _facts(record.sampling, longest)),
            kept("Result", _facts({k: v for k, v in record.details.items() if k != "plots"}, longest)),
            kept("Provenance", _facts({k: v for k, v in record.provenance.items() if k != "time"}, longest)),
            kept("Time", _facts(record.provenance.get("time"), longest)),
            kept("Pictures", _pictures(record, longest)),
        ]  # fmt: skip
        rows.append([
            _text(record.kind, 40), _text(record.concept, 120), _text(method_label(record.method), 80),
            _text(attack_label(record.attack), 80), record.seed, record.status, _result(record), *parts,
        ])  # fmt: skip
    text = f'{{"pool":[{",".join(pool)}],"rows":{json.dumps(rows, ensure_ascii=False, separators=(",", ":"))}}}'
    # Nothing in it can end the element or begin a comment.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(value: Any, limit: int) -> str:
    return printable(shortened(str(value), limit))


def _facts(values: Any, limit: int) -> Pairs:
    if not isinstance(values, dict):
        return [] if values is None else [("value", _text(values, limit))]
    found = []
    for key, value in list(values.items())[:LISTED]:
        said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        found.append((_text(key, 120), _text(said, limit)))
    return found


def _measurements(record: Record) -> Pairs:
    found = []
    for entry in record.measurements[:LISTED]:
        if entry.value is None:
            said = f"not measured{f': {_text(entry.why, 300)}' if entry.why else ''}"
        else:
            interval = f" [{number(entry.interval[0])}, {number(entry.interval[1])}]" if entry.interval else ""
            before = f", before protection {number(entry.reference)}" if entry.reference is not None else ""
            said = f"{number(entry.value)}{f' {_text(entry.unit, 40)}' if entry.unit else ''}{interval}, n = {entry.n}{before}"
        found.append((_text(entry.name, 120), said))
    return found


def _pictures(record: Record, limit: int) -> Pairs:
    found = []
    for entry in record.artefacts[: 8 if limit < 1000 else LISTED]:
        step = f" after {entry.step} steps" if entry.step is not None else ""
        found.append((_text(entry.role, 40) + step, f"{_text(entry.path, 200)}: {_text(entry.prompt, limit)}, seed {entry.seed}"))
    return found


def _result(record: Record) -> str:
    """The one figure that a list shows."""
    if record.status == "error":
        return "failed"
    by_name = {entry.name: entry for entry in record.measurements}
    entry = by_name.get("asr") or by_name.get("concept_rate") or next(iter(record.measurements), None)
    if entry is None or entry.value is None:
        return "not measured" if entry else ""
    if entry.name in ("asr", "concept_rate"):
        name = "ASR" if entry.name == "asr" else "drawn"
        return f"{name} {percent(entry.value)} {span(entry.interval)}".strip()
    return f"{_text(entry.name, 60)} {number(entry.value)} {_text(entry.unit, 20)}".strip()
