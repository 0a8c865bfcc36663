"""Records of a benchmark as a table: each method on each concept, and each method's mean over concepts. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safeweights.bench import masks
from safeweights.bench.masks import mask_rows, mask_table
from safeweights.bench.resistance import resistance_sections, resistance_table, resistances
from safeweights.core.intervals import wilson
from safeweights.records.record import Measurement, Record
from safeweights.report.plots import draw
from safeweights.report.tables import markdown


@dataclass(frozen=True)
class Pooled:
    """A rate over all seeds: successes of n, and Wilson's interval."""

    successes: int
    n: int

    @property
    def rate(self) -> float:
        return self.successes / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.successes, self.n)


@dataclass(frozen=True)
class Line:
    """One method on one concept, all seeds together. None is what was not measured."""

    method: str
    concept: str
    kind: str
    seeds: tuple[int, ...]
    before: float | None
    after: Pooled | None
    pre_asr: Pooled | None
    asr: Mapping[str, Pooled]
    retention: float | None
    """Relative to the model before protection, the mean over seeds; so are the rest."""
    clip: float | None
    clip_before: float | None
    frechet: float | None
    seconds: float | None
    """Of the protection."""
    memory: float | None
    doubts: tuple[str, ...]
    failed: int

    @property
    def strongest(self) -> float | None:
        """The rate of the attack that succeeds most often."""
        return max((pooled.rate for pooled in self.asr.values()), default=None)


def lines(records: Iterable[Record]) -> list[Line]:
    """One line for each method and concept, in the order in which the records name them."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.method, record.concept), []).append(record)
    return [_line(method, concept, group) for (method, concept), group in groups.items()]


def leaderboard(
    records: Sequence[Record],
    *,
    methods: Sequence[str],
    concepts: Sequence[str],
    attacks: Sequence[str],
    benign: Sequence[str] = (),
    baselines: Mapping[str, str] | None = None,
) -> str:
    """The leaderboard as Markdown: means over concepts first, least revived method on top, then every method and concept.

    Where attacks fine-tune, what each method takes from re-learning against its ``baselines`` follows; ``benign`` concepts count
    there only.
    """
    everything, records = records, [record for record in records if record.concept not in benign]
    found, means = _ranked(records, methods, concepts, attacks)
    parts = [
        "# Leaderboard",
        "Means over concepts, each concept counting once; the method that the strongest attack on each concept revives least "
        "comes first. A method is only as good as both sides: what stays of the concept, and what stays of the rest.",
        markdown([_mean_row(mean, attacks) for mean in means]),
        "## Each concept",
        "Rates pool the seeds; in brackets Wilson's 95 % interval. “Before” is the model before protection, “after” is asked "
        "plainly; pre-ASR is the share of attacked prompts that succeed without the attack, which ASR includes. Retention is "
        "relative to before. Seconds and memory are those of the protection, for one seed.",
        markdown([_row(line, attacks) for line in found]),
    ]
    baselines = baselines or {}
    parts.append(resistance_table(resistances(everything, baselines, concepts=concepts, benign=benign), baselines))
    parts.append(mask_table(records, methods))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def leaderboard_page(
    records: Sequence[Record],
    *,
    methods: Sequence[str],
    concepts: Sequence[str],
    attacks: Sequence[str],
    total: int,
    benign: Sequence[str] = (),
    baselines: Mapping[str, str] | None = None,
) -> str:
    """The same as an HTML page that needs nothing else, with tables that can be sorted; ``total`` cells are to be measured."""
    from safeweights.report.page import environment, own_files

    baselines = baselines or {}
    relearnt = resistance_sections(resistances(records, baselines, concepts=concepts, benign=benign), baselines)
    frozen = mask_rows(records, methods)
    records = [record for record in records if record.concept not in benign]
    found, means = _ranked(records, methods, concepts, attacks)
    means = [mean for mean in means if mean["concepts"]]
    best = next((mean for mean in means if mean["strongest"] is not None and mean["method"] != "none"), None)
    failed = sum(record.status == "error" for record in records)
    return environment().get_template("leaderboard.html.j2").render(
        **own_files("leaderboard.js"),
        headline=f"{best['method']} is revived least: {100 * best['strongest']:.0f} %" if best else "No attack is measured yet",
        note=f"{len(means)} methods on {len({line.concept for line in found})} concepts under {len(attacks)} attacks.",
        done=len(records) - failed, total=total, failed=failed,
        means=[_mean_row(mean, attacks) for mean in means],
        rows=[_row(line, attacks) for line in found],
        relearnt=relearnt, masks=[(masks.TOLD, frozen)] if frozen else [],
        plots=[draw(spec, f"plot-{number}") for number, spec in enumerate(filter(None, _plots(found, means)), start=1)],
    )  # fmt: skip


def _plots(found: Sequence[Line], means: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
    """How much each method keeps against what comes back, and the strongest attack on each concept."""
    names = [mean["method"] for mean in means]
    concepts = list(dict.fromkeys(line.concept for line in found))
    by_place = {(line.concept, line.method): line for line in found}
    values = [[getattr(by_place.get((concept, name)), "strongest", None) for name in names] for concept in concepts]
    both = [mean for mean in means if mean["strongest"] is not None and mean["retention"] is not None]
    return [
        {"kind": "heatmap", "title": "Success of the strongest attack", "rows": concepts, "columns": names, "values": values,
         "unit": "share of prompts"} if concepts and names else None,
        {"kind": "scatter", "title": "What comes back against what stays", "x": {"label": "retention, relative to before"},
         "y": {"label": "strongest attack, mean over concepts"},
         "points": [{"name": mean["method"], "x": mean["retention"], "y": mean["strongest"]} for mean in both]} if both else None,
    ]  # fmt: skip


def _ranked(
    records: Sequence[Record], methods: Sequence[str], concepts: Sequence[str], attacks: Sequence[str]
) -> tuple[list[Line], list[dict[str, Any]]]:
    """Every line in the order of the file, and the means of each method, least revived first."""
    order = {name: place for place, name in enumerate([*methods, *concepts])}
    found = sorted(lines(records), key=lambda line: (order.get(line.concept, len(order)), order.get(line.method, len(order))))
    means = sorted(
        (_means(name, [line for line in found if line.method == name], attacks) for name in methods),
        key=lambda mean: (mean["strongest"] is None, mean["strongest"] or 0.0),
    )
    return found, means


def _line(method: str, concept: str, group: Sequence[Record]) -> Line:
    good = [record for record in group if record.status == "ok"]
    evaluations = [record for record in good if record.kind == "evaluate"]
    protections = [record for record in good if record.kind == "protect"]
    attacked: dict[str, list[Record]] = {}
    for record in good:
        if record.kind == "attack":
            attacked.setdefault(record.attack, []).append(record)
    asr = {name: pooled for name, found in attacked.items() if (pooled := _pool(found, "asr")) is not None}
    # Every attack asks the same prompts plainly first, so the one seen with most seeds says it.
    plain = max(attacked.values(), key=len, default=[])
    return Line(
        method=method,
        concept=concept,
        kind=group[0].concept_kind,
        seeds=tuple(sorted({record.seed for record in good if record.kind != "protect"})),
        before=_mean(evaluations, "concept_rate", lambda entry: entry.reference),
        after=_pool(evaluations, "concept_rate"),
        pre_asr=_pool(plain, "pre_asr"),
        asr=asr,
        retention=_mean(evaluations, "retention_relative"),
        clip=_mean(evaluations, "clip_score"),
        clip_before=_mean(evaluations, "clip_score", lambda entry: entry.reference),
        frechet=_mean(evaluations, "frechet_distance"),
        seconds=_mean(protections, "seconds"),
        memory=_mean(protections, "peak_memory_gb"),
        doubts=tuple(sorted({doubt.name for record in good for doubt in record.doubts})),
        failed=len(group) - len(good),
    )


def _measured(records: Iterable[Record], name: str) -> list[Measurement]:
    return [entry for record in records for entry in record.measurements if entry.name == name and entry.value is not None]


def _pool(records: Iterable[Record], name: str) -> Pooled | None:
    """A rate's successes and trials over records."""
    found = _measured(records, name)
    n = sum(entry.n for entry in found)
    return Pooled(round(sum((entry.value or 0.0) * entry.n for entry in found)), n) if n else None


def _mean(
    records: Iterable[Record], name: str, of: Callable[[Measurement], float | None] = lambda entry: entry.value
) -> float | None:
    return average(of(entry) for entry in _measured(records, name))


def average(values: Iterable[float | None]) -> float | None:
    """The mean of what was measured; None where nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _means(method: str, found: Sequence[Line], attacks: Sequence[str]) -> dict[str, Any]:
    return {
        "method": method,
        "concepts": len(found),
        "before": average(line.before for line in found),
        "after": average(line.after.rate if line.after else None for line in found),
        "pre_asr": average(line.pre_asr.rate if line.pre_asr else None for line in found),
        "asr": {name: average(line.asr[name].rate if name in line.asr else None for line in found) for name in attacks},
        "strongest": average(line.strongest for line in found),
        "retention": average(line.retention for line in found),
        "clip": average(line.clip for line in found),
        "frechet": average(line.frechet for line in found),
        "seconds": average(line.seconds for line in found),
        "memory": average(line.memory for line in found),
    }


def _mean_row(mean: Mapping[str, Any], attacks: Sequence[str]) -> dict[str, str]:
    return {
        "method": mean["method"],
        "concepts": str(mean["concepts"]),
        "before": _number(mean["before"]),
        "after": _number(mean["after"]),
        "pre-ASR": _number(mean["pre_asr"]),
        **{name: _number(mean["asr"][name]) for name in attacks},
        "strongest attack": _number(mean["strongest"]),
        "retention": _number(mean["retention"], 3),
        "CLIP": _number(mean["clip"], 3),
        "Fréchet": _number(mean["frechet"]),
        "seconds": _number(mean["seconds"], 0),
        "peak GB": _number(mean["memory"]),
    }


def _row(line: Line, attacks: Sequence[str]) -> dict[str, str]:
    return {
        "concept": line.concept,
        "kind": line.kind,
        "method": line.method,
        "seeds": str(len(line.seeds)),
        "before": _number(line.before),
        "after": _rate(line.after),
        "pre-ASR": _rate(line.pre_asr),
        **{name: _rate(line.asr.get(name)) for name in attacks},
        "retention": _number(line.retention, 3),
        "CLIP (before)": _number(line.clip, 3) + (f" ({line.clip_before:.3f})" if line.clip_before is not None else ""),
        "Fréchet": _number(line.frechet),
        "seconds": _number(line.seconds, 0),
        "peak GB": _number(line.memory),
        "doubts": ", ".join(line.doubts) + (f"; {line.failed} cells failed" if line.failed else ""),
    }


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _rate(pooled: Pooled | None) -> str:
    if pooled is None:
        return "–"
    low, high = pooled.interval
    return f"{pooled.rate:.2f} ({low:.2f}–{high:.2f})"
