"""One measured cell with everything needed to measure it again. Plain data, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA = 1

Status = Literal["ok", "error"]

Kind = Literal["attack", "evaluate", "protect", "freeze", "leakage", "prune", "event", "neurons"]
"""attack: success of one attack on one concept; evaluate: concept rate, retention, quality; protect: cost of a method; freeze:
what a freezing mask does; leakage: what a shared LoRA tells; prune: what pruning takes away; neurons: how far the concept's
neurons come back; event: what stays after the release
(quantised, merged, sampled otherwise). A report shows any other kind as well, as it stands."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number read from samples.

    ``value`` is None when it could not be measured; ``why`` then says what was missing.
    ``interval`` is a 95 % interval (low, high) in the unit of ``value``; ``n`` counts the statistical units.
    """

    name: str
    value: float | None
    n: int
    interval: tuple[float, float] | None = None
    better: Literal["lower", "higher"] | None = None
    unit: str = ""
    reference: float | None = None
    """The same number on the model before protection."""
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """A reason not to trust a measurement: a name from ``docs/doubts.md`` and one sentence with the figures."""

    name: str
    explanation: str


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A picture that belongs to a record: path relative to the store's folder, and what it shows.

    ``role`` is "reference" (before protection), "protected", "attacked" or "relearned" (after ``step`` steps of an attack on the
    weights); ``detected`` is the detector's verdict. ``prompt`` of an attacked picture is the adversarial prompt.
    """

    path: str
    role: str
    prompt: str
    seed: int
    detected: bool | None = None
    score: float | None = None
    group: int = 0
    """Ties together the pictures of one original prompt: the same number on its reference, protected and attacked picture."""
    step: int | None = None
    """Optimiser steps taken, of a picture at a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A measured cell: this model, this method, this concept, this attack, this seed."""

    kind: Kind
    status: Status
    model: str
    reference: str
    method: str
    concept: str
    concept_kind: str
    attack: str
    seed: int
    detector: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    artefacts: tuple[Artefact, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    """What the command prints as JSON for this cell, e.g. the ``attack`` object of the interface contract."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Hashes of inputs, library versions, command; and under "time" what differs from run to run (seconds, peak memory, date)."""
    error: str | None = None
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """This record as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """The record that ``to_json`` wrote. Raises ValueError where the schema is not this one."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"record schema {data.get('schema')!r}, this version reads {SCHEMA}")
        values = dict(data)
        values["measurements"] = tuple(
            Measurement(**{**m, "interval": tuple(m["interval"]) if m.get("interval") else None}) for m in data["measurements"]
        )
        values["doubts"] = tuple(Doubt(**d) for d in data["doubts"])
        values["artefacts"] = tuple(Artefact(**a) for a in data["artefacts"])
        record = cls(**values)
        if strange := _strange(record):
            raise ValueError(f"{strange} is not what it should be")
        return record


_TEXTS = ("kind", "model", "reference", "method", "concept", "concept_kind", "attack")
_MAPPINGS = ("detector", "sampling", "settings", "details", "provenance")


def _strange(record: Record) -> str:
    """The first field whose value has another type than it should have, or nothing: files come from anywhere."""

    def real(value: Any) -> bool:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300)

    for name in _TEXTS:
        if not isinstance(getattr(record, name), str):
            return name
    for name in _MAPPINGS:
        if not isinstance(getattr(record, name), dict):
            return name
    if record.status not in ("ok", "error") or not isinstance(record.error, str | None):
        return "status or error"
    if not isinstance(record.seed, int) or abs(record.seed) >= 2**63:
        return "seed"
    for m in record.measurements:
        if not (isinstance(m.name, str) and isinstance(m.why, str) and isinstance(m.unit, str) and isinstance(m.n, int)):
            return "a measurement"
        if not (real(m.value) and real(m.reference) and abs(m.n) < 2**63):
            return f"measurement {m.name[:60]!r}"
        if m.interval is not None and not (len(m.interval) == 2 and all(real(end) and end is not None for end in m.interval)):
            return f"the interval of {m.name[:60]!r}"
    for d in record.doubts:
        if not (isinstance(d.name, str) and isinstance(d.explanation, str)):
            return "a doubt"
    for a in record.artefacts:
        whole = isinstance(a.seed, int) and isinstance(a.group, int) and isinstance(a.step, int | None)
        if not (whole and isinstance(a.path, str) and isinstance(a.role, str) and isinstance(a.prompt, str) and real(a.score)):
            return "an artefact"
        if not isinstance(a.detected, bool | None):
            return "an artefact"
    return ""
