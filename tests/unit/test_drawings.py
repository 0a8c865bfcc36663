"""Drawings of the world as folders: captions name the concept, the two folders share nothing, unseen concepts are in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safeweights.cli.main import run
from safeweights.core.concept import load_concepts
from safeweights.diffusion.image_folder import read_folder
from safeweights.sandbox import world


def test_unseen_concepts_are_drawn_and_described(tmp_path: Path, capsys: Any) -> None:
    command = ["sandbox", "draw", "--n", "3", "-o", str(tmp_path / "out"), "--json", "--concept"]
    assert run([*command, "polka-dot", "--concept", "mosaic"]) == 0
    assert json.loads(capsys.readouterr().out)["concepts"] == ["polka-dot", "mosaic"]
    file = load_concepts(tmp_path / "out" / "concepts.yaml")
    dots, mosaic = file.pick(["polka-dot", "mosaic"])
    assert dots.images == tmp_path / "out" / "pictures" / "polka-dot"
    assert mosaic.images is None  # the model knows it
    assert dots.detector is not None
    assert Path(dots.detector.model).is_dir()
    assert (dots.detector.label, len(dots.test_prompts), len(file.concepts)) == ("polka dot", 64, 30)
    assert not {p.text for p in dots.test_prompts} & set(dots.texts)
    seen = set()
    for folder in ("pictures", "elsewhere"):
        for name in ("polka-dot", "mosaic"):
            images, captions = read_folder(tmp_path / "out" / folder / name, width=64, height=64)
            assert all(name.replace("-", " ") in caption for caption in captions)
            seen |= {image.numpy().tobytes() for image in images}
    assert len(seen) == 12
    assert run([*command, "polka-dots", "--overwrite"]) == 2
    assert "polka-dot," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "name"), [*((k, n) for n, k in world.unseen().items()), ("identity", "mira lund"), ("content", "emblem")]
)
def test_captions_name_what_is_drawn(kind: str, name: str) -> None:
    images, captions = world.draw_concept(kind, name, 2, 5)
    assert all(("warning emblem" if kind == "content" else name) in caption for caption in captions)
    again, _ = world.draw_concept(kind, name, 2, 5)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in again]
    assert images[0].tobytes() != images[1].tobytes()


def test_what_the_world_lacks_is_told() -> None:
    with pytest.raises(ValueError, match="no style 'cubism'"):
        world.draw_concept("style", "cubism", 1, 0)
