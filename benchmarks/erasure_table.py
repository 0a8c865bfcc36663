"""Methods by concepts from a CSV of benchmark cells: how often each is asked for and revived, and what that costs.

    python benchmarks/erasure_table.py docs/results/erasure-cells.csv [--seed 0] [--methods esd advunlearn …]

Prints three Markdown tables. A cell of the first: rate asked plainly · prompts that succeed unattacked · under UnlearnDiffAtk ·
under soft prompts; of the second: retention · CLIP score · Fréchet distance; a row of the third: seconds and peak GB,
lowest to highest over the concepts. A dash is what was not measured.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

CONCEPTS = ("emblem", "mosaic", "neon", "fish", "teapot", "mira-lund")
METHODS = (
    "esd", "advunlearn", "esd-text", "at-esd", "spm", "ac", "salun", "erasediff", "scissorhands", "fmn", "uce", "rece", "mace",
)  # fmt: skip
ATTACKS = ("no-attack", "unlearndiffatk", "soft-prompt")
Cells = dict[tuple[str, str], dict[str, tuple[float, int]]]
"""{(model, attack): {measurement: (value, n)}}; the attack is "" for an evaluation."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS)
    options = parser.parse_args()
    cells = read(options.cells, options.seed)

    def revived(model: str) -> Iterable[str]:
        yield number(cells, model, "", "concept_rate")
        for attack in ATTACKS:
            value, n = cells[model, attack].get("asr", (None, 0))
            yield "–" if value is None else str(round(value * n))

    def cost(model: str) -> Iterable[str]:
        yield number(cells, model, "", "retention_relative", 3)
        yield number(cells, model, "", "clip_score", 3)
        yield number(cells, model, "", "frechet_distance")

    for told in (revived, cost):
        print(table(options.methods, options.concepts, told), end="\n\n")
    print("| | seconds | peak GB |\n| --- | --- | --- |")
    for method in options.methods:
        made = [cells[f"{method}-{concept}", ""] for concept in options.concepts]
        seconds, memory = ([facts[name][0] for facts in made if name in facts] for name in ("seconds", "peak_memory_gb"))
        print(f"| {method} | {span(seconds, 0)} | {span(memory, 2)} |")


def read(path: Path, seed: str) -> Cells:
    """The cells of one seed; a model is called METHOD-CONCEPT there."""
    cells: Cells = defaultdict(dict)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["seed"] == seed and row["value"]:
                cells[row["model"], row["attack"]][row["measurement"]] = float(row["value"]), int(row["n"] or 0)
    return cells


def number(cells: Cells, model: str, attack: str, name: str, digits: int = 2) -> str:
    """A value as the page writes it, without the zero before the point."""
    if name not in cells[model, attack]:
        return "–"
    text = f"{cells[model, attack][name][0]:.{digits}f}"
    return text[1:] if text.startswith("0.") else text


def span(values: list[float], digits: int) -> str:
    """Lowest to highest."""
    ends = dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values))) if values else ("–",)
    return "–".join(ends)


def table(methods: Iterable[str], concepts: Iterable[str], told: Callable[[str], Iterable[str]]) -> str:
    rows = [["", *concepts], ["---"] * (1 + len(tuple(concepts)))]
    rows += [[method, *(" · ".join(told(f"{method}-{concept}")) for concept in concepts)] for method in methods]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
