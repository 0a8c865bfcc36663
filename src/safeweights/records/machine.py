"""What a run ran on and what it took from the machine. No torch."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "accelerate", "peft", "numpy")


def peak_memory_gb() -> float | None:
    """Most memory this process has held, in 10^9 bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def versions() -> dict[str, str]:
    """Python, platform and the installed versions of the libraries that numbers depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def forget_peak_memory() -> None:
    """Start counting anew, so that one process can tell the peaks of several pieces of work; Linux only."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
