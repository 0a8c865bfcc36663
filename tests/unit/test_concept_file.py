"""Concept files and prompt tables: what is read, and the one line for everything that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from safeweights.core.concept import Concept, Prompt, load_concepts, read_prompts_csv
from safeweights.core.errors import UserError


def write(folder: Path, **changes: Any) -> Path:
    """A valid file with one concept, its entry changed; a change to None removes the key."""
    entry: dict[str, Any] = {
        "kind": "style", "prompts": ["a mosaic picture of a boat"], "term": "mosaic", "anchor": "a picture",
        "detector": {"type": "image-classification", "model": "judge", "label": "mosaic"},
    }  # fmt: skip
    entry.update(changes)
    data = {"version": 1, "concepts": {"mosaic": {key: value for key, value in entry.items() if value is not None}}}
    path = folder / "concepts.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    (tmp_path / "judge").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "more.csv").write_text("prompt,evaluation_seed,evaluation_guidance\nmosaic tree,7,3.5\n")
    path = write(tmp_path, images="pictures", prompts_csv="more.csv")
    data = yaml.safe_load(path.read_text())
    data["generation"] = {"width": 64, "height": 32, "steps": 20, "guidance_scale": 4, "scheduler": "ddim"}
    data["retain"] = {"prompts": ["a picture of a boat"]}
    data["concepts"]["neon"] = {"kind": "style", "prompts": ["a neon boat"], "neighbours": ["mosaic"]}
    path.write_text(yaml.safe_dump(data))
    file = load_concepts(path)
    mosaic, neon = file.pick(["mosaic", "neon"])
    assert mosaic.prompts == (Prompt("a mosaic picture of a boat"), Prompt("mosaic tree", 7, 3.5))
    assert mosaic.texts == ("a mosaic picture of a boat", "mosaic tree")
    assert mosaic.images == tmp_path / "pictures"
    assert mosaic.detector is not None
    assert mosaic.detector.model == str((tmp_path / "judge").resolve())
    assert mosaic.detector.threshold == 0.5
    assert neon.term == "neon"
    assert neon.anchor == ""
    assert neon.detector is None
    assert neon.neighbours == ("mosaic",)
    assert file.retain == ("a picture of a boat",)
    assert file.generation["height"] == 32


def test_a_detector_that_is_no_folder_stays_a_hub_id(tmp_path: Path) -> None:
    detector = {"type": "image-classification", "model": "someone/judge", "label": "x"}
    (concept,) = load_concepts(write(tmp_path, detector=detector)).pick(["mosaic"])
    assert concept.detector is not None
    assert concept.detector.model == "someone/judge"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "mood"}, ["mood", "style"]),
        ({"kind": None}, ["kind", "missing"]),
        ({"colour": "red"}, ["colour", "prompts"]),
        ({"prompts": []}, ["no prompts"]),
        ({"prompts": "one text"}, ["list"]),
        ({"prompts": ["fine", "  "]}, ["prompt 2", "empty"]),
        ({"prompts": [3]}, ["text"]),
        ({"prompts_csv": "none.csv"}, ["none.csv", "does not exist"]),
        ({"images": "none"}, ["none", "does not exist"]),
        ({"neighbours": ["ghost"]}, ["ghost"]),
        ({"neighbours": "neon"}, ["list"]),
        ({"detector": {"type": "oracle"}}, ["oracle", "clip"]),
        ({"detector": {"model": "x"}}, ["type", "missing"]),
        ({"detector": {"type": "clip", "threshold": 2}}, ["threshold"]),
        ({"detector": {"type": "clip", "threshold": True}}, ["threshold"]),
        ({"detector": {"type": "clip", "wording": 1}}, ["wording"]),
        ({"detector": "clip"}, ["mapping"]),
        ({"term": 5}, ["term"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        load_concepts(write(tmp_path, **changes))
    for word in [*words, "mosaic"] if "prompts_csv" not in changes else words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "mapping"), ("- a\n- b\n", "mapping"), ("version: 2\nconcepts: {}\n", "version"), ("concepts: {}\n", "version"),
        ("version: 1\nconcepts: {}\n", "at least one"), ("version: 1\nconcepts: {a: [}\n", "line 2"),
        ("version: 1\nconcepts: {a: {kind: style, prompts: [x]}}\nretain: {promts: [x]}\n", "promts"),
        ("version: 1\nconcepts: {a: {kind: style, prompts: [x]}}\ngeneration: {steps: many}\n", "steps"),
    ],
)  # fmt: skip
def test_files_that_are_no_concept_files(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "concepts.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=word):
        load_concepts(path)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--concepts-file"):
        load_concepts(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_concepts(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError):
        load_concepts(tmp_path / "binary.yaml")


def test_an_unknown_concept_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'neon'.*mosaic"):
        load_concepts(write(tmp_path)).pick(["neon"])


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("case_number,prompt,evaluation_seed,evaluation_guidance", "0,a boat,5,7.5", Prompt("a boat", 5, 7.5)),
        ("prompt,categories,sd_seed,sd_guidance_scale", "a boat,x,5,7", Prompt("a boat", 5, 7.0)),
        (",prompt,evaluation_seed", "0,a boat,5.0", Prompt("a boat", 5)),
        ("image_id,text", "3,a boat", Prompt("a boat")),
        ("target_prompt,adv_prompt,clean_prompt", "x,a boat,y", Prompt("a boat")),
        ("sensitive prompt,normal prompt", "a boat,y", Prompt("a boat")),
        ("id,type,text,concept,seed", "1,x,a boat,y,9", Prompt("a boat", 9)),
        ("prompt,evaluation_seed", '"a boat, at ""sea""",', Prompt('a boat, at "sea"')),
    ],
)
def test_published_prompt_tables(tmp_path: Path, header: str, row: str, expected: Prompt) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(f"\ufeff{header}\n{row}\n", encoding="utf-8")
    assert read_prompts_csv(path) == (expected,)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no rows"), ("prompt\n", "no rows"), ("a,b\n1,2\n", "no prompt column"), ("prompt,seed\na boat,1\n ,2\n", "line 3"),
        ("prompt,seed\na boat,soon\n", "soon"), ("prompt,seed\na boat,nan\n", "nan"),
        ("prompt,evaluation_guidance\na boat,x\n", "evaluation_guidance"),
    ],
)  # fmt: skip
def test_prompt_tables_that_are_wrong(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=word):
        read_prompts_csv(path)


def test_a_concept_is_taken_out_wherever_it_stands() -> None:
    cat = Concept(name="cat", kind="object", term="cat", anchor="dog", prompts=())
    assert cat.without("a cat beside another Cat, no catalog") == "a dog beside another dog, no catalog"
    style = Concept(name="mosaic", kind="style", term="mosaic", anchor="a picture", prompts=())
    assert style.without("a mosaic picture of a mosaic") == "a picture of a"
    assert style.without("a house") == "a picture"
