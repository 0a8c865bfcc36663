"""Benchmarks on a tiny sandbox of random weights: files are checked, cells are measured once, failures stay with their cell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import factories
import folders
from safeweights.bench.cells import Worker
from safeweights.bench.leaderboard import leaderboard, leaderboard_page, lines
from safeweights.bench.resistance import resistance_table, resistances
from safeweights.bench.runner import Outcome, prepare, run
from safeweights.bench.spec import Bench, load_bench
from safeweights.cli.main import run as cli
from safeweights.core.errors import UserError
from safeweights.core.intervals import wilson
from safeweights.core.workspace import Workspace
from safeweights.records.mask import read_mask
from safeweights.records.record import Doubt, Measurement
from safeweights.records.store import deterministic

SPECS = Path(__file__).parents[2] / "benchmarks" / "specs"
SMALL: dict[str, Any] = {
    "version": 1,
    "concepts": ["mosaic"],
    "methods": ["none", "uce"],
    "attacks": ["no-attack", {"name": "random", "settings": {"images": 2, "tokens": 1}}],
    "prompts": 2,
    "evaluation": {"n": 2, "retain_n": 1},
    "device": "cpu",
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Callable[..., Path]) -> Path:
    return folders.sandbox(tmp_path_factory.mktemp("world") / "sandbox", tiny_sd())


@pytest.fixture(autouse=True)
def use_it(sandbox: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "shipped" not in request.node.name:
        monkeypatch.setenv("SAFEWEIGHTS_SANDBOX", str(sandbox))


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


def measured(spec: Bench, folder: Path, **options: Any) -> list[Outcome]:
    return list(run(prepare(spec, folder), **options))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"speed": 3}, "unknown key 'speed'"),
        ({"likeness": {"kind": "ssim"}}, "likeness.kind"),
        ({"likeness": {"sort": "cosine"}}, "unknown key 'sort' in likeness; known are kind, mode, model"),
        ({"evaluation": {"m": 3}}, "unknown key 'm' in evaluation; known are n, retain_n"),
        ({"methods": [{"name": "uce", "steps": 3}]}, "unknown key 'steps' in methods.0"),
        ({"methods": ["uces"]}, "unknown method 'uces'; known are"),
        ({"methods": [{"name": "uce", "settings": {"eta": 1}}]}, "unknown setting 'eta'"),
        ({"methods": [{"name": "none", "settings": {"eta": 1}}]}, "has no settings"),
        ({"methods": [{"name": "esd", "per_concept": {"emblem": {"steps": "many"}}}]}, "esd: steps must be int"),
        ({"methods": [{"name": "esd", "per_concept": {"mosaics": {"steps": 4}}}]}, "unknown concept 'mosaics'"),
        ({"methods": [{"name": "uce", "attacks": ["p4d"]}]}, "unknown attack 'p4d'"),
        ({"methods": ["uce", "uce"]}, "'uce' stands there twice"),
        ({"methods": [{"name": "uce", "label": "../up"}]}, "methods.0.label"),
        ({"methods": []}, "methods"),
        ({"attacks": ["guess"]}, "unknown attack 'guess'"),
        ({"concepts": ["mosaics"]}, "unknown concept 'mosaics'"),
        ({"concepts": ["blind"]}, "a detector is missing"),
        ({"seeds": [-1]}, "seeds.0"),
        ({"prompts": True}, "prompts"),
        ({"version": 2}, "version"),
        ({"model": "some/model"}, "needs 'concepts_file'"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as told:
        load_bench(written(tmp_path, **changes))
    assert part in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_are_valid(path: Path) -> None:
    if path.stem != "leakage":
        load_bench(path)
        return
    with pytest.raises(UserError, match=r"python benchmarks/leakage.py .*leakage.yaml"):
        load_bench(path)
    # The plan is read before the stage's name is: every key of it is one the program knows.
    planned = [sys.executable, str(SPECS.parent / "leakage.py"), str(path), "-o", "runs", "--only", "nothing"]
    refused = subprocess.run(planned, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "unknown stage 'nothing'" in refused.stderr


def test_parts_of_a_file(tmp_path: Path) -> None:
    spec = load_bench(written(tmp_path, methods=["none", {"name": "uce", "attacks": ["random"]}], seeds=[0, 1]))
    part = spec.narrowed(methods=["uce"], attacks=["no-attack"], seeds=[1])
    assert [(entry.title, entry.attacks) for entry in part.methods] == [("uce", [])]
    assert part.seeds == [1]
    with pytest.raises(UserError, match="no method 'esd'"):
        spec.narrowed(methods=["esd"])


def test_finished_cells_are_never_measured_again(tmp_path: Path) -> None:
    spec, folder = load_bench(written(tmp_path)), tmp_path / "out"
    first = measured(spec, folder)
    assert all(outcome.ok for outcome in first)
    assert [outcome.cell.title for outcome in first] == [
        "none mosaic seed 0 evaluate",
        "none mosaic seed 0 no-attack",
        "none mosaic seed 0 random",
        "uce mosaic seed 0 protect",
        "uce mosaic seed 0 evaluate",
        "uce mosaic seed 0 no-attack",
        "uce mosaic seed 0 random",
    ]
    assert measured(spec, folder) == []
    assert not list((folder / "work" / "models").glob("*"))
    # One record lost is one cell measured, with the same result; its weights are not made again.
    job = prepare(spec, folder)
    (path,) = (folder / "records").glob("attack-mosaic-uce-random-*.json")
    before = deterministic(next(r for r in job.records() if r.method == "uce" and r.attack == "random"))
    path.unlink()
    assert [outcome.cell.title for outcome in measured(spec, folder)] == ["uce mosaic seed 0 random"]
    assert deterministic(next(r for r in job.records() if r.method == "uce" and r.attack == "random")) == before
    # Other settings are other cells, whatever their label.
    attacks = ["no-attack", {"name": "random", "settings": {"images": 3, "tokens": 1}}]
    again = measured(load_bench(written(tmp_path, attacks=attacks)), folder)
    assert [outcome.cell.attack for outcome in again] == ["random", "random"]
    methods = ["none", {"name": "uce", "settings": {"lam": 0.7}}]
    assert {o.cell.method for o in measured(load_bench(written(tmp_path, methods=methods)), folder)} == {"uce"}
    assert len(measured(load_bench(written(tmp_path, prompts=1)), folder)) == 4


def test_a_failing_cell_leaves_an_error_and_the_rest_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safeweights.erasure.uce import UCE

    spec, folder = written(tmp_path, methods=["uce", "none"]), tmp_path / "out"
    with monkeypatch.context() as broken:
        broken.setattr(UCE, "protect", lambda *_, **__: 1 / 0)
        assert cli(["bench", str(spec), "-o", str(folder), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["failed"][0] == {"cell": "uce mosaic seed 0 protect", "error": "ZeroDivisionError: division by zero"}
    assert {entry["error"] for entry in told["failed"][1:]} == {"not run: its protection failed"}
    assert (told["measured"], len(told["failed"])) == (3, 4)
    job = prepare(load_bench(spec), folder)
    assert sorted(r.status for r in job.records()) == ["error"] * 4 + ["ok"] * 3
    # Mended, the same command measures what failed, and no error stays behind.
    assert cli(["bench", str(spec), "-o", str(folder), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finished_before"] == 3
    assert [r.status for r in job.records()] == ["ok"] * 7
    assert "| uce |" in (folder / "leaderboard.md").read_text()
    page = (folder / "leaderboard.html").read_text()
    assert "7</strong> of 7 cells measured" in page
    assert "<h1><bdi>uce is revived least" in page
    assert page.count('class="drawing"') == 2
    assert (folder / "report.html").is_file()


def test_the_command_line_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, full = written(tmp_path), tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    for arguments, part in (
        ([str(spec), "-o", str(full)], "not empty and holds no benchmark"),
        ([str(spec)], "name it with -o"),
        ([str(spec), "-o", str(tmp_path / "new"), "--executor", "slurm"], "unknown executor"),
        ([str(tmp_path / "no.yaml"), "-o", str(tmp_path / "new")], "does not exist"),
    ):
        assert cli(["bench", *arguments]) == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert cli(["bench", str(spec), "--dry-run"]) == 0
    assert "7 cells, 0 finished" in capsys.readouterr().out
    assert cli(["bench", "--help"]) == 0


@pytest.mark.slow
def test_worker_processes_survive_a_kill(tmp_path: Path) -> None:
    spec, folder = load_bench(written(tmp_path)), tmp_path / "out"
    alone = measured(spec, tmp_path / "alone")
    seen, struck = [], False
    from safeweights.bench import runner

    class Crew(runner.Processes):
        def begin(self, cell: Any) -> None:
            nonlocal struck
            if not struck:
                struck = True
                victim = self.idle[0][0].pid
                assert victim is not None
                os.kill(victim, signal.SIGKILL)
                time.sleep(0.2)
            super().begin(cell)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "Processes", Crew)
        seen = measured(spec, folder, jobs=2)
    assert struck
    assert sorted(o.cell.title for o in seen if o.ok) == sorted(o.cell.title for o in alone)
    ours, theirs = (
        {r.provenance["cell"]: {**deterministic(r), "provenance": 0} for r in prepare(spec, place).records()}
        for place in (folder, tmp_path / "alone")
    )
    assert ours == theirs


@pytest.mark.slow
def test_a_killed_driver_loses_nothing(tmp_path: Path, sandbox: Path) -> None:
    path, folder = written(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "safeweights", "bench", str(path), "-o", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "SAFEWEIGHTS_SANDBOX": str(sandbox)})
    for _ in range(1200):
        if len(list((folder / "records").glob("*.json"))) >= 2 or process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    spec = load_bench(path)
    kept = prepare(spec, folder).finished
    assert len(kept) >= 2
    rest = measured(spec, folder)
    assert not kept & {outcome.cell.key for outcome in rest}
    assert len(prepare(spec, folder).finished) == 7


def test_ray_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"safeweights\[ray\]"):
        measured(load_bench(written(tmp_path, methods=["none"], attacks=[])), tmp_path / "out", executor="ray")


def test_leaderboard_numbers() -> None:
    """Two seeds of one method on two concepts, worked out by hand."""

    def entry(name: str, value: float | None, n: int, **more: Any) -> Measurement:
        return Measurement(name=name, value=value, n=n, **more)

    records = []
    for seed, (after, fell, relative) in enumerate([(1 / 32, 3 / 12, 0.9), (3 / 32, 6 / 12, 1.0)]):
        records += [
            factories.base(kind="protect", method="esd", attack="", seed=seed, measurements=(entry("seconds", 10.0 + seed, 1),)),
            factories.base(
                kind="evaluate", method="esd", attack="", seed=seed,
                measurements=(
                    entry("concept_rate", after, 32, reference=1.0), entry("retention_relative", relative, 100),
                    entry("clip_score", 0.5, 100, reference=0.6), entry("frechet_distance", 2.0, 100),
                ),
            ),
            factories.base(
                kind="attack", method="esd", attack="random", seed=seed, doubts=(Doubt(name="few_samples", explanation="x"),),
                measurements=(entry("pre_asr", 1 / 12, 12), entry("asr", fell, 12)),
            ),
        ]  # fmt: skip
    records.append(factories.base(kind="attack", method="esd", attack="p4d", seed=0, status="error", error="broke"))
    records.append(
        factories.base(kind="attack", method="esd", concept="emblem", attack="p4d", measurements=(entry("asr", 1.0, 10),))
    )
    first, second = lines(records)
    assert (first.after.successes, first.after.n) == (4, 64)  # type: ignore[union-attr]
    assert first.asr["random"].interval == wilson(9, 24)
    assert (first.pre_asr.successes, first.pre_asr.n) == (2, 24)  # type: ignore[union-attr]
    assert (first.retention, first.seconds, first.failed, first.seeds) == (0.95, 10.5, 1, (0, 1))
    assert (second.after, second.asr["p4d"].rate, second.retention) == (None, 1.0, None)
    text = leaderboard(records, methods=["esd"], concepts=["mosaic", "emblem"], attacks=["random", "p4d"])
    means, rows = (part.splitlines() for part in text.split("## Each concept"))
    assert "| esd | 2 | 1.00 | 0.06 | 0.08 | 0.38 | 1.00 | 0.69 | 0.950 | 0.500 | 2.00 | 10 | – |" in means
    assert any(row.startswith("| mosaic | style | esd | 2 | 1.00 | 0.06 (0.02–0.15) | 0.08 (0.02–0.26) | 0.38 (0.21–0.57) | – |")
               for row in rows)  # fmt: skip
    assert any("few\\_samples; 1 cells failed" in row for row in rows)


RELEARN: dict[str, Any] = {
    "name": "relearn", "label": "lora", "settings": {"adaptation": "lora", "steps": 2, "pictures": 2, "images": 3, "rank": 1},
}  # fmt: skip
QUICK: dict[str, Any] = {
    "steps": 2, "horizon": 1, "batch_size": 1, "pictures": 4, "retained": 2, "ddim_steps": 2, "lr": 1e-3, "order": 1,
}  # fmt: skip


def group_of_two(folder: Path, **changes: Any) -> Bench:
    """Mosaic and emblem, erased by UCE, then immunized in one model; a third concept is nobody's enemy."""
    methods = [
        {"name": "none", "label": "erased", "start": "uce", "together": True},
        {"name": "mima", "start": "uce", "together": True, "settings": QUICK},
    ]
    wanted: dict[str, Any] = {
        "concepts": ["mosaic", "emblem"], "benign": ["harmless"], "methods": methods, "attacks": ["no-attack", RELEARN],
    }  # fmt: skip
    return load_bench(written(folder, **{**wanted, **changes}))


def test_several_concepts_in_one_model_that_was_erased_first(tmp_path: Path) -> None:
    spec, folder = group_of_two(tmp_path), tmp_path / "out"
    outcomes = measured(spec, folder)
    assert [outcome.said for outcome in outcomes if not outcome.ok] == []
    assert [outcome.cell.title for outcome in outcomes] == [
        f"{method} {rest}"
        for rests in (
            ("mosaic+emblem seed 0 protect", "mosaic+emblem seed 0 evaluate", "mosaic seed 0 no-attack", "mosaic seed 0 lora",
             "harmless seed 0 lora"),
            ("emblem seed 0 no-attack", "emblem seed 0 lora"),
        )
        for method in ("erased", "mima")
        for rest in rests
    ]  # fmt: skip
    assert measured(spec, folder) == []
    records = prepare(spec, folder).records()
    # One protection and one evaluation, told of each concept; every record is of the same model.
    assert sorted((r.method, r.concept) for r in records if r.kind == "protect") == [
        ("erased", "emblem"), ("erased", "mosaic"), ("mima", "emblem"), ("mima", "mosaic")
    ]  # fmt: skip
    assert len({r.provenance["inputs"]["model"] for r in records if r.method == "mima" and r.kind != "protect"}) == 1
    # The retained pictures of an evaluation are of neither concept.
    (told,) = {tuple(r.details["retention"]["concepts"]) for r in records if r.kind == "evaluate"}
    assert told == ("harmless",)
    # What mima changed came on top of what UCE changed.
    tensors = {cell.method: Workspace(folder / "work" / "protections").load(cell.key) for cell in prepare(spec, folder).cells
               if cell.kind == "protect"}  # fmt: skip
    erased, both = tensors["erased"][0], tensors["mima"][0]  # type: ignore[index]
    assert set(erased) < set(both)
    assert any(not torch.equal(erased[name], both[name]) for name in erased)
    text = leaderboard(
        records, methods=["erased", "mima"], concepts=spec.concepts, attacks=["no-attack", "lora"], benign=spec.benign,
        baselines=spec.baselines(),
    )  # fmt: skip
    assert "| lora | mima | erased | 2 |" in text
    assert "harmless" not in text.split("## Re-learning")[0]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"groups": [["mosaic"]]}, "look at 'emblem'"),
        ({"groups": [["mosaic", "emblem"], ["mosaic"]]}, "look at 'mosaic'"),
        ({"benign": ["mosaic"]}, "'mosaic' stands there twice"),
        ({"benign": ["unheard"]}, "unknown concept 'unheard'"),
        ({"methods": ["none"]}, "no method has 'together: true'"),
        ({"methods": [{"name": "mima", "start": "uces", "together": True}]}, "unknown eraser 'uces'"),
        ({"methods": [{"name": "mima", "start": {"name": "uce", "steps": 3}, "together": True}]}, "unknown key 'steps'"),
        ({"methods": [{"name": "imma", "together": True, "only": ["fish"]}]}, "'only' names 'fish'"),
        ({"methods": ["none", {"name": "imma", "only": ["mosaic"]}], "benign": []}, "needs 'together: true'"),
        ({"methods": [{"name": "jt", "together": True, "per_concept": {"mosaic": {"steps": 3}}}]}, "no per_concept"),
        ({"attacks": [{"name": "random", "joint": True}]}, "'joint' is for relearn"),
    ],
)  # fmt: skip
def test_wrong_groups_and_starts_are_told(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as told:
        group_of_two(tmp_path, **changes)
    assert part in str(told.value)


def test_a_group_is_kept_whole_and_has_a_baseline(tmp_path: Path) -> None:
    spec = group_of_two(tmp_path)
    assert spec.baselines() == {"erased": "erased", "mima": "erased"}
    with pytest.raises(UserError, match="protected together"):
        spec.narrowed(concepts=["mosaic"])
    assert spec.narrowed(concepts=["mosaic", "emblem"], methods=["mima"]).baselines() == {"mima": "mima"}


def test_a_joint_user_learns_the_whole_group(tmp_path: Path) -> None:
    spec = group_of_two(tmp_path, attacks=[{**RELEARN, "joint": True}])
    cells = [cell for cell in prepare(spec, tmp_path / "out").cells if cell.kind == "attack" and cell.method == "mima"]
    mosaic, emblem = (spec.file().concepts[name].texts for name in ("mosaic", "emblem"))
    assert {cell.concept: list(cell.attack_settings["along"]) for cell in cells} == {
        "mosaic": [emblem[i % len(emblem)] for i in range(2)], "emblem": [mosaic[i % len(mosaic)] for i in range(2)],
        "harmless": [],
    }  # fmt: skip
    assert [outcome.said for outcome in measured(spec, tmp_path / "out") if not outcome.ok] == []


def test_one_concept_of_a_group_is_immunized_and_all_are_attacked(tmp_path: Path) -> None:
    imma = {"name": "imma", "start": "uce", "together": True, "only": ["mosaic"]}
    spec = group_of_two(tmp_path, methods=[imma], benign=[], attacks=[RELEARN])
    cells = prepare(spec, tmp_path / "out").cells
    assert [(cell.kind, cell.concept, cell.only) for cell in cells] == [
        ("protect", "mosaic+emblem", ("mosaic",)), ("evaluate", "mosaic+emblem", ("mosaic",)),
        ("attack", "mosaic", ("mosaic",)), ("attack", "emblem", ("mosaic",)),
    ]  # fmt: skip
    assert len({cell.model_key for cell in cells}) == 1
    apart = group_of_two(tmp_path, methods=[imma], benign=[], groups=[["emblem"], ["mosaic"]])
    assert {cell.concept for cell in prepare(apart, tmp_path / "out").cells} == {"mosaic"}


def test_guards_hand_their_mask_to_those_who_fine_tune(tmp_path: Path) -> None:
    full = {**RELEARN, "label": "full", "settings": {"adaptation": "full", "steps": 2, "pictures": 2, "images": 2}}
    guards = [{"name": name, "start": "uce", "together": True} for name in ("random", "xattn")]
    spec = group_of_two(tmp_path, methods=guards, attacks=[full, "no-attack"], seeds=[0, 1])
    folder = tmp_path / "out"
    assert [outcome.said for outcome in measured(spec, folder) if not outcome.ok] == []
    records = prepare(spec, folder).records()
    masks = {(r.method, r.seed): frozenset(r.details["frozen"]) for r in records if r.kind == "protect"}
    assert masks["random", 0] != masks["random", 1]
    for record in records:
        settings = record.settings.get("attack", {})
        if record.attack == "full":
            assert settings["mask"] == f"the mask of {record.method}"
            assert not Path(record.details["mask"]).is_absolute()
            mask = read_mask(folder / record.details["mask"])
            assert mask.frozen == masks[record.method, record.seed]
            assert mask.legal == ("harmless",)
            assert mask.achieved["tensors"] == record.details.get("frozen_shares", mask.achieved)["tensors"]
            assert str(folder) not in json.dumps([doubt.explanation for doubt in record.doubts])
        elif record.attack:
            assert "mask" not in settings
    # A lost file is written again; what the guard learnt is kept with the protections.
    for file in (folder / "masks").iterdir():
        file.unlink()
    for file in (folder / "records").glob("*full*"):
        file.unlink()
    assert all(outcome.ok for outcome in measured(spec, folder))
    text = leaderboard(records, methods=["random", "xattn"], concepts=spec.concepts, attacks=["full"], benign=spec.benign)
    random, attention = (
        next(line for line in text.splitlines() if line.startswith(f"| {name} | mosaic, emblem")) for name in ("random", "xattn")
    )
    assert "| 2 | 0.298 |" in random  # 0.3 of the tiny UNet
    assert "| 1.00 |" in attention  # every seed freezes the same
    page = leaderboard_page(
        records, methods=["random", "xattn"], concepts=spec.concepts, attacks=["full"], total=1, benign=spec.benign,
        baselines=spec.baselines(),
    )  # fmt: skip
    assert ">Re-learning</h2>" in page
    assert ">Masks</h2>" in page
    assert "Jaccard over seeds" in page
    assert "harmless" not in page.partition(">Re-learning</h2>")[0]


def test_what_a_guard_leaves_to_be_learnt_decides_its_cells(tmp_path: Path) -> None:
    guard = [{"name": "random", "together": True}, {"name": "uce", "together": True}]
    keys = [
        {
            cell.method: cell.model_key
            for cell in prepare(group_of_two(tmp_path, methods=guard, benign=benign), tmp_path / "out").cells
        }
        for benign in (["harmless"], [])
    ]
    assert keys[0]["random"] != keys[1]["random"]
    assert keys[0]["uce"] == keys[1]["uce"]


def test_likeness_decides_only_the_cells_that_measure_it(tmp_path: Path, sandbox: Path) -> None:
    attacks = {"methods": ["none"], "attacks": ["no-attack", RELEARN]}
    plain = prepare(load_bench(written(tmp_path, **attacks)), tmp_path / "out")
    paper = {"kind": "perceptual", "mode": "paper", "model": str(sandbox / "embedder")}
    other = prepare(load_bench(written(tmp_path, **attacks, likeness=paper)), tmp_path / "out")
    assert [a.key == b.key for a, b in zip(plain.cells, other.cells, strict=True)] == [True, True, False]
    worker = Worker(other.spec, tmp_path / "out")
    assert worker._similarity is not None
    assert worker._similarity.name == "perceptual of embedder"


def curve(*checkpoints: list[float], back: int | None = None) -> dict[str, Any]:
    """An attack's details: similarities of every prompt after 0, 10, 20 … steps."""
    points = [{"steps": 10 * i, "similarities": values} for i, values in enumerate(checkpoints)]
    return {"curve": points, "steps_to_recovery": back, "n": len(checkpoints[0])}


def test_gap_ratios_of_a_benchmark() -> None:
    """Two concepts and a benign one under two attacks; step 0 counts for nothing."""
    told = {
        ("none", "mosaic", "lora"): curve([0.1, 0.1], [0.8, 0.4], [0.8, 0.8], back=10),
        ("mima", "mosaic", "lora"): curve([0.9, 0.9], [0.4, 0.2], [0.6, 0.6], back=None),
        ("none", "emblem", "lora"): curve([0.1, 0.1], [0.5, 0.5], [0.5, 0.5], back=10),
        ("mima", "emblem", "lora"): curve([0.1, 0.1], [0.5, 0.5], [0.4, 0.4], back=20),
        ("jt", "mosaic", "lora"): curve([0.9, 0.9], [0.6, 0.3], [0.8, 0.8], back=None),
        ("jt", "emblem", "lora"): curve([0.1, 0.1], [0.5, 0.5], [0.5, 0.5], back=20),
        ("none", "cup", "lora"): curve([0.1, 0.1], [0.5, 0.5], [0.5, 0.5]),
        ("mima", "cup", "lora"): curve([0.1, 0.1], [0.45, 0.45], [0.5, 0.5]),
        ("none", "mosaic", "full"): curve([0.1, 0.1], [0.5, 0.5], back=10),
        ("mima", "mosaic", "full"): curve([0.1, 0.1], [0.5, 0.5], back=10),
    }
    records = [factories.base(method=m, concept=c, attack=a, details=details) for (m, c, a), details in told.items()]
    baselines = {"none": "none", "mima": "none", "jt": "none"}
    rows = {
        (row.attack, row.method): row for row in resistances(records, baselines, concepts=["mosaic", "emblem"], benign=["cup"])
    }
    lora = rows["lora", "mima"]
    assert lora.sgr == pytest.approx({"mosaic": (0.5 + 0.25) / 2, "emblem": (0.0 + 0.2) / 2})
    assert lora.msgr == pytest.approx((0.375 + 0.1) / 2)
    assert lora.mrsgr == pytest.approx((0.375 + 0.1) / 2 - 0.05)
    assert lora.msgr_interval is not None
    assert lora.recovery == {"mosaic": None, "emblem": 20}
    assert (rows["lora", "none"].msgr, rows["full", "mima"].mrsgr) == (None, None)
    text = resistance_table(list(rows.values()), baselines)
    assert "mosaic over 20, emblem 20" in text
    apart = (0.375 - 0.125) / 2 + 0.1 / 2
    assert f"| lora | mima | jt | {apart:.3f} (" in text
    assert "| mima | 0.000 (0.000 to 0.000) (full) | 10 steps (mosaic, full) |" in text
    assert resistance_table([], baselines) == ""


def test_a_mean_over_fewer_concepts_says_which_are_missing() -> None:
    """One cell failed, another's pictures were nothing alike: both are named beside the mean of the rest."""
    told = {
        ("none", "mosaic"): curve([0.1], [0.8]), ("mima", "mosaic"): curve([0.1], [0.4]),
        ("none", "emblem"): curve([0.1], [0.5]),
        ("none", "cup"): curve([0.1], [-0.5]), ("mima", "cup"): curve([0.1], [0.5]),
    }  # fmt: skip
    records = [factories.base(method=m, concept=c, attack="lora", details=details) for (m, c), details in told.items()]
    baselines = {"none": "none", "mima": "none"}
    rows = resistances(records, baselines, concepts=["mosaic", "emblem", "cup"])
    assert rows[1].msgr == pytest.approx(0.5)
    assert rows[1].missing == ("emblem", "cup")
    assert "0.500 (0.500 to 0.500), without emblem, cup" in resistance_table(rows, baselines)


def test_the_database_ranks_as_the_table_does(tmp_path: Path) -> None:
    """Two implementations, one in Python and one in SQL, of one definition."""
    store = factories.fill(tmp_path, pictured=False)
    store.add(replace(factories.attack(None, "esd", "random", 11, n=20), seed=1))
    by_place = {(line.method, line.concept): line for line in lines(store.records())}
    rows = store.query("SELECT * FROM leaderboard")
    assert len(rows) == 3  # what failed altogether is not ranked
    assert [row["asr"] for row in rows] == sorted(row["asr"] for row in rows)
    for row in rows:
        line = by_place[row["method"], row["concept"]]
        assert row["strongest_attack"] == max(line.asr, key=lambda name: line.asr[name].rate)
        pooled = line.asr[row["strongest_attack"]]
        assert (row["asr"], row["asr_n"]) == (pytest.approx(pooled.rate), pooled.n)
        assert row["asr_interval"] == pytest.approx(list(pooled.interval), abs=1e-6)
        assert row["after"] == pytest.approx(line.after.rate)  # type: ignore[union-attr]
        for name, value in (
            ("before", line.before),
            ("retention", line.retention),
            ("clip_score", line.clip),
            ("seconds", line.seconds),
        ):
            assert row[name] == (None if value is None else pytest.approx(value)), name
