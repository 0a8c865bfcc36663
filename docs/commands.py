"""Fills docs/commands.md with what the program itself says of its commands, so that no option list can go stale.

A hook of mkdocs: ``<!-- options: NAME -->`` becomes the table of that command's options, and a command that the page does not
show yet gets a section of its own at the end. ``python docs/commands.py`` prints the filled page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK = re.compile(r"^<!-- options: ([a-z -]+) -->$", re.MULTILINE)
SHARED = ("--help",)


def commands(group: Any = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name as typed after ``safeweights``, command) of every command the program has, those of groups included."""
    if group is None:
        import typer

        from safeweights.cli.main import app

        group = typer.main.get_command(app)
    for name, command in group.commands.items():
        if getattr(command, "commands", None):
            yield from commands(command, f"{prefix}{name} ")
        elif not getattr(command, "hidden", False):
            yield f"{prefix}{name}", command


def options(command: Any) -> list[tuple[str, str, str]]:
    """(how it is written, default, what it does) of every argument and option."""
    rows = []
    for parameter in command.params:
        written = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.name.upper()
        if written in SHARED:
            continue
        is_option = written.startswith("-")
        if is_option:
            written = ", ".join([*parameter.opts, *parameter.secondary_opts])
            if not getattr(parameter, "is_flag", False):
                written += f" {parameter.metavar or _kind(parameter)}"
        rows.append((written, _default(parameter), str(parameter.help or "")))
    return rows


def table(command: Any) -> str:
    """The options of a command as a Markdown table."""
    lines = ["| option | default | |", "|---|---|---|"]
    lines += [f"| `{_cell(written)}` | {default} | {_cell(said)} |" for written, default, said in options(command)]
    return "\n".join(lines)


def fill(page: str) -> str:
    """The page with every mark filled and every command on it. Raises KeyError for a mark of a command that does not exist."""
    known = dict(commands())
    page = MARK.sub(lambda found: table(known[found[1].strip()]), page)
    for name, command in known.items():
        if heading(name) not in page:
            page = f"{page.rstrip()}\n\n{heading(name)}\n\n{_said(command)}\n\n{table(command)}\n"
    return page


def heading(name: str) -> str:
    """The heading under which a command stands on the page."""
    return f"## `safeweights {name}`"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return fill(markdown) if page.file.src_uri == "commands.md" else markdown


def _said(command: Any) -> str:
    return " ".join(str(command.help or "").split("\f")[0].split())


def _kind(parameter: Any) -> str:
    # Typer tells a Python type since it left click's own types behind, and a click type before.
    told = getattr(parameter, "type_descriptor", None)
    name = getattr(told.annotation, "__name__", "") if told is not None else getattr(getattr(parameter, "type", None), "name", "")
    kinds = {
        "int": "N",
        "integer": "N",
        "integer range": "N",
        "float": "X",
        "float range": "X",
        "path": "PATH",
        "directory": "PATH",
    }
    return kinds.get(str(name).lower(), "TEXT")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "**required**"
    value = parameter.default
    if value is None or value is False or value == () or callable(value):
        # Some say in their own words what happens without them.
        return ""
    return f"`{_cell(value)}`" if value is not True else "on"


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(fill((Path(__file__).parent / "commands.md").read_text(encoding="utf-8")))
