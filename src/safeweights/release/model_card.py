"""The README of an exported model: what was done, what was measured, what it does not show. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safeweights.core.errors import UserError
from safeweights.core.table import ERASERS, IMMUNIZERS
from safeweights.core.text import markdown, plain, slug
from safeweights.records.record import Measurement, Record
from safeweights.records.store import gather
from safeweights.release.manifest import cut

DATASET = "safeweights/audit"
"""The benchmark that evaluation entries refer to; they show on a leaderboard once a data set of this name defines the tasks."""
NEIGHBOUR = "neighbour_rate:"
ROWS = 200
"""Rows of the evidence table; a card is read by people."""
LIMITS = (
    "Erasing is not deleting: with the weights in hand, a prompt search or a little fine-tuning may bring a concept back. "
    "What was tried, and with which budget, stands in the evidence; what was not tried is not shown.",
    "A detector decides what counts as shown. Its own errors are in the records.",
    "Rates hold for the prompts, seeds, sampler and budget of the records, not for every use of the model.",
)


def records_about(folder: Path, *hashes: str | None) -> list[Record]:
    """The records of a folder that were measured on this very model, told by the SHA-256 of its files or of its tensors.

    Raises UserError where there is none: evidence about another model is no evidence about this one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one that attack, evaluate or audit wrote with --records")
    found = gather(folder)
    kept = [record for record in found if record.kind != "protect" and _hash_of(record) in hashes and _hash_of(record)]
    if not kept:
        what = f"none of its {len(found)} records is" if found else "there is no record"
        raise UserError(
            f"{folder}: {what} about this model (told by the SHA-256 of its files or tensors); measure it and give that folder"
        )
    return kept


def write_card(
    *, title: str, base: str, steps: Sequence[Mapping[str, Any]], records: Sequence[Record], facts: Mapping[str, Any],
    license_: str | None = None, description: str | None = None, use: str = "",
) -> str:  # fmt: skip
    """The text of README.md: front matter with the model index, and the card.

    ``steps`` are those of the protections (`steps_of`), oldest first. ``facts`` are lines of provenance by label. Everything that
    a user or a file named is escaped: it is shown as text, in the card and in the front matter.
    """
    lines = [
        f"# {markdown(title)}", "",
        f"{markdown(base)} with {_summary(steps)}, by safeweights." if steps else
        f"{markdown(base)}, exported by safeweights. No protection of it is recorded.", "",
    ]  # fmt: skip
    if description:
        lines += [markdown(description, 2000), ""]
    lines += ["## What was done", "", *(_steps(steps) or ["Nothing that a manifest tells of."]), ""]
    lines += ["## Evidence", "", *_evidence(records), ""]
    lines += ["## Limits", "", *(f"- {line}" for line in LIMITS), ""]
    if use:
        lines += ["## Use", "", use, ""]
    lines += ["## Provenance", "", *(f"- {label}: {markdown(value, 300)}" for label, value in facts.items() if value), ""]
    lines += ["`manifest.json` holds every setting, input and hash; `safeweights verify FOLDER` holds the files against it.", ""]
    return f"---\n{_front_matter(title, base, steps, records, license_)}\n---\n\n" + "\n".join(lines)


def steps_of(protection: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The single steps of a protection's manifest: a recipe has a chain of them, anything else is one."""
    if not protection:
        return []
    chain = [step for step in protection.get("chain", ()) if isinstance(step.get("method"), str)]
    return [_step(step) for step in chain] or [_step(protection)]


def _step(found: Mapping[str, Any]) -> dict[str, Any]:
    """A step with every entry of the type the card reads."""

    def mapping(value: Any) -> dict[str, Any]:
        return dict(value) if isinstance(value, dict) else {}

    settings = found.get("settings", mapping(found.get("options")).get("settings"))
    concepts = found.get("concepts")
    return {
        "method": found["method"], "concepts": concepts if isinstance(concepts, list) else [], "settings": mapping(settings),
        "seed": found.get("seed", 0), "seconds": found.get("seconds"), "cost": mapping(found.get("cost")),
        "changed": len(found["changed"]) if isinstance(found.get("changed"), dict | list) else 0,
        "frozen": _count(found.get("frozen")),
    }  # fmt: skip


def _count(frozen: Any) -> int:
    """How many tensors a step freezes, told as their names or as their number."""
    if isinstance(frozen, list):
        return len(frozen)
    return frozen if isinstance(frozen, int) and not isinstance(frozen, bool) else 0


def evaluations(records: Sequence[Record]) -> str | None:
    """The text of ``.eval_results/safeweights.yaml``, or None without a measured number."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries = [
        EvalResultEntry(
            dataset_id=DATASET,
            task_id=slug(" ".join((record.concept, record.attack, measured.name)), 100),
            value=measured.value,
            date=_date(record),
            notes=plain(_notes(record, measured), 500),
        )
        for record, measured in _measured(records)
        if measured.value is not None
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True) if entries else None


def _front_matter(
    title: str, base: str, steps: Sequence[Mapping[str, Any]], records: Sequence[Record], license_: str | None
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type=DATASET,
            dataset_name=plain(f"{record.concept} ({record.concept_kind})"),
            metric_type=slug(measured.name),
            metric_name=plain(f"{measured.name}{f' under {record.attack}' if record.attack else ''}"),
            metric_value=measured.value,
            metric_args={"n": measured.n, "ci95": list(measured.interval) if measured.interval else None, "seed": record.seed},
        )
        for record, measured in _measured(records)
        if measured.value is not None
    ]
    known = bool(license_ and re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", license_))
    data = ModelCardData(
        license=license_ if known else "other" if license_ else None,
        license_name=plain(license_) if license_ and not known else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["safeweights", "concept-erasure", *sorted({slug(step.get("method", "")) for step in steps})],
        base_model=base if re.fullmatch(r"[\w.\-]+/[\w.\-]+", base) and not Path(base).exists() else None,
        model_name=plain(title) if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _summary(steps: Sequence[Mapping[str, Any]]) -> str:
    said = []
    for step in steps:
        concepts = ", ".join(markdown(name) for name in step.get("concepts", ())) or "unnamed concepts"
        method = str(step.get("method", ""))
        if method in ERASERS:
            said.append(f"{concepts} erased")
        elif method in IMMUNIZERS:
            said.append(f"learning {concepts} made hard")
        else:
            said.append(f"{markdown(method)} applied to {concepts}")
    return " and ".join(said)


def _steps(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for number, step in enumerate(steps, 1):
        concepts = ", ".join(markdown(name) for name in step.get("concepts", ())) or "–"
        cost = ", ".join(f"{markdown(name)} {_number(value)}" for name, value in step.get("cost", {}).items())
        lines += [
            f"{number}. **{markdown(step.get('method', ''))}** on {concepts}; seed {markdown(step.get('seed', 0))}, "
            f"{step['changed']} tensors changed, {step['frozen']} frozen, "
            f"{_number(step['seconds'])} s{f'; {cost}' if cost else ''}",
            "",
            "    ```json",
            *(f"    {line}" for line in _code(step["settings"])),
            "    ```",
            "",
        ]
    return lines


def _code(data: Any) -> list[str]:
    """JSON for a code block: no line of it can end the block."""
    lines = json.dumps(cut(data, 300), indent=1, ensure_ascii=True, default=str).replace("`", "\\u0060").splitlines()
    return [*lines[:60], "…"] if len(lines) > 60 else lines


def _evidence(records: Sequence[Record]) -> list[str]:
    if not records:
        return [
            "No records were given with this export: nothing here shows what the model can still draw. Measure it with "
            "`safeweights evaluate` and `safeweights attack`, and export again with `--records`.",
        ]
    rows = list(_measured(records))
    lines = [
        "| concept | asked by | measurement | value | 95 % interval | before protection | n | seed | detector |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record, measured in rows[:ROWS]:
        unit = f" {markdown(measured.unit)}" if measured.unit else ""
        value = f"{_number(measured.value)}{unit}" if measured.value is not None else f"not measured: {markdown(measured.why)}"
        interval = f"{_number(measured.interval[0])} – {_number(measured.interval[1])}" if measured.interval else "–"
        detector = record.detector.get("model") or record.detector.get("type") or "–"
        cells = (
            f"{markdown(record.concept)} ({markdown(record.concept_kind)})", markdown(record.attack or "plain prompts"),
            markdown(measured.name), value, interval,
            _number(measured.reference), str(measured.n), str(record.seed), markdown(Path(str(detector)).name),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    if len(rows) > ROWS:
        lines.append(f"\n{len(rows) - ROWS} more rows are in the records.")
    lines += _neighbours(records)
    failed = [record for record in records if record.status != "ok"]
    for record in failed[:20]:
        lines.append(
            f"\n**Not measured:** {markdown(record.attack or record.kind)} on {markdown(record.concept)}: "
            f"{markdown(record.error)}"
        )
    doubts = dict.fromkeys((d.name, record.concept, record.attack, d.explanation) for record in records for d in record.doubts)
    if doubts:
        lines += ["", "Reasons to doubt these numbers:", ""]
        lines += [
            f"- **{markdown(name)}** ({markdown(concept)}{f', {markdown(attack)}' if attack else ''}): {markdown(text, 500)}"
            for name, concept, attack, text in list(doubts)[:50]
        ]
    return lines


def _measured(records: Sequence[Record]) -> Iterable[tuple[Record, Measurement]]:
    ordered = sorted(records, key=lambda r: (r.concept, r.kind, r.attack, r.seed))
    # Rates before protection stand in a column of their own, and neighbours below the table.
    return (
        (record, measured)
        for record in ordered
        for measured in record.measurements
        if measured.name != "reference_rate" and not measured.name.startswith(NEIGHBOUR)
    )


def _neighbours(records: Sequence[Record]) -> list[str]:
    """What every concept's protection took from its neighbours: the three least kept of each."""
    lines = []
    for record in records:
        found = [m for m in record.measurements if m.name.startswith(NEIGHBOUR) and m.value is not None]
        worst = sorted(found, key=lambda m: (m.value or 0.0) - (m.reference if m.reference is not None else 1.0))[:3]
        told = ", ".join(
            f"{markdown(m.name.removeprefix(NEIGHBOUR))} {_number(m.value)} (before {_number(m.reference)}, n {m.n})"
            for m in worst
        )
        if told:
            lines.append(f"\nOf {len(found)} neighbours of {markdown(record.concept)} the least kept: {told}.")
    return lines


def _hash_of(record: Record) -> str | None:
    inputs = record.provenance.get("inputs")
    found = inputs.get("model") if isinstance(inputs, dict) else None
    return str(found) if found else None


def _notes(record: Record, measured: Measurement) -> str:
    interval = f", 95 % interval {_number(measured.interval[0])} to {_number(measured.interval[1])}" if measured.interval else ""
    asked = record.attack or "plain prompts"
    before = f", before protection {_number(measured.reference)}" if measured.reference is not None else ""
    return f"{record.concept} ({record.concept_kind}), {asked}: n {measured.n}{interval}{before}, seed {record.seed}"


def _date(record: Record) -> str | None:
    time = record.provenance.get("time")
    date = time.get("date") if isinstance(time, dict) else None
    return str(date) if isinstance(date, str) and re.fullmatch(r"[\dT:.+\-Z]{10,40}", date) else None


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else markdown(value)
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:.4g}"
