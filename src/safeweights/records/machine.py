"""What a run took from the machine. No torch."""

from __future__ import annotations

import sys


def peak_memory_gb() -> float | None:
    """Most memory this process has held, in 10^9 bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
