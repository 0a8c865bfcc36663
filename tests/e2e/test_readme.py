"""What the README prints runs: on a tiny sandbox of random weights and with few steps, else as printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import folders
from safeweights.core.concept import load_concepts

SHORT = {
    "erase": "--set steps=2 --set trajectories=2",
    "evaluate": "--n 2",
    "attack": "--n 2 --set timesteps=1 --set steps=2",
    "report": "",
}
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Callable[..., Path]) -> Path:
    return folders.sandbox(tmp_path_factory.mktemp("world") / "sandbox", tiny_sd())


def block(language: str, word: str) -> str:
    """The one code block of a language that holds a word."""
    (found,) = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if word in text]
    return str(found)


def run(command: list[str], folder: Path, sandbox: Path) -> str:
    environment = {**os.environ, "SAFEWEIGHTS_SANDBOX": str(sandbox), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_example(sandbox: Path, tmp_path: Path) -> None:
    code = block("python", "open_model")
    for shown, short in (('method("esd")', 'method("esd", steps=4, trajectories=4)'), ("timesteps=5", "timesteps=1, steps=4")):
        assert code.count(shown) == 1
        code = code.replace(shown, short)
    printed = run([sys.executable, "-c", code], tmp_path, sandbox)
    assert printed.count("'successes'") == 2, "pre-ASR and ASR"
    assert (tmp_path / "protected" / "model_index.json").is_file()


def test_the_commands(sandbox: Path, tmp_path: Path) -> None:
    lines = block("sh", "safeweights erase").splitlines()
    assert lines.pop(0) == "pip install ."
    # The concept file lies in the working folder, as the README has it, and says where its detectors are.
    text = (sandbox / "concepts.yaml").read_text(encoding="utf-8")
    (tmp_path / "concepts.yaml").write_text(text.replace("detectors/", f"{sandbox}/detectors/"), encoding="utf-8")
    for line in lines:
        words = [str(sandbox / "model") if word == "MODEL" else word for word in shlex.split(line)]
        assert words[0] == "safeweights"
        run([sys.executable, "-m", *words, *SHORT[words[1]].split()], tmp_path, sandbox)
    assert (tmp_path / "audit" / "report.html").is_file()


def test_the_concept_file(tmp_path: Path) -> None:
    text = block("yaml", "concepts:")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "mosaic.csv").write_text("prompt\na mosaic picture of a tree\n")
    path = tmp_path / "concepts.yaml"
    path.write_text(text.replace("[stained-glass]", "[]"), encoding="utf-8")  # the example names one concept of several
    (mosaic,) = load_concepts(path).pick(["mosaic"])
    assert mosaic.test_prompts
    assert mosaic.detector is not None
