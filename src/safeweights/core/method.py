"""What a protection method takes and gives: model and concepts in, a `Protection` out. The base model is never edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from safeweights.core.concept import Concept
from safeweights.core.mask import Mask
from safeweights.core.model import DiffusionModel
from safeweights.core.workspace import Workspace

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class Protection:
    """New tensor values and/or names to freeze. Applying it makes a copy of the model."""

    method: str
    concepts: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    settings: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    """Counted work, e.g. {"eps_calls": 1200, "steps": 300, "loss": 0.01}."""
    mask: Mask | None = None
    """What was pruned, where the method prunes; ``tensors`` hold the result."""

    def apply(self, model: DiffusionModel) -> DiffusionModel:
        """A protected copy; ``model`` stays as it was."""
        return model.with_tensors(self.tensors)


class Method(Protocol):
    """An eraser, immunizer or guard. Its dataclass fields are its settings."""

    name: ClassVar[str]

    def protect(
        self,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        *,
        retain: Sequence[str] = (),
        rng: Generator,
        workspace: Workspace | None = None,
    ) -> Protection:
        """The protection of ``model`` against ``concepts``; ``retain`` are prompts that must stay as they were."""
        ...
