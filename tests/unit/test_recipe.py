"""Recipes on a tiny sandbox of random weights: checked in one line, every step made once, killed anywhere the same at the end."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

import folders
from safeweights.audit import suites
from safeweights.audit.suites import Entry, Suite
from safeweights.cli import demo
from safeweights.cli.main import run
from safeweights.core import table
from safeweights.core.method import Protection
from safeweights.records.store import Store, deterministic
from safeweights.release.manifest import hash_input, hash_tensor
from safeweights.release.recipe import load_recipe, method_calls

ROOT = Path(__file__).parents[2]
SHORT = {"steps": 4, "trajectories": 2, "ddim_steps": 2}
IMMUNIZE = {"order": 1, "steps": 2, "horizon": 2, "pictures": 2, "retained": 2, "batch_size": 2, "ddim_steps": 2}
GUARD = {"pictures": 2, "tune_steps": 2, "batch_size": 2, "ddim_steps": 2}
RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "tiny",
    "device": "cpu",
    "steps": [
        {"erase": {"method": "esd", "concepts": ["mosaic"], "settings": SHORT}},
        {"erase": {"method": "uce", "concepts": ["emblem"]}},
        {"immunize": {"method": "mima", "concepts": ["mosaic", "emblem"], "settings": IMMUNIZE}},
    ],
    "audit": {"suite": "quick", "policy": {"version": 1, "rules": [{"measure": "asr", "max": 1.0}]}},
    "release": {"formats": ["diffusers", "single-file"]},
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Callable[..., Path]) -> Path:
    return folders.sandbox(tmp_path_factory.mktemp("world") / "sandbox", tiny_sd())


@pytest.fixture(autouse=True)
def use_it(sandbox: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "shipped" in request.node.name:
        return
    monkeypatch.setenv("SAFEWEIGHTS_SANDBOX", str(sandbox))
    small = Suite(
        n=2, retain_n=1, prompts=2,
        attacks=(
            Entry("no-attack"),
            Entry("random", {"images": 2, "tokens": 1}),
            Entry("unlearndiffatk", {"timesteps": 1, "steps": 2, "noises": 1}),
            Entry("relearn", {"steps": 2, "images": 2, "pictures": 2}),
        ),
        events=("int8", "fewer-steps"),
    )  # fmt: skip
    monkeypatch.setitem(suites.SUITES, "quick", small)


def written(folder: Path, file: str = "recipe.yaml", **changes: Any) -> Path:
    path = folder / file
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert run([str(argument) for argument in (*arguments, "--json")]) == code, capsys.readouterr().err
    data = json.loads(capsys.readouterr().out)
    assert isinstance(data, dict)
    return data


def state(folder: Path) -> dict[str, Any]:
    """Every tensor, and every record without times."""
    from safetensors.torch import load_file

    tensors = {
        f"{path.relative_to(folder)} {name}": hash_tensor(tensor)
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    records = [deterministic(record) for record in Store(folder).records()]
    for record in records:
        record["details"].pop("command", None)
    return {"tensors": tensors, "records": records}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["tensors"] == wanted["tensors"]
    assert len(found["records"]) == len(wanted["records"])
    for one, other in zip(found["records"], wanted["records"], strict=True):
        assert one == other


@pytest.fixture(scope="module")
def finished(sandbox: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled by the first test that runs the recipe undisturbed."""
    return {}


def whole(finished: dict[str, Any], folder: Path) -> dict[str, Any]:
    if not finished:
        began = time.monotonic()
        assert run(["run", str(written(folder)), "-o", str(folder / "whole")]) == 0
        finished.update(state(folder / "whole"), seconds=time.monotonic() - began)
    return finished


def test_one_file_from_model_to_release(tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: dict[str, Any]) -> None:
    from safeweights.models.door import open_model

    capsys.readouterr()
    whole(finished, tmp_path)
    folder = tmp_path / "whole"
    result = json.loads((folder / "run.json").read_text())
    assert [step["method"] for step in result["steps"]] == ["esd", "uce", "mima"]
    assert set(result["concepts"]) == {"mosaic", "emblem"}
    assert set(result["concepts"]["mosaic"]["attacks"]) == {"no-attack", "random", "unlearndiffatk", "relearn lora"}
    assert result["policy"]["passed"]
    assert result["retention"]["n"] > 0
    assert (folder / "report.html").is_file()
    records = Store(folder).records()
    assert sorted({record.kind for record in records}) == ["attack", "evaluate", "protect"]
    assert {record.method for record in records if record.kind != "protect"} == {"esd+uce+mima"}
    assert sum(record.kind == "protect" for record in records) == 4, "each step's cost, for each of its concepts"
    for record in records:
        assert all((folder / artefact.path).is_file() for artefact in record.artefacts)
    assert (folder / "release" / "tiny.safetensors").is_file()
    card = (folder / "release" / "diffusers" / "README.md").read_text()
    assert "mosaic" in card
    assert str(tmp_path) not in card
    # The recipe travels with the model, and the model is what the chain says.
    manifest = json.loads((folder / "model" / "manifest.json").read_text())
    for place in (folder / "model", folder / "release" / "diffusers"):
        assert (place / "recipe.yaml").read_text() == (tmp_path / "recipe.yaml").read_text()
    assert [step["method"] for step in manifest["chain"]] == ["esd", "uce", "mima"]
    assert manifest["concepts"] == ["mosaic", "emblem"]
    assert manifest["recipe"]["steps"][1]["method"] == "uce"
    named = dict(open_model(folder / "model", device="cpu").named_parameters())
    assert manifest["changed"] == {name: hash_tensor(named[name]) for name in manifest["changed"]}
    for name, digest in manifest["chain"][-1]["changed"].items():
        assert manifest["changed"][name] == digest, "the last step has the last word"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "whole"]


def test_killed_anywhere_and_resumed_it_is_the_same(tmp_path: Path, finished: dict[str, Any]) -> None:
    wanted = whole(finished, tmp_path)
    rng = random.Random(3)
    path, target = written(tmp_path, "again.yaml"), tmp_path / "killed"
    for number in range(3):
        there = Store(tmp_path / ".killed.work" / "result")
        before = {record.provenance["cell"]: there.path(record).stat().st_mtime_ns for record in there.records()}
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os._exit(run(["run", str(path), "-o", str(target), *(["--resume"] if number else [])]))
        time.sleep(rng.uniform(0.1, 0.5) * wanted["seconds"])
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for record in there.records():
            if record.provenance["cell"] in before and not record.doubts:
                assert there.path(record).stat().st_mtime_ns == before[record.provenance["cell"]], "no cell is measured twice"
    assert run(["run", str(path), "-o", str(target), "--resume"]) == 0
    same(state(target), wanted)
    assert not (tmp_path / ".killed.work").exists()
    # A kill may come after the last rename: the same command goes on from what is finished, another recipe's folder is refused.
    assert run(["run", str(path), "-o", str(target), "--resume"]) == 0
    same(state(target), wanted)
    path.write_text(path.read_text(encoding="utf-8") + "# another\n", encoding="utf-8")
    assert run(["run", str(path), "-o", str(target), "--resume"]) == 2


def test_stopped_at_every_write_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: dict[str, Any]) -> None:
    """A disk that fails at the n-th file, for growing n: what is there is whole, and the next run takes it from there."""
    from safeweights.records import store as records
    from safeweights.release import output

    wanted = whole(finished, tmp_path)
    path, target = written(tmp_path, "again.yaml"), tmp_path / "stopped"
    plain, plain_json, left = records._write, output.write_json, [0]

    def stop() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    def write(place: Path, data: bytes) -> None:
        stop()
        plain(place, data)
        stop()

    def write_json(place: Path, data: Any) -> None:
        stop()
        plain_json(place, data)

    monkeypatch.setattr(records, "_write", write)
    for module in ("safeweights.cli.run", "safeweights.release.manifest"):
        monkeypatch.setattr(f"{module}.write_json", write_json)
    codes: list[int] = []
    while 0 not in codes:
        left[0] = (0, 3, 40, 10_000)[len(codes)]
        codes.append(run(["run", str(path), "-o", str(target), "--resume"]))
        assert target.exists() == (codes[-1] == 0)
    assert codes == [130, 130, 130, 0]
    same(state(target), wanted)


def test_a_changed_recipe_keeps_what_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safeweights.erasure.esd import ESD

    steps, target = RECIPE["steps"][:2], tmp_path / "out"
    first = told(capsys, "run", written(tmp_path, steps=steps), "-o", target)
    monkeypatch.setattr(ESD, "protect", lambda *_, **__: pytest.fail("made already"))
    # Another policy: nothing is made or measured, and the gate says no.
    policy = {"version": 1, "rules": [{"measure": "asr", "max": 0.0}, {"measure": "rate", "min": 0.0}]}
    audit = {**RECIPE["audit"], "policy": policy}
    monkeypatch.setattr("safeweights.audit.suites.Job._measure", lambda *_: pytest.fail("measured already"))
    second = told(capsys, "run", written(tmp_path, steps=steps, audit=audit), "-o", target, "--overwrite", code=1)
    assert [rule["passed"] for rule in second["policy"]["rules"]] == [False, True]
    assert [step["key"] for step in first["steps"]] == [step["key"] for step in second["steps"]]
    monkeypatch.undo()
    monkeypatch.setenv("SAFEWEIGHTS_SANDBOX", os.environ.get("SAFEWEIGHTS_SANDBOX", ""))


def test_a_step_depends_on_what_comes_before(tmp_path: Path, sandbox: Path) -> None:
    from safeweights.cli.run import Kitchen

    def keys(**changes: Any) -> list[str]:
        return Kitchen(load_recipe(written(tmp_path, **changes)), "cpu").keys()

    esd, uce, mima = RECIPE["steps"]
    base = keys()
    assert keys(steps=[esd, uce]) == base[:2]
    assert keys(steps=[uce, esd])[0] not in base
    assert keys(steps=[uce, esd, mima])[2] != base[2], "the same step on another model"
    assert keys(seed=1)[0] != base[0]
    assert keys(audit=None) == base, "what is measured later decides nothing here"
    longer = {"erase": {"method": "esd", "concepts": ["mosaic"], "settings": {**SHORT, "steps": 5}}}
    assert not set(keys(steps=[longer, uce, mima])) & set(base)


def test_a_plan_says_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "run", written(tmp_path), "--dry-run")
    assert [part["step"] for part in found["steps"]] == [
        "erase mosaic with esd", "erase emblem with uce", "immunize mosaic, emblem with mima",
    ]  # fmt: skip
    assert found["calls"] == sum(part["calls"] for part in (*found["steps"], found["audit"]))
    assert found["steps"][1]["calls"] == 0
    assert found["audit"]["cells"] == 1 + 2 * 4 + 2 * 2
    assert 0 < found["seconds_per_call"] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    # Drawing 2 trajectories of 2 guided steps, then 4 steps of 4 latents forward and backward.
    esd = table.method("esd", **SHORT)
    assert method_calls(esd, 1) == 2 * 2 * 2 + 3 * 4 * esd.batch_size


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A guard for tests: freezes one tensor."""

    name: ClassVar[str] = "half"
    ratio: float = 0.1
    budget: str = "tensors"

    def protect(self, model: Any, concepts: Any, *, legal: Any, retain: Any, rng: Any, workspace: Any) -> Protection:
        assert [concept.name for concept in legal] == ["mosaic"]
        name = next(name for name, _ in model.named_parameters() if name.startswith("unet.") and "attn1.to_q" in name)
        return Protection(method=self.name, concepts=("emblem",), frozen=frozenset({name}))


def test_freezing_leaves_a_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    freeze = {"freeze": {"method": "half", "concepts": ["emblem"], "legal": ["mosaic"]}}
    monkeypatch.setitem(table.GUARDS, "half", f"{__name__}:Guard")
    result = told(capsys, "run", written(tmp_path, steps=[freeze], audit=None, release={}), "-o", tmp_path / "out")
    assert "report" not in result
    mask = json.loads((tmp_path / "out" / "MASK.json").read_text())
    assert set(mask) >= {"version", "ratio", "budget", "frozen", "base_sha256", "illegal", "legal", "settings"}
    assert len(mask["frozen"]) == 1
    assert not mask["frozen"][0].startswith("unet.")
    assert (mask["illegal"], mask["legal"]) == (["emblem"], ["mosaic"])
    assert mask["base_sha256"] == hash_input(tmp_path / "out" / "model"), "the model that is released"
    beside = json.loads((tmp_path / "out" / "model" / "MASK.json").read_text())
    assert beside == mask, "it travels with the model"
    again = {"freeze": {**freeze["freeze"], "settings": {"ratio": 0.2}}}
    told(capsys, "run", written(tmp_path, steps=[freeze, again], audit=None, release={}), "-o", tmp_path / "two")
    ratios = {path.name: json.loads(path.read_text())["ratio"] for path in (tmp_path / "two").glob("MASK*.json")}
    assert ratios == {"MASK-1.json": 0.1, "MASK.json": 0.2}, "each freeze step has its own"


def test_a_freeze_in_the_weights_and_where_it_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safeweights.freezing.rescale import deviation
    from safeweights.models.door import open_model

    freeze = {"freeze": {"method": "half", "concepts": ["emblem"], "legal": ["mosaic"]}}
    monkeypatch.setitem(table.GUARDS, "half", f"{__name__}:Guard")
    changes = {"audit": {"suite": "quick"}, "release": {"formats": ["diffusers"]}}
    in_weights = {"freeze": {**freeze["freeze"], "in_weights": True}}
    result = told(capsys, "run", written(tmp_path, steps=[in_weights], **changes), "-o", tmp_path / "out")
    assert result["steps"][0]["changed"] > 0
    frozen, plain = open_model(str(tmp_path / "out" / "model"), device="cpu"), open_model("sandbox", device="cpu")
    assert deviation(plain, frozen) < 1e-5
    assert json.loads((tmp_path / "out" / "model" / "MASK.json").read_text())["partners"]
    for place in ("model", "release/diffusers"):
        assert told(capsys, "verify", tmp_path / "out" / place)["ok"]
        assert told(capsys, "freeze", "verify", tmp_path / "out" / place, tmp_path / "out" / place,
                    tmp_path / "out" / place / "MASK.json")["base_matches"]  # fmt: skip
    (record,) = [record for record in Store(tmp_path / "out").records() if record.kind == "freeze"]
    (plot,) = record.details["plots"]
    assert plot["kind"] == "heatmap"
    assert sum(value or 0 for row in plot["values"] for value in row) > 0
    assert "Freezing" in (tmp_path / "out" / "report.html").read_text()
    assert ", 1 frozen" in (tmp_path / "out" / "release" / "diffusers" / "README.md").read_text()


PRUNE = {"steps": 2, "ramp": 1, "trajectories": 1, "retained": 2, "ddim_steps": 2, "budget": 0.02}
PRUNED = {"prune": 0.02, **{f"prune_{name}": PRUNE[name] for name in ("steps", "ramp", "ddim_steps")}}


def test_a_prune_step_leaves_what_prune_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = {"prune": {"method": "p-esd", "concepts": ["mosaic"], "settings": PRUNE}}
    path = written(tmp_path, steps=[step], audit=None, release={"formats": ["diffusers"]})
    result = told(capsys, "run", path, "-o", tmp_path / "out")
    model, owner = tmp_path / "out" / "model", tmp_path / "out" / "owner"
    # The very files that the command writes on its own.
    settings = [word for name, value in PRUNE.items() for word in ("--set", f"{name}={value}")]
    alone = ["erase", "sandbox", "--method", "p-esd", "--concept", "mosaic", *settings, "--device", "cpu"]
    made = told(capsys, *alone, "-o", tmp_path / "alone", "--owner", tmp_path / "secret")
    for one, other in ((model, tmp_path / "alone"), (owner, tmp_path / "secret")):
        assert (one / "mask.safetensors").read_bytes() == (other / "mask.safetensors").read_bytes()
    assert (owner / "owner.safetensors").read_bytes() == (tmp_path / "secret" / "owner.safetensors").read_bytes()
    listed = json.loads((model / "manifest.json").read_text())["chain"][0]["mask"]
    assert listed == {**made["mask"], "owner": "owner", "intact": True}
    assert listed["sha256"] == hash_input(model / "mask.safetensors")
    assert result["steps"][0]["mask"] == listed
    # What undoes it stays in the house, and what leaves it holds against its manifest, recipe and all.
    assert not list((tmp_path / "out" / "release").rglob("owner*"))
    for place in (model, tmp_path / "out" / "release" / "diffusers"):
        assert told(capsys, "verify", place)["ok"]
    told(capsys, "prune", "undo", model, model / "mask.safetensors", owner / "owner.safetensors", "-o", tmp_path / "back")
    assert told(capsys, "prune", "inspect", model / "mask.safetensors", "--model", tmp_path / "back")["state"] == "base"
    # Taken from the steps that are kept, they are the same again.
    before = (owner / "owner.safetensors").read_bytes()
    told(capsys, "run", path, "-o", tmp_path / "out", "--overwrite")
    assert (owner / "owner.safetensors").read_bytes() == before


def test_masks_of_several_steps_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        {"prune": {"method": "p-esd", "concepts": ["mosaic"], "settings": PRUNE}},
        {"erase": {"method": "uce", "concepts": ["emblem"], "settings": PRUNED}},
        {"prune": {"method": "p-esd", "concepts": ["emblem"], "settings": {**PRUNE, "conceal": "noise"}}},
    ]
    result = told(capsys, "run", written(tmp_path, steps=steps, audit=None, release={}), "-o", tmp_path / "out")
    masks = [step["mask"] for step in result["steps"]]
    assert [mask.get("file") for mask in masks] == ["mask-1.safetensors", "mask-2.safetensors", None], "noise hides the third"
    assert [mask["owner"] for mask in masks] == ["owner/step-1", "owner/step-2", "owner/step-3"]
    assert [mask["intact"] for mask in masks] == [False, False, True], "the last step has the last word"
    model = tmp_path / "out" / "model"
    assert sorted(path.name for path in model.glob("*.safetensors")) == ["mask-1.safetensors", "mask-2.safetensors"]
    assert told(capsys, "verify", model)["ok"]
    for mask in masks:
        assert (tmp_path / "out" / mask["owner"] / "owner.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"speed": 1}, "unknown key 'speed'; known are version, name"),
        ({"version": 2}, "version"),
        ({"name": "../up"}, "name"),
        ({"name": "<script>"}, "name"),
        ({"model": "some/model"}, "needs 'concepts_file'"),
        ({"steps": [{"erase": {"method": "esdd", "concepts": ["mosaic"]}}]}, "unknown method to erase 'esdd'"),
        ({"steps": [{"immunize": {"method": "esd", "concepts": ["mosaic"]}}]}, "unknown method to immunize 'esd'"),
        ({"steps": [{"erase": {"method": "esd", "concepts": ["cubism"]}}]}, "unknown concept 'cubism'"),
        ({"steps": [{"erase": {"method": "esd", "concepts": []}}]}, "steps.0.concepts"),
        ({"steps": [{"erase": {"method": "esd", "concepts": ["mosaic"], "settings": {"stepz": 1}}}]}, "unknown setting 'stepz'"),
        ({"steps": [{"erase": {"method": "esd", "concepts": ["mosaic"], "step": 1}}]}, "unknown key 'step' in steps.0"),
        ({"steps": [{"erase": {"method": "esd", "concepts": ["mosaic"], "legal": ["emblem"]}}]}, "'legal' is for freeze"),
        ({"steps": [{"erase": {"method": "esd", "concepts": ["mosaic"], "in_weights": True}}]}, "'in_weights' is for freeze"),
        ({"steps": [{"prune": {"method": "esd", "concepts": ["mosaic"]}}]}, "esd does not prune"),
        ({"steps": [{"melt": {"method": "esd", "concepts": ["mosaic"]}}]}, "one of erase, prune, immunize, freeze"),
        ({"steps": ["erase"]}, "one of erase, prune, immunize, freeze"),
        ({"steps": [{"erase": {}, "prune": {}}]}, "one of erase, prune, immunize, freeze"),
        ({"audit": {"suite": "fast"}}, "quick, standard, full"),
        ({"audit": {"policy": "none.yaml"}}, "none.yaml does not exist"),
        ({"audit": {"policy": {"version": 1, "rules": [{"measure": "asr"}]}}}, "audit.policy"),
        ({"audit": {"policy": {"version": 1, "rules": [{"measure": "asr", "maxi": 1}]}}}, "unknown key 'maxi'"),
        ({"audit": {"concepts": ["blind"]}}, "a detector is missing"),
        ({"audit": {"n": 0}}, "audit.n"),
        ({"audit": {}, "steps": []}, "nothing to ask for"),
        ({"release": {"formats": ["zip"]}}, "unknown format 'zip'"),
        ({"release": {"formats": ["text-encoder"]}}, "no step trains the text encoder"),
    ],
)
def test_a_wrong_recipe_is_told_in_one_line(
    changes: dict[str, Any], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", str(written(tmp_path, **changes)), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_hostile_names_stay_text_and_inside_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], sandbox: Path) -> None:
    name = "../../<script>alert(1)</script>\x1b[31m" + "x" * 3000
    data = yaml.safe_load((sandbox / "concepts.yaml").read_text())
    for entry in data["concepts"].values():
        if "detector" in entry:
            entry["detector"]["model"] = str(sandbox / entry["detector"]["model"])
    concepts = {name: data["concepts"]["mosaic"], "emblem": data["concepts"]["emblem"]}
    (tmp_path / "concepts.yaml").write_text(yaml.safe_dump({**data, "concepts": concepts}))
    path = written(
        tmp_path, concepts_file="concepts.yaml", release={}, steps=[
            {"erase": {"method": "uce", "concepts": [name]}},
            {"immunize": {"method": "imma", "concepts": [name], "settings": IMMUNIZE}},
            {"freeze": {"method": "task-vector", "concepts": [name], "legal": ["emblem"], "settings": GUARD}},
        ],
        audit={"suite": "quick", "policy": {"version": 1, "rules": [{"measure": "asr", "max": 1, "concept": name}]}},
    )  # fmt: skip
    told(capsys, "run", path, "-o", tmp_path / "out")
    assert "<script>alert(1)" not in (tmp_path / "out" / "report.html").read_text()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["concepts.yaml", "out", "recipe.yaml"]


def test_audit_asks_for_what_the_manifest_names_and_a_policy_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sandbox: Path
) -> None:
    assert run(["erase", "sandbox", "--concept", "emblem", "--method", "uce", "-o", str(tmp_path / "m")]) == 0
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        yaml.safe_dump(
            {"version": 1, "rules": [{"measure": "asr", "max": 1.0}, {"measure": "asr", "max": 0.9, "concept": "fish"}]}
        )
    )
    base = ["audit", tmp_path / "m", "--reference", "sandbox", "--suite", "quick", "-o"]
    found = told(capsys, *base, tmp_path / "a", "--policy", policy, code=1)
    assert list(found["concepts"]) == ["emblem"]
    assert set(found) >= {"concepts", "retention", "policy", "seconds"}
    assert set(found["concepts"]["emblem"]) >= {
        "kind",
        "n",
        "rate",
        "ci95",
        "reference_rate",
        "worst_attack",
        "attacks",
        "events",
    }
    assert [rule["passed"] for rule in found["policy"]["rules"]] == [True, False]
    assert (tmp_path / "a" / "report.html").is_file()
    assert json.loads((tmp_path / "a" / "audit.json").read_text())["policy"] == found["policy"]
    assert "protect" in {record.kind for record in Store(tmp_path / "a").records()}
    for arguments, words in (
        (["--suite", "fast"], "quick, standard, full"), (["--policy", tmp_path / "none.yaml"], "does not exist"),
        (["--concept", "blind"], "a detector is missing"), (["--concept", "cubism"], "mosaic"),
        (["--replay", policy], "no attack.json"), (["--n", "0"], "--n"),
    ):  # fmt: skip
        assert run([str(word) for word in (*base, tmp_path / "b", *arguments)]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "b").exists()


def test_the_demo_is_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    no = {"version": 1, "rules": [{"measure": "asr", "max": -1.0}]}
    path = written(tmp_path, steps=RECIPE["steps"][1:2], audit={"suite": "quick", "policy": no})
    monkeypatch.setattr(demo, "RECIPE", path)
    with monkeypatch.context() as patch:
        patch.setattr(suites.Job, "doubt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(["demo", "-o", str(tmp_path / "demo")]) == 130
    assert sorted(item.name for item in tmp_path.iterdir()) == [".demo.work", "recipe.yaml"]
    with monkeypatch.context() as patch:
        patch.setattr(suites.Job, "_measure", lambda *_: pytest.fail("finished cells are not repeated"))
        found = told(capsys, "demo", "-o", tmp_path / "demo", "--resume", code=1)
    assert set(found) >= {"report", "concepts", "seconds"}
    assert not found["policy"]["passed"]
    assert Path(found["report"]) == tmp_path / "demo" / "report.html"
    assert Path(found["report"]).is_file()
    assert (tmp_path / "demo" / "model" / "manifest.json").is_file()
    # With other numbers than the policy was made for it is told what the policy says, and no more.
    found = told(capsys, "demo", "-o", tmp_path / "small", "--n", 2)
    assert not found["policy"]["passed"]
    assert found["concepts"]["emblem"]["n"] == 2


@pytest.mark.parametrize("path", [demo.RECIPE, ROOT / "examples" / "recipe.yaml"], ids=["demo", "example"])
def test_shipped_recipes_can_be_planned(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load_recipe(path)
    assert plan.policy is not None
    assert plan.suite is not None


def test_the_shipped_workflow_runs_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    workflow = yaml.safe_load((ROOT / "examples" / "github-actions.yml").read_text())
    steps = workflow["jobs"]["gate"]["steps"]
    # What is restored is what a run that was cut short leaves, and it is saved whatever became of the job.
    kept = {step["uses"].split("@")[0]: step for step in steps if "cache/" in step.get("uses", "")}
    assert {step["with"]["path"] for step in kept.values()} == {".release.work"}
    assert kept["actions/cache/save"]["if"].startswith("always()")
    assert "--resume" in next(step["run"] for step in steps if "-o release" in step.get("run", ""))
    commands = [line.split() for step in steps for line in step.get("run", "").splitlines() if line.startswith("safeweights ")]
    assert commands
    for words in commands:
        files = [word for word in words if word.endswith(".yaml")]
        assert all((ROOT / "examples" / word).is_file() for word in files), words
        assert run([words[1], "--help"]) == 0
        options = [word for word in words if word.startswith("--")]
        shown = capsys.readouterr().out
        assert all(option in shown for option in options), words


def test_an_empty_protection_can_be_kept(tmp_path: Path) -> None:
    from safeweights.core.workspace import Workspace

    Workspace(tmp_path).save("none", {}, {"a": 1})
    assert Workspace(tmp_path).load("none") == ({}, {"a": 1})
    assert torch.get_num_threads() == 1
