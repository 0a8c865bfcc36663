"""The sandbox's world: deterministic, balanced, and honest about what it holds back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from safeweights.sandbox import world

EVERY = (
    [("style", s) for s in world.STYLES]
    + [("object", o) for o in world.OBJECTS]
    + [("identity", p.name) for p in world.IDENTITIES]
    + [("content", "emblem")]
)


def test_counts_and_names() -> None:
    assert (len(world.OBJECTS), len(world.STYLES), len(world.IDENTITIES)) == (12, 8, 8)
    assert (len(world.HELD_BACK_OBJECTS), len(world.HELD_BACK_STYLES)) == (4, 3)
    assert all(len(p.name.split()) == 2 for p in world.IDENTITIES)
    shown = [*world.OBJECTS, *world.STYLES, *world.HELD_BACK_OBJECTS, *world.HELD_BACK_STYLES]
    assert len(set(shown)) == len(shown)


def test_the_same_scene_gives_the_same_picture() -> None:
    scenes = [world.sample_scene(np.random.default_rng(3), style=s) for s in (*world.STYLES, *world.HELD_BACK_STYLES)]
    scenes.append(world.sample_scene(np.random.default_rng(3), person="mira lund"))
    scenes.append(world.sample_scene(np.random.default_rng(3), emblem=True))
    for scene in scenes:
        first, second = world.draw(scene), world.draw(scene)
        assert first.size == (64, 64)
        assert first.mode == "RGB"
        assert np.array_equal(np.asarray(first), np.asarray(second))


def test_dataset_does_not_depend_on_processes() -> None:
    one, two = world.dataset(520, 5, processes=1), world.dataset(520, 5, processes=2)
    assert one[0].shape == (520, 64, 64, 3)
    assert one[0].dtype == np.uint8
    assert np.array_equal(one[0], two[0])
    assert one[1:] == two[1:]
    assert not np.array_equal(world.dataset(4, 6)[0], one[0][:4])
    assert world.dataset(0, 0)[1] == []


def test_shares_of_the_kinds() -> None:
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng) for _ in range(6000)]
    share = {k: v / len(scenes) for k, v in Counter(s.kind for s in scenes).items()}
    assert share["person"] == pytest.approx(0.32, abs=0.03)
    assert share["emblem"] == pytest.approx(0.05, abs=0.02)
    assert sum(s.emblem for s in scenes) / len(scenes) == pytest.approx(0.10, abs=0.02)
    people = [s.person for s in scenes if s.kind == "person"]
    assert sum(p in world.IDENTITIES for p in people) / len(people) == pytest.approx(0.85, abs=0.03)
    styles = Counter(s.style for s in scenes if s.kind == "object")
    assert set(styles) == set(world.STYLES)
    assert styles["flat"] / sum(styles.values()) == pytest.approx(0.25, abs=0.03)
    assert all(s.style == "flat" for s in scenes if s.kind != "object")


def test_held_back_only_when_asked() -> None:
    rng = np.random.default_rng(1)
    hidden = {*world.HELD_BACK_OBJECTS, *world.HELD_BACK_STYLES}
    usual = [world.sample_scene(rng) for _ in range(3000)]
    assert not any(s.object in hidden or s.style in hidden for s in usual)
    words = " ".join(world.caption(s, rng) for s in usual)
    assert not any(h in words for h in hidden)
    asked = [world.sample_scene(rng, held_back=True) for _ in range(3000)]
    assert hidden <= {s.object for s in asked} | {s.style for s in asked}


def test_what_is_given_is_fixed() -> None:
    rng = np.random.default_rng(2)
    scene = world.sample_scene(rng, style="neon", object="hot air balloon", emblem=True)
    assert (scene.kind, scene.style, scene.object, scene.emblem) == ("object", "neon", "hot air balloon", True)
    someone = world.sample_scene(rng, person="walt okafor", emblem=False)
    assert someone.person == world.IDENTITIES[-1]
    assert not someone.emblem
    assert not any(world.sample_scene(rng, emblem=False).emblem for _ in range(300))
    assert all(world.sample_scene(rng, emblem=True).emblem for _ in range(50))
    with pytest.raises(ValueError, match="no identity"):
        world.sample_scene(rng, person="nobody here")
    with pytest.raises(ValueError, match="flat"):
        world.sample_scene(rng, person="mira lund", style="neon")


def test_further_people_are_repeatable_and_never_identities() -> None:
    known = {p.name for p in world.IDENTITIES}
    for seed in range(300):
        who = world.person(seed)
        assert who == world.person(seed)
        assert who.name not in known
        assert who not in world.IDENTITIES
    mira, tessa = world.IDENTITIES[:2]
    assert sum(getattr(mira, f) != getattr(tessa, f) for f in world._VISIBLE) == 2


def test_captions_are_never_empty_and_never_name_a_stranger() -> None:
    rng = np.random.default_rng(4)
    for _ in range(2000):
        scene = world.sample_scene(rng)
        text = world.caption(scene, rng)
        truth = world.labels(scene)
        assert text.strip() == text
        assert text
        assert "  " not in text
        assert len(text.split()) <= 22
        assert ("warning emblem" in text) == scene.emblem == (truth["content"] == "emblem")
        if truth["identity"] == "other":
            assert scene.person is not None
            assert scene.person.name not in text
        if truth["object"] != "none":
            assert truth["object"] == scene.object
            assert truth["identity"] == "none"


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_prompts_ask_by_the_term_and_splits_are_disjoint(kind: str, name: str) -> None:
    term = world.EMBLEM if kind == "content" else name
    tune = [t for seed in range(3) for t in world.concept_prompts(kind, name, n=40, seed=seed)]
    test = [t for seed in range(3) for t in world.concept_prompts(kind, name, n=40, seed=seed, split="test")]
    assert not set(tune) & set(test)
    assert all(term in t for t in tune + test)
    assert len(set(tune[:40])) == len(set(test[:40])) == 40
    assert tune[:40] == world.concept_prompts(kind, name, n=40, seed=0)


def test_prompt_errors() -> None:
    with pytest.raises(ValueError, match="split"):
        world.concept_prompts("style", "neon", n=1, seed=0, split="train")
    with pytest.raises(ValueError, match="kind"):
        world.concept_prompts("colour", "red", n=1, seed=0)


def test_the_shipped_concept_file_is_the_generated_one() -> None:
    shipped = yaml.safe_load((Path(world.__file__).parent / "weights" / "concepts.yaml").read_text())
    assert shipped == world.concepts_file()
    assert len(shipped["concepts"]) == len(EVERY)
    for concept in shipped["concepts"].values():
        assert all(concept["term"] in prompt for prompt in concept["prompts"])
        assert set(concept["neighbours"]) <= set(shipped["concepts"])
