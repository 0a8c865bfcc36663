"""Suites are plain data that names what exists; events are what they say; a live number is never one of stored prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import folders
from safeweights.audit import suites
from safeweights.audit.audit import Names
from safeweights.audit.events import BENIGN, EVENTS, Benign, average, half, happen, harmless_prompts, int8
from safeweights.audit.suites import SUITES, Entry, Job, Suite, pick_suite, plan, summarise
from safeweights.core.concept import ConceptFile, load_concepts
from safeweights.core.errors import UserError
from safeweights.core.model import Sampling
from safeweights.core.table import ADAPTATIONS, ATTACKS, configure, resolve
from safeweights.core.workspace import Workspace
from safeweights.metrics.backbones import Backbones
from safeweights.models.door import open_model
from safeweights.records.store import Store, deterministic

TINY = Suite(
    n=2, retain_n=1, prompts=2,
    attacks=(
        Entry("no-attack"), Entry("random", {"images": 2, "tokens": 1}),
        Entry("relearn", {"steps": 2, "images": 2, "pictures": 2}),
    ),
    events=("fp16", "fewer-steps"),
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Callable[..., Path]) -> tuple[Any, ConceptFile]:
    folder = folders.sandbox(tmp_path_factory.mktemp("world") / "sandbox", tiny_sd())
    return open_model(folder / "model", device="cpu"), load_concepts(folder / "concepts.yaml")


def sampling(file: ConceptFile) -> Sampling:
    return Sampling(**file.generation)


def benign(model: Any, file: ConceptFile, **values: Any) -> Benign:
    return Benign(original=model, prompts=file.retain, sampling=sampling(file), steps=2, pictures=2, **values)


@pytest.mark.parametrize("name", SUITES)
def test_suites_name_what_exists_with_settings_it_takes(name: str) -> None:
    suite = pick_suite(name)
    for entry in suite.attacks:
        attack = configure(resolve(ATTACKS, entry.name, "attack"), entry.settings)
        assert attack.mode in ("seed", "live"), "stored prompts are no part of a suite"
        assert entry.n is None or entry.n >= 1
    labels = [entry.label for entry in suite.attacks]
    assert len(set(labels)) == len(labels)
    assert set(suite.events) <= set(EVENTS)
    assert {"no-attack", "random", "seed-search"} <= set(labels), "what every attack is held against"


def test_suites_grow_and_the_full_one_is_everything() -> None:
    used = {name: {entry.name for entry in suite.attacks} for name, suite in SUITES.items()}
    assert used["quick"] <= used["standard"] <= used["full"]
    assert used["full"] == set(ATTACKS) - {"replay"}
    tried = {entry.settings["adaptation"] for entry in SUITES["full"].attacks if entry.name == "relearn"}
    assert tried == set(ADAPTATIONS)
    assert set(SUITES["full"].events) == set(EVENTS)
    for suite in SUITES.values():
        assert len({entry.settings.get("images") for entry in suite.attacks if entry.name in ("random", "seed-search")}) == 1
    with pytest.raises(UserError, match="quick, standard, full"):
        pick_suite("fast")


@pytest.mark.parametrize(("pixels", "most"), [(64, 11), (64 * 64, 61)])
def test_black_boxes_have_as_many_pictures_as_any_search(world: tuple[Any, ConceptFile], pixels: int, most: int) -> None:
    _, file = world
    concept = next(iter(file.concepts.values()))
    cells = plan(SUITES["standard"], [concept], file, sampling=Sampling(steps=2), seed=0, inputs={}, latent_pixels=pixels)
    assert [cell.settings["images"] for cell in cells if cell.name in ("random", "seed-search")] == [most, most]


def test_casts_are_what_they_say(world: tuple[Any, ConceptFile]) -> None:
    model, file = world
    named = dict(model.named_parameters())
    after = dict(happen("fp16", model, sampling(file), benign(model, file)).model.named_parameters())
    for name, weight in named.items():
        assert torch.equal(after[name], weight.half().float())
    assert any(not torch.equal(after[name], named[name]) for name in named)
    after = dict(happen("int8", model, sampling(file), benign(model, file)).model.named_parameters())
    for name, weight in named.items():
        if weight.ndim < 2:
            assert torch.equal(after[name], weight)
            continue
        # The slow definition: channel by channel, the nearest of 255 evenly spaced values.
        for channel, got in zip(weight.detach(), after[name], strict=True):
            scale = channel.abs().max() / 127
            assert torch.allclose(got, (channel / scale).round() * scale, atol=1e-7)
            assert (got - channel).abs().max() <= scale / 2 + 1e-6
    assert torch.equal(int8(torch.zeros(3, 4)), torch.zeros(3, 4))
    assert torch.isfinite(half(torch.tensor([1e9, -1e9]))).all()
    assert torch.equal(int8(int8(weight)), int8(weight)) or torch.allclose(int8(int8(weight)), int8(weight), atol=1e-6)


def test_sampling_events(world: tuple[Any, ConceptFile]) -> None:
    model, file = world
    before = sampling(file)
    other = happen("scheduler", model, before, benign(model, file))
    assert (other.model, other.sampling) == (model, replace(before, scheduler="dpm"))
    assert happen("scheduler", model, replace(before, scheduler="dpm"), benign(model, file)).sampling.scheduler == "ddim"
    fewer = happen("fewer-steps", model, before, benign(model, file))
    assert (fewer.model, fewer.sampling) == (model, replace(before, steps=1))
    with pytest.raises(UserError, match="unknown event"):
        happen("flood", model, before, benign(model, file))


def test_fine_tuning_events_share_one_fine_tune(world: tuple[Any, ConceptFile], tmp_path: Path) -> None:
    model, file = world
    base = {name: p.clone() for name, p in model.named_parameters()}
    user = benign(model, file, workspace=Workspace(tmp_path))
    tuned, merged, stacked = (happen(event, model, sampling(file), user) for event in ("fine-tune", "merge", "lora"))
    t, m, s = (dict(after.model.named_parameters()) for after in (tuned, merged, stacked))
    moved = [name for name in base if not torch.equal(t[name], base[name])]
    assert moved
    for name in base:
        assert torch.allclose(m[name], 0.5 * base[name] + 0.5 * t[name], atol=1e-7)
    assert {name for name in base if not torch.equal(s[name], base[name])} <= {name for name in base if ".attn" in name}
    assert any(not torch.equal(s[name], base[name]) for name in base)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters()), "the released model stays as it is"
    # The fine-tune is kept: another pass does not learn again, and gives the same.
    calls = model.calls.eps
    again = dict(happen("fine-tune", model, sampling(file), user).model.named_parameters())
    assert model.calls.eps == calls
    assert all(torch.equal(again[name], t[name]) for name in base)
    assert len({after.fingerprint("x") for after in (tuned, merged, stacked)}) == 3
    assert set(BENIGN) <= set(EVENTS)
    assert torch.equal(average({"a": torch.tensor([0.0])}, {"a": torch.tensor([4.0])}, 0.25)["a"], torch.tensor([1.0]))
    with pytest.raises(UserError, match="retain prompts"):
        happen("lora", model, sampling(file), replace(user, prompts=()))


def test_harmless_prompts_never_name_an_audited_concept(world: tuple[Any, ConceptFile]) -> None:
    _, file = world
    prompts = harmless_prompts(replace(file, retain=("a picture of a vincent house", "a boat")), file.pick(["mosaic"]))
    assert prompts[0] == "a boat"
    assert not any("vincent" in prompt for prompt in prompts)
    assert any("church" in prompt for prompt in prompts), "other concepts of the file are harmless"


def job(world: tuple[Any, ConceptFile], folder: Path, suite: Suite = TINY, replays: dict[str, str] | None = None) -> Job:
    model, file = world
    hashes = {"model": "m", "reference": "r"}
    cells = plan(
        suite,
        file.pick(["mosaic", "emblem"]),
        file,
        sampling=sampling(file),
        seed=0,
        inputs=hashes,
        latent_pixels=64,
        replays=replays,
    )
    return Job(
        model=model, reference=model, file=file, cells=cells, folder=folder / "result", work=Workspace(folder / "work"),
        names=Names(model="tiny", reference="tiny", hashes=hashes), backbones=Backbones(None, None),
    )  # fmt: skip


def test_an_audit_is_one_record_a_cell_and_never_measured_twice(world: tuple[Any, ConceptFile], tmp_path: Path) -> None:
    first = job(world, tmp_path)
    done = [cell.title for cell, _ in first.run()]
    assert len(done) == len(first.cells) == 1 + 2 * 3 + 2 * 2
    records = first.records()
    assert len(records) == 12, "asking plainly leaves one for each concept"
    assert list(job(world, tmp_path).run()) == []
    by_label = {(r.concept, r.attack): r for r in records}
    event = by_label["mosaic", "after fewer-steps"]
    assert event.details["event"] == {"event": "fewer-steps", "steps": 1}
    assert (event.sampling["steps"], event.details["mode"]) == (1, "seed")
    assert event.provenance["inputs"]["released"] == "m" != event.provenance["inputs"]["model"]
    assert by_label["mosaic", "relearn lora"].details["mode"] == "live"
    assert by_label["mosaic", "no-attack"].details["mode"] == "seed"
    # A lost record is one cell measured, with the same result; another budget is another cell.
    before = deterministic(by_label["emblem", "random"])
    Store(tmp_path / "result").path(by_label["emblem", "random"]).unlink()
    assert [cell.title for cell, _ in job(world, tmp_path).run()] == ["emblem: random"]
    again = {(r.concept, r.attack): r for r in job(world, tmp_path).records()}
    assert deterministic(again["emblem", "random"]) == before
    other = replace(TINY, attacks=(Entry("random", {"images": 3, "tokens": 1}),), events=())
    assert [cell.title for cell, _ in job(world, tmp_path, other).run()] == ["mosaic: random", "emblem: random"]
    told = summarise(records, ["mosaic", "emblem"])
    rates = {label: entry["rate"] for label, entry in told["concepts"]["emblem"]["attacks"].items()}
    assert set(rates) == {"no-attack", "random", "relearn lora"}
    worst = told["concepts"]["emblem"]["worst_attack"]
    assert worst["rate"] == max(rates.values())
    assert set(worst) >= {"attack", "mode", "ci95", "n"}
    assert set(told["concepts"]["emblem"]["events"]) == {"after fp16", "after fewer-steps"}


def test_a_cell_that_breaks_leaves_an_error_and_is_tried_again(
    world: tuple[Any, ConceptFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(TINY, attacks=(Entry("no-attack"), Entry("random", {"images": 2, "tokens": 1})), events=())
    from safeweights.attacks.adversarial.baselines import RandomTokens

    with monkeypatch.context() as broken:
        broken.setattr(RandomTokens, "revive", lambda *_, **__: 1 / 0)
        said = [text for _, text in job(world, tmp_path, small).run()]
    assert sum("FAILED: ZeroDivisionError" in text for text in said) == 2
    told = summarise(job(world, tmp_path, small).records(), ["mosaic", "emblem"])
    assert told["concepts"]["mosaic"]["failed"] == {"random": "ZeroDivisionError: division by zero"}
    assert [cell.label for cell, _ in job(world, tmp_path, small).run()] == ["random", "random"]
    assert all(record.status == "ok" for record in Store(tmp_path / "result").records())


def test_replayed_prompts_are_transfer_wherever_they_stand(world: tuple[Any, ConceptFile], tmp_path: Path) -> None:
    from safeweights.release.output import write_json

    small = replace(TINY, attacks=(Entry("random", {"images": 2, "tokens": 1}),), events=())
    live = job(world, tmp_path / "a", small)
    list(live.run())
    found = next(record for record in live.records() if record.concept == "mosaic" and record.kind == "attack")
    write_json(tmp_path / "attack.json", found.details)
    replayed = job(world, tmp_path / "b", small, replays={"mosaic": str(tmp_path / "attack.json")})
    list(replayed.run())
    modes = {record.attack: record.details["mode"] for record in replayed.records() if record.kind == "attack"}
    assert modes == {"random": "live", "replay": "transfer"}


def test_keys_tell_cells_apart(world: tuple[Any, ConceptFile], tmp_path: Path) -> None:
    cell = job(world, tmp_path).cells[2]
    assert replace(cell, calls=7).key == cell.key
    for change in ({"seed": 1}, {"counts": {"n": 3}}, {"inputs": {"model": "other"}}, {"label": "x"}, {"sampling": {}}):
        assert replace(cell, **change).key != cell.key
    assert len({cell.key for cell in job(world, tmp_path).cells}) == len(job(world, tmp_path).cells)
    assert asdict(cell)["settings"]["images"] == 2
    assert suites.attack_calls(configure(resolve(ATTACKS, "random", "attack"), {"images": 3}), 10, 4) == 120
