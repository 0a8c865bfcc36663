"""Where a long run keeps its checkpoints and shows its progress. No torch at import."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.core.model import Calls

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Meter:
    """Keeps the count of model calls right across interrupts: a checkpoint carries what it took to reach it.

    A resumed run then counts what an undisturbed one would, work that was lost and done again counted once.
    """

    calls: Calls
    spent: dict[str, int] = field(default_factory=dict)
    """Calls behind each checkpoint that this life wrote or took over."""

    def __post_init__(self) -> None:
        self.last = self.calls.eps

    def reached(self, checkpoint: str) -> int:
        """Calls behind a checkpoint that is about to be written."""
        self.spent[checkpoint] = self.spent.get(checkpoint, 0) + self.calls.eps - self.last
        self.last = self.calls.eps
        return self.spent[checkpoint]

    def take_over(self, checkpoint: str, calls: int) -> None:
        """Count what an earlier life spent on a checkpoint, once; what was prepared for it again is in that number already."""
        if checkpoint not in self.spent:
            self.spent[checkpoint] = calls
            self.calls.eps = self.last = self.last + calls


@dataclass(frozen=True)
class Workspace:
    """A folder for checkpoints, or None for a run that keeps none, and whether to draw progress bars on stderr.

    Checkpoints are safetensors files with a JSON header, written to a temporary name, synced and renamed: a kill at any moment
    leaves the previous checkpoint whole. ``every`` is the number of steps between two checkpoints.
    """

    folder: Path | None = None
    progress: bool = False
    every: int = 25
    meter: Meter | None = None
    """Counts model calls across interrupts, where somebody wants to know them."""

    def track(self, steps: range, description: str) -> Iterator[int]:
        """Iterate with a progress bar."""
        if not self.progress:
            yield from steps
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(steps, description=description, console=Console(stderr=True), transient=True)

    def child(self, name: str) -> Workspace:
        """A workspace of its own for one part of the run; a name that is no plain word becomes a hash of it."""
        if not re.fullmatch(r"\w[\w .+=-]{0,80}", name):
            name = hashlib.sha256(name.encode()).hexdigest()[:24]
        return Workspace(self.folder / name if self.folder else None, self.progress, self.every, self.meter)

    def save(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write one checkpoint; does nothing without a folder."""
        if self.folder is None:
            return
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.safetensors"
        # Workers of one benchmark may come to the same checkpoint at the same time.
        partial = path.with_suffix(f".{os.getpid()}.partial")
        header = {"facts": json.dumps(facts)} | ({"calls": str(self.meter.reached(str(path)))} if self.meter else {})
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, partial, header)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last checkpoint of that name, or None."""
        if self.folder is None or not (path := self.folder / f"{name}.safetensors").is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
                header = file.metadata()
            facts = json.loads(header["facts"])
        except (SafetensorError, TypeError, KeyError, ValueError):
            # A rename after a sync leaves no half file; a disk or a user may. That part of the run is done again.
            print(f"the checkpoint {path} cannot be read; what it held is done again", file=sys.stderr)
            return None
        if self.meter and "calls" in header:
            self.meter.take_over(str(path), int(header["calls"]))
        return tensors, facts
