"""``MASK.json``: which UNet tensors stay as they were released, by name, and what the mask was made for. No torch at import."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.core.errors import UserError

if TYPE_CHECKING:
    from safeweights.core.model import DiffusionModel

NAME = "MASK.json"
VERSION = 1
UNET = "unet."


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A freeze mask. Names carry their ``unet.`` here, as in models; in the file they do not."""

    frozen: frozenset[str]
    ratio: float
    """What was asked for; ``achieved`` is what came out."""
    budget: str = "tensors"
    base_sha256: str | None = None
    """Digest of the model the mask was made for."""
    architecture: str | None = None
    """Digest of the names and shapes of its UNet, which every derivative shares."""
    illegal: tuple[str, ...] = ()
    legal: tuple[str, ...] = ()
    achieved: Mapping[str, float] = field(default_factory=dict)
    """Shares frozen, of the tensors and of the parameters."""
    partners: frozenset[str] = frozenset()
    """Tensors that must be left alone, too, once the mask is in the weights: steps on them count many times over."""
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)
    """The recipe: command, seed, inputs, cost, versions."""

    @property
    def held(self) -> frozenset[str]:
        """All names a fine-tune that honours the mask leaves alone."""
        return self.frozen | self.partners

    def as_json(self) -> dict[str, Any]:
        """The contents of the file."""
        return {
            "version": VERSION,
            "ratio": self.ratio,
            "budget": self.budget,
            "achieved": dict(self.achieved),
            "frozen": sorted(name.removeprefix(UNET) for name in self.frozen),
            **({"partners": sorted(name.removeprefix(UNET) for name in self.partners)} if self.partners else {}),
            "base_sha256": self.base_sha256,
            "architecture": self.architecture,
            "illegal": list(self.illegal),
            "legal": list(self.legal),
            "method": self.method,
            "settings": dict(self.settings),
            "made": dict(self.made),
        }

    def check(self, model: DiffusionModel, file: str | Path = "the mask") -> None:
        """Raise UserError where ``model`` is not of the architecture the mask is for: a name or a shape differs."""
        known = {name for name, _ in model.named_parameters()}
        if unknown := sorted(self.held - known):
            raise UserError(f"{file} freezes {unknown[0]!r}, which this model does not have; the mask is for another model")
        if self.architecture is not None and self.architecture != architecture(model):
            raise UserError(f"{file} was made for a UNet of other shapes; learn a mask for this model with 'freeze learn'")


def overlap(first: frozenset[str], second: frozenset[str]) -> float:
    """Jaccard index of two masks, |A and B| / |A or B|; two random ones of ratio rho expect about rho / (2 - rho)."""
    together = first | second
    return len(first & second) / len(together) if together else 1.0


def read_mask(path: str | Path) -> Mask:
    """Read a mask file; only ``frozen`` is required, with or without ``unet.`` before the names.

    Raises UserError for a file that cannot be read, is no mask, is of an unknown version, or freezes nothing.
    """
    path = Path(path).expanduser()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        names = data["frozen"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no freeze mask (MASK.json with a list 'frozen'): {error}") from None
    if data.get("version", VERSION) != VERSION:
        raise UserError(f"{path}: version {data['version']!r} is not known; this release reads version {VERSION}")
    partners = data.get("partners", [])
    for what, listed in (("frozen", names), ("partners", partners)):
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise UserError(f"{path}: {what!r} must be a list of parameter names")
    if not names:
        raise UserError(f"{path} freezes nothing: 'frozen' is empty")
    ratio = data.get("ratio", 0.0)
    if not isinstance(ratio, int | float) or isinstance(ratio, bool):
        raise UserError(f"{path}: 'ratio' must be a number, not {ratio!r}")

    def mapping(key: str) -> Mapping[str, Any]:
        value = data.get(key)
        return value if isinstance(value, dict) else {}

    def texts(key: str) -> tuple[str, ...]:
        value = data.get(key)
        return tuple(str(item) for item in value) if isinstance(value, list) else ()

    def text(key: str) -> str | None:
        value = data.get(key)
        return value if isinstance(value, str) else None

    return Mask(
        frozen=_full(names), partners=_full(partners), ratio=float(ratio), budget=text("budget") or "tensors",
        base_sha256=text("base_sha256"), architecture=text("architecture"), illegal=texts("illegal"), legal=texts("legal"),
        achieved=mapping("achieved"), method=text("method") or "", settings=mapping("settings"), made=mapping("made"),
    )  # fmt: skip


def architecture(model: DiffusionModel) -> str:
    """SHA-256 of the names and shapes of a model's UNet parameters."""
    lines = sorted(f"{name} {tuple(value.shape)}\n" for name, value in model.named_parameters() if name.startswith(UNET))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def note_other_base(mask: Mask, sha256: str, file: str | Path) -> bool:
    """Whether a model of this digest is the one the mask was made for (true where it does not say); a line on stderr if not.

    A derivative, such as a protected copy, has the same tensors under the same names, so the mask still means something there:
    `Mask.check` refuses only another architecture.
    """
    if mask.base_sha256 in (None, sha256):
        return True
    print(f"note: {file} was made for another model (base_sha256 differs); its names and shapes fit this one", file=sys.stderr)
    return False


def with_partners(mask: Mask, partners: Sequence[str]) -> Mask:
    """The mask together with what a rescaling made sensitive; what is not of the UNet cannot stand in a mask."""
    return replace(mask, partners=frozenset(name for name in partners if name.startswith(UNET)))


def _full(names: Sequence[str]) -> frozenset[str]:
    """Names as models call them; the file leaves out the part they all belong to."""
    return frozenset(name if name.startswith(UNET) else f"{UNET}{name}" for name in names)
