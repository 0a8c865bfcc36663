"""The job of the README on the shipped sandbox, small: the commands, their files, their JSON; killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from safeweights.records.record import Record
from safeweights.records.store import TIMES, deterministic
from safeweights.sandbox.files import weights_folder

pytestmark = pytest.mark.skipif(
    not (weights_folder() / "model" / "model_index.json").is_file(), reason="the sandbox's weights are not in this checkout"
)
SHORT = ["--set", "steps=12", "--set", "trajectories=4", "--set", "ddim_steps=5"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "safeweights", *arguments]


def run(*arguments: str, code: int = 0, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    if code == 2:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        assert "Traceback" not in done.stderr
    return done


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {
        f"{path.parent.name}/{key}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for key, value in load_file(path).items()
    }


def equal(one: Path, other: Path) -> bool:
    import torch

    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def erased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e") / "erased"
    run("erase", "sandbox", "--concept", "mosaic", "--method", "esd", *SHORT, "-o", str(folder))
    return folder


def test_erased_model_is_a_plain_diffusers_folder(erased: Path) -> None:
    code = (
        "import sys, torch; from diffusers import StableDiffusionPipeline as P; "
        f"p = P.from_pretrained({str(erased)!r}); p.set_progress_bar_config(disable=True); "
        "i = p('a mosaic picture of a house', num_inference_steps=2, height=64, width=64).images[0]; "
        "assert i.size == (64, 64); assert 'safeweights' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    manifest = json.loads((erased / "manifest.json").read_text())
    assert manifest["method"] == "esd"
    assert manifest["options"]["settings"]["steps"] == 12
    assert all(".attn2." in name for name in manifest["changed"])


def timeless(path: Path) -> Any:
    """What a file says, without the times and the memory its run took."""
    if path.parent.name == "records":
        return deterministic(Record.from_json(json.loads(path.read_bytes())))
    if path.name in ("manifest.json", "attack.json"):
        return {key: value for key, value in json.loads(path.read_bytes()).items() if key not in TIMES}
    return path.read_bytes()


def test_the_same_seed_twice_gives_the_same_files(erased: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):  # the same words from two folders, since records hold the paths they were given
        folder = tmp_path / name
        folder.mkdir()
        run("erase", "sandbox", "--concept", "mosaic", "--method", "esd", *SHORT, "-o", "protected", folder=folder)
        run(
            "attack", "protected", "--reference", "sandbox", "--concept", "mosaic", "--method", "unlearndiffatk", "--n", "2",
            "--set", "timesteps=2", "--set", "steps=2", "-o", "audit", folder=folder,
        )  # fmt: skip
    first, second = (
        {path.relative_to(tmp_path / name).as_posix(): timeless(path) for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("one", "two")
    )
    assert len([name for name in first if name.startswith("audit/records/")]) == 2, "what protecting cost, and the attack"
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert equal(erased, tmp_path / "one" / "protected")


def test_evaluate_attack_and_report(erased: Path, tmp_path: Path) -> None:
    judged = run(
        "evaluate", str(erased), "--reference", "sandbox", "--concept", "mosaic", "--n", "3", "--retain-n", "2", "--json",
        "-o", str(tmp_path / "audit" / "plain"),
    )  # fmt: skip
    result = json.loads(judged.stdout)
    assert {"kind", "n", "reference_rate", "rate", "ci95"} <= set(result["concepts"]["mosaic"])
    assert result["retention"]["n"] > 40
    assert result["clip_score"]["scale"] == "cosine"
    assert -1 <= result["clip_score"]["reference"] <= 1
    assert result["frechet_distance"]["value"] >= 0
    for method, settings in (
        ("unlearndiffatk", ["--set", "timesteps=2", "--set", "steps=2"]), ("seed-search", ["--set", "images=3"])
    ):  # fmt: skip
        attacked = run(
            "attack", str(erased), "--reference", "sandbox", "--concept", "mosaic", "--method", method, *settings, "--n", "2",
            "--json", "-o", str(tmp_path / "audit" / method),
        )  # fmt: skip
        result = json.loads(attacked.stdout)
        assert result["budget"]["images_per_prompt"] == 3
        assert result["n"] == 2
        for rate in (result["pre_asr"], result["asr"]):
            assert rate["rate"] == rate["successes"] / 2
            assert rate["ci95"][0] <= rate["rate"] <= rate["ci95"][1]
        assert result["pre_asr"]["successes"] <= result["asr"]["successes"]
        assert len(result["detector"]["sha256"]) == 64
    run("report", str(tmp_path / "audit"))
    page = (tmp_path / "audit" / "report.html").read_text()
    assert "mosaic" in page
    assert "unlearndiffatk" in page.lower()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_resumed_it_ends_with_the_same_tensors(erased: Path, tmp_path: Path, how: signal.Signals) -> None:
    arguments = ["erase", "sandbox", "--concept", "mosaic", "--method", "esd", *SHORT, "-o", str(tmp_path / "erased")]
    # A shell that runs the tests in the background has told its children to ignore Ctrl-C.
    process = subprocess.Popen(
        command(*arguments), stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    work = tmp_path / ".erased.work"
    # The bank of latents is the first thing a run keeps.
    deadline = time.monotonic() + 120
    while not list(work.rglob("*.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), said
    assert not (tmp_path / "erased").exists()
    run(*arguments, "--resume")
    assert equal(erased, tmp_path / "erased")
    assert not work.exists()


def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path: Path, erased: Path) -> None:
    out = str(tmp_path / "out")
    erase = ["erase", "sandbox", "--method", "esd", "-o", out]
    run(*erase, "--concept", "unheard-of", code=2)
    run(*erase, "--concept", "mosaic", "--set", "stpes=3", code=2)
    run(*erase, "--concept", "mosaic", "--set", "steps=many", code=2)
    run(*erase, "--concept", "mosaic", "--set", "parameters=everything", code=2)
    run("erase", str(tmp_path / "absent"), "--concept", "mosaic", "--method", "esd", "-o", out, code=2)
    run("erase", "sandbox", "--concept", "mosaic", "--method", "esd", "-o", str(erased), code=2)
    run("erase", "sandbox", "--concept", "mosaic", "--method", "magic", "-o", out, code=2)
    run("report", str(tmp_path), code=2)
    broken = tmp_path / "broken"
    shutil.copytree(erased, broken)
    weights = next((broken / "unet").glob("*.safetensors"))
    whole = weights.read_bytes()
    again = ["erase", str(broken), "--concepts-file", str(weights_folder() / "concepts.yaml"), "--concept", "mosaic"]
    weights.write_bytes(whole[: len(whole) // 2])
    run(*again, "--method", "uce", "-o", out, code=2)
    weights.rename(weights.with_suffix(".bin"))
    run(*again, "--method", "uce", "-o", out, code=2)
    assert not Path(out).exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".out")]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        done = run("erase", "sandbox", "--concept", "mosaic", "--method", "uce", "-o", str(disk / "out"), code=2)
        assert "disk is full" in done.stderr
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
