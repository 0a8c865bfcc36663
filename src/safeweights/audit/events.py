"""What happens to released weights without anybody attacking them: does the concept come back by itself?

Each event gives the changed model, or the changed sampling; the concept is then asked plainly. Casts and mixtures touch the UNet
and the text encoder, all that can bring a concept back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safeweights.core.concept import Concept, ConceptFile
from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import ADAPTATIONS, configure, resolve
from safeweights.core.workspace import Workspace
from safeweights.diffusion.latent_bank import fingerprint
from safeweights.diffusion.retain_set import names
from safeweights.diffusion.shots import drawn_shots

if TYPE_CHECKING:
    from safeweights.attacks.relearning.finetune import FineTune

EVENTS = {
    "fp16": "all weights are cast to half precision and back",
    "int8": "all matrices and kernels are rounded to 8 bits, one scale for each output channel",
    "merge": "averaged half and half with a fine-tune of itself on harmless pictures",
    "lora": "a LoRA learnt from harmless pictures is stacked on it",
    "fine-tune": "fine-tuned on harmless pictures",
    "scheduler": "drawn with another scheduler",
    "fewer-steps": "drawn with half as many steps",
}
"""Events by name: what happens."""
BENIGN = {"merge": "full", "fine-tune": "full", "lora": "lora"}
"""The adaptation that an event's harmless fine-tune takes."""


@dataclass(frozen=True, kw_only=True)
class Benign:
    """Somebody fine-tunes the released model on pictures that have nothing to do with the concepts; done once for all events.

    ``prompts`` say what the pictures show; ``original``, the model before protection, draws them.
    """

    original: DiffusionModel
    prompts: Sequence[str]
    sampling: Sampling
    steps: int = 50
    """Optimiser steps; > 0."""
    pictures: int = 16
    """Harmless pictures; > 0."""
    seed: int = 0
    workspace: Workspace = field(default_factory=Workspace)

    def tensors(self, model: DiffusionModel, adaptation: str) -> dict[str, Tensor]:
        """The weights of ``model`` that fine-tuning changes. Raises UserError without harmless prompts."""
        if not self.prompts:
            raise UserError("no prompt is left that names no audited concept; add retain prompts to the concept file")
        kept = self.workspace.load(f"benign-{adaptation}")
        facts = {**self.settings(adaptation), "model": fingerprint(model), "prompts": list(self.prompts)}
        if kept is not None and kept[1] == facts:
            return {name: tensor.to(model.device) for name, tensor in kept[0].items()}
        shots = drawn_shots(
            self.original, self.prompts, n=self.pictures, sampling=self.sampling, seed=self.seed,
            workspace=self.workspace.child("harmless"),
        )  # fmt: skip
        pixels = model.latent_shape[1] * model.latent_shape[2]
        kind = resolve(ADAPTATIONS, adaptation, "adaptation")
        tuned: FineTune = configure(kind, {"steps": self.steps}, latent_pixels=pixels)
        adapted = tuned.fit(model, shots, seed=self.seed, workspace=self.workspace.child(adaptation))[-1]
        tensors = adapted.adapter.tensors(model, adapted.phi)
        self.workspace.save(f"benign-{adaptation}", tensors, facts)
        return tensors

    def settings(self, adaptation: str) -> dict[str, Any]:
        """What a record says of the fine-tune."""
        return {"adaptation": adaptation, "steps": self.steps, "pictures": self.pictures, "seed": self.seed}


@dataclass(frozen=True)
class Aftermath:
    """The model as it is after the event, how it is drawn from, and what a record says of the event."""

    model: DiffusionModel
    sampling: Sampling
    settings: Mapping[str, Any]

    def fingerprint(self, before: str) -> str:
        """Stands for the changed weights, ``before`` for those that were released."""
        return hashlib.sha256(json.dumps([before, dict(self.settings)], sort_keys=True).encode()).hexdigest()


def happen(event: str, model: DiffusionModel, sampling: Sampling, benign: Benign) -> Aftermath:
    """Let an event of `EVENTS` happen. Raises UserError for an unknown one."""
    if event not in EVENTS:
        raise UserError(f"unknown event {event!r}; known are {', '.join(EVENTS)}")
    if event == "scheduler":
        other = "dpm" if sampling.scheduler != "dpm" else "ddim"
        return Aftermath(model, replace(sampling, scheduler=other), {"event": event, "scheduler": other})
    if event == "fewer-steps":
        steps = max(1, sampling.steps // 2)
        return Aftermath(model, replace(sampling, steps=steps), {"event": event, "steps": steps})
    if event in BENIGN:
        tuned = benign.tensors(model, BENIGN[event])
        changed = average(dict(model.named_parameters()), tuned, 0.5) if event == "merge" else tuned
        settings = {"event": event, **benign.settings(BENIGN[event]), **({"weight": 0.5} if event == "merge" else {})}
        return Aftermath(model.with_tensors(changed), sampling, settings)
    cast = half if event == "fp16" else int8
    return Aftermath(model.with_tensors({n: cast(p.detach()) for n, p in model.named_parameters()}), sampling, {"event": event})


def half(weight: Tensor) -> Tensor:
    """The weight after a cast to half precision and back; what half precision cannot hold becomes its largest number."""
    largest = torch.finfo(torch.float16).max
    return weight.clamp(-largest, largest).half().to(weight.dtype)


def int8(weight: Tensor) -> Tensor:
    """Symmetric rounding to integers of -127 … 127, one scale for each output channel; vectors (biases, norms) stay as they are.

    w <- s round(w / s),   s = max |w| / 127 over a channel
    """
    if weight.ndim < 2:
        return weight.clone()
    rows = weight.float().flatten(1)
    scale = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return ((rows / scale).round().clamp(-127, 127) * scale).view(weight.shape).to(weight.dtype)


def average(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """(1 - weight) base + weight tuned, for every weight that ``tuned`` names."""
    return {name: torch.lerp(base[name].detach().float(), value.float(), weight) for name, value in tuned.items()}


def harmless_prompts(file: ConceptFile, concepts: Sequence[Concept]) -> tuple[str, ...]:
    """The file's retained prompts, then the prompts of its other concepts, without those that name one of ``concepts``."""
    from safeweights.audit.evaluate import retained_concepts

    texts = [*file.retain, *(text for other in retained_concepts(concepts, file) for text in other.texts[:1])]
    kept = [text for text in dict.fromkeys(texts) if not any(names(text, concept.term) for concept in concepts)]
    return tuple(kept)
