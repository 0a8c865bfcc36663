"""Whether this process was begun with others by ``accelerate launch`` (or ``torchrun``). No torch."""

from __future__ import annotations

import os


def processes() -> tuple[int, int]:
    """This process's rank and how many there are: (0, 1) for one begun alone."""
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1
    return (rank, size) if 0 <= rank < size else (0, 1)


def follows() -> bool:
    """Whether this is one of several processes and not the first: it computes, and neither writes nor prints."""
    return processes()[0] > 0
