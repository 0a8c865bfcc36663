"""Plots: every figure is drawn where it belongs and told in words; nothing in a specification becomes markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from safeweights.report.plots import draw

SVG = "{http://www.w3.org/2000/svg}"
LINE: dict[str, Any] = {
    "kind": "line", "title": "Loss", "x": {"label": "steps", "scale": "linear"}, "y": {"label": "loss"},
    "series": [{"name": "a", "points": [[0, 1.0], [10, 0.5]], "band": [[0, 0.9, 1.0], [10, 0.4, 0.6]]},
               {"name": "b", "points": [[0, 0.2], [10, 0.2]]}],
}  # fmt: skip
HEAT: dict[str, Any] = {
    "kind": "heatmap",
    "title": "Map",
    "rows": ["r", "s"],
    "columns": ["c", "d"],
    "values": [[0.1, None], [0.9, 0.5]],
}
BARS: dict[str, Any] = {"kind": "bars", "title": "Bars", "unit": "s",
                        "bars": [{"name": "a", "value": 2.0, "low": 1.0, "high": 3.0},
                                 {"name": "b", "value": None}]}  # fmt: skip
DOTS: dict[str, Any] = {"kind": "scatter", "title": "Dots", "x": {"label": "x"}, "y": {"label": "y"},
                        "points": [{"name": "p", "x": 1, "y": 2}, {"name": "q", "x": 3, "y": 1}]}  # fmt: skip
EVIL = "'\"></svg><script>alert(1)</script><img src=x onerror=alert(1)>\x00\u202e\ud800"


def parsed(spec: Any) -> ET.Element:
    text = str(draw(spec, "p1"))
    assert " style=" not in text
    return ET.fromstring(
        re.sub("class=aside", 'class="aside"', text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" '))
    )


def words(element: ET.Element) -> str:
    return " ".join(element.itertext())


@pytest.mark.parametrize("spec", [LINE, HEAT, BARS, DOTS], ids=lambda spec: spec["kind"])
def test_every_plot_has_a_title_a_description_and_its_figures(spec: dict[str, Any]) -> None:
    figure = parsed(spec)
    svg = figure.find(f"{SVG}svg")
    assert svg is not None
    assert svg.get("role") == "img"
    named = [svg.find(f"{SVG}{part}") for part in ("title", "desc")]
    assert svg.get("aria-labelledby") == " ".join(part.get("id") for part in named)  # type: ignore[union-attr]
    assert named[0].text == spec["title"]  # type: ignore[union-attr]
    assert len(named[1].text) > 20  # type: ignore[union-attr, arg-type]
    assert len(figure.findall(".//table/tbody/tr")) >= 2


def test_points_lie_where_their_values_say() -> None:
    svg = parsed(LINE)
    lines = [
        [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()] for line in svg.iter(f"{SVG}polyline")
    ]
    (start, end), (flat, also) = lines
    assert start[0] == flat[0] < end[0] == also[0]
    assert start[1] < end[1] < flat[1] == also[1]  # the vertical axis points down
    share = (flat[1] - end[1]) / (flat[1] - start[1])
    assert share == pytest.approx((0.5 - 0.2) / (1.0 - 0.2), abs=0.01)
    assert "a: 1 at 0, 0.5 at 10" in words(svg)


def test_a_logarithmic_axis_has_a_place_for_zero() -> None:
    series = [{"name": "m", "points": [[0, 0], [1, 0.2], [10, 0.4], [100, 0.6]]}]
    svg = parsed({**LINE, "x": {"label": "steps", "scale": "log"}, "series": series})
    (line,) = [[float(pair.split(",")[0]) for pair in line.get("points", "").split()] for line in svg.iter(f"{SVG}polyline")]
    assert line[0] < line[1]
    assert line[2] - line[1] == pytest.approx(line[3] - line[2], abs=0.2)


def test_bars_are_as_long_as_their_values() -> None:
    bars = [{"name": str(value), "value": value} for value in (1, 2, 4)]
    widths = [float(bar.get("width", 0)) for bar in parsed({**BARS, "bars": bars}).iter(f"{SVG}rect")]
    assert widths == pytest.approx([widths[0], 2 * widths[0], 4 * widths[0]], abs=0.3)


def test_a_map_is_darker_where_its_values_are_higher() -> None:
    cells = list(parsed(HEAT).iter(f"{SVG}rect"))
    strengths = [float(cell.get("fill-opacity", -1)) for cell in cells]
    assert strengths[1] == -1
    assert strengths[0] < strengths[3] < strengths[2]


@pytest.mark.parametrize("spec", [LINE, HEAT, BARS, DOTS], ids=lambda spec: spec["kind"])
def test_nothing_becomes_markup(spec: dict[str, Any]) -> None:
    def spoilt(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoilt(inner) if key not in ("kind", "scale") else inner for key, inner in value.items()}
        if isinstance(value, list):
            return [spoilt(inner) for inner in value]
        return EVIL if isinstance(value, str) else value

    text = str(draw(spoilt(spec), "p1"))
    assert "<script" not in text
    assert "<img" not in text
    assert not re.search("[\x00-\x08\u202e\ud800-\udfff]", text)
    parsed(spoilt(spec))


@pytest.mark.parametrize(
    "spec",
    [
        None, 3, [], {}, {"kind": "pie"}, {"kind": []}, {"kind": "line"}, {**LINE, "series": []}, {**LINE, "series": [3]},
        {**LINE, "series": [{"name": "a", "points": [["x", 1], [1], None]}]}, {**LINE, "series": {"a": 1}},
        {**HEAT, "values": [[1, 2]]}, {**HEAT, "values": [[1], [2]]}, {**HEAT, "rows": "ab"}, {**BARS, "bars": []},
        {**BARS, "bars": [1]},
        {**DOTS, "points": [{"x": float("nan"), "y": 1}]}, {**DOTS, "points": [{"x": 10**400, "y": 1}]},
        {"kind": "x" * 10_000_000},
    ],
)  # fmt: skip
def test_what_is_no_plot_is_told_in_a_few_words(spec: Any) -> None:
    with pytest.raises(ValueError, match=r".{4,}") as told:
        draw(spec, "p")
    assert len(str(told.value)) < 100


@pytest.mark.parametrize(
    "spec",
    [
        {**LINE, "series": [{"name": "n" * 10_000, "points": [[i, i % 7] for i in range(100_000)]}] * 200},
        {**HEAT, "rows": ["r"] * 500, "columns": ["c" * 500] * 500, "values": [[0.5] * 500] * 500},
        {**BARS, "bars": BARS["bars"] * 5000, "title": "t" * 10_000_000},
        {**DOTS, "points": DOTS["points"] * 50_000},
    ],
    ids=lambda spec: spec["kind"],
)
def test_too_much_is_cut_and_said(spec: dict[str, Any]) -> None:
    text = str(draw(spec, "p"))
    assert len(text) < 2_500_000
    assert " of " in text
    parsed(spec)


@pytest.mark.parametrize("values", [[5.0], [0.0], [-3.0, 2.0], [1e-30, 1e30], [7, 7, 7], [-1e-12, 0]])
def test_odd_ranges_are_drawn(values: list[float]) -> None:
    for scale in ("linear", "log"):
        spec = {**LINE, "x": {"label": "x", "scale": scale}, "series": [{"name": "s", "points": [[v, v] for v in values]}]}
        assert "nan" not in str(draw(spec, "p"))
    assert "nan" not in str(draw({**BARS, "bars": [{"name": "b", "value": v} for v in values]}, "p"))
    assert "nan" not in str(draw({**HEAT, "rows": ["r"], "columns": list(map(str, values)), "values": [values]}, "p"))


def test_names_of_dots_in_one_place_do_not_cover_each_other() -> None:
    points = [{"name": f"method number {i}", "x": 0.5 + 0.001 * i, "y": 0.9} for i in range(8)]
    drawn = str(draw({"kind": "scatter", "title": "t", "x": {"label": "x"}, "y": {"label": "y"}, "points": points}, "p"))
    svg = drawn.partition("<svg")[2].partition("</svg>")[0]
    places = [
        (float(x), float(y), anchor)
        for x, y, anchor in re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(start|end)" opacity="\.85">method', svg)
    ]
    assert len(places) == len(points)
    boxes = [(x, x + 105, y) if anchor == "start" else (x - 105, x, y) for x, y, anchor in places]
    for i, (left, right, y) in enumerate(boxes):
        assert all(abs(y - other) >= 12 or right <= a or b <= left for a, b, other in boxes[:i])
