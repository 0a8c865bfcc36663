"""The audit judges honestly: what it counts, what it keeps apart, what it doubts, and that it says the same twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights.audit import doubts
from safeweights.audit.audit import Names, audit, choose_prompts, concept_pictures
from safeweights.audit.evaluate import evaluate, retained_concepts
from safeweights.audit.pictures import Painter
from safeweights.core.attack import Candidate
from safeweights.core.concept import Concept, ConceptFile, DetectorSpec, Prompt
from safeweights.core.detector import Detection
from safeweights.core.errors import UserError
from safeweights.core.model import Sampling
from safeweights.core.table import ATTACKS, configure, resolve
from safeweights.core.text import whole_words
from safeweights.core.workspace import Workspace
from safeweights.metrics.backbones import Backbones
from safeweights.records.record import Measurement, Record
from safeweights.records.store import Store, deterministic

SAMPLING = Sampling(width=16, height=16, steps=2, guidance_scale=2.0)
NAMES = Names(model="protected", reference="base", method="esd", hashes={"model": "m", "reference": "r"})
SPEC = DetectorSpec(type="python", model="fake")


class Brighter:
    """Sees the concept in pictures whose mean is above a level that splits the tiny model's pictures."""

    level = 0.5

    def detect(self, images: torch.Tensor) -> Detection:
        score = images.flatten(1).mean(1).clamp(0, 1)
        return Detection(score >= self.level, score)

    def describe(self) -> dict[str, Any]:
        return {"type": "fake", "model": "", "label": "", "threshold": self.level, "sha256": "0" * 64}


def concept(name: str = "dog", tests: int = 6, **more: Any) -> Concept:
    values: dict[str, Any] = {
        "name": name, "kind": "object", "term": name, "prompts": (Prompt(f"a picture of a {name}"),), "detector": SPEC,
        "test_prompts": tuple(Prompt(f"a {name} {'red ' * i}", seed=i) for i in range(tests)),
    }  # fmt: skip
    return Concept(**{**values, **more})


def attack(name: str, **settings: Any) -> Any:
    return configure(resolve(ATTACKS, name, "attack"), settings)


@pytest.fixture
def median(tiny_model: Any, monkeypatch: Any) -> float:
    """A level that half of the plain pictures pass."""
    painter = Painter(tiny_model, SAMPLING, "tiny")
    prompts = choose_prompts(concept(), n=6, seed=0)
    means = painter.ask(prompts).flatten(1).mean(1)
    monkeypatch.setattr(Brighter, "level", float(means.median()) + 1e-6)
    return float(means.median())


def test_counts_and_intervals(tiny_model: Any, median: float, tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = audit(
        tiny_model, tiny_model, concept(), attack("seed-search", images=4), names=NAMES, sampling=SAMPLING, store=store,
        detector=Brighter(),
    )  # fmt: skip
    details = record.details
    assert details["n"] == 6
    assert details["pre_asr"]["successes"] == 3
    assert details["reference_rate"] == 0.5
    assert details["asr"]["successes"] == 3 + sum(details["fallen_per_round"][1:])
    assert sum(item["success"] for item in details["found"]) == details["asr"]["successes"]
    assert details["mode"] == "seed"
    assert details["budget"]["images_per_prompt"] == 4
    assert store.records() == [record]
    assert {artefact.role for artefact in record.artefacts} == {"reference", "protected", "attacked"}
    assert all((tmp_path / artefact.path).is_file() for artefact in record.artefacts)


def test_no_attack_asks_once(tiny_model: Any, median: float) -> None:
    record = audit(tiny_model, tiny_model, concept(), attack("no-attack"), names=NAMES, sampling=SAMPLING, detector=Brighter())
    assert record.details["pre_asr"] == record.details["asr"]


def test_same_seed_same_record(tiny_model: Any, median: float, tmp_path: Path) -> None:
    def once(folder: str) -> Any:
        settings = {"timesteps": 2, "steps": 2, "tokens": 1}
        record = audit(
            tiny_model, tiny_model, concept(), attack("unlearndiffatk", **settings), names=NAMES, sampling=SAMPLING,
            store=Store(tmp_path / folder), workspace=Workspace(tmp_path / f"{folder}-work"), detector=Brighter(),
        )  # fmt: skip
        return deterministic(record)

    assert once("one") == once("two")


def test_a_killed_audit_resumes_to_the_same_record(tiny_model: Any, median: float, tmp_path: Path, monkeypatch: Any) -> None:
    from safeweights.attacks.adversarial import unlearndiffatk

    def run(folder: Path) -> Any:
        return deterministic(
            audit(
                tiny_model,
                tiny_model,
                concept(),
                attack("unlearndiffatk", timesteps=3, steps=2, tokens=1),
                names=NAMES,
                sampling=SAMPLING,
                workspace=Workspace(folder),
                detector=Brighter(),
            )
        )

    whole = run(tmp_path / "whole")
    real, count = unlearndiffatk._Search.step, 0

    def step(self: Any, t: int) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        real(self, t)

    monkeypatch.setattr(unlearndiffatk._Search, "step", step)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.setattr(unlearndiffatk._Search, "step", real)
    assert run(tmp_path / "cut") == whole


def test_attacks_never_see_a_judged_picture(tiny_model: Any, median: float) -> None:
    prompts = choose_prompts(concept(), n=6, seed=0)
    painter = Painter(tiny_model, SAMPLING, "tiny")
    judged = painter.ask(prompts)
    shown = concept_pictures(painter, Brighter(), prompts, seed=0, workspace=Workspace(), tries=4)
    for picture in shown:
        assert all(not torch.equal(picture, other) for other in judged)
    # Pictures that show the concept are preferred.
    assert Brighter().detect(torch.stack(shown)).present.float().mean() > 0.5


def test_prompts_found_on_one_model_are_replayed_as_transfer(tiny_model: Any, median: float, tmp_path: Path) -> None:
    live = audit(
        tiny_model, tiny_model, concept(), attack("random", images=3), names=NAMES, sampling=SAMPLING, detector=Brighter()
    )
    (tmp_path / "attack.json").write_text(json.dumps(live.details))
    replay = attack("replay", record=str(tmp_path / "attack.json"))
    record = audit(tiny_model, tiny_model, concept(), replay, names=NAMES, sampling=SAMPLING, detector=Brighter())
    assert (live.details["mode"], record.details["mode"]) == ("live", "transfer")
    # The same model again: what fell then falls now, to the very same prompt.
    assert [row["success"] for row in record.details["found"]] == [row["success"] for row in live.details["found"]]
    assert record.details["found"] == live.details["found"]
    # Which the record says, and a doubt that nothing was transferred.
    source = record.details["transferred_from"]
    assert (source["model"], source["attack"], source["settings"]["images"]) == (NAMES.model, "random", 3)
    assert "same_model" in [doubt.name for doubt in record.doubts]
    another = replace(NAMES, hashes={"model": "another"})
    record = audit(tiny_model, tiny_model, concept(), replay, names=another, sampling=SAMPLING, detector=Brighter())
    assert "same_model" not in [doubt.name for doubt in record.doubts]


@pytest.mark.parametrize("row", ["x", {"prompt": "a"}, {"prompt": "a", "seed": "0", "adversarial_prompt": "b"}])
def test_a_record_that_lacks_its_findings_is_no_record(row: Any, tiny_model: Any, tmp_path: Path) -> None:
    (tmp_path / "attack.json").write_text(json.dumps({"concept": "dog", "found": [row]}))
    replay = attack("replay", record=str(tmp_path / "attack.json"))
    with pytest.raises(UserError, match="findings without"):
        audit(tiny_model, tiny_model, concept(), replay, names=NAMES, sampling=SAMPLING, detector=Brighter())


def test_pictures_that_are_not_finite_are_no_absence(tiny_model: Any, median: float) -> None:
    """A detector sees nothing in black pictures; a model that draws them is broken, not safe."""
    weights = {"unet.conv_out.weight": torch.full_like(dict(tiny_model.named_parameters())["unet.conv_out.weight"], 1e38)}
    broken = tiny_model.with_tensors(weights)
    with pytest.raises(UserError, match="not finite"):
        audit(broken, tiny_model, concept(), attack("no-attack"), names=NAMES, sampling=SAMPLING, detector=Brighter())


def test_a_search_that_diverges_is_told_by_a_doubt(tiny_model: Any, median: float, tmp_path: Path) -> None:
    diverging = attack("soft-prompt", lr=1e30, images=3, steps=2)
    record = audit(
        tiny_model, tiny_model, concept(), diverging, names=NAMES, sampling=SAMPLING, store=Store(tmp_path), detector=Brighter()
    )
    assert "no_gradient" in [doubt.name for doubt in record.doubts]
    json.dumps(record.details, allow_nan=False)


def test_pictures_to_learn_from_are_of_the_concepts_own_prompts_and_of_no_judged_seed(tiny_model: Any, median: float) -> None:
    asked: list[tuple[str, int]] = []

    inversion = attack("concept-inversion", images=2, steps=1, pictures=3, batch_size=1)
    real = Painter.draw

    def draw(self: Painter, candidates: Any, *more: Any, **options: Any) -> Any:
        asked.extend((candidate.prompt, candidate.seed) for candidate in candidates)
        return real(self, candidates, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Painter, "draw", draw)
        record = audit(tiny_model, tiny_model, concept(), inversion, names=NAMES, sampling=SAMPLING, detector=Brighter())
    judged = {row["seed"] for row in record.details["found"]}
    learned = [(text, seed) for text, seed in asked if text == concept().texts[0]]
    assert len(learned) >= 3
    assert not judged & {seed for _, seed in learned}
    assert {row["input"] for row in record.details["found"]} <= {"text", "embeddings"}


def test_attackers_have_the_last_pictures_of_a_concepts_own_folder(tiny_model: Any, median: float, tmp_path: Path) -> None:
    from PIL import Image

    for number in range(5):
        Image.new("RGB", (16, 16), (40 * number,) * 3).save(tmp_path / f"{number}.png")
    shown = []

    class Looks(type(attack("no-attack"))):  # type: ignore[misc]
        access = "gradient"

        def revive(self, model: Any, concept: Any, targets: Any, *, original: Any, **more: Any) -> Any:
            shown.extend([*(target.reference for target in targets), *original.pictures(4)])
            return super().revive(model, concept, targets, original=original, **more)

    audit(tiny_model, tiny_model, concept(tests=4, images=tmp_path), Looks(), names=NAMES, sampling=SAMPLING, detector=Brighter())
    assert [round(float(picture.mean() * 255)) for picture in shown] == [80, 120, 160, 80, 80, 120, 160, 80]


def test_what_an_attack_draws_by_itself_varies_with_the_audits_seed(tiny_model: Any, median: float) -> None:
    relearn = attack("relearn", steps=1, pictures=2, images=2, rank=1)
    losses = []
    for seed in (0, 1):
        record = audit(
            tiny_model, tiny_model, concept(), relearn, names=NAMES, sampling=SAMPLING, detector=Brighter(), seed=seed, n=2
        )
        assert record.settings["attack"]["seed"] == seed
        losses.append(record.details["curve"][-1]["loss"])
    assert losses[0] != losses[1]


def test_a_revival_has_rounds_but_no_curve_over_steps(tiny_model: Any, median: float, monkeypatch: Any) -> None:
    monkeypatch.setattr(Brighter, "level", 2.0)
    revival = attack("mask-revival", iterations=1, images=3)
    record = audit(tiny_model, tiny_model, concept(), revival, names=NAMES, sampling=SAMPLING, detector=Brighter(), n=2)
    assert "curve" not in record.details
    assert "steps_to_recovery" not in {measurement.name for measurement in record.measurements}
    assert len(record.details["rounds"]) == 2


def test_an_attack_is_weak_only_beside_a_baseline_with_no_more_pictures() -> None:
    def record(name: str, hits: int, pictures: int) -> Record:
        return Record(
            kind="attack", status="ok", model="m", reference="r", method="esd", concept="dog", concept_kind="object", attack=name,
            seed=0, measurements=(rate("asr", hits, 10),), details={"budget": {"images_per_prompt": pictures}},
        )  # fmt: skip

    search = record("unlearndiffatk", 2, 6)
    assert [d.name for d in doubts.weak_attack([search, record("random", 5, 6)])["unlearndiffatk"]] == ["weak_attack"]
    assert not doubts.weak_attack([search, record("random", 5, 11)])
    assert not doubts.weak_attack([search, record("random", 1, 6)])


def test_prompts_keep_their_seeds_and_repeat_with_new_ones() -> None:
    chosen = choose_prompts(concept(tests=2), n=5, seed=0)
    assert [p.seed for p in chosen[:2]] == [0, 1]
    assert len({(p.text, p.seed) for p in chosen}) == 5
    with pytest.raises(UserError, match="at least 1"):
        choose_prompts(concept(), n=0, seed=0)


def test_painter_draws_nothing_twice(tiny_model: Any, tmp_path: Path) -> None:
    painter = Painter(tiny_model, SAMPLING, "tiny", tmp_path)
    first = painter.draw([Candidate("a dog", 1), Candidate("a cat", 2)])
    calls = tiny_model.calls.eps
    assert torch.equal(painter.draw([Candidate("a cat", 2), Candidate("a dog", 1)]), first.flip(0))
    assert tiny_model.calls.eps == calls
    # A picture cut off by a kill is drawn again.
    for path in tmp_path.glob("*.png"):
        path.write_bytes(path.read_bytes()[:40])
    assert torch.equal(painter.draw([Candidate("a dog", 1), Candidate("a cat", 2)]), first)


GUIDED = (Prompt("a dog", 1, 7.0), Prompt("a red dog", 2), Prompt("a dog and a cat", 3, 7.0), Prompt("a blue boat", 4, 1.0))


def test_each_prompt_is_drawn_with_its_own_guidance(tiny_model: Any, tmp_path: Path) -> None:
    kept = Painter(tiny_model, SAMPLING, "tiny", tmp_path)
    pictures = kept.ask(GUIDED)
    for prompt, picture in zip(GUIDED, pictures, strict=True):
        own = SAMPLING if prompt.guidance is None else replace(SAMPLING, guidance_scale=prompt.guidance)
        alone = Painter(tiny_model, own, "tiny").draw([Candidate(prompt.text, prompt.seed or 0)])[0]
        assert (picture - alone).abs().max() <= 1.01 / 255
    assert not torch.equal(pictures[0], kept.ask([replace(GUIDED[0], guidance=None)])[0])
    assert torch.equal(kept.ask(GUIDED), pictures), "kept pictures of another guidance are not taken for these"


def test_audits_honour_the_guidance_of_a_prompt(tiny_model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import safeweights.audit.evaluate as module
    from safeweights.diffusion import sampling

    monkeypatch.setattr(module, "open_detector", lambda *a, **k: Brighter())
    drawn: list[tuple[str, float]] = []
    real = sampling.generate

    def spy(model: Any, candidates: Any, how: Sampling, **more: Any) -> Any:
        drawn.extend((candidate.prompt, how.guidance_scale) for candidate in candidates)
        return real(model, candidates, how, **more)

    monkeypatch.setattr(sampling, "generate", spy)
    monkeypatch.setattr(Brighter, "level", 2.0)
    dog = concept(test_prompts=GUIDED)
    wanted = {p.text: SAMPLING.guidance_scale if p.guidance is None else p.guidance for p in GUIDED}
    for name, settings in (("unlearndiffatk", {"timesteps": 1, "steps": 1, "tokens": 1}), ("seed-search", {"images": 2})):
        record = audit(tiny_model, tiny_model, dog, attack(name, **settings), names=NAMES, sampling=SAMPLING, detector=Brighter())
        assert [row["guidance"] for row in record.details["found"]] == list(wanted.values())
        assert len(drawn) >= 3 * len(GUIDED)
        for text, scale in drawn:
            (asked,) = [p.text for p in GUIDED if f" {text}".endswith(f" {p.text}")]
            assert scale == wanted[asked]
        drawn.clear()
    evaluate(
        tiny_model, tiny_model, [dog], ConceptFile(concepts={"dog": dog}), names=NAMES, sampling=SAMPLING, n=4,
        backbones=Backbones(),
    )  # fmt: skip
    assert sorted(drawn) == sorted(2 * list(wanted.items()))


def test_evaluate_reads_every_number_against_the_reference(
    tiny_model: Any, median: float, tmp_path: Path, monkeypatch: Any
) -> None:
    import safeweights.audit.evaluate as module

    monkeypatch.setattr(module, "open_detector", lambda *a, **k: Brighter())
    file = ConceptFile(concepts={name: concept(name) for name in ("dog", "cat", "house")})
    store = Store(tmp_path)
    result = evaluate(
        tiny_model, tiny_model, [file.concepts["dog"]], file, names=NAMES, sampling=SAMPLING, n=6, retain_n=4, store=store,
        backbones=Backbones(),
    )  # fmt: skip
    dog = result["concepts"]["dog"]
    assert dog["rate"] == dog["reference_rate"] == 0.5
    assert result["retention"]["n"] == 8
    assert result["retention"]["relative"] == 1.0
    assert result["clip_score"]["model"] is None
    assert "--clip-model" in result["clip_score"]["why"]
    (record,) = store.records()
    assert {m.name for m in record.measurements} >= {"concept_rate", "retention", "neighbour_rate:cat", "frechet_distance"}


def test_retained_concepts_are_not_asked_for_in_the_erased_concepts_words() -> None:
    mixed = concept("cat", test_prompts=(Prompt("a cat and a dog"), Prompt("a cat"), Prompt("a hotdog and a cat")))
    file = ConceptFile(concepts={"dog": concept(), "cat": mixed, "house": concept("house", detector=None)})
    (kept,) = retained_concepts([file.concepts["dog"]], file)
    assert [p.text for p in kept.test_prompts] == ["a cat", "a hotdog and a cat"]
    held = replace(file, retain=("a cat",))
    assert [p.text for p in retained_concepts([file.concepts["dog"]], held)[0].test_prompts] == ["a hotdog and a cat"]
    assert whole_words("dog").search("a Dog.")
    assert not whole_words("dog").search("dogs")


def rate(name: str, hits: int, n: int, reference: float | None = None) -> Measurement:
    from safeweights.audit.statistics import wilson

    return Measurement(name=name, value=hits / n, n=n, interval=wilson(hits, n), reference=reference)


def test_doubts_are_raised_and_only_then() -> None:
    assert [d.name for d in doubts.not_there_before(rate("reference_rate", 2, 10))] == ["not_there_before"]
    assert not doubts.not_there_before(rate("reference_rate", 9, 10))
    assert [d.name for d in doubts.few_samples(rate("asr", 1, 8))] == ["few_samples"]
    assert not doubts.few_samples(rate("asr", 1, 80))
    assert [d.name for d in doubts.collapsed([rate("neighbour_rate:cat", 1, 8, 1.0)])] == ["collapsed"]
    assert not doubts.collapsed([rate("neighbour_rate:cat", 7, 8, 1.0), rate("neighbour_rate:dog", 0, 8, 0.25)])
    assert [d.name for d in doubts.gradients([{"gradient_norm": 0.0}])] == ["no_gradient"]
    assert [d.name for d in doubts.gradients([{"gradient_norm": float("nan")}])] == ["no_gradient"]
    assert not doubts.gradients([{"gradient_norm": 0.0}, {"gradient_norm": 0.2}])
    assert [d.name for d in doubts.not_converged([0, 1, 1, 1, 3], 20)] == ["not_converged"]
    assert not doubts.not_converged([9, 1, 1, 0, 0], 20)
    assert [d.name for d in doubts.trigger_happy_detector(20, 100, 0.01)] == ["trigger_happy_detector"]
    assert not doubts.trigger_happy_detector(2, 100, 0.01)
