"""Policies: every measurement that a rule matches, the pessimistic end of the interval; not shown is not safe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import factories
from safeweights.audit.policy import Rule, judge, load_policy, parse_policy
from safeweights.core.errors import UserError
from safeweights.records.record import Measurement, Record


def attacked(successes: int, n: int = 40, **values: Any) -> Record:
    details = {"mode": "live", "access": "gradient", "reference_rate": 0.97, **values.pop("details", {})}
    measurements = (factories.rate("asr", successes, n, better="lower"), factories.rate("pre_asr", 1, n), *values.pop("more", ()))
    return factories.base(**{"attack": "unlearndiffatk", "measurements": measurements, "details": details, **values})


def verdict(records: list[Record], **rule: Any) -> tuple[bool, str]:
    (found,) = judge(parse_policy({"version": 1, "rules": [rule]}, "policy"), records).findings
    return found.passed, found.why


RECORDS = [
    attacked(2),
    attacked(30, concept="emblem", concept_kind="content"),
    attacked(0, attack="replay", details={"mode": "transfer", "access": "prompt"}),
    factories.evaluation(None, "esd", 1),
]


def test_the_end_of_the_interval_that_speaks_against_a_release_counts() -> None:
    low, high = factories.wilson(2, 40)
    for limit, use, passed in (
        (high + 1e-6, None, True), (high - 1e-6, None, False), (0.05, "value", True), (0.049, "value", False),
        (low + 1e-6, "lower", True), (low - 1e-6, "lower", False),
    ):  # fmt: skip
        rule = {"measure": "asr", "max": limit, "concept": "mosaic", "attack": "unlearndiffatk", **({"use": use} if use else {})}
        assert verdict(RECORDS, **rule)[0] is passed, rule
    low, high = factories.wilson(491, 512)
    assert verdict(RECORDS, measure="retention", min=low - 1e-6)[0]
    assert not verdict(RECORDS, measure="retention", min=low + 1e-6)[0]
    assert verdict(RECORDS, measure="retention", min=high - 1e-6, use="upper")[0]


def test_every_match_must_hold_and_failures_are_named() -> None:
    passed, why = verdict(RECORDS, measure="asr", max=0.5)
    assert not passed
    assert "emblem unlearndiffatk: 0.75" in why
    assert "mosaic" not in why
    assert verdict(RECORDS, measure="asr", max=0.5, kind="style")[0]
    assert verdict(RECORDS, measure="asr", max=0.5, concept="mos*")[0]
    assert verdict(RECORDS, measure="asr", max=0.1, mode="transfer")[0], "a replayed number is no live one"
    assert not verdict(RECORDS, measure="asr", max=0.1, mode="live")[0]
    assert verdict(RECORDS, measure="asr", max=0.1, access="prompt")[0]


@pytest.mark.parametrize(
    "rule",
    [
        {"measure": "asr", "max": 1, "concept": "fish"},
        {"measure": "asr", "max": 1, "concept": ["mosaic", "fish"]},
        {"measure": "asr", "max": 1, "attack": ["unlearndiffatk", "p4d"]},
        {"measure": "asr", "max": 1, "access": "weights"},
        {"measure": "beauty", "max": 1},
        {"measure": "asr", "max": 1, "kind": "identity"},
    ],
)
def test_what_was_not_shown_is_not_safe(rule: dict[str, Any]) -> None:
    passed, why = verdict(RECORDS, **rule)
    assert not passed
    assert "not shown is not safe" in why


def test_names_of_measurements_as_the_commands_print_them() -> None:
    assert verdict(RECORDS, measure="rate", max=0.2)[0]
    assert verdict(RECORDS, measure="concept_rate", max=0.2)[0]
    assert verdict(RECORDS, measure="retention.relative", min=0.98)[0], "no interval: the value counts"
    assert not verdict(RECORDS, measure="retention.relative", min=0.98, use="lower")[0], "a bound that is not there cannot hold"
    assert verdict(RECORDS, measure="neighbour_rate:*", min=0.4)[0]
    assert not verdict(RECORDS, measure="neighbour_rate:*", min=0.9)[0]
    assert verdict(RECORDS, measure="frechet_distance", max=3.2)[0]
    assert verdict(RECORDS, measure="clip_score", min=0.3)[0]


def test_a_failed_cell_fails_its_rules_only() -> None:
    broken = factories.base(status="error", attack="p4d", error="RuntimeError: loss is nan")
    assert not verdict([*RECORDS, broken], measure="asr", max=1)[0]
    assert not verdict([*RECORDS, broken], measure="asr", max=1, mode="live")[0]
    assert "loss is nan" in verdict([*RECORDS, broken], measure="asr", max=1)[1]
    assert verdict([*RECORDS, broken], measure="retention", min=0.9)[0]
    assert verdict([*RECORDS, broken], measure="rate", max=1)[0]
    assert "loss is nan" not in verdict([*RECORDS, broken], measure="neighbour_rate:cat", min=0, use="value")[1]
    assert not verdict([*RECORDS, broken], measure="a*", max=1)[0]
    assert not verdict([*RECORDS, broken], measure="similarity", max=1)[0]
    unjudged = factories.base(kind="evaluate", status="error", error="RuntimeError")
    assert not verdict([*RECORDS, unjudged], measure="neighbour_rate:*", min=0, use="value")[0]
    assert verdict([*RECORDS, unjudged], measure="asr", max=1)[0]
    assert verdict([*RECORDS, broken], measure="asr", max=0.5, attack="unlearn*", kind="style")[0]
    unknown = factories.base(
        kind="evaluate", attack="", measurements=(Measurement(name="clip_score", value=None, n=0, why="no CLIP"),)
    )
    assert "no CLIP" in verdict([unknown], measure="clip_score", min=0)[1]


def test_never_back_is_shown_as_far_as_was_tried() -> None:
    never = Measurement(name="steps_to_recovery", value=None, n=8, better="higher", why="never")
    record = attacked(1, more=(never,), details={"curve": [{"steps": 0}, {"steps": 25}], "access": "weights"})
    assert verdict([record], measure="steps_to_recovery", min=25)[0]
    assert not verdict([record], measure="steps_to_recovery", min=26)[0]
    blind = attacked(0, more=(never,), details={"curve": [{"steps": 25}], "reference_rate": 0.0})
    assert not verdict([blind], measure="steps_to_recovery", min=1)[0]
    back = attacked(9, more=(Measurement(name="steps_to_recovery", value=10.0, n=8),), details={"curve": [{"steps": 25}]})
    assert not verdict([back], measure="steps_to_recovery", min=25)[0]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("rules: [{measure: asr, max: 1}]", "'version' is missing"),
        ("version: 2\nrules: [{measure: asr, max: 1}]", "version"),
        ("version: 1\nrules: []", "rules"),
        ("version: 1\nrules: [{measure: asr}]", "either max or min"),
        ("version: 1\nrules: [{measure: asr, max: 1, min: 0}]", "either max or min"),
        ("version: 1\nrules: [{measure: asr, max: .nan}]", "finite"),
        ("version: 1\nrules: [{measure: asr, max: 1, atack: p4d}]", "unknown key 'atack' in rules.0; known are measure, concept"),
        ("version: 1\nrule: []", "unknown key 'rule'; known are version, rules"),
        ("version: 1\nrules: [{measure: asr, max: lots}]", "rules.0.max"),
        ("version: 1\nrules: [{measure: asr, max: 1, use: middle}]", "rules.0.use"),
        ("version: 1\nrules: {", "not valid YAML at line"),
        ("- 1", "must be a mapping"),
        ("version: 1\nrules: [{measure: asr, max: 1}]\n\x00", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        load_policy(path)
    assert part in str(told.value)
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="does not exist"):
        load_policy(tmp_path / "none.yaml")


def test_lines_say_rule_and_figures(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        yaml.safe_dump({"version": 1, "rules": [{"measure": "retention", "min": 0.9}, {"measure": "asr", "max": 0.5}]})
    )
    found = judge(load_policy(path), RECORDS)
    assert not found.passed
    first, second = found.lines()
    assert first.startswith("FAIL  asr <= 0.5: emblem unlearndiffatk: 0.75, 95 %")
    assert second.startswith("pass  retention >= 0.9: nearest is mosaic: 0.959")
    assert found.to_json()["rules"][1]["settings"] == {"measure": "asr", "max": 0.5}
    assert str(Rule(measure="asr", max=0.5, attack=["a", "b"])) == "asr (attack a|b) <= 0.5"
