"""The documentation knows every command, prints only commands that exist, and builds without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if path.name != "LOG.md")]
"""All but the log, which tells of commands as they once were."""


@pytest.fixture(scope="module")
def reference() -> Any:
    spec = importlib.util.spec_from_file_location("commands_page", DOCS / "commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_and_option_is_on_the_page(reference: Any) -> None:
    page = reference.fill((DOCS / "commands.md").read_text(encoding="utf-8"))
    assert "<!-- options" not in page
    known = dict(reference.commands())
    assert {"erase", "export", "verify", "sandbox train"} <= set(known)
    for name, command in known.items():
        _, _, section = page.partition(reference.heading(name) + "\n")
        section = section.partition("\n## ")[0]
        for written, _, _ in reference.options(command):
            assert f"| `{reference._cell(written)}` |" in section, f"{name}: {written}"


def test_every_command_is_shown_with_what_it_prints(reference: Any) -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    for name, _ in reference.commands():
        section = page.partition(reference.heading(name) + "\n")[2].partition("\n## ")[0]
        assert "```console\n$ " in section, f"docs/commands.md shows no output of {name}"


def test_no_page_is_a_placeholder() -> None:
    for path in DOCS.rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# "), path
        assert "@@" not in text, path


def test_a_new_command_gets_a_section_and_a_stale_mark_is_an_error(reference: Any) -> None:
    page = reference.fill("# Commands\n")
    assert page.count("## `safeweights ") == len(dict(reference.commands()))
    with pytest.raises(KeyError):
        reference.fill("<!-- options: no such command -->")


def printed() -> list[tuple[str, str]]:
    """(page, command line) of every safeweights command the pages print."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"^```(?:sh|console|bash|)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            lines = [line.removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines()]
            # "safeweights  0.1.0" is a line of what doctor prints.
            found += [(path.name, line) for line in lines if re.match(r"safeweights +[a-z]", line)]
        found += [(path.name, line) for line in re.findall(r"`(safeweights [a-z][^`\n]*)`", text)]
    return found


def test_what_the_pages_print_can_be_typed(reference: Any) -> None:
    known = dict(reference.commands())
    lines = printed()
    assert len(lines) > 25
    for page, line in lines:
        words = shlex.split(line.partition(" | ")[0], comments=True)[1:]
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        assert name in known, f"{page}: {line}"
        options = {option for parameter in known[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            assert not word.startswith("-") or word in options, f"{page}: {word} in: {line}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "site" / "commands.html").read_text(encoding="utf-8")
    assert "--sign-key" in page
    assert "open_model" in (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
