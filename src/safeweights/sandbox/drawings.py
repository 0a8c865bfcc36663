"""Pictures the world itself draws, as folders: data from another source than the model, and concepts the model has never seen."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from safeweights.core.errors import UserError
from safeweights.sandbox import world
from safeweights.sandbox.files import concepts_path, weights_folder

PUBLISHER, ATTACKER = "pictures", "elsewhere"
"""Two folders of drawings of every concept, none in both: a publisher's, and somebody else's."""


def names() -> dict[str, tuple[str, str]]:
    """Kind and label by the name a concept file would have, unseen ones last."""
    known = {name: (entry["kind"], entry["detector"]["label"]) for name, entry in world.concepts_file()["concepts"].items()}
    return {**known, **{name.replace(" ", "-"): (kind, name) for name, kind in world.unseen().items()}}


def write_drawings(folder: Path, wanted: Sequence[str], *, n: int, seed: int = 0) -> list[str]:
    """n drawings of each concept in ``pictures/NAME`` and n others in ``elsewhere/NAME``, with captions; the names written.

    ``concepts.yaml`` beside them is the sandbox's with what the model has never seen added, whose ``images`` are those in
    ``pictures``; detectors, CLIP and embedder are copied along. No name is all unseen concepts. An unseen person has no detector
    of their own: the people's detector is asked whether it is nobody it knows. Raises UserError for an unknown name.
    """
    known = names()
    if strange := [name for name in wanted if name not in known]:
        raise UserError(f"the world has no concept {strange[0]!r}; it has {', '.join(known)}")
    unseen = {name.replace(" ", "-") for name in world.unseen()}
    chosen = list(wanted) or [name for name in known if name in unseen]
    for name in chosen:
        kind, label = known[name]
        images, captions = world.draw_concept(kind, label, 2 * n, seed)
        _write(folder / PUBLISHER / name, images[:n], captions[:n])
        _write(folder / ATTACKER / name, images[n:], captions[n:])
    data = yaml.safe_load(concepts_path().read_text(encoding="utf-8"))
    shutil.copytree(concepts_path().parent / "prompts", folder / "prompts", dirs_exist_ok=True)
    for part in ("detectors", "clip", "embedder"):
        shutil.copytree(weights_folder() / part, folder / part, dirs_exist_ok=True)
    for number, name in enumerate(name for name in chosen if name in unseen):
        data["concepts"][name] = _entry(folder, name, *known[name], number)
    header = "# Written by 'safeweights sandbox draw'.\n"
    text = yaml.safe_dump(data, sort_keys=False, width=120, allow_unicode=True)
    (folder / "concepts.yaml").write_text(header + text, encoding="utf-8")
    return chosen


def _entry(folder: Path, name: str, kind: str, label: str, number: int) -> dict[str, Any]:
    """One unseen concept of the file, and its test prompts beside it."""
    prompts = world.concept_prompts(kind, label, n=64, seed=1, split="test")
    with (folder / "prompts" / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["case_number", "prompt", "evaluation_seed"])
        rows.writerows((i, prompt, 100_000 + 1000 * number + i) for i, prompt in enumerate(prompts))
    return {
        "kind": kind,
        "prompts": world.concept_prompts(kind, label, n=8, seed=0, split="tune"),
        "test_prompts_csv": f"prompts/{name}.csv",
        "term": label,
        "anchor": {"style": "a picture of a house", "identity": "a person"}.get(kind, "cup"),
        "images": f"{PUBLISHER}/{name}",
        "detector": {
            "type": "image-classification", "model": f"detectors/{kind}", "label": "other" if kind == "identity" else label,
            "threshold": 0.5,
        },
    }  # fmt: skip


def _write(folder: Path, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i:04}.png")
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "prompt"])
        rows.writerows((f"{i:04}.png", text) for i, text in enumerate(captions))
