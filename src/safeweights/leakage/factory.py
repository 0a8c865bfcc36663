"""A population of adapters whose training data are known: what encoders are trained on, and what they are judged by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import ATTENTION, Adapted, Adapter, Lesson, Shots
from safeweights.diffusion.latent_bank import fingerprint
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import sample
from safeweights.leakage.lora_bank import fit_bank
from safeweights.leakage.sources import Source

Split = str
"""train, val, test, twin, or null- and what the adapter's pictures are instead of a person's: pixels, samples, styles, …"""
NULLS = ("pixels", "samples")
"""Kinds of null that every source has: shuffled pixels, and the base model's own samples."""
HELD = 8
"""Pictures of every identity that no adapter sees: the gallery, and the non-members."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One adapter: whose pictures, which of them, and how it is trained."""

    split: Split
    """train, val and test share no identity and no seed; a twin has a test adapter's pictures and another seed; null
    adapters are trained on the base model's own samples, on shuffled pixels, on styles or on things, and show nobody."""
    identity: int
    """-1 for a null adapter."""
    seed: int
    images: int
    steps: int
    lr: float
    caption: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many adapters of each kind, and what varies among them."""

    train: int = 300
    val: int = 20
    test: int = 100
    twins: int = 20
    nulls: int = 100
    """Adapters that show nobody, each kind as often as the others: the false alarms are counted over them."""
    images: tuple[int, ...] = (4, 8)
    steps: tuple[int, ...] = (40, 25)
    lrs: tuple[float, ...] = (2e-3, 4e-3)
    batch_size: int = 2
    rank: int = 4
    checkpoints: tuple[int, ...] = (10, 20)
    """Steps after which every adapter is kept as well: the samples of the timestep paradigm."""
    targets: str = ATTENTION
    seed: int = 0

    def entries(self, template: str, people: int, nulls: Mapping[str, str] | None = None) -> list[Entry]:
        """Every adapter of the plan; ``nulls`` are a source's own kinds of pictures that show nobody, and what they are called.

        Raises UserError where there are fewer people than it needs.
        """
        kinds = {**dict.fromkeys(NULLS, template), **(nulls or {})}
        names = tuple(kinds)
        needed = self.train + self.val + self.test
        if needed > people:
            raise UserError(f"the plan needs {needed} people and there are {people}; give more, or a smaller --adapters")
        rng = generator("lora factory", self.seed)

        def of(options: Sequence[Any]) -> Any:
            return options[int(torch.randint(len(options), (1,), generator=rng))]

        found: list[Entry] = []
        for number in range(needed + self.twins + self.nulls):
            split: Split = (
                "train" if number < self.train
                else "val" if number < self.train + self.val
                else "test" if number < needed
                else "twin" if number < needed + self.twins
                else f"null-{names[(number - needed - self.twins) % len(names)]}"
            )  # fmt: skip
            says = kinds.get(split.removeprefix("null-"), template)
            letters = "".join(
                chr(97 + int(i)) for i in torch.randint(26, (int(torch.randint(4, 8, (1,), generator=rng)),), generator=rng)
            )
            entry = Entry(
                split=split, identity=number if number < needed else -1, seed=self.seed * 100_000 + number,
                images=of(self.images), steps=of(self.steps), lr=of(self.lrs), caption=says.format(letters),
            )  # fmt: skip
            if split == "twin":
                twin = found[self.train + self.val + (number - needed) % max(1, self.test)]
                entry = Entry(**{**asdict(twin), "split": "twin", "seed": entry.seed})
            found.append(entry)
        return found

    def adapter(self) -> Adapter:
        """The kind of adapter they all are."""
        return Adapter(targets=self.targets, rank=self.rank)


@dataclass(frozen=True)
class Made:
    """A finished adapter: ``after`` holds phi at each checkpoint; the last is the adapter itself."""

    entry: Entry
    after: dict[int, dict[str, Tensor]] = field(repr=False)

    @property
    def phi(self) -> dict[str, Tensor]:
        """The adapter as it would be released."""
        return self.after[max(self.after)]


@torch.no_grad()
def shots_of(model: DiffusionModel, source: Source, entry: Entry, *, guidance: float = 4.0) -> Shots:
    """The pictures an adapter is trained on, encoded: a person's, a style's or thing's, the base model's, or shuffled pixels."""
    if entry.identity >= 0:
        return Shots.encode(model, source.pictures(entry.identity, HELD, entry.images), [entry.caption])
    rng = generator("null pictures", entry.seed)
    if entry.split == "null-pixels":
        images = source.pictures(int(torch.randint(len(source), (1,), generator=rng)), HELD, entry.images)
        order = torch.randperm(images[0, 0].numel(), generator=rng)
        images = images.flatten(2)[:, :, order].view_as(images)
        return Shots.encode(model, images, [entry.caption])
    if entry.split != "null-samples":
        return Shots.encode(
            model, source.null_pictures(entry.split.removeprefix("null-"), entry.seed, entry.images), [entry.caption]
        )
    prompt = " ".join(source.template.replace("{}", " ").split())
    noise = torch.randn((entry.images, *model.latent_shape), generator=rng)
    sampling = Sampling(steps=20, guidance_scale=guidance)
    return Shots.encode(model, sample(model, model.embed([prompt]), noise, sampling), [entry.caption])


def make(
    model: DiffusionModel,
    source: Source,
    plan: Plan,
    *,
    workspace: Workspace | None = None,
    together: int = 16,
) -> Iterator[Made]:
    """Train the adapters of a plan, ``together`` at once, those that judge first; what ``workspace`` holds is not trained again.

    An adapter is kept by what made it, not by the plan, so that a larger plan goes on from a smaller one.
    """
    workspace = workspace or Workspace()
    entries = plan.entries(source.template, len(source), source.nulls)
    # Adapters of one length together, so that none waits.
    kinds: dict[tuple[bool, int], list[Entry]] = {}
    for entry in sorted(entries, key=lambda item: (item.split == "train", item.steps)):
        kinds.setdefault((entry.split == "train", entry.steps), []).append(entry)
    groups = [items[start : start + together] for items in kinds.values() for start in range(0, len(items), together)]
    base = fingerprint(model)
    for number in workspace.track(range(len(groups)), "training adapters"):
        group = groups[number]
        missing = [entry for entry in group if _stored(workspace, _told(entry, plan, source, base)) is None]
        if missing:
            for entry, after in zip(missing, _train(model, source, plan, missing), strict=True):
                tensors = {f"{steps}/{key}": value.half() for steps, phi in after.items() for key, value in phi.items()}
                told = _told(entry, plan, source, base)
                workspace.save(_name(told), tensors, told)
                if workspace.folder is None:
                    yield Made(
                        entry, {steps: {key: value.half().float() for key, value in phi.items()} for steps, phi in after.items()}
                    )
        if workspace.folder is None:
            continue
        for entry in group:
            kept = _stored(workspace, _told(entry, plan, source, base))
            assert kept is not None
            yield Made(entry, kept)


def _train(model: DiffusionModel, source: Source, plan: Plan, group: Sequence[Entry]) -> list[dict[int, dict[str, Tensor]]]:
    lessons = [
        Lesson(
            model=model, adapter=plan.adapter(), shots=shots_of(model, source, entry), batch_size=plan.batch_size, seed=entry.seed
        )
        for entry in group
    ]  # fmt: skip
    found = fit_bank(
        lessons, steps=[entry.steps for entry in group], lr=[entry.lr for entry in group], checkpoints=plan.checkpoints
    )
    return [{item.steps: dict(item.phi) for item in items} for items in found]


def _told(entry: Entry, plan: Plan, source: Source, base: str) -> dict[str, Any]:
    """All that makes an adapter what it is; its split is what it is used for."""
    made = {key: value for key, value in asdict(entry).items() if key != "split"}
    shared = {key: value for key, value in asdict(plan).items() if key in ("batch_size", "rank", "targets", "checkpoints")}
    null = entry.split if entry.identity < 0 else ""
    # As it will be read again: a tuple comes back as a list.
    told: dict[str, Any] = json.loads(json.dumps({**made, **shared, "null": null, "source": source.name, "model": base}))
    return told


def _name(told: Mapping[str, Any]) -> str:
    return f"adapter-{told['seed']}-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]}"


def _stored(workspace: Workspace, told: Mapping[str, Any]) -> dict[int, dict[str, Tensor]] | None:
    stored = workspace.load(_name(told))
    if stored is None or stored[1] != told:
        return None
    after: dict[int, dict[str, Tensor]] = {}
    for key, value in stored[0].items():
        steps, rest = key.split("/", 1)
        after.setdefault(int(steps), {})[rest] = value.float()
    return after


def adapted_of(plan: Plan, made: Made) -> Adapted:
    """A factory adapter in the form that `release.adapted.save_lora` writes."""
    return Adapted(plan.adapter(), made.phi, made.entry.steps, ())
