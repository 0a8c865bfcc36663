"""The command line on a tiny sandbox of random weights: exit codes, one-line errors, one JSON object, files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import folders
from safeweights.cli.main import run
from safeweights.records.store import Store

COMMANDS = (
    "demo",
    "sandbox",
    "doctor",
    "generate",
    "erase",
    "immunize",
    "freeze",
    "adapt",
    "attack",
    "evaluate",
    "report",
    "export",
    "bench",
    "audit",
    "run",
    "compare",
    "leakage",
    "neurons",
    "prune",
    "sign",
    "verify",
)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Callable[..., Path]) -> Path:
    return folders.sandbox(tmp_path_factory.mktemp("world") / "sandbox", tiny_sd())


@pytest.fixture(autouse=True)
def use_it(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEWEIGHTS_SANDBOX", str(sandbox))


@pytest.fixture(scope="module")
def erased(sandbox: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a concept erased in closed form."""
    folder = tmp_path_factory.mktemp("erased") / "uce"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEWEIGHTS_SANDBOX", str(sandbox))
        assert run(["erase", "sandbox", "--concept", "mosaic", "--method", "uce", "-o", str(folder)]) == 0
    return folder


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that must end with 2."""
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith("error: ")
    return output.err


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The JSON object of a command that must end with 0; nothing else may be on stdout."""
    capsys.readouterr()
    code = run([str(argument) for argument in (*arguments, "--json")])
    output = capsys.readouterr()
    assert code == 0, output.err
    data = json.loads(output.out)
    assert isinstance(data, dict)
    return data


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from safeweights.cli.main import run; code = run(['--help']);"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules); print(heavy, file=sys.stderr);"
        "sys.exit(code or bool(heavy))"
    )
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
    assert min(times) < 1.0, "0.3 s on an idle machine"
    for command in COMMANDS:
        assert command in done.stdout


def test_every_command_has_help_and_no_stub_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (*COMMANDS, "sandbox train", "sandbox evaluate", "sandbox export"):
        assert run([*command.split(), "--help"]) == 0
    assert "No such command" in told(capsys, "unheard-of")


def test_an_error_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"version": 1, "steps": [{"erase": {"method": "\x1b[2J" + "x" * 10**6, "concepts": ["mosaic"]}}]}))
    assert run(["run", str(path), "-o", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "unknown method to erase" in told
    assert "\x1b" not in told
    assert len(told) < 3000


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("safeweights ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "Missing command"),
        ("erase", "'model'; see 'safeweights erase --help'"),
        ("erase sandbox -o OUT --method esd", "--concept"),
        ("erase sandbox -o OUT --concept mosaic", "--method"),
        ("erase sandbox -o OUT --concept mosaic --method esdd", "uce"),
        ("erase sandbox -o OUT --concept cubism --method esd", "mosaic"),
        ("erase sandbox -o OUT --concept mosaic --method esd --set stepz=3", "stepz"),
        ("erase sandbox -o OUT --concept mosaic --method esd --set steps=x", "steps"),
        ("erase sandbox -o OUT --concept mosaic --method esd --set steps", "key=value"),
        ("erase sandbox -o OUT --concept mosaic --method esd --seed -1", "--seed"),
        ("erase sandbox -o OUT --concept mosaic --method esd --device abacus", "abacus"),
        ("erase sandbox -o OUT --concept mosaic --method esd --dtype int3", "int3"),
        ("immunize sandbox -o OUT --concept mosaic", "--method"),
        ("immunize sandbox -o OUT --concept mosaic --method esd", "mima"),
        ("immunize sandbox -o OUT --concept mosaic --method imma --set order=3", "order"),
        ("immunize sandbox -o OUT --concept mosaic --method imma --set adaptations=qlora", "adaptations"),
        ("immunize sandbox -o OUT --concept mosaic --concept emblem --method imma --set ddim_steps=1", "mima"),
        ("erase ./none -o OUT --concept mosaic --method esd", "does not exist"),
        ("erase someone/model -o OUT --concept mosaic --method esd", "--concepts-file"),
        ("erase sandbox -o OUT --concept mosaic --method esd --concepts-file none.yaml", "none.yaml"),
        ("attack sandbox --concept mosaic --method random -o OUT", "--reference"),
        ("attack sandbox --reference sandbox --concept mosaic --method hammer -o OUT", "unlearndiffatk"),
        ("attack sandbox --reference sandbox --concept blind --method random -o OUT", "a detector is missing"),
        ("attack sandbox --reference sandbox --concept mosaic --concept emblem --method random -o OUT", "one --concept"),
        ("attack sandbox --reference sandbox --concept mosaic --method random --n 0 -o OUT", "--n"),
        ("attack sandbox --reference sandbox --concept mosaic --method random --set images=0 -o OUT", "at least 1"),
        ("evaluate sandbox --reference sandbox --concept blind -o OUT", "a detector is missing"),
        ("evaluate sandbox --reference sandbox --clip-model ./none -o OUT", "none"),
        ("generate sandbox -o OUT", "--prompt"),
        ("generate sandbox --prompt= -o OUT", "empty"),
        ("generate sandbox --prompts-csv none.csv -o OUT", "none.csv"),
        ("generate sandbox --prompt x --steps 0 -o OUT", "--steps"),
        ("generate sandbox --prompt x --steps 2000 -o OUT", "1000"),
        ("generate sandbox --prompt x --width 17 -o OUT", "multiples"),
        ("generate sandbox --prompt x --scheduler magic -o OUT", "ddim"),
        ("generate sandbox --prompt x --guidance-scale nan -o OUT", "finite"),
        ("report OUT", "no folder"),
        ("run", "RECIPE"),
        ("run none.yaml -o OUT", "none.yaml does not exist"),
        ("audit sandbox -o OUT", "--reference"),
        ("audit sandbox --reference sandbox --suite fast -o OUT", "quick, standard, full"),
        ("audit sandbox --reference sandbox --policy none.yaml -o OUT", "none.yaml does not exist"),
        ("compare OUT OUT", "no folder"),
        ("sandbox evaluate OUT", "no sandbox folder"),
        ("sandbox paint", "paint"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(
    arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = told(capsys, *(str(tmp_path / "out") if word == "OUT" else word for word in arguments.split()))
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_a_full_output_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").touch()
    for command in (
        ["generate", "sandbox", "--prompt", "a boat"], ["erase", "sandbox", "--concept", "mosaic", "--method", "uce"],
        ["attack", "sandbox", "--reference", "sandbox", "--concept", "mosaic", "--method", "random"],
        ["evaluate", "sandbox", "--reference", "sandbox"], ["demo"], ["sandbox", "export"],
    ):  # fmt: skip
        assert "--overwrite" in told(capsys, *command, "-o", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_python_detectors_are_not_run_unasked(sandbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sandbox / "python.yaml"
    path.write_text("version: 1\nconcepts: {a: {kind: style, prompts: [a boat], detector: {type: python, model: 'os:getcwd'}}}\n")
    for verb in (["attack", "--method", "random"], ["evaluate"]):
        where = ["--reference", "sandbox", "--concept", "a", "--concepts-file", path, "-o", tmp_path / "out"]
        assert "--allow-python-detectors" in told(capsys, verb[0], "sandbox", *verb[1:], *where)


def test_generate_writes_pictures_and_their_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    table = tmp_path / "prompts.csv"
    table.write_text("case_number,adv_prompt,sd_seed,sd_guidance_scale\n4,a dog,77,2.5\n5,a cat,,\n")
    found = printed(
        capsys, "generate", "sandbox", "--prompt", "a boat", "--prompts-csv", table, "--n", 2, "--seed", 9, "-o", tmp_path / "out"
    )
    assert found["n"] == 6
    assert found["sampling"]["steps"] == 2, "the sandbox's own concept file says how to sample"
    with (tmp_path / "out" / "prompts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["case_number", "prompt", "evaluation_seed", "evaluation_guidance", "file_name"]
    assert [(row["prompt"], row["evaluation_seed"], row["evaluation_guidance"]) for row in rows] == [
        ("a boat", "9", "4.0"), ("a boat", "10", "4.0"), ("a dog", "77", "2.5"), ("a dog", "78", "2.5"), ("a cat", "13", "4.0"),
        ("a cat", "14", "4.0"),
    ]  # fmt: skip
    for row in rows:
        assert Image.open(tmp_path / "out" / row["file_name"]).size == (16, 16)
    # Its own table draws the same pictures again.
    printed(capsys, "generate", "sandbox", "--prompts-csv", tmp_path / "out" / "prompts.csv", "-o", tmp_path / "again")
    for row in rows:
        first, second = (tmp_path / name / row["file_name"] for name in ("out", "again"))
        assert first.read_bytes() == second.read_bytes()


def test_erase_leaves_a_plain_folder_with_its_recipe(erased: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(erased, local_files_only=True)
    manifest = json.loads((erased / "manifest.json").read_text())
    assert manifest["method"] == "uce"
    assert manifest["concepts"] == ["mosaic"]
    assert manifest["options"]["settings"]
    assert set(manifest["inputs"]) == {"model", "concepts_file"}
    names = {f"unet.{name}" for name, _ in pipeline.unet.named_parameters()}
    assert manifest["changed"]
    assert set(manifest["changed"]) <= names
    assert [path.name for path in erased.parent.iterdir()] == ["uce"]


def test_erase_is_repeatable_and_resumable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["erase", "sandbox", "--concept", "mosaic", "--method", "esd", "--set", "steps=2", "--set", "trajectories=2"]
    first = printed(capsys, *base, "-o", tmp_path / "a")
    second = printed(capsys, *base, "-o", tmp_path / "b", "--resume")
    other = printed(capsys, *base, "-o", tmp_path / "c", "--seed", 1)
    assert first["changed"] == second["changed"]
    assert first["changed"] != other["changed"]


def test_immunize_draws_from_before_protection_and_is_repeatable(
    erased: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [f"--set={key}=2" for key in ("steps", "horizon", "pictures", "retained", "batch_size", "ddim_steps")]
    base = ["immunize", str(erased), "--concept", "mosaic", "--method", "imma", *short]
    a, b = (printed(capsys, *base, "-o", tmp_path / name) for name in ("a", "b"))
    assert a["options"]["reference"] == "sandbox"  # the erased model cannot draw what it must resist
    assert a["inputs"]["reference"] != a["inputs"]["model"]
    assert a["changed"] == b["changed"]
    assert {name.partition(".")[0] for name in a["changed"]} == {"unet"}
    assert a["options"]["settings"]["steps"] == 2
    assert (tmp_path / "a" / "model_index.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_attack_evaluate_report(erased: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [erased, "--reference", "sandbox"]
    found = printed(
        capsys, "attack", *both, "--concept", "mosaic", "--method", "random", "--set", "images=2", "--n", 3, "--steps", 3,
        "-o", tmp_path / "all" / "attack",
    )  # fmt: skip
    assert set(found) >= {
        "concept", "attack", "mode", "n", "pre_asr", "asr", "budget", "detector", "prompts_sha256", "seed", "seconds",
    }  # fmt: skip
    assert set(found["asr"]) == {"successes", "rate", "ci95"}
    assert set(found["budget"]) == {"tokens", "steps", "timesteps", "images_per_prompt"}
    assert set(found["detector"]) >= {"type", "model", "label", "threshold", "sha256"}
    folder = tmp_path / "all" / "attack"
    assert json.loads((folder / "attack.json").read_text()) == found
    with (folder / "prompts.csv").open() as file:
        assert len(list(csv.DictReader(file))) == found["asr"]["successes"]
    records = Store(folder).records()
    assert sorted(record.kind for record in records) == ["attack", "protect"]
    assert {record.method for record in records} == {"uce"}
    assert [record.sampling["steps"] for record in records if record.kind == "attack"] == [3]

    found = printed(capsys, "evaluate", *both, "--n", 2, "-o", tmp_path / "all" / "evaluate")
    assert set(found) >= {"concepts", "retention", "clip_score", "frechet_distance", "seconds"}
    assert list(found["concepts"]) == ["mosaic"], "the manifest says what was erased"
    assert set(found["concepts"]["mosaic"]) >= {"kind", "n", "reference_rate", "rate", "ci95"}
    assert found["clip_score"]["scale"] == "cosine"
    assert -1 <= found["clip_score"]["model"] <= 1
    assert found["frechet_distance"]["value"] is None
    assert found["frechet_distance"]["why"]

    report = printed(capsys, "report", tmp_path / "all")["report"]
    assert "mosaic" in Path(report).read_text()
    assert "no records" in told(capsys, "report", erased)


def test_another_file_measures_no_quality_unless_named(
    erased: Path, sandbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    text = (sandbox / "concepts.yaml").read_text()
    other.write_text(text.replace("detectors/", f"{sandbox}/detectors/"))
    command = ["evaluate", erased, "--reference", "sandbox", "--n", 2, "--concepts-file", other]
    bare = printed(capsys, *command, "-o", tmp_path / "a")
    assert bare["clip_score"]["model"] is None
    assert "--clip-model" in bare["clip_score"]["why"]
    named = printed(capsys, *command, "--clip-model", sandbox / "clip", "-o", tmp_path / "b")
    assert named["clip_score"]["model"] is not None


def test_the_sandbox_can_be_copied(sandbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "sandbox", "export", "-o", tmp_path / "copy")
    assert (Path(found["model"]) / "model_index.json").is_file()
    copied = printed(
        capsys,
        "generate",
        found["model"],
        "--prompt",
        "a boat",
        "--concepts-file",
        found["concepts_file"],
        "-o",
        tmp_path / "drawn",
    )
    assert copied["n"] == 1


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = printed(capsys, "doctor")
    assert found["sandbox"]["model"] is True
    assert found["sandbox"]["detectors"] == ["content", "style"]
    assert {"versions", "devices", "extras", "caches", "problems"} <= set(found)
    assert all(state == "cached" or "hf download" in state for state in found["tokenizers"].values())
    assert set(found["tokenizers"]) == {"SD 1.x", "SD 2.x"}
    monkeypatch.setenv("SAFEWEIGHTS_SANDBOX", str(tmp_path))
    assert run(["doctor"]) == 1
    assert "sandbox train" in capsys.readouterr().out
    for command in (["demo", "-o", tmp_path / "x"], ["sandbox", "export", "-o", tmp_path / "x"]):
        assert "the sandbox model is not at" in told(capsys, *command)


def test_interrupts_and_crashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safeweights.diffusion import sampling

    calls = []

    def interrupt(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    command = ["generate", "sandbox", "--prompt", "a boat", "-o", str(tmp_path / "out")]
    monkeypatch.setattr(sampling, "generate", interrupt)
    assert run(command) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sampling, "generate", lambda *_, **__: 1 / 0)
    line = told(capsys, *command, "--resume")
    assert "ZeroDivisionError" in line
    assert "SAFEWEIGHTS_DEBUG" in line
    monkeypatch.undo()
