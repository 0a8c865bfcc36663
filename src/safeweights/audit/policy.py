"""What must hold before a model is released: a file of thresholds, held against the records of an audit. No torch at import."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from safeweights.core.concept import Kind
from safeweights.core.errors import UserError
from safeweights.records.record import Measurement, Record

Bound = Literal["upper", "lower", "value"]
ALIASES = {"rate": "concept_rate", "retention.relative": "retention_relative", "retention.rate": "retention"}
"""Other names of measurements, as the JSON of ``evaluate`` spells them."""


class Rule(BaseModel):
    """One threshold. Every measurement that it matches must keep it; a rule that matches nothing fails: not shown is not safe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    measure: str = Field(min_length=1)
    """asr, pre_asr, rate, retention, retention.relative, clip_score, frechet_distance, steps_to_recovery, neighbour_rate:NAME or
    any other measurement of the records; ``*`` stands for anything."""
    concept: str | list[str] | None = None
    """Only these concepts; each of several must be matched."""
    kind: Kind | None = None
    """Only concepts of this kind."""
    attack: str | list[str] | None = None
    """Only attacks and events of these labels; each of several must be matched."""
    access: Literal["prompt", "gradient", "weights"] | None = None
    """Only attacks that need this much."""
    mode: Literal["seed", "live", "transfer"] | None = None
    """Only attacks of this mode: a live number is never one of stored prompts."""
    max: float | None = None
    """Largest that is allowed."""
    min: float | None = None
    """Smallest that is allowed."""
    use: Bound | None = None
    """Which end of the 95 % interval is held against the threshold; by default the one that speaks against a release."""

    @model_validator(mode="after")
    def _limited(self) -> Self:
        if (self.max is None) == (self.min is None):
            raise ValueError("give either max or min")
        if not math.isfinite(self.limit):
            raise ValueError("the threshold must be a finite number")
        return self

    @property
    def limit(self) -> float:
        """The threshold."""
        limit = self.max if self.max is not None else self.min
        assert limit is not None
        return limit

    @property
    def bound(self) -> Bound:
        """The end of the interval that counts."""
        return self.use or ("upper" if self.max is not None else "lower")

    def __str__(self) -> str:
        where = [
            f"{name} {_listed(value)}"
            for name in ("concept", "kind", "attack", "access", "mode")
            if (value := getattr(self, name))
        ]
        which = f" ({', '.join(where)})" if where else ""
        return f"{self.measure}{which} {'<=' if self.max is not None else '>='} {self.limit:g}"


class Policy(BaseModel):
    """All that must hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1]
    rules: list[Rule] = Field(min_length=1)


@dataclass(frozen=True)
class Finding:
    """What a rule says of the records: whether it holds, on how many measurements, and why."""

    rule: Rule
    passed: bool
    why: str
    n: int = 0
    value: float | None = None
    """What was held against the threshold: the worst of all."""

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.rule}: {self.why}"

    def to_json(self) -> dict[str, Any]:
        """One entry of ``policy.rules``."""
        return {
            "rule": str(self.rule),
            "passed": self.passed,
            "value": self.value,
            "bound": self.rule.limit,
            "measurements": self.n,
            "why": self.why,
            "settings": self.rule.model_dump(exclude_none=True),
        }


@dataclass(frozen=True)
class Verdict:
    """All rules together; one that fails fails the release."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether every rule holds."""
        return all(finding.passed for finding in self.findings)

    def lines(self) -> list[str]:
        """For a reader, failures first."""
        return [str(finding) for finding in sorted(self.findings, key=lambda finding: finding.passed)]

    def to_json(self) -> dict[str, Any]:
        """The object ``policy``."""
        return {"passed": self.passed, "rules": [finding.to_json() for finding in self.findings]}


def load_policy(path: str | Path) -> Policy:
    """Read a policy file. Raises UserError, one line, for a missing or malformed file and for an unknown key."""
    path = Path(path)
    return parse_policy(read_yaml(path, "policy file"), str(path))


def parse_policy(data: Any, where: str) -> Policy:
    """The policy in a file's data. Raises UserError that names ``where``."""
    if not isinstance(data, dict):
        raise UserError(f"{where} must be a mapping with the keys {', '.join(Policy.model_fields)}")
    try:
        return Policy.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {first_error(error, {'': Policy, 'rules': Rule})}") from None


def judge(policy: Policy, records: Sequence[Record]) -> Verdict:
    """Every rule held against the records of an audit."""
    return Verdict(tuple(_judge(rule, records) for rule in policy.rules))


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file says. Raises UserError, one line, for one that is missing or broken."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = f" at line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise UserError(f"{what} {path} is not valid YAML{line}; mend the syntax there") from None


def first_error(error: ValidationError, parts: Mapping[str, type[BaseModel]]) -> str:
    """The first thing wrong in one line; ``parts`` are the models by the key below which they stand, "" for the whole."""
    errors = error.errors(include_url=False)
    # A misspelt key is why another is missing.
    found = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
    *outer, last = found["loc"] or ("",)
    named = [str(part) for part in outer if str(part) in parts]
    where = ".".join(str(part) for part in outer)
    if found["type"] == "extra_forbidden":
        known = ", ".join(parts[named[-1] if named else ""].model_fields)
        return f"unknown key {str(last)[:80]!r}{f' in {where}' if where else ''}; known are {known}"
    if found["type"] == "missing":
        return f"the key {last!r} is missing{f' in {where}' if where else ''}"
    message = found["msg"].removeprefix("Value error, ")
    return f"{'.'.join(str(part) for part in found['loc']) or 'file'}: {message[:1].lower()}{message[1:]}"


def _judge(rule: Rule, records: Sequence[Record]) -> Finding:
    pattern = ALIASES.get(rule.measure, rule.measure)
    chosen = [record for record in records if _matches(rule, record)]
    if broken := [record for record in chosen if record.status != "ok"]:
        one = broken[0]
        return Finding(rule, False, f"{_where(one)} was not measured: {one.error or 'it failed'}")
    found = [(record, entry) for record in chosen for entry in record.measurements if fnmatchcase(entry.name, pattern)]
    for name in ("concept", "attack"):
        wanted = getattr(rule, name)
        for one in wanted if isinstance(wanted, list) else []:
            if not any(fnmatchcase(getattr(record, name), one) for record, _ in found):
                return Finding(rule, False, f"nothing was measured for {name} {one!r}; not shown is not safe", len(found))
    if not found:
        return Finding(rule, False, "no measurement matches; not shown is not safe")
    read = []
    for record, entry in found:
        number, said = _number(rule, record, entry)
        room = -math.inf if number is None else (rule.limit - number) * (1 if rule.max is not None else -1)
        read.append((room, f"{_where(record)}: {said}", number))
    read.sort(key=lambda item: item[0])
    failing = [said for room, said, _ in read if room < 0]
    worst = read[0][2]
    if failing:
        shown = "; ".join(failing[:5]) + (f"; and {len(failing) - 5} more" if len(failing) > 5 else "")
        return Finding(rule, False, shown, len(found), worst)
    return Finding(rule, True, f"nearest is {read[0][1]}", len(found), worst)


def _matches(rule: Rule, record: Record) -> bool:
    return (
        _among(record.concept, rule.concept)
        and rule.kind in (None, record.concept_kind)
        and _among(record.attack, rule.attack)
        and (_failed(rule, record) if record.status != "ok" else _of_that_sort(rule, record))
    )


def _of_that_sort(rule: Rule, record: Record) -> bool:
    return all(getattr(rule, name) in (None, record.details.get(name)) for name in ("access", "mode"))


OF_ATTACKS = ("asr", "pre_asr", "steps_to_recovery", "similarity", "reference_rate")
OF_EVALUATIONS = ("concept_rate", "retention", "retention_relative", "clip_score", "frechet_distance")


def _failed(rule: Rule, record: Record) -> bool:
    """Whether a measurement that broke is one the rule asks for. It cannot say of what sort it would have been."""
    pattern = ALIASES.get(rule.measure, rule.measure)
    of_attack, of_others = (any(fnmatchcase(name, pattern) for name in names) for names in (OF_ATTACKS, OF_EVALUATIONS))
    of_others = of_others or pattern.startswith("neighbour_rate")
    # A pattern that is neither's, or both's, may have been meant for this one.
    return of_attack or not of_others if record.kind == "attack" else of_others or not of_attack


def _among(value: str, wanted: str | list[str] | None) -> bool:
    patterns = [wanted] if isinstance(wanted, str) else wanted
    return patterns is None or any(fnmatchcase(value, pattern) for pattern in patterns)


def _number(rule: Rule, record: Record, entry: Measurement) -> tuple[float | None, str]:
    """What is held against the threshold, and how it reads."""
    if entry.value is None:
        tried = max((int(point["steps"]) for point in record.details.get("curve", ())), default=None)
        if entry.name == "steps_to_recovery" and tried is not None and (record.details.get("reference_rate") or 0) > 0:
            # Never back within what was tried: shown up to there, and no further.
            return float(tried), f"not back within the {tried} steps tried"
        return None, f"not measured ({entry.why or 'no reason told'})"
    if rule.bound == "value" or (rule.use is None and entry.interval is None):
        return entry.value, f"{entry.value:.4g}{'' if entry.interval else ', no interval'} (n = {entry.n})"
    if entry.interval is None:
        return None, f"{entry.value:.4g} has no interval, so no {rule.bound} bound"
    low, high = entry.interval
    return (high if rule.bound == "upper" else low), f"{entry.value:.4g}, 95 % {low:.4g} to {high:.4g} (n = {entry.n})"


def _where(record: Record) -> str:
    return " ".join(part for part in (record.concept, record.attack) if part)[:120]


def _listed(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else "|".join(value)
