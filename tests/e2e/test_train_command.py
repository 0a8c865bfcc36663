"""``sandbox train`` as one command: killed in the middle and resumed it ends with the weights of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(output: Path) -> list[str]:
    """Two steps of the generator, one of everything else, on 64 pictures."""
    return [sys.executable, "-m", "safeweights", "sandbox", "train", "--minutes", "0.04", "--workers", "1", "-o", str(output)]


def run(*arguments: str) -> str:
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the one that holds times."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "training.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, cut, work = tmp_path / "whole", tmp_path / "cut", tmp_path / ".cut.work" / "training"
    run(*command(whole))
    process = subprocess.Popen(command(cut), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (work / "generator.done").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said
    assert not cut.exists()
    assert not (work / "judges.done").exists()
    said = run(*command(cut), "--resume")
    assert "generator begins" not in said, "a finished stage is not done again"
    assert "judges begins" in said
    assert {"model/model_index.json", "concepts.yaml", "clip/config.json", "embedder/config.json"} <= set(files(whole))
    assert files(cut) == files(whole)
    # What came out is a sandbox that commands can use.
    draw = [sys.executable, "-m", "safeweights", "generate", "sandbox", "--prompt", "a boat", "--steps", "2"]
    done = subprocess.run(
        [*draw, "-o", str(tmp_path / "drawn")],
        env={**ENVIRONMENT, "SAFEWEIGHTS_SANDBOX": str(cut)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
