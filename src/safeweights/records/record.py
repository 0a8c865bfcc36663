"""One measured cell with everything needed to measure it again. Plain data, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA = 1

Status = Literal["ok", "error"]


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

    ``role`` is "reference" (before protection), "protected" or "attacked"; ``detected`` is the detector's verdict.
    ``prompt`` of an attacked picture is the adversarial prompt.
    """

    path: str
    role: str
    prompt: str
    seed: int
    detected: bool | None = None
    score: float | None = None
    group: int = 0
    """Ties together the pictures of one original prompt: the same number on its reference, protected and attacked picture."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A measured cell: this model, this method, this concept, this attack, this seed."""

    kind: Literal["attack", "evaluate", "protect", "leakage"]
    """attack: success of one attack on one concept; evaluate: concept rate, retention, quality; protect: cost of a method;
    leakage: what a shared LoRA tells."""
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
        return cls(**values)
