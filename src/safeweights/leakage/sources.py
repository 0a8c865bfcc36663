"""Where the people (or things) come from that adapters are trained on: drawn, or folders of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
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

    @property
    def nulls(self) -> Mapping[str, str]:
        """Kinds of pictures that show nobody, and what each is called; ``{}`` stands for the trigger word."""
        ...

    def null_pictures(self, kind: str, seed: int, n: int) -> Tensor:
        """Pictures (n, 3, H, W) of one thing or style of that kind, which ``seed`` chooses. Raises UserError where too few."""
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

    @property
    def nulls(self) -> Mapping[str, str]:
        return MappingProxyType({"styles": "a picture in {} style", "objects": "a picture of a {}"})

    def null_pictures(self, kind: str, seed: int, n: int) -> Tensor:
        import numpy as np

        from safeweights.sandbox import world

        names = (
            world.STYLES[1:] + world.HELD_BACK_STYLES if kind == "styles" else world.OBJECTS + world.HELD_BACK_OBJECTS
        )  # the flat style is that of people
        name = names[seed % len(names)]
        drawn, _ = world.draw_concept(kind.removesuffix("s"), name, n, seed)
        return torch.from_numpy(np.stack([np.asarray(image) for image in drawn])).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Folders:
    """One folder of pictures for each identity below ``root``; below ``things``, where given, one for each that is no person."""

    root: Path
    width: int
    height: int
    template: str = "a picture of a {} person"
    name: str = field(default="folders")
    things: Path | None = None

    def __post_init__(self) -> None:
        for root, folders, what in ((self.root, self._folders, "person"), (self.things, self._things, "thing")):
            if root is not None and not folders:
                raise UserError(f"{root} holds no folders of pictures; give one folder for each {what} below it")

    @cached_property
    def _folders(self) -> list[Path]:
        return _below(self.root, "person")

    @cached_property
    def _things(self) -> list[Path]:
        return _below(self.things, "thing") if self.things is not None else []

    def check(self, people: int, pictures: int, things: int) -> None:
        """Raise UserError where one of the first ``people`` has fewer than ``pictures``, or a thing fewer than ``things``."""
        for folders, needed, what in ((self._folders[:people], pictures, "person"), (self._things, things, "thing")):
            for folder in folders:
                found = sum(path.suffix.lower() in PICTURES for path in folder.iterdir())
                if found < needed:
                    raise UserError(
                        f"{folder} holds {found} pictures; {needed} are needed of every {what}: add some, or leave it out"
                    )

    def __len__(self) -> int:
        return len(self._folders)

    def pictures(self, identity: int, first: int, n: int) -> Tensor:
        folder = self._folders[identity]
        found, _ = read_folder(folder, width=self.width, height=self.height, prompt=self.template)
        if first + n > len(found):
            raise UserError(f"{folder} holds {len(found)} pictures; {first + n} are needed of every person")
        return found[first : first + n]

    @property
    def nulls(self) -> Mapping[str, str]:
        return MappingProxyType({"things": "a picture of a {}"} if self.things is not None else {})

    def null_pictures(self, kind: str, seed: int, n: int) -> Tensor:
        folder = self._things[seed % len(self._things)]
        found, _ = read_folder(folder, width=self.width, height=self.height, prompt=self.template)
        if n > len(found):
            raise UserError(f"{folder} holds {len(found)} pictures; {n} are needed of every thing")
        return found[:n]


def _below(root: Path, what: str) -> list[Path]:
    if not root.is_dir():
        raise UserError(f"{root} is no folder; give one that holds one folder of pictures for each {what}")
    return sorted(
        folder
        for folder in root.iterdir()
        if folder.is_dir() and any(path.suffix.lower() in PICTURES for path in folder.iterdir())
    )
