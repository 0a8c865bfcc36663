"""Transfer: prompts found on one model, asked of another."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safeweights.attacks.adversarial.baselines import as_asked
from safeweights.core.attack import Access, Budget, Candidate, Mode, Original, Revival, Target
from safeweights.core.concept import Concept
from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Ask with the prompts that another attack found on another model: transfer, not a live attack.

    Each prompt is asked with what the record found for it first (as it was found, with its seed), then with what it found for the
    others, those that succeeded there first. A low rate says that these prompts do not carry over, not that none would be found.

    Needs: a record of an attack with the same prompts whose findings are text.   Cost: ``images`` pictures a prompt.
    """

    name: ClassVar[str] = "replay"
    access: ClassVar[Access] = Access.PROMPT
    mode: ClassVar[Mode] = "transfer"

    record: str = ""
    """The ``attack.json`` of an attack, or a record of its store."""
    images: int = 2
    """Pictures a prompt, the plain one included; >= 2."""

    def __post_init__(self) -> None:
        if self.images < 2:
            raise ValueError("images must be at least 2")

    @property
    def budget(self) -> Budget:
        return Budget(images=self.images)

    def revive(
        self,
        model: DiffusionModel,
        concept: Concept,
        targets: Sequence[Target],
        *,
        sampling: Sampling,
        original: Original | None = None,
        workspace: Workspace | None = None,
    ) -> Generator[Revival, Sequence[bool], None]:
        found = self._found(concept)
        queues = [_queue(target, found) for target in targets]
        if missing := [target.prompt for target, queue in zip(targets, queues, strict=True) if not queue]:
            raise UserError(
                f"replay: {self.record} has nothing to ask for {missing[0]!r}; was it made with the same concept and --n?"
            )
        seen = yield as_asked(model, targets)
        standing = [i for i, fell in enumerate(seen) if not fell]
        for number in range(self.images - 1):
            if not standing:
                return
            # A record that holds fewer prompts than the budget allows is asked from the start again, with nothing new to win.
            seen = yield Revival(model, tuple(queues[i][number % len(queues[i])] for i in standing))
            standing = [i for i, fell in zip(standing, seen, strict=True) if not fell]

    def origin(self) -> dict[str, Any]:
        """Where the prompts come from: model, its SHA-256, attack and settings, as far as the record tells; after `revive`."""
        data = json.loads(Path(self.record).expanduser().read_text(encoding="utf-8"))
        told = {**data, **data.get("details", {})}
        told["model_sha256"] = told.get("model_sha256") or told.get("provenance", {}).get("hashes", {}).get("model")
        settings = told.get("settings", {})
        told["settings"] = settings.get("attack", settings)
        return {key: told.get(key) for key in ("model", "model_sha256", "attack", "settings")}

    def _found(self, concept: Concept) -> list[Mapping[str, Any]]:
        """The rows found, those that succeeded first. Raises UserError for a file that is no such record."""
        if not self.record:
            raise UserError("replay needs the record of an attack: --set record=FOLDER/attack.json")
        try:
            data = json.loads(Path(self.record).expanduser().read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"replay: {self.record} does not exist") from None
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise UserError(f"replay: {self.record} cannot be read as JSON: {error}") from None
        details = data.get("details", data) if isinstance(data, dict) else {}
        rows = details.get("found") if isinstance(details, dict) else None
        if not isinstance(rows, list) or not rows:
            raise UserError(f"replay: {self.record} is no record of an attack; give the attack.json that 'attack' wrote")
        if details.get("concept") != concept.name:
            raise UserError(f"replay: {self.record} attacks {details.get('concept')!r}, not {concept.name!r}")
        if any(isinstance(row, dict) and row.get("input", "text") != "text" for row in rows):
            raise UserError(f"replay: {self.record} holds embeddings or latents, not text; they were made for one model")
        wanted = {"prompt": str, "seed": int, "adversarial_prompt": str, "adversarial_seed": int, "success": bool}
        if any(not isinstance(row, dict) or any(not isinstance(row.get(k), t) for k, t in wanted.items()) for row in rows):
            raise UserError(f"replay: {self.record} has findings without {', '.join(wanted)}; give the attack.json as written")
        return sorted(rows, key=lambda row: not row["success"])


def _queue(target: Target, found: Sequence[Mapping[str, Any]]) -> list[Candidate]:
    """What to ask for a target: its own finding, then the others with the target's seed; nothing where it has none itself."""
    own = [row for row in found if row["prompt"] == target.prompt and row["seed"] == target.seed]
    own = own or [row for row in found if row["prompt"] == target.prompt]
    first = [Candidate(row["adversarial_prompt"], row["adversarial_seed"]) for row in own[:1]]
    others = [Candidate(row["adversarial_prompt"], target.seed) for row in found if row not in own[:1] and row["success"]]
    return [*first, *others] if first else []
