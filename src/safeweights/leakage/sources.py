"""Where the people (or things) come from that adapters are trained on: drawn, or folders of pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.diffusion.image_folder import PICTURES, read_folder

FIRST = 1_000_000
"""The first drawn person: from here on, neither the sandbox's model nor its embedder has seen any."""


class Source(Protocol):
    """Identities by number, and pictures of each by number; the same numbers are always the same pictures."""

    @property
    def name(self) -> str:
        """What to call the source in a record."""
        ...

    @property
    def template(self) -> str:
        """What a picture is called; ``{}`` stands for the trigger word."""
        ...

    def __len__(self) -> int:
        """How many identities there are."""
        ...

    def pictures(self, identity: int, first: int, n: int) -> Tensor:
        """Pictures (n, 3, H, W) in [0, 1], the ``first``-th onwards. Raises UserError where there are too few."""
        ...


@dataclass(frozen=True)
class Drawn:
    """People of the sandbox's world that look different from one another and that no model has been shown."""

    limit: int = 2_000
    name: str = "drawn people"
    template: str = "a picture of a {} person"

    def __len__(self) -> int:
        return self.limit

    @cached_property
    def _seeds(self) -> list[int]:
        from dataclasses import astuple

        from safeweights.sandbox.world import person

        seen: dict[tuple[str, ...], int] = {}
        seed = FIRST
        while len(seen) < self.limit:
            # The name is not visible; two people of one look are one identity to every picture.
            seen.setdefault(astuple(person(seed))[1:], seed)
            seed += 1
        return list(seen.values())

    def pictures(self, identity: int, first: int, n: int) -> Tensor:
        import numpy as np

        from safeweights.sandbox.world import draw, person, sample_scene

        who = person(self._seeds[identity])
        drawn = [
            np.asarray(draw(sample_scene(np.random.default_rng([9151, identity, number]), person=who)))
            for number in range(first, first + n)
        ]
        return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Folders:
    """One folder of pictures for each identity below ``root``."""

    root: Path
    width: int
    height: int
    template: str = "a picture of a {} person"
    name: str = field(default="folders")

    def __post_init__(self) -> None:
        if not self._folders:
            raise UserError(f"{self.root} holds no folders of pictures; give one folder for each person below it")

    @cached_property
    def _folders(self) -> list[Path]:
        if not self.root.is_dir():
            raise UserError(f"{self.root} is no folder; give one that holds one folder of pictures for each person")
        return sorted(
            folder
            for folder in self.root.iterdir()
            if folder.is_dir() and any(path.suffix.lower() in PICTURES for path in folder.iterdir())
        )

    def __len__(self) -> int:
        return len(self._folders)

    def pictures(self, identity: int, first: int, n: int) -> Tensor:
        folder = self._folders[identity]
        found, _ = read_folder(folder, width=self.width, height=self.height, prompt=self.template)
        if first + n > len(found):
            raise UserError(f"{folder} holds {len(found)} pictures; {first + n} are needed of every person")
        return found[first : first + n]
