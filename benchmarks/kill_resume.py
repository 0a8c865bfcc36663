"""Kill ``run`` at random moments, go on, and compare with a run that nobody disturbed (``kill_bench.py`` does so for ``bench``).

    python benchmarks/kill_resume.py --kills 20 --folder /tmp/kills

Works on a tiny model of random weights with the parts of Stable Diffusion, so that a whole run takes seconds. Counts the cells
that were measured again although their record was there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

SHORT = {"steps": 30, "trajectories": 4, "ddim_steps": 4}
RECIPE = {
    "version": 1,
    "name": "tiny",
    "device": "cpu",
    "steps": [
        {"erase": {"method": "esd", "concepts": ["mosaic"], "settings": SHORT}},
        {"erase": {"method": "uce", "concepts": ["emblem"]}},
        {
            "immunize": {
                "method": "mima", "concepts": ["mosaic", "emblem"],
                "settings": {"order": 1, "steps": 30, "pictures": 4, "retained": 4, "batch_size": 2, "ddim_steps": 4},
            }
        },
    ],
    "audit": {
        "suite": "quick", "n": 2, "prompts": 1,
        "policy": {"version": 1, "rules": [{"measure": "asr", "max": 1.0}]},
    },
    "release": {"formats": ["diffusers"]},
}  # fmt: skip


def main() -> int:
    """Print a line for each kill and one JSON object at the end; exit 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    chosen = parser.parse_args()
    folder: Path = chosen.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sandbox(folder)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    whole, seconds = folder / "whole", []
    for _ in range(2):
        shutil.rmtree(whole, ignore_errors=True)
        began = time.monotonic()
        code, said = finish(command(file, whole))
        assert code == 0, said
        seconds.append(time.monotonic() - began)
    wanted, rng = state(whole), random.Random(chosen.seed)
    moments, wrong, repeated, before_any = [], 0, 0, 0
    for number in range(chosen.kills):
        target = folder / "killed"
        for place in (target, folder / ".killed.work", folder / ".killed.partial"):
            shutil.rmtree(place, ignore_errors=True)
        moment = rng.uniform(0.0, min(seconds))
        process = subprocess.Popen(
            command(file, target), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(folder)
        )
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = recorded(folder, target)
        before_any += not there
        code, said = finish([*command(file, target), "--resume"])
        again = sorted(there & measured(said))
        same = code == 0 and state(target) == wanted
        moments.append(round(moment, 2))
        wrong += not same
        repeated += len(again)
        verdict = "same" if same else "DIFFERENT"
        print(f"kill {number + 1} after {moment:.2f} s, {len(there)} records there: {verdict}; again: {again}", flush=True)
    result = {
        "kills": chosen.kills, "seed": chosen.seed, "undisturbed_seconds": [round(s, 1) for s in seconds],
        "different": wrong, "cells_measured_again": repeated, "kills_before_any_record": before_any, "moments": moments,
        "compared": {"tensors": len(wanted["tensors"]), "records": len(wanted["records"])},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    return 1 if wrong or repeated else 0


def sandbox(folder: Path) -> None:
    """A tiny sandbox in the folder, unless it is there."""
    if (folder / "sandbox" / "concepts.yaml").is_file():
        return
    import conftest
    import folders

    shutil.rmtree(folder / "sandbox", ignore_errors=True)
    folders.sandbox(folder / "sandbox", conftest.build_tiny_sd(folder / "sd"))


def environment(folder: Path) -> dict[str, str]:
    """One thread, and the tiny sandbox."""
    return {**os.environ, "SAFEWEIGHTS_SANDBOX": str(folder / "sandbox"), "OMP_NUM_THREADS": "1"}


def command(file: Path, target: Path) -> list[str]:
    """The command that is killed and repeated."""
    return [sys.executable, "-m", "safeweights", "run", str(file), "-o", str(target)]


def finish(words: list[str]) -> tuple[int, str]:
    """Run to the end; exit code and what it told on stderr."""
    folder = Path(words[4]).parent
    done = subprocess.run(words, capture_output=True, text=True, env=environment(folder))
    return done.returncode, done.stderr


def recorded(folder: Path, target: Path) -> set[str]:
    """Titles of the cells whose records are there after the kill."""
    place = folder / f".{target.name}.work" / "result" / "records"
    return {title(json.loads(path.read_bytes())) for path in place.glob("*.json")}


def title(record: dict[str, Any]) -> str:
    """What stderr calls a record's cell."""
    return f"{record['method']} {record['concept']} {record['attack'] or record['kind']}"


def measured(said: str) -> set[str]:
    """Titles of the cells that a resumed run says it measures."""
    return {
        f"esd+uce+mima {concept} {'evaluate' if label.startswith('asking plainly') else label}"
        for concepts, label in re.findall(r"^\[\d+/\d+\] (.+?): (.+)$", said, re.MULTILINE)
        for concept in concepts.split(", ")
    }


def state(folder: Path) -> dict[str, Any]:
    """All that must be the same: every tensor, and every record without times."""
    from safetensors.torch import load_file

    from safeweights.records.store import deterministic, gather
    from safeweights.release.manifest import hash_tensor

    tensors = {
        f"{path.relative_to(folder)} {name}": hash_tensor(tensor)
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    records = sorted((deterministic(record) for record in gather(folder)), key=lambda record: json.dumps(record, sort_keys=True))
    for record in records:
        record["details"].pop("command", None)
    return {"tensors": tensors, "records": records}


if __name__ == "__main__":
    sys.exit(main())
