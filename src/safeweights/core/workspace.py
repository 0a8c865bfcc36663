"""Where a long run keeps its checkpoints and shows its progress. No torch at import."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Workspace:
    """A folder for checkpoints, or None for a run that keeps none, and whether to draw progress bars on stderr.

    Checkpoints are safetensors files with a JSON header, written to a temporary name, synced and renamed: a kill at any moment
    leaves the previous checkpoint whole. ``every`` is the number of steps between two checkpoints.
    """

    folder: Path | None = None
    progress: bool = False
    every: int = 25

    def track(self, steps: range, description: str) -> Iterator[int]:
        """Iterate with a progress bar."""
        if not self.progress:
            yield from steps
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(steps, description=description, console=Console(stderr=True), transient=True)

    def child(self, name: str) -> Workspace:
        """A workspace of its own for one part of the run."""
        return Workspace(self.folder / name if self.folder else None, self.progress, self.every)

    def save(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write one checkpoint; does nothing without a folder."""
        if self.folder is None:
            return
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.safetensors"
        partial = path.with_suffix(".partial")
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, partial, {"facts": json.dumps(facts)})
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last checkpoint of that name, or None."""
        if self.folder is None or not (path := self.folder / f"{name}.safetensors").is_file():
            return None
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            return tensors, json.loads(file.metadata()["facts"])
