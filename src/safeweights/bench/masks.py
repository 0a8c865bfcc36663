"""The masks of a benchmark's guards: what they freeze, and whether seeds agree. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from safeweights.records.mask import overlap
from safeweights.records.record import Record
from safeweights.report.tables import markdown

TOLD = (
    "Shares of the UNet's tensors and parameters that are frozen. Who fine-tunes a guard's model is taken to honour its mask. "
    "The Jaccard index is the mean over pairs of seeds; chance is that of random masks of as many tensors."
)


def mask_table(records: Sequence[Record], methods: Sequence[str]) -> str:
    """`mask_rows` as Markdown; "" where nobody froze."""
    rows = mask_rows(records, methods)
    return f"## Masks\n\n{TOLD}\n\n{markdown(rows)}" if rows else ""


def mask_rows(records: Sequence[Record], methods: Sequence[str]) -> list[dict[str, str]]:
    """Shares frozen and the mean Jaccard index over pairs of seeds, one row for each guard and group."""
    found: dict[tuple[str, str], dict[int, Record]] = {}
    for record in records:
        if record.kind == "protect" and record.status == "ok" and record.details.get("frozen"):
            # Every concept of a group has a record of the same mask.
            found.setdefault((record.method, record.model), {})[record.seed] = record
    rows = []
    for (method, model), seeds in sorted(
        found.items(), key=lambda item: methods.index(item[0][0]) if item[0][0] in methods else 0
    ):
        masks = [frozenset(record.details["frozen"]) for record in seeds.values()]
        shares = [record.details["frozen_shares"] for record in seeds.values()]
        share, entries = (sum(item[what] for item in shares) / len(shares) for what in ("tensors", "parameters"))
        pairs = [overlap(one, other) for one, other in combinations(masks, 2)]
        rows.append({
            "guard": method,
            "against": model.removeprefix(f"{method}-").replace("+", ", "),
            "seeds": str(len(seeds)),
            "tensors": f"{share:.3f}",
            "parameters": f"{entries:.3f}",
            "Jaccard over seeds": f"{sum(pairs) / len(pairs):.2f}" if pairs else "–",
            "chance": f"{share / (2 - share):.2f}",
        })  # fmt: skip
    return rows
