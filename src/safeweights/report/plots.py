"""Plots described as plain JSON, drawn as inline SVG that people and screen readers can use. No script, no library, no torch.

    {"kind": "line", "title", "x": {"label", "scale": "linear|log"}, "y": {"label"},
     "series": [{"name", "points": [[x, y], ...], "band": [[x, low, high], ...]?}], "levels": [{"name", "y"}]?}
    {"kind": "heatmap", "title", "rows": [..], "columns": [..], "values": [[number|null]], "unit"}
    {"kind": "bars", "title", "unit", "bars": [{"name", "value", "low"?, "high"?}]}
    {"kind": "scatter", "title", "x": {"label"}, "y": {"label"}, "points": [{"name", "x", "y"}]}

Colours are CSS variables with a fallback and ``currentColor``, so a plot follows the theme of the page that holds it; dashes and
marks tell series apart where colours do not. Every figure is in a table below its plot as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safeweights.report.tables import number, printable, shortened

if TYPE_CHECKING:
    from markupsafe import Markup

Point = tuple[float, float]

WIDTH = 580.0
COLOURS = ("#0b6aa8", "#b3530a", "#177a5b", "#8a4a9e", "#6b6f16", "#b03060", "#3c5fb5", "#6d5546")
"""Fallbacks of --plot-1 … --plot-8."""
DASHES = ("", "7 4", "2 3", "9 3 2 3")
LINE, LETTER = 15.0, 7.0
"""Height of a line of text and the mean width of a letter, in the units of a drawing."""
SERIES, POINTS, CELLS, BARS, LABELS, ROWS = 16, 2000, 60, 60, 40, 400
"""The most that is drawn of series, points, rows and columns of a map, bars, labelled points and table rows; a cut is said."""


def draw(spec: Any, ident: str) -> Markup:
    """The plot as a ``<figure>``; ``ident`` makes its ids unique on the page.

    Raises ValueError, in a few words, for what is no plot.
    """
    if not isinstance(spec, dict):
        raise ValueError("it is not an object")
    kinds = {"line": _line, "heatmap": _heatmap, "bars": _bars, "scatter": _scatter}
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"unknown kind {shortened(str(kind), 40)}")
    return _figure(kinds[kind](spec), _plain(spec.get("title"), 160) or "Untitled plot", ident)


@dataclass(frozen=True)
class _Drawing:
    """Markup inside the SVG, its size, a sentence that says what is to be seen, and the figures."""

    body: list[str]
    height: float
    told: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    cut: str = ""
    width: float = WIDTH


def _figure(drawing: _Drawing, title: str, ident: str) -> Markup:
    from markupsafe import Markup, escape

    rows = drawing.rows[:ROWS]
    left_out = f" The first {len(rows)} of {len(drawing.rows)} rows." if len(rows) < len(drawing.rows) else ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in drawing.head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(value)}</td>" for value in rest)}</tr>'
        for first, *rest in rows
    )
    cut = f'<p class="aside">{escape(drawing.cut)}</p>' if drawing.cut else ""
    return Markup(
        f'<figure class="figure"><figcaption><bdi>{escape(title)}</bdi></figcaption>'
        f'<svg class="drawing" viewBox="0 0 {drawing.width:g} {drawing.height:g}" role="img" '
        f'aria-labelledby="{ident}-t {ident}-d" font-size="13" fill="currentColor"><title id="{ident}-t">{escape(title)}</title>'
        f'<desc id="{ident}-d">{escape(shortened(drawing.told, 1200))}</desc>{"".join(drawing.body)}</svg>{cut}'
        f'<details class="data"><summary>The figures of this plot</summary><div class="scroll" role="region" tabindex="0" '
        f'aria-label="Figures of {escape(title)}"><table class="figures"><caption class="away">{escape(title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"{f'<p class=aside>{left_out}</p>' if left_out else ''}</details></figure>"
    )


# ----------------------------------------------------------------------------------------------------------- reading


def _plain(value: Any, limit: int = 60) -> str:
    return printable(shortened(str(value), limit)) if isinstance(value, str | int | float) and value != "" else ""


def _real(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) and abs(value) < 1e100 else None


def _list(spec: dict[str, Any], name: str) -> list[Any]:
    value = spec.get(name)
    if not isinstance(value, list):
        raise ValueError(f"'{name}' is not a list")
    return value


def _label(spec: dict[str, Any], name: str) -> str:
    axis = spec.get(name)
    return _plain(axis.get("label")) if isinstance(axis, dict) else ""


def _numbers(value: Any, length: int) -> tuple[float, ...] | None:
    if not isinstance(value, list | tuple) or len(value) != length:
        return None
    found = [_real(item) for item in value]
    return tuple(item for item in found if item is not None) if None not in found else None


def _thinned(points: list[Any]) -> list[Any]:
    """At most ``POINTS`` of them, evenly, first and last included."""
    if len(points) <= POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]


# -------------------------------------------------------------------------------------------------------------- axes


@dataclass(frozen=True)
class _Axis:
    """Places of values, in SVG units, and where the labels stand."""

    at: Callable[[float], float]
    ticks: list[tuple[float, str]]


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that cover the range."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough), power * 10)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [0.0 if abs(i * step) < step / 1e6 else i * step for i in range(first, last + 1)]


def _linear(values: Iterable[float], start: float, end: float, *, share: bool = False) -> _Axis:
    values = list(values) or [0.0, 1.0]
    low, high = min(values), max(values)
    if share and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    marks = _ticks(low, high)
    low, high = marks[0], marks[-1]
    return _Axis(lambda v: start + (v - low) / (high - low) * (end - start), [(mark, number(mark)) for mark in marks])


def _log(values: Iterable[float], start: float, end: float) -> _Axis:
    """Decades; zero, which has no logarithm, has a place of its own before them."""
    values = list(values)
    positive = [value for value in values if value > 0]
    if not positive or min(values) < 0:
        return _linear(values, start, end)
    low, high = math.log10(min(positive)), math.log10(max(positive))
    high = max(high, low + 0.3)
    origin = low - 0.12 * (high - low) if len(positive) < len(values) else low

    def at(value: float) -> float:
        return start + ((math.log10(value) if value > 0 else origin) - origin) / (high - origin) * (end - start)

    decades = [10.0**i for i in range(math.floor(low), math.ceil(high) + 1)]
    marks = [
        m * f
        for m in decades
        for f in ((1, 2, 5) if high - low < 2.5 else (1,))
        if low - 1e-9 <= math.log10(m * f) <= high + 1e-9
    ]
    marks = marks if len(marks) > 1 else [min(positive), max(positive)]
    return _Axis(at, [*([(0.0, "0")] if origin < low else []), *((mark, number(mark)) for mark in marks)])


def _frame(x: _Axis, y: _Axis, box: tuple[float, float, float, float], labels: tuple[str, str]) -> list[str]:
    """Grid lines, tick labels and axis titles. ``box`` is left, top, right, bottom."""
    from markupsafe import escape

    left, top, right, bottom = box
    parts = []
    for value, text in y.ticks:
        at = y.at(value)
        parts.append(
            f'<line x1="{left:g}" x2="{right:g}" y1="{at:.1f}" y2="{at:.1f}" stroke="currentColor" stroke-opacity=".13"/>'
        )
        parts.append(f'<text x="{left - 8:g}" y="{at + 4:.1f}" text-anchor="end" opacity=".78">{escape(text)}</text>')
    for value, text in x.ticks:
        at = x.at(value)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:g}" y2="{bottom + 5:g}" stroke="currentColor" stroke-opacity=".5"/>'
        )
        parts.append(f'<text x="{at:.1f}" y="{bottom + 19:g}" text-anchor="middle" opacity=".78">{escape(text)}</text>')
    parts.append(
        f'<line x1="{left:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}" stroke="currentColor" stroke-opacity=".5"/>'
    )
    parts.append(f'<text x="{(left + right) / 2:g}" y="{bottom + 39:g}" text-anchor="middle">{escape(labels[0])}</text>')
    parts.append(f'<text x="{left - 8:g}" y="{top - 12:g}" text-anchor="start" dx="{8 - left + 4:g}">{escape(labels[1])}</text>')
    return parts


def _colour(place: int) -> str:
    return f"var(--plot-{place % len(COLOURS) + 1}, {COLOURS[place % len(COLOURS)]})"


def _mark(place: int, x: float, y: float, size: float = 3.6) -> str:
    """A dot whose shape depends on the series."""
    colour = f'fill="{_colour(place)}"'
    shape = place % 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" {colour}/>'
    if shape == 1:
        return f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size:g}" height="{2 * size:g}" {colour}/>'
    corners = [(0, -1.3), (1.2, 0.9), (-1.2, 0.9)] if shape == 2 else [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)]
    return f'<polygon points="{" ".join(f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in corners)}" {colour}/>'


def _apart(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Heights as near to the wanted ones as labels of that size allow."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    last = top - gap
    for i in order:
        placed[i] = last = max(wanted[i], last + gap)
    edge = bottom
    for i in reversed(order):
        placed[i] = edge = min(placed[i], edge)
        edge -= gap
    return placed


def _beside(
    names: Sequence[str], dots: Sequence[tuple[float, float]], box: tuple[float, float, float, float]
) -> list[tuple[float, float, str]]:
    """Where the name of each dot stands, (x, y of the baseline, text-anchor): beside it, else the nearest free place above or
    below, on either side. Where nothing is free it stands beside its dot."""
    taken = [(left - 4, top - 4, left + 4, top + 4) for left, top in dots]
    placed = []
    for name, (left, top) in zip(names, dots, strict=False):
        width = LETTER * len(name)
        places = [
            (left + side * 7, top + 4 + step * LINE, "start" if side > 0 else "end")
            for step in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, 6, 7, 8)
            for side in (1, -1)
        ]

        def area(place: tuple[float, float, str], width: float = width) -> tuple[float, float, float, float]:
            start = place[0] if place[2] == "start" else place[0] - width
            return start, place[1] - LINE + 3, start + width, place[1] + 2

        def free(place: tuple[float, float, str]) -> bool:
            a = area(place)
            inside = a[0] >= box[0] and a[2] <= WIDTH and a[1] >= box[1] - LINE and a[3] <= box[3]
            return inside and all(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for b in taken)

        found = next((place for place in places if free(place)), places[0])
        taken.append(area(found))
        placed.append(found)
    return placed


# ------------------------------------------------------------------------------------------------------------- kinds


def _levels(spec: dict[str, Any]) -> list[tuple[str, float]]:
    """Named heights that a line plot marks across its width."""
    given, found = spec.get("levels"), []
    for entry in given[:4] if isinstance(given, list) else []:
        if isinstance(entry, dict) and (height := _real(entry.get("y"))) is not None:
            found.append((_plain(entry.get("name"), 40), height))
    return found


def _line(spec: dict[str, Any]) -> _Drawing:
    from markupsafe import escape

    given, most = _list(spec, "series"), 0
    series: list[tuple[str, list[Point], list[tuple[float, ...]]]] = []
    for entry in given[:SERIES]:
        if not isinstance(entry, dict):
            raise ValueError("a series is not an object")
        whole = _list(entry, "points")
        most = max(most, len(whole))
        found = [(p[0], p[1]) for raw in _thinned(whole) if (p := _numbers(raw, 2))]
        band = entry.get("band")
        band = [b for raw in _thinned(band) if (b := _numbers(raw, 3))] if isinstance(band, list) else []
        series.append((_plain(entry.get("name"), 48) or f"series {len(series) + 1}", sorted(found), sorted(band)))
    series = [entry for entry in series if entry[1]]
    if not series:
        raise ValueError("it holds no points")
    levels = _levels(spec)
    tags = len(series) + len(levels)
    height = max(290.0, 90.0 + 17 * tags)
    longest = max(len(name) for name in [*(entry[0] for entry in series), *(entry[0] for entry in levels)])
    box = (52.0, 34.0, WIDTH - min(280.0, 30 + 9.0 * longest), height - 50)
    xs = [x for _, points, _ in series for x, _ in points]
    ys = [y for _, points, _ in series for _, y in points] + [y for _, y in levels]
    ys += [value for _, _, band in series for _, *pair in band for value in pair]
    scale = spec.get("x", {}).get("scale") if isinstance(spec.get("x"), dict) else None
    x = (_log if scale == "log" else _linear)(xs, box[0] + 6, box[2] - 8)
    y = _linear(ys, box[3], box[1], share=True)
    labels = (_label(spec, "x"), _label(spec, "y"))
    body = _frame(x, y, box, labels)
    for _, level in levels:
        at = y.at(level)
        body.append(f'<line x1="{box[0]:g}" x2="{box[2]:g}" y1="{at:.1f}" y2="{at:.1f}" stroke="currentColor" '
                    'stroke-opacity=".65" stroke-dasharray="3 4"/>')  # fmt: skip
    for place, (_, _, band) in enumerate(series):
        if len(band) > 1:
            edge = [f"{x.at(a):.1f},{y.at(high):.1f}" for a, _, high in band]
            edge += [f"{x.at(a):.1f},{y.at(low):.1f}" for a, low, _ in reversed(band)]
            body.append(f'<polygon points="{" ".join(edge)}" fill="{_colour(place)}" fill-opacity=".13"/>')
    for place, (_, points, _) in enumerate(series):
        path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in points)
        dash = f' stroke-dasharray="{DASHES[place % len(DASHES)]}"' if DASHES[place % len(DASHES)] else ""
        body.append(f'<polyline points="{path}" fill="none" stroke="{_colour(place)}" stroke-width="2"{dash} '
                    'stroke-linejoin="round"/>')  # fmt: skip
        if len(points) <= 40:
            body.extend(_mark(place, x.at(a), y.at(b)) for a, b in points)
    wanted = [y.at(points[-1][1]) for _, points, _ in series] + [y.at(level) for _, level in levels]
    for place, at in enumerate(_apart(wanted, 16, box[1] + 4, box[3])):
        name = series[place][0] if place < len(series) else levels[place - len(series)][0]
        ink = f'fill="{_colour(place)}"' if place < len(series) else 'opacity=".8"'
        mark = _mark(place, box[2] + 9, at) if place < len(series) else ""
        body.append(f'{mark}<text x="{box[2] + 18:g}" y="{at + 4:.1f}" {ink} font-weight="600">{escape(name)}</text>')
    told = f"{labels[1] or 'y'} against {labels[0] or 'x'}. " + " ".join(
        f"{name}: {number(points[0][1])} at {number(points[0][0])}, {number(points[-1][1])} at {number(points[-1][0])}, "
        f"highest {number(max(b for _, b in points))}."
        for name, points, _ in series
    )
    told += "".join(f" {name}: {number(level)}." for name, level in levels)
    bands = any(band for _, _, band in series)
    rows: list[tuple[str, ...]] = []
    for name, points, band in series:
        spans = {a: f"{number(low)} to {number(high)}" for a, low, high in band}
        rows += [(name, number(a), number(b), *([spans.get(a, "")] if bands else [])) for a, b in points]
    cut = f"The first {SERIES} of {len(given)} series are drawn. " if len(given) > SERIES else ""
    cut += f"At most {POINTS} of {most} points of a series are drawn." if most > POINTS else ""
    head = ("Series", labels[0] or "x", labels[1] or "y", *(["Interval"] if bands else []))
    return _Drawing(body, height, told, head, rows, cut)


def _scatter(spec: dict[str, Any]) -> _Drawing:
    from markupsafe import escape

    found = []
    for entry in _list(spec, "points"):
        if isinstance(entry, dict) and (a := _real(entry.get("x"))) is not None and (b := _real(entry.get("y"))) is not None:
            found.append((_plain(entry.get("name"), 32), a, b))
    if not found:
        raise ValueError("it holds no points")
    shown, height = _thinned(found), 330.0
    box = (52.0, 34.0, WIDTH - 20, height - 50)
    x = _linear((a for _, a, _ in found), box[0] + 6, box[2] - 60)
    y = _linear((b for *_, b in found), box[3], box[1])
    labels = (_label(spec, "x"), _label(spec, "y"))
    body = _frame(x, y, box, labels)
    dots = [(x.at(a), y.at(b)) for _, a, b in shown]
    body += [_mark(0, left, top, 4) for left, top in dots]
    if len(shown) <= 2 * LABELS:
        names = [name for name, *_ in shown[:LABELS]]
        for name, dot, (left, top, anchor) in zip(names, dots, _beside(names, dots, box), strict=False):
            if abs(top - 4 - dot[1]) > LINE:  # too far from its dot to be taken for its name
                ends = f'x1="{dot[0]:.1f}" y1="{dot[1]:.1f}" x2="{left:.1f}" y2="{top - 4:.1f}"'
                body.append(f'<line {ends} stroke="currentColor" stroke-opacity=".35"/>')
            body.append(f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}" opacity=".85">{escape(name)}</text>')
    told = f"{len(found)} points, {labels[1] or 'y'} against {labels[0] or 'x'}. " + " ".join(
        f"{name or 'point'}: {number(a)}, {number(b)}." for name, a, b in found[:20]
    )
    rows: list[tuple[str, ...]] = [(name or str(i + 1), number(a), number(b)) for i, (name, a, b) in enumerate(found)]
    cut = f"{len(shown)} of {len(found)} points are drawn." if len(shown) < len(found) else ""
    return _Drawing(body, height, told, ("Point", labels[0] or "x", labels[1] or "y"), rows, cut)


def _bars(spec: dict[str, Any]) -> _Drawing:
    from markupsafe import escape

    given = _list(spec, "bars")
    bars: list[tuple[str, float | None, float | None, float | None]] = []
    for entry in given:
        if not isinstance(entry, dict):
            raise ValueError("a bar is not an object")
        name = _plain(entry.get("name"), 44)
        bars.append((name, _real(entry.get("value")), _real(entry.get("low")), _real(entry.get("high"))))
    if not bars:
        raise ValueError("it holds no bars")
    unit, shown = _plain(spec.get("unit"), 24), bars[:BARS]
    values = [value for _, *triple in shown for value in triple if value is not None]
    share = bool(values) and min(values) >= 0 and max(values) <= 1
    left = min(230.0, 20 + 7.2 * max(len(name) for name, *_ in shown))
    height, x = 24.0 * len(shown) + (60 if unit else 40), _linear([0.0, *values], left, WIDTH - 96, share=share)
    body, bottom = [], 24.0 * len(shown) + 10
    for mark, text in x.ticks:
        at = x.at(mark)
        body.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="6" y2="{bottom:g}" stroke="currentColor" stroke-opacity=".13"/>')
        body.append(f'<text x="{at:.1f}" y="{bottom + 17:g}" text-anchor="middle" opacity=".78">{escape(text)}</text>')
    zero = x.at(0.0)
    for place, (name, value, low, high) in enumerate(shown):
        top = 24.0 * place + 10
        body.append(f'<text x="{left - 10:g}" y="{top + 12:g}" text-anchor="end">{escape(name)}</text>')
        if value is None:
            body.append(f'<text x="{zero + 6:g}" y="{top + 12:g}" opacity=".78">not measured</text>')
            continue
        at = x.at(value)
        body.append(f'<rect x="{min(zero, at):.1f}" y="{top:g}" width="{abs(at - zero):.1f}" height="16" rx="2" '
                    f'fill="{_colour(0)}" fill-opacity=".8"/>')  # fmt: skip
        end = at
        if low is not None and high is not None:
            a, b, middle = x.at(low), x.at(high), top + 8
            end = max(at, b)
            body.append(f'<path d="M{a:.1f} {middle:g}H{b:.1f}M{a:.1f} {middle - 4:g}v8M{b:.1f} {middle - 4:g}v8" '
                        'fill="none" stroke="currentColor" stroke-width="1.5"/>')  # fmt: skip
        body.append(f'<text x="{max(end, zero) + 7:.1f}" y="{top + 12:g}" font-weight="600">{escape(number(value))}</text>')
    if unit:
        body.append(f'<text x="{(left + WIDTH - 96) / 2:g}" y="{bottom + 38:g}" text-anchor="middle">{escape(unit)}</text>')

    def interval(low: float | None, high: float | None) -> str:
        return f"{number(low)} to {number(high)}" if low is not None and high is not None else ""

    rows: list[tuple[str, ...]] = [(name, number(value), interval(low, high)) for name, value, low, high in bars]
    told = f"Bars{f' in {unit}' if unit else ''}. " + " ".join(
        f"{name}: {number(value)}{f' ({interval(low, high)})' if interval(low, high) else ''}."
        for name, value, low, high in shown[:24]
    )
    cut = f"The first {BARS} of {len(bars)} bars are drawn." if len(bars) > BARS else ""
    return _Drawing(body, height, told, ("Name", unit or "Value", "Interval"), rows, cut)


def _heatmap(spec: dict[str, Any]) -> _Drawing:
    from markupsafe import escape

    names = [_plain(name, 40) for name in _list(spec, "rows")]
    columns = [_plain(name, 40) for name in _list(spec, "columns")]
    values = _list(spec, "values")
    if not names or not columns or len(values) != len(names):
        raise ValueError("its values do not fit its rows and columns")
    cells = []
    for row in values:
        if not isinstance(row, list) or len(row) != len(columns):
            raise ValueError("its values do not fit its rows and columns")
        cells.append([_real(value) for value in row])
    unit = _plain(spec.get("unit"), 24)
    shown_rows, shown_columns = names[:CELLS], columns[:CELLS]
    known = [v for row in cells for v in row if v is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    split = low < 0 < high
    floor = 0.0 if split or (low >= 0 and high <= 1) else low
    reach = (
        max(abs(low), abs(high))
        if split
        else ((1.0 if unit in ("", "share", "rate") and floor == 0.0 and high <= 1 else high) - floor)
    )
    left = min(210.0, 22 + 7.2 * max(len(name) for name in shown_rows))
    wide = min(76.0, max(9.0, (WIDTH - left - 16) / len(shown_columns)))
    tall = 26.0 if len(shown_rows) <= 24 else 16.0
    slanted = wide < 7.2 * max(len(name) for name in shown_columns) + 6
    # A slanted label must not leave the picture on top: its height is half its length.
    top = 12 + min(150.0, 3.9 * max(len(name) for name in shown_columns)) if slanted else 24.0
    height = top + tall * len(shown_rows) + 40
    body = []
    for place, name in enumerate(shown_columns):
        at = left + wide * (place + 0.5)
        turn = f' transform="rotate(-35 {at:.1f} {top - 8:.1f})"' if slanted else ""
        anchor = "start" if slanted else "middle"
        if wide >= 12 or place % 3 == 0:
            body.append(f'<text x="{at:.1f}" y="{top - 8:.1f}" text-anchor="{anchor}"{turn}>{escape(name)}</text>')
    for i, name in enumerate(shown_rows):
        y = top + tall * i
        body.append(f'<text x="{left - 9:g}" y="{y + tall / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for j, value in enumerate(cells[i][: len(shown_columns)]):
            x = left + wide * j
            if value is None:
                body.append(f'<rect x="{x + 1.5:.1f}" y="{y + 1.5:.1f}" width="{wide - 3:.1f}" height="{tall - 3:.1f}" '
                            'fill="none" stroke="currentColor" stroke-opacity=".35" stroke-dasharray="2 3"/>')  # fmt: skip
                continue
            strength = min(1.0, abs(value - floor) / reach) if reach > 0 else 0.0
            colour = _colour(1 if split and value < 0 else 0)
            body.append(f'<rect x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{wide - 1:.1f}" height="{tall - 1:.1f}" rx="2" '
                        f'fill="{colour}" fill-opacity="{0.07 + 0.93 * strength:.2f}"/>')  # fmt: skip
            if wide >= 34 and tall >= 20:
                ink = ' fill="var(--plot-paper, #fff)"' if strength > 0.55 else ""
                body.append(f'<text x="{x + wide / 2:.1f}" y="{y + tall / 2 + 4:.1f}" text-anchor="middle"{ink}>'
                            f"{escape(number(value))}</text>")  # fmt: skip
    scale = f"{number(low)} to {number(high)}{f' {unit}' if unit else ''}; dashed: not measured"
    body.append(f'<text x="{left:g}" y="{height - 12:g}" opacity=".78">{escape(scale)}</text>')
    worst = max(((v, i, j) for i, row in enumerate(cells) for j, v in enumerate(row) if v is not None), default=None)
    told = f"A map of {len(names)} rows and {len(columns)} columns, from {number(low)} to {number(high)} {unit}."
    if worst:
        told += f" The highest is {number(worst[0])}, at {names[worst[1]]}, {columns[worst[2]]}."
    rows = [(name, *(number(value) for value in row[: len(shown_columns)])) for name, row in zip(names, cells, strict=True)]
    cut = ""
    if len(names) > CELLS or len(columns) > CELLS:
        cut = f"The first {len(shown_rows)} of {len(names)} rows and {len(shown_columns)} of {len(columns)} columns are drawn."
    width = max(WIDTH, left + wide * len(shown_columns) + 16)
    return _Drawing(body, height, told, ("", *shown_columns), rows, cut, width)
