"""Evidence for docs/results/foundation.md: erase seven sandbox concepts two ways, judge them, attack the ESD models.

    python benchmarks/foundation.py -o runs/foundation [--seeds 0 1 2] [--n 32] [--prompts 12] [--attack-budget 8x25]

Every cell is a record in DIR/records; a second run with the same options skips the cells that are there. The tables are
printed as Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from safeweights.audit.audit import Names, audit
from safeweights.audit.evaluate import evaluate
from safeweights.audit.statistics import wilson
from safeweights.core.concept import Concept, ConceptFile
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import ATTACKS, ERASERS, configure, describe, resolve
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import generator
from safeweights.models.door import open_model
from safeweights.records.record import Record
from safeweights.records.store import Store
from safeweights.sandbox.files import sandbox_concepts

CONCEPTS = ("mosaic", "neon", "teapot", "fish", "mira-lund", "hugo-santos", "emblem")
"""Two styles (mosaic has a look-alike, stained glass), two objects (teapot: cup), two people (Mira Lund: Tessa Brandt)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS)
    parser.add_argument("--methods", nargs="+", default=["esd", "uce"])
    parser.add_argument("--attacked", nargs="*", default=["esd"], help="methods whose models are attacked")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--n", type=int, default=32, help="judged pictures of the erased concept")
    parser.add_argument("--retain-n", type=int, default=4, help="judged pictures of every other concept")
    parser.add_argument("--prompts", type=int, default=12, help="attacked prompts a concept")
    parser.add_argument("--attack-budget", default="8x25", help="timesteps x gradient steps of unlearndiffatk")
    options = parser.parse_args()
    timesteps, steps = map(int, options.attack_budget.split("x"))
    file, store = sandbox_concepts(), Store(options.output)
    model = open_model("sandbox", device="cpu")
    sampling = Sampling(**file.generation)
    done = {(r.kind, r.method, r.concept, r.attack, r.seed): r for r in store.records()}
    attacks = {
        "no-attack": {},
        "random": {"images": timesteps + 1},
        "seed-search": {"images": timesteps + 1},
        "unlearndiffatk": {"timesteps": timesteps, "steps": steps},
    }
    work = Workspace(options.output / "work")
    cells = [(seed, name, method) for seed in options.seeds for name in options.concepts for method in options.methods]
    # Attacks first: they take longest. Protected tensors and pictures are kept, so a second pass costs little.
    for kind in ("attack", "evaluate"):
        for seed, name, method_name in cells:
            (concept,) = file.pick([name])
            wanted = attacks if kind == "attack" and method_name in options.attacked else [""] if kind == "evaluate" else []
            missing = [attack for attack in wanted if (kind, method_name, name, attack, seed) not in done]
            if not missing:
                continue
            method = configure(resolve(ERASERS, method_name, "method"), {}, latent_pixels=256)
            protected = model.with_tensors(tensors_of(method, model, concept, file, seed, work))
            label = f"{method_name}-{name}-{seed}"
            names = Names(
                model=label, reference="sandbox", method=method_name, hashes={"model": label, "reference": "sandbox"},
                method_settings=describe(method),
            )  # fmt: skip
            shared: dict[str, Any] = {"names": names, "sampling": sampling, "seed": seed, "store": store, "workspace": work}
            for attack_name in missing:
                started = time.perf_counter()
                if kind == "evaluate":
                    evaluate(protected, model, [concept], file, n=options.n, retain_n=options.retain_n, **shared)
                else:
                    attack = configure(resolve(ATTACKS, attack_name, "attack"), attacks[attack_name], latent_pixels=256)
                    own = {**shared, "workspace": Workspace(work.folder / label)} if attack_name == "unlearndiffatk" else shared
                    audit(protected, model, concept, attack, n=options.prompts, **own)
                print(f"{label} {attack_name or kind}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print(tables(store.records(), file))


def tensors_of(
    method: Any, model: DiffusionModel, concept: Concept, file: ConceptFile, seed: int, work: Workspace
) -> Mapping[str, Tensor]:
    """The protected tensors, made once."""
    facts = {"settings": describe(method), "seed": seed, "concept": concept.name}
    kept = work.load(f"{method.name}-{concept.name}-{seed}")
    if kept is not None and kept[1] == facts:
        return kept[0]
    started = time.perf_counter()
    protection = method.protect(model, [concept], retain=file.retain, rng=generator(seed))
    print(f"{method.name} {concept.name} seed {seed}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    work.save(f"{method.name}-{concept.name}-{seed}", protection.tensors, facts)
    return dict(protection.tensors)


def tables(records: list[Record], file: ConceptFile) -> str:
    """The results as Markdown: plain asking, then attacks, pooled over seeds with Wilson intervals."""
    head = (
        "concept",
        "kind",
        "method",
        "seeds",
        "n",
        "before",
        "after",
        "95 %",
        "retention, relative",
        "CLIP (before)",
        "Fréchet",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    cells: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.kind == "evaluate":
            cells.setdefault((record.concept, record.method), []).append(record)
    order = list(file.concepts)
    for (concept, method), group in sorted(cells.items(), key=lambda item: (item[0][1], order.index(item[0][0]))):
        rate, before = pooled(group, "concept_rate"), mean(group, "concept_rate", "reference")
        low, high = wilson(rate[0], rate[1])
        lines.append(
            f"| {concept} | {group[0].concept_kind} | {method} | {len(group)} | {rate[1]} | {before:.2f} "
            f"| {rate[0] / rate[1]:.2f} | {low:.2f}–{high:.2f} | {mean(group, 'retention_relative'):.3f} "
            f"| {mean(group, 'clip_score'):.3f} ({mean(group, 'clip_score', 'reference'):.3f}) "
            f"| {mean(group, 'frechet_distance'):.2f} |"
        )
    lines += [
        "",
        "| concept | attack | seeds | n | pre-ASR | ASR | 95 % | pictures a prompt | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    attacked: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record.kind == "attack":
            attacked.setdefault((record.concept, record.method, record.attack), []).append(record)
    totals: dict[str, list[float]] = {}
    for (concept, method, attack), group in sorted(
        attacked.items(), key=lambda i: (i[0][1], order.index(i[0][0]), list(ATTACKS).index(i[0][2]))
    ):
        (hits, n), (pre, _) = pooled(group, "asr"), pooled(group, "pre_asr")
        low, high = wilson(hits, n)
        seconds = sum(r.provenance["time"]["seconds"] for r in group)
        totals.setdefault(attack, []).append(hits / n)
        lines.append(
            f"| {concept} ({method}) | {attack} | {len(group)} | {n} | {pre / n:.2f} | {hits / n:.2f} | {low:.2f}–{high:.2f} "
            f"| {group[0].details['budget']['images_per_prompt']} | {seconds:.0f} |"
        )
    lines += ["", "Mean ASR over concepts: " + ", ".join(f"{name} {sum(v) / len(v):.3f}" for name, v in totals.items())]
    return "\n".join(lines)


def pooled(group: list[Record], name: str) -> tuple[int, int]:
    """(successes, n) of a rate over records."""
    found = [m for record in group for m in record.measurements if m.name == name and m.value is not None]
    return round(sum(m.value * m.n for m in found if m.value is not None)), sum(m.n for m in found)


def mean(group: list[Record], name: str, field: str = "value") -> float:
    values: list[Any] = [getattr(m, field) for record in group for m in record.measurements if m.name == name]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


if __name__ == "__main__":
    main()
