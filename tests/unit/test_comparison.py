"""Two folders of records: Newcombe's interval decides, and what is better depends on the measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import factories
from safeweights.cli.main import run
from safeweights.core.intervals import difference
from safeweights.records.record import Measurement, Record
from safeweights.records.store import Store
from safeweights.report.comparison import compare, counts, table


def asr(successes: int, n: int, **values: Any) -> Record:
    return factories.base(**{"attack": "p4d", "measurements": (factories.rate("asr", successes, n, better="lower"),), **values})


def quality(name: str, value: float, **more: Any) -> Record:
    return factories.base(kind="evaluate", attack="", measurements=(Measurement(name=name, value=value, n=50, **more),))


# Newcombe (1998), table II, method 10: (a/m, b/n) and the interval of a/m - b/n.
@pytest.mark.parametrize(
    ("a", "m", "b", "n", "low", "high"),
    [
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (0, 10, 0, 20, -0.1611, 0.2775),
        (10, 10, 0, 10, 0.6075, 1.0),
    ],
)
def test_intervals_of_the_paper(a: int, m: int, b: int, n: int, low: float, high: float) -> None:
    assert difference(a, m, b, n) == pytest.approx((low, high), abs=5e-5)
    (change,) = compare([asr(b, n)], [asr(a, m)])
    assert change.ci95 == pytest.approx((low, high), abs=5e-5)
    assert change.delta == pytest.approx(a / m - b / n)
    assert change.state == ("same" if low <= 0 <= high else "worse")


def test_better_is_what_the_measure_says() -> None:
    a = [asr(30, 40), factories.evaluation(None, "esd", 20)]
    b = [asr(3, 40), factories.evaluation(None, "esd", 1)]
    states = {(c.measure, c.attack): c.state for c in compare(a, b)}
    assert states["asr", "p4d"] == "better"
    assert states["concept_rate", ""] == "better"
    assert states["retention", ""] == "same"
    assert {(c.measure, c.attack): c.state for c in compare(b, a)}["asr", "p4d"] == "worse"


def test_seeds_are_pooled_and_shared_measurements_counted_once() -> None:
    a = [asr(1, 10, seed=seed) for seed in range(3)]
    (change,) = compare(a, [asr(6, 30)])
    assert (change.n_a, change.a, change.b) == (30, 0.1, 0.2)
    twice = [factories.evaluation(None, "esd", 1), factories.evaluation(None, "esd", 1, concept="emblem")]
    found = {(c.concept, c.measure): c for c in compare(twice, twice)}
    assert found["", "retention"].n_a == 512, "one evaluation of two concepts"
    assert found["mosaic", "concept_rate"].n_a == 32


def test_several_methods_in_a_folder_stay_apart() -> None:
    a = [asr(1, 40, method="esd"), asr(39, 40, method="uce")]
    assert [(c.method, c.state) for c in compare(a, a)] == [("esd", "same"), ("uce", "same")]


def test_what_has_no_interval_is_not_called_better() -> None:
    (change,) = compare([quality("frechet_distance", 3.0, better="lower")], [quality("frechet_distance", 1.0, better="lower")])
    assert (change.state, change.delta) == ("no interval", -2.0)
    a, b = quality("x", 3.0, better="lower", interval=(2.5, 3.5)), quality("x", 1.0, better="lower", interval=(0.5, 1.5))
    assert compare([a], [b])[0].state == "better"
    assert compare([a], [quality("x", 2.4, better="lower", interval=(1.4, 2.6))])[0].state == "same"
    gone = compare([asr(1, 2)], [quality("x", 1.0, better="lower")])
    assert sorted(c.state for c in gone) == ["only in a", "only in b"]
    assert counts(gone)["only in a"] == 1
    failed = factories.base(status="error", error="x")
    assert compare([failed], [failed]) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "<b>\x1b[31m../../etc/" + "y" * 500
    for name, successes in (("a", 30), ("b", 3)):
        Store(tmp_path / name).add(asr(successes, 40))
        Store(tmp_path / name / "deeper").add(asr(1, 40, concept=hostile))
    assert run(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "y" * 81 not in out
    assert "1 better, 1 same" in out
    assert run(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["counts"]["better"] == 1
    assert data["changes"][0]["ci95"][1] < 0
    (tmp_path / "empty").mkdir()
    for wrong in ("empty", "none"):
        assert run(["compare", str(tmp_path / "a"), str(tmp_path / wrong)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_columns_line_up() -> None:
    lines = table(compare([asr(30, 40)], [asr(3, 40)]))
    assert lines[0].index("b - a") == lines[1].index("-0.675")
