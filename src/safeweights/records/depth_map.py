"""Where in a UNet a mask lies: block by block and kind by kind of layer, as the report draws it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNET = "unet."
KINDS = {
    "conv": ("conv",), "feed-forward": (".ff.",), "self-attention": ("attn1",), "cross-attention": ("attn2",),
    "projections": ("proj_in", "proj_out"), "time": ("time_emb",),
}  # fmt: skip
OTHERS = ("norms", "other")


def kind_of(name: str) -> str:
    """Which kind of layer a tensor belongs to."""
    if "norm" in name:
        return "norms"
    return next((kind for kind, marks in KINDS.items() if any(mark in name for mark in marks)), "other")


def block_of(name: str) -> str:
    """Which block of the UNet a tensor lies in: ``down 0``, ``mid``, ``up 2``, ``conv_in``."""
    part = name.removeprefix(UNET).split(".")
    return f"{part[0].removesuffix('_blocks')} {part[1]}" if part[0].endswith("_blocks") else part[0].removesuffix("_block")


def depth_map(masked: Mapping[str, float], whole: Mapping[str, float], title: str) -> dict[str, Any]:
    """A heatmap for a record's plots: sum of ``masked`` over sum of ``whole`` by block and kind of layer.

    Both are by name of the UNet's tensors, ``whole`` of all of them in the model's order: 1 each to count tensors, their sizes to
    count weights.
    """
    names = [name for name in whole if name.startswith(UNET)]
    blocks = list(dict.fromkeys(sorted(map(block_of, names), key=_depth)))
    kinds = [kind for kind in (*KINDS, *OTHERS) if any(kind_of(name) == kind for name in names)]
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for name in names:
        place = block_of(name), kind_of(name)
        part, total = sums.get(place, (0.0, 0.0))
        sums[place] = part + masked.get(name, 0.0), total + whole[name]
    values = [
        [sums[block, kind][0] / sums[block, kind][1] if (block, kind) in sums else None for kind in kinds] for block in blocks
    ]
    return {"kind": "heatmap", "title": title, "rows": blocks, "columns": kinds, "values": values, "unit": "share"}


def _depth(block: str) -> tuple[int, str]:
    """Sorts blocks from the input to the output."""
    name = block.split()[0]
    order = {"conv_in": 0, "time_embedding": 1, "down": 2, "mid": 3, "up": 4, "conv_norm_out": 5, "conv_out": 6}
    return order.get(name, 1), block
