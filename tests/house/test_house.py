"""The house is in order: tables equal folders, imports are light, docs know every method, examples are runnable."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safeweights.core.table import ADAPTATIONS, ATTACKS, DETECTORS, ERASERS, GUARDS, IMMUNIZERS

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "safeweights"
NO_METHODS = {"finetune", "__init__", "load", "bilevel", "pruning", "rounds", "guard", "enforce", "rescale"}


def modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - NO_METHODS


@pytest.mark.parametrize(
    ("registry", "folder"),
    [(ERASERS, "erasure"), (IMMUNIZERS, "immunization"), (GUARDS, "freezing"), (DETECTORS, "detectors")],
)
def test_registries_equal_folders(registry: dict[str, str], folder: str) -> None:
    named = {entry.partition(":")[0].rpartition(".")[2] for entry in registry.values()}
    assert named == modules(SRC / folder)
    for name, entry in registry.items():
        module, cls = entry.split(":")
        found = getattr(importlib.import_module(module), cls)
        assert getattr(found, "name", name) == name
        assert found.__doc__


def test_attacks_and_adaptations_equal_their_folders() -> None:
    named: dict[str, set[str]] = {"adversarial": set(), "relearning": set()}
    for name, entry in {**ATTACKS, **ADAPTATIONS}.items():
        module, cls = entry.split(":")
        _, folder, stem = module.rsplit(".", 2)
        named[folder].add(stem)
        found = getattr(importlib.import_module(module), cls)
        assert found.name == name
        assert found.__doc__
    assert named == {folder: modules(SRC / "attacks" / folder) for folder in named}


def test_every_paper_method_names_its_paper() -> None:
    for folder in ("erasure", "immunization", "freezing", "attacks/adversarial", "attacks/relearning"):
        for path in (SRC / folder).glob("*.py"):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert path.stem in NO_METHODS | {"baselines", "replay"} or "arXiv:" in text, path


def test_readme_names_every_method_and_its_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in (*ERASERS, *IMMUNIZERS, *GUARDS, *ATTACKS, *ADAPTATIONS):
        assert f"`{name}`" in readme or f"`{name}:" in readme, name
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_doubts_are_documented() -> None:
    text = (ROOT / "docs" / "doubts.md").read_text(encoding="utf-8")
    source = (SRC / "audit" / "doubts.py").read_text(encoding="utf-8")
    for name in set(re.findall(r'name="(\w+)"', source)):
        assert f"`{name}`" in text, name


def test_public_functions_have_docstrings() -> None:
    missing = []
    for path in SRC.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(SRC)}:{node.lineno} {node.name}")
    assert not missing


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("what", ["import safeweights", "import safeweights.cli.main", "import safeweights.core.concept"])
def test_imports_are_light(what: str) -> None:
    heavy = ("torch", "diffusers", "transformers", "matplotlib")
    assert python(f"{what}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_help_is_quick() -> None:
    # The best of three: other jobs on the machine slow single runs down.
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "safeweights", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0


def test_every_public_name_can_be_had() -> None:
    import safeweights

    for name in safeweights.__all__:
        assert getattr(safeweights, name) is not None
