"""What the weights-changing attacks' checkpoints say, as plots: success and likeness against optimiser steps. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from safeweights.records.record import Record
from safeweights.report.tables import AttackRow, Case


def curve_plots(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Plot specifications for one concept: for each attack with a curve one of the detector's rate and one of the similarity.

    The methods are the series; a method measured with several seeds has one series for each.
    """
    plots = []
    for title, found in _by_attack(cases).items():
        rates, likenesses, before = [], [], []
        for case, row in found:
            for record in row.records:
                points = _checkpoints(record)
                name = case.title + (f", seed {record.seed}" if len(row.records) > 1 else "")
                if rate := [[p["steps"], p["rate"]] for p in points if p["rate"] is not None]:
                    band = [[p["steps"], *p["ci95"]] for p in points if p["ci95"] and p["rate"] is not None]
                    rates.append({"name": name, "points": rate, "band": band})
                    before.append(_real(record.details.get("reference_rate")))
                if likeness := [[p["steps"], p["similarity"]] for p in points if p["similarity"] is not None]:
                    likenesses.append({"name": name, "points": likeness})
        known = [value for value in before if value is not None]
        levels = [{"name": "before protection", "y": sum(known) / len(known)}] if known else []
        x = {"label": "optimiser steps of the attack", "scale": "log"}
        for label, series, marks, what in (
            ("prompts that show the concept", rates, levels, "how often the concept comes back"),
            ("similarity", likenesses, [], "how alike the pictures are to those before protection"),
        ):
            if series:
                y = {"label": label}
                plots.append({"kind": "line", "title": f"{title}: {what}", "x": x, "y": y, "series": series, "levels": marks})
    return plots


def _by_attack(cases: Iterable[Case]) -> dict[str, list[tuple[Case, AttackRow]]]:
    found: dict[str, list[tuple[Case, AttackRow]]] = {}
    for case in cases:
        for row in case.attacks:
            if any(record.details.get("curve") for record in row.records):
                found.setdefault(row.title, []).append((case, row))
    return found


def _checkpoints(record: Record) -> list[dict[str, Any]]:
    """The rows of a curve that are rows of a curve."""
    curve = record.details.get("curve")
    found = []
    for point in curve if isinstance(curve, list) else []:
        if isinstance(point, dict) and (steps := _real(point.get("steps"))) is not None:
            ends = point.get("ci95")
            pair = [_real(end) for end in ends] if isinstance(ends, list) and len(ends) == 2 else []
            found.append({
                "steps": steps, "rate": _real(point.get("rate")), "similarity": _real(point.get("similarity")),
                "ci95": pair if pair and None not in pair else None,
            })  # fmt: skip
    return found


def _real(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and math.isfinite(value) else None
