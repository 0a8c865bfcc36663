"""``safeweights doctor``: what this machine has, and what is missing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

import typer

from safeweights import __version__
from safeweights.cli import options
from safeweights.cli.common import speaking
from safeweights.records.machine import versions


def command(as_json: options.Json = False) -> None:
    """Show versions, devices, optional extras, caches and the sandbox. Exits with 1 where something needed is missing."""
    with speaking(as_json) as show:
        found = examine()
        show(found, *_lines(found))
    if found["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything the doctor looks at, and ``problems``: one line for each thing that keeps commands from working."""
    devices, trouble = _devices()
    sandbox = _sandbox()
    problems = [trouble] if trouble else []
    if not sandbox["model"]:
        problems.append(f"the sandbox model is missing at {sandbox['path']}; reinstall or run 'safeweights sandbox train'")
    caches = _caches()
    problems += [f"{name} at {cache['path']} cannot be written" for name, cache in caches.items() if not cache["writable"]]
    return {
        "safeweights": __version__,
        "versions": versions(),
        "devices": devices,
        "extras": {"nudenet": _installed("nudenet"), "sign": _signing(), "chromium": _chromium()},
        "caches": caches,
        "tokenizers": {} if trouble else _tokenizers(),
        "sandbox": sandbox,
        "problems": problems,
    }


def _devices() -> tuple[dict[str, Any], str]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return {}, f"torch cannot be imported: {error}"
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "cuda": cuda,
        "mps": torch.backends.mps.is_available(),
    }, ""


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _signing() -> str | None:
    """The version of model-signing; None where it, or pyOpenSSL which it needs, is missing."""
    return _installed("model-signing") if _installed("pyopenssl") else None


def _chromium() -> str | None:
    """The browser that the tests of the report use; None without playwright or its browser."""
    if util.find_spec("playwright") is None:
        return None
    default = Path("~/Library/Caches" if os.uname().sysname == "Darwin" else "~/.cache").expanduser() / "ms-playwright"
    folder = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or default)
    found = sorted(path.name for path in folder.glob("chromium*")) if folder.is_dir() else []
    return str(folder / found[-1]) if found else None


def _caches() -> dict[str, dict[str, Any]]:
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    import tempfile

    folders = {"Hub cache": hub, "temporary folder": Path(tempfile.gettempdir())}
    return {name: {"path": str(path), "writable": _writable(path)} for name, path in folders.items()}


def _tokenizers() -> dict[str, str]:
    """For each version of Stable Diffusion "cached", or the command that fetches what its single-file checkpoints lack."""
    from safeweights.models.single_file import TOKENIZERS, fetch_tokenizer, tokenizer_cached

    return {f"SD {v}.x": "cached" if tokenizer_cached(v) else f"not cached: {fetch_tokenizer(v)}" for v in TOKENIZERS}


def _writable(path: Path) -> bool:
    """Whether files can be made there; a folder that does not exist yet counts by its nearest parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def _sandbox() -> dict[str, Any]:
    from safeweights.sandbox.files import weights_folder

    folder = weights_folder()
    detectors = sorted(path.parent.name for path in (folder / "detectors").glob("*/config.json"))
    return {
        "path": str(folder),
        "model": (folder / "model" / "model_index.json").is_file(),
        "concepts": (folder / "concepts.yaml").is_file(),
        "detectors": detectors,
        "clip": (folder / "clip" / "config.json").is_file(),
        "embedder": (folder / "embedder" / "config.json").is_file(),
    }


def _lines(found: Mapping[str, Any]) -> list[str]:
    sandbox, devices = found["sandbox"], found["devices"]
    table = {
        "safeweights": found["safeweights"],
        **found["versions"],
        "devices": ", ".join(["cpu", *devices.get("cuda", ()), *(["mps"] if devices.get("mps") else [])]),
        "cores": devices.get("cpu", {}).get("cores"),
        "nudenet (optional)": found["extras"]["nudenet"] or "not installed",
        "model-signing (optional)": found["extras"]["sign"] or "not installed",
        "chromium (optional)": found["extras"]["chromium"] or "not installed",
        **{name: f"{cache['path']}{'' if cache['writable'] else ' NOT WRITABLE'}" for name, cache in found["caches"].items()},
        **{f"tokenizer for single files, {name}": state for name, state in found["tokenizers"].items()},
        "sandbox": f"{sandbox['path']}: model {'present' if sandbox['model'] else 'MISSING'}, "
        f"{len(sandbox['detectors'])} detectors",
    }  # fmt: skip
    width = max(map(len, table))
    lines = [f"{name:<{width}}  {value}" for name, value in table.items()]
    return [*lines, *(f"problem: {problem}" for problem in found["problems"] or ())] + (
        [] if found["problems"] else ["all is well"]
    )
