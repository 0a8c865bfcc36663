"""The command line. One thin file per verb; torch is imported only when a command runs."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer

from safeweights import __version__
from safeweights.core.errors import UserError
from safeweights.core.text import plain

app = typer.Typer(
    name="safeweights",
    help="Make the weights of a text-to-image diffusion model safe to release, and prove it.",
    add_completion=False,
    no_args_is_help=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


LONGEST = 2000
"""Characters of an error: names from files stand in it, whatever they hold."""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"safeweights {__version__}")
        raise typer.Exit


@app.callback()
def _top(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show it and end.")) -> None:
    pass


COMMANDS = (
    "demo", "sandbox", "doctor", "generate", "erase", "immunize", "freeze", "prune", "adapt", "attack", "neurons", "evaluate",
    "audit", "leakage", "bench", "compare", "report", "export", "sign", "verify", "run",
)  # fmt: skip
"""Modules of this package in the order of ``--help``; each has a ``command``, or an ``app`` of several."""


def _register() -> None:
    for name in COMMANDS:
        module = import_module(f"safeweights.cli.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(module.command)


_register()


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 the finding says no, 2 wrong use or bad input, 130 interrupted."""
    debug = os.environ.get("SAFEWEIGHTS_DEBUG") == "1"
    _quiet(debug)
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="safeweights", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"error: {_line(error)}", file=sys.stderr)
        return 2


def main() -> None:
    """The console entry point."""
    # Asked to end, end as for Ctrl-C: clean up and keep what can be resumed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = run()
    if code == 130:
        print("interrupted", file=sys.stderr)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read us has gone; the interpreter must not complain about that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _line(error: Exception) -> str:
    """One line that says what is wrong and how to mend it."""
    if isinstance(error, UserError):
        return plain(error, LONGEST)
    # typer's own errors: an unknown option, a missing argument, a value of the wrong type.
    if callable(formatted := getattr(error, "format_message", None)):
        context: Any = getattr(error, "ctx", None)
        help_ = f"; see '{context.command_path} --help'" if context is not None else ""
        return plain(str(formatted()).rstrip("."), LONGEST) + help_
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full while writing {plain(error.filename or 'the output')}; free some space and repeat the command"
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        return "out of memory; draw smaller or fewer pictures, or use --device cpu or --dtype float16"
    return f"unexpected {type(error).__name__}: {plain(error, 300)} (SAFEWEIGHTS_DEBUG=1 shows where)"


def _quiet(debug: bool) -> None:
    """Keep libraries from writing between our lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        warnings.filterwarnings("ignore")
