"""Two folders of records side by side: what got better, what worse, and what nobody can tell apart. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from safeweights.core.intervals import difference
from safeweights.records.record import Measurement, Record

State = Literal["better", "worse", "same", "no interval", "only in a", "only in b"]
STATES: tuple[State, ...] = ("worse", "better", "same", "no interval", "only in a", "only in b")
"""What matters most first."""
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Change:
    """One measurement in both folders: b - a, its 95 % interval, and what that means."""

    concept: str
    attack: str
    measure: str
    state: State
    a: float | None
    b: float | None
    delta: float | None = None
    ci95: tuple[float, float] | None = None
    n_a: int = 0
    n_b: int = 0
    method: str = ""

    def to_json(self) -> dict[str, Any]:
        """One entry of ``changes``."""
        return asdict(self)


@dataclass(frozen=True)
class _Pool:
    """A measurement of one cell over all its records (seeds)."""

    entries: tuple[Measurement, ...]

    @property
    def n(self) -> int:
        return sum(entry.n for entry in self.entries)

    @property
    def rate(self) -> bool:
        """Whether it is a share of trials."""
        return all(
            entry.interval is not None and entry.value is not None and 0 <= entry.value <= 1 and entry.n > 0
            and abs(entry.value * entry.n - round(entry.value * entry.n)) < 1e-6 and entry.name not in ("retention_relative",)
            for entry in self.entries
        )  # fmt: skip

    @property
    def successes(self) -> int:
        return round(sum((entry.value or 0.0) * entry.n for entry in self.entries))

    @property
    def value(self) -> float | None:
        if self.rate:
            return self.successes / self.n
        known = [entry.value for entry in self.entries if entry.value is not None]
        return sum(known) / len(known) if known else None

    @property
    def interval(self) -> tuple[float, float] | None:
        return self.entries[0].interval if len(self.entries) == 1 else None


def compare(before: Iterable[Record], after: Iterable[Record]) -> list[Change]:
    """Every measurement that says which way is better, worse ones first.

    Rates are told apart by Newcombe's interval for the difference of two independent proportions: asked with the same prompts and
    seeds, as here, they differ less by chance than it allows for, so it errs on the side of "same". Other measurements are told
    apart where both have intervals that do not meet.
    """
    a, b = list(before), list(after)
    several = max(len({record.method for record in part}) for part in (a, b)) > 1
    old, new = _pools(a, several), _pools(b, several)
    changes = [_change(key, old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]
    return sorted(changes, key=lambda change: (STATES.index(change.state), change.concept, change.measure, change.attack))


def counts(changes: Sequence[Change]) -> dict[str, int]:
    """How many of each."""
    return {state: sum(change.state == state for change in changes) for state in STATES}


def _pools(records: Sequence[Record], several: bool) -> dict[Key, _Pool]:
    found: dict[Key, list[Measurement]] = {}
    seen: set[tuple[Any, ...]] = set()
    for record in records:
        if record.status != "ok" or record.kind == "protect":
            continue
        for entry in record.measurements:
            if entry.better is None:
                continue
            # What stayed is measured once for all concepts of an evaluation, and stands in the record of each.
            shared = record.kind == "evaluate" and entry.name != "concept_rate"
            key = (record.method if several else "", "" if shared else record.concept, record.attack, entry.name)
            once = (key, record.seed, entry.n, entry.value)
            if shared and once in seen:
                continue
            seen.add(once)
            found.setdefault(key, []).append(entry)
    return {key: _Pool(tuple(entries)) for key, entries in found.items()}


def _change(key: Key, a: _Pool | None, b: _Pool | None) -> Change:
    method, concept, attack, measure = key
    common: dict[str, Any] = {"concept": concept, "attack": attack, "measure": measure, "method": method}
    if a is None or b is None:
        there = a or b
        assert there is not None
        state: State = "only in b" if a is None else "only in a"
        return Change(
            state=state, a=a.value if a else None, b=b.value if b else None, n_a=a.n if a else 0, n_b=b.n if b else 0, **common
        )
    common |= {"a": a.value, "b": b.value, "n_a": a.n, "n_b": b.n}
    if a.value is None or b.value is None:
        return Change(state="no interval", **common)
    common["delta"] = b.value - a.value
    if a.rate and b.rate:
        low, high = difference(b.successes, b.n, a.successes, a.n)
        return Change(state=_state(low, high, a.entries[0].better), ci95=(low, high), **common)
    if a.interval is None or b.interval is None:
        return Change(state="same" if a.value == b.value else "no interval", **common)
    low, high = b.interval[0] - a.interval[1], b.interval[1] - a.interval[0]
    return Change(state=_state(low, high, a.entries[0].better), ci95=(low, high), **common)


def _state(low: float, high: float, better: str | None) -> State:
    if low <= 0 <= high:
        return "same"
    return "better" if (low > 0) == (better == "higher") else "worse"


def table(changes: Sequence[Change]) -> list[str]:
    """Lines for a reader: columns as wide as what they hold."""
    rows = [("", "concept", "measure", "a", "b", "b - a (95 % interval)")]
    for change in changes:
        interval = f" ({change.ci95[0]:+.3f} to {change.ci95[1]:+.3f})" if change.ci95 else ""
        delta = "–" if change.delta is None else f"{change.delta:+.3f}{interval}"
        what = " ".join(part for part in (change.method, change.measure, change.attack and f"[{change.attack}]") if part)
        rows.append(
            (change.state, change.concept or "the rest", what, _told(change.a, change.n_a), _told(change.b, change.n_b), delta)
        )
    widths = [max(len(_plain(row[column])) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(_plain(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _told(value: float | None, n: int) -> str:
    return "–" if value is None else f"{value:.3f} (n {n})"


def _plain(text: str) -> str:
    """Names come from files: no control character may reach a terminal, and no name may fill it."""
    return "".join(char if char.isprintable() else "?" for char in text[:80])


def as_json(changes: Sequence[Change]) -> Mapping[str, Any]:
    """The object that ``compare --json`` prints."""
    return {"counts": counts(changes), "changes": [change.to_json() for change in changes]}
