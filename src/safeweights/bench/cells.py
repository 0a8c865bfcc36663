"""The cells of a benchmark, and measuring one: protect, evaluate or attack. Each leaves one record, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safeweights.bench.spec import METHODS, NONE, SANDBOX, AttackEntry, Bench, MethodEntry, judged
from safeweights.core.concept import ConceptFile
from safeweights.core.errors import UserError
from safeweights.core.model import Sampling
from safeweights.core.table import ATTACKS, ERASERS, GUARDS, configure, describe, resolve
from safeweights.core.workspace import Meter, Workspace
from safeweights.records.machine import forget_peak_memory, peak_memory_gb, versions
from safeweights.records.record import Record
from safeweights.records.store import Store
from safeweights.release.output import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from safeweights.audit.audit import Names
    from safeweights.core.concept import Concept
    from safeweights.core.model import DiffusionModel
    from safeweights.metrics.similarity_gap import Similarity

Kind = Literal["protect", "evaluate", "attack"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement to make. Equal keys, and only they, are the same measurement."""

    kind: Kind
    concept: str
    concept_kind: str
    method: str
    """Its label, as ``attack`` is the attack's."""
    method_name: str
    method_given: Mapping[str, Any]
    """The settings that the file names; ``method_settings`` are all of them after defaults."""
    method_settings: Mapping[str, Any]
    attack: str = ""
    attack_name: str = ""
    attack_given: Mapping[str, Any] = field(default_factory=dict)
    attack_settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int
    counts: Mapping[str, int | None]
    """How much is judged: n and retain_n of an evaluation, n of an attack."""
    sampling: Mapping[str, Any]
    inputs: Mapping[str, str]
    """SHA-256 of the reference model and of the concept file."""
    group: tuple[str, ...] = ()
    """The concepts of a model that protects several; its protection and evaluation are those of all of them."""
    only: tuple[str, ...] = ()
    """Those of the group that the method itself protects; all where empty."""
    start: Mapping[str, Any] = field(default_factory=dict)
    """The eraser that goes first and its settings after defaults."""
    likeness: Mapping[str, Any] = field(default_factory=dict)
    """How likeness is measured, where not as by default."""
    legal: tuple[str, ...] = ()
    """What a guard leaves to be learnt."""

    @property
    def title(self) -> str:
        """What people call it: "esd mosaic seed 0 unlearndiffatk"."""
        return f"{self.method} {self.concept} seed {self.seed} {self.attack or self.kind}"

    @cached_property
    def key(self) -> str:
        """SHA-256 of all that decides what is measured."""
        told = {name: value for name, value in asdict(self).items() if not name.endswith("_given")}
        # What most cells lack is left out, so that records from before it was known stay valid.
        return _digest(
            {name: value for name, value in told.items() if value or name not in ("group", "only", "start", "likeness", "legal")}
        )

    @cached_property
    def model_key(self) -> str:
        """The key of the cell that protects; the reference's own hash for the method that changes nothing."""
        if self.unedited:
            return self.inputs["reference"]
        whole = replace(self, kind="protect", attack="", attack_name="", attack_settings={}, counts={}, sampling={}, likeness={})
        if self.group:
            whole = replace(whole, concept="+".join(self.group), concept_kind="")
        return whole.key

    @property
    def unedited(self) -> bool:
        """Whether the model is the reference itself."""
        return self.method_name == NONE and not self.start

    @property
    def concepts(self) -> tuple[str, ...]:
        """The concepts that its model protects."""
        return self.group or (self.concept,)


def plan(spec: Bench, model: DiffusionModel, reference_hash: str) -> list[Cell]:
    """All cells, seed by seed and model by model, each model's protection first, then its evaluation, then its attacks."""
    from safeweights.release.manifest import hash_input

    file = spec.file()
    inputs = {"reference": reference_hash}
    if file.path is not None and (digest := hash_input(file.path)):
        inputs["concepts"] = digest
    pixels = model.latent_shape[1] * model.latent_shape[2]
    sampling = asdict(sampling_of(spec, file, model))
    # Settings are spelled out once for each entry; a benchmark of thousands of cells has a few dozen.
    attacks = {entry.title: describe(configure(resolve(ATTACKS, entry.name, "attack"), entry.settings, latent_pixels=pixels))
               for entry in spec.attacks}  # fmt: skip

    def cells() -> Iterator[Cell]:
        for seed in spec.seeds:
            for concept in judged(spec, file):
                for entry in spec.methods:
                    given = entry.settings_for(concept.name)
                    group = spec.group_of(concept.name) if entry.together else ()
                    only = tuple(name for name in group if name in entry.only)
                    if entry.only and not only:
                        continue
                    common: dict[str, Any] = {
                        "concept": concept.name, "concept_kind": concept.kind, "method": entry.title, "method_name": entry.name,
                        "method_given": given, "seed": seed, "inputs": inputs, "method_settings": {}, "group": group,
                        "only": only, "start": starting(entry),
                        "legal": tuple(spec.benign) if entry.name in GUARDS else (),
                    }  # fmt: skip
                    if entry.name != NONE:
                        method = configure(resolve(METHODS, entry.name, "method"), given, latent_pixels=pixels)
                        common["method_settings"] = describe(method)
                    counts: dict[str, int | None] = {"n": spec.evaluation.n, "retain_n": spec.evaluation.retain_n}
                    # What belongs to all concepts of a group is measured once, before the first of them.
                    whole = {**common, "concept": "+".join(group), "concept_kind": ""} if group else common
                    if not group or concept.name == group[0]:
                        if entry.name != NONE or entry.start is not None:
                            yield Cell(kind="protect", counts={}, sampling={}, **whole)
                        yield Cell(kind="evaluate", counts=counts, sampling=sampling, **whole)
                    learnt = spec.benign if group and concept.name == group[0] else []
                    for attack in spec.attacks:
                        if entry.attacks is not None and attack.title not in entry.attacks:
                            continue
                        tuned = resolve(ATTACKS, attack.name, "attack").access == "weights"
                        for aim in (concept, *file.pick(learnt if tuned else [])):
                            more = joining(attack, aim, group)
                            yield Cell(
                                kind="attack", counts={"n": spec.prompts}, sampling=sampling, attack=attack.title,
                                likeness=spec.likeness.model_dump(exclude_defaults=True) if tuned else {},
                                attack_name=attack.name, attack_given={**attack.settings, **more},
                                attack_settings={**attacks[attack.title], **more},
                                **{**common, "concept": aim.name, "concept_kind": aim.kind},
                            )  # fmt: skip

    def joining(attack: AttackEntry, concept: Concept, group: Sequence[str]) -> dict[str, Any]:
        """A joint user of one of a group's concepts also learns as many pictures of each other one."""
        if not attack.joint or concept.name not in group:
            return {}
        others = file.pick([name for name in group if name != concept.name])
        count = attacks[attack.title]["pictures"]
        return {"along": [other.texts[i % len(other.texts)] for other in others for i in range(count)]}

    def starting(entry: MethodEntry) -> dict[str, Any]:
        if entry.start is None:
            return {}
        eraser = configure(resolve(ERASERS, entry.start.name, "eraser"), entry.start.settings, latent_pixels=pixels)
        return {"name": entry.start.name, "settings": describe(eraser)}

    return list(cells())


def sampling_of(spec: Bench, file: ConceptFile, model: DiffusionModel) -> Sampling:
    """How to draw: what the benchmark says, else the concept file, else the model's own picture size."""
    _, height, width = model.latent_shape
    own = {"width": width * model.latent_stride, "height": height * model.latent_stride}
    return Sampling(**{**own, **file.generation, **spec.generation.model_dump(exclude_none=True)})


def hash_reference(spec: Bench, model: DiffusionModel) -> str:
    """SHA-256 of the model that the benchmark protects."""
    from safeweights.release.manifest import hash_model
    from safeweights.sandbox.files import model_folder

    path = model_folder() if spec.model == SANDBOX else Path(spec.model).expanduser()
    return hash_model(model, path if path.exists() else None)


class CellStore(Store):
    """A store that stamps what it adds with the cell it belongs to, so that a later run finds what is finished."""

    def __init__(self, folder: str | Path, cell: Cell | None = None) -> None:
        super().__init__(folder)
        self.cell = cell

    def add(self, record: Record) -> Path:
        """Write the record under its cell's labels and key; an error that the cell left earlier goes."""
        if (cell := self.cell) is not None:
            record = self._inside(record)
            record = replace(
                record,
                attack=cell.attack,
                settings={**record.settings, "counts": dict(cell.counts)} if cell.counts else record.settings,
                provenance={**record.provenance, "cell": cell.key},
            )
        path = super().add(record)
        if cell is not None and record.status == "ok" and (stale := self.path(failure(cell, ""))) != path:
            stale.unlink(missing_ok=True)
        return path

    def _inside(self, record: Record) -> Record:
        """The record of an attacker who honours a guard's mask: the guard named in its settings, which all seeds then share, the
        mask's file among its details, by its place in this folder."""
        attack, place = record.settings.get("attack", {}), f"{self.folder}/"
        path = str(attack.get("mask", ""))
        if self.cell is None or place not in path:
            return record
        named = f"the mask of {self.cell.method}"
        doubts = tuple(replace(doubt, explanation=doubt.explanation.replace(path, named)) for doubt in record.doubts)
        return replace(
            record, settings={**record.settings, "attack": {**attack, "mask": named}}, doubts=doubts,
            details={**record.details, "mask": path.replace(place, "")},
        )  # fmt: skip

    def finished(self) -> dict[str, Record]:
        """The records of measured cells by key."""
        return {str(r.provenance["cell"]): r for r in self.records() if r.status == "ok" and "cell" in r.provenance}

    def recorded(self, cell: Cell) -> bool:
        """Whether this cell's record is there already: a worker may have died between writing it and saying so."""
        prefixes = [
            self.path(failure(replace(cell, concept=name), "")).stem.rpartition("-")[0]
            for name in (cell.concepts if cell.group and cell.kind != "attack" else (cell.concept,))
        ]
        # Of a group every concept leaves its own record.
        return all(
            any(
                json.loads(path.read_bytes()).get("status") == "ok"
                for path in self.cells.glob(f"{prefix}-*.json")
                if cell.key in path.read_text(encoding="utf-8")
            )
            for prefix in prefixes
        )


def failure(cell: Cell, error: str) -> Record:
    """What a cell that could not be measured leaves."""
    return Record(
        kind=cell.kind, status="error", model=_model_label(cell), reference="", method=cell.method, concept=cell.concept,
        concept_kind=cell.concept_kind, attack=cell.attack, seed=cell.seed,
        settings={"method": dict(cell.method_settings), "attack": dict(cell.attack_settings), "counts": dict(cell.counts)},
        provenance={"cell": cell.key, "inputs": dict(cell.inputs), "versions": versions()}, error=error,
    )  # fmt: skip


class Worker:
    """Opens the model once and measures the cells it is handed. One for each process."""

    def __init__(self, spec: Bench, folder: Path, *, allow_python_detectors: bool = False) -> None:
        from safeweights.models.door import open_model

        self.spec, self.folder, self.allow_python = spec, folder, allow_python_detectors
        self.file = spec.file()
        self.model = open_model(spec.model, device=spec.device, dtype=spec.dtype)
        self.pixels = self.model.latent_shape[1] * self.model.latent_shape[2]
        self.held: tuple[str, DiffusionModel] = ("", self.model)

    def measure(self, cell: Cell) -> str:
        """Measure one cell and write its record; what came out, in a few words."""
        store = CellStore(self.folder, cell)
        if store.recorded(cell):
            return "recorded before"
        forget_peak_memory()
        own = home(self.folder, cell) / cell.key[:24]
        said = {"protect": self._protect, "evaluate": self._evaluate, "attack": self._attack}[cell.kind](cell, store, own)
        shutil.rmtree(own, ignore_errors=True)
        return said

    def _protect(self, cell: Cell, store: CellStore, own: Path) -> str:
        from safeweights.diffusion.noise import generator
        from safeweights.release.manifest import protection_records

        kept = self._protections.load(cell.key)
        if kept is None:
            start, tensors, facts = self._start(cell, own)
            if cell.method_name != NONE:
                started = time.perf_counter()
                method = configure(resolve(METHODS, cell.method_name, "method"), cell.method_given, latent_pixels=self.pixels)
                concepts = self.file.pick(cell.only or cell.concepts)
                legal = self.file.pick(cell.legal)
                if cell.start and "pictures" in cell.method_settings:
                    concepts, legal = (
                        tuple(self._pictured(concept, method.pictures, cell) for concept in side) for side in (concepts, legal)
                    )
                protection = method.protect(
                    start, concepts, retain=self.file.retain, rng=generator(cell.seed),
                    workspace=Workspace(own, meter=Meter(self.model.calls)),
                    **({"legal": legal} if cell.method_name in GUARDS else {}),
                )  # fmt: skip
                tensors = {**tensors, **protection.tensors}
                if cell.method_name in GUARDS and not protection.frozen:
                    raise UserError(f"{cell.method} freezes nothing: no tensor is as small as its budget; set a larger ratio")
                facts = {
                    "seconds": time.perf_counter() - started,
                    "peak_memory_gb": peak_memory_gb(),
                    "cost": dict(protection.cost),
                    **({"frozen": sorted(protection.frozen)} if protection.frozen else {}),
                }
            # First the weights, then the record: a kill between the two costs nothing.
            self._protections.save(cell.key, tensors, facts)
            kept = tensors, facts
        changed, facts = kept
        manifest = {
            **facts, "method": cell.method, "concepts": list(cell.concepts), "seed": cell.seed,
            "command": ["safeweights", "bench"], "options": {"settings": dict(cell.method_settings), "start": dict(cell.start)},
            "changed": list(changed), "inputs": dict(cell.inputs), "versions": versions(),
        }  # fmt: skip
        frozen = list(facts.get("frozen", ()))
        if frozen:
            self._mask(cell, anew=True)
        for record in protection_records(manifest, self.file, model=_model_label(cell), reference=self.spec.model):
            store.add(
                replace(record, details={**record.details, **self._frozen(frozen, cell, record.concept)}) if frozen else record
            )
        return f"{len(frozen)} tensors frozen" if frozen else f"{len(changed)} tensors"

    def _frozen(self, names: Sequence[str], cell: Cell, concept: str) -> dict[str, Any]:
        """What a concept's record says of a mask: its names and shares, and, once for all of a group, where it lies."""
        from safeweights.freezing.guard import shares, unet_shapes
        from safeweights.records.depth_map import depth_map

        shapes, frozen = unet_shapes(self.model), frozenset(names)
        title = f"Share of tensors that {cell.method} freezes, seed {cell.seed}"
        plots = [depth_map(dict.fromkeys(frozen, 1.0), dict.fromkeys(shapes, 1.0), title)] if concept == cell.concepts[0] else []
        return {"frozen": names, "frozen_shares": shares(frozen, shapes), "plots": plots}

    def _mask(self, cell: Cell, *, anew: bool = False) -> Path:
        """The file of a guard's mask, as somebody who honours it is handed it; ``anew`` where it has just been learnt."""
        from safeweights.freezing.guard import mask_of

        path = self.folder / "masks" / f"{cell.method}-seed-{cell.seed}-{cell.model_key[:12]}.json"
        if path.is_file() and not anew:
            return path
        kept = self._protections.load(cell.model_key)
        if kept is None:
            raise UserError(f"the mask of {cell.title} is gone; delete the record of its protection")
        mask = mask_of(
            self.model, frozenset(kept[1]["frozen"]), cell.method_name, cell.method_settings, illegal=cell.only or cell.concepts,
            legal=cell.legal, base_sha256=None if cell.start else cell.inputs["reference"],
            made={"seed": cell.seed, "command": ["safeweights", "bench"]},
        )  # fmt: skip
        path.parent.mkdir(exist_ok=True)
        write_json(path, mask.as_json())
        return path

    def _start(self, cell: Cell, own: Path) -> tuple[DiffusionModel, dict[str, Tensor], dict[str, Any]]:
        """What a method begins with: a model, the tensors in which it differs from the reference, and what it cost.

        Methods with the same start share it.
        """
        from safeweights.diffusion.noise import generator

        if not cell.start:
            return self.model, {}, {}
        key = _digest([dict(cell.start), cell.concepts, cell.seed, dict(cell.inputs)])
        kept = self._protections.load(f"start-{key}")
        if kept is None:
            started = time.perf_counter()
            eraser = configure(resolve(ERASERS, cell.start["name"], "eraser"), cell.start["settings"], latent_pixels=self.pixels)
            made = eraser.protect(
                self.model, self.file.pick(cell.concepts), retain=self.file.retain, rng=generator(cell.seed),
                workspace=Workspace(own).child("start"),
            )  # fmt: skip
            facts = {"seconds": time.perf_counter() - started, "peak_memory_gb": peak_memory_gb(), "cost": dict(made.cost)}
            kept = dict(made.tensors), facts
            self._protections.save(f"start-{key}", *kept)
        tensors, facts = kept
        return self.model.with_tensors(tensors), dict(tensors), dict(facts)

    def _pictured(self, concept: Concept, n: int, cell: Cell) -> Concept:
        """A concept with pictures that the publisher makes of it, before it is erased: afterwards they would not show it.

        Methods that ask for as many share them.
        """
        from safeweights.diffusion.shots import with_drawn_folder

        key = _digest([n, cell.seed, asdict(self.sampling(cell)), dict(cell.inputs)])[:16]
        return with_drawn_folder(concept, self.model, self.sampling(cell), n, self.folder / "work" / "drawn" / key, cell.seed)

    def sampling(self, cell: Cell) -> Sampling:
        """How pictures are drawn: the cell's own way, or the benchmark's for cells that judge none."""
        return Sampling(**cell.sampling) if cell.sampling else sampling_of(self.spec, self.file, self.model)

    def _evaluate(self, cell: Cell, store: CellStore, own: Path) -> str:
        from safeweights.audit.evaluate import evaluate

        n, retain_n = cell.counts["n"], cell.counts["retain_n"]
        assert n is not None
        result = evaluate(
            self._protected(cell), self.model, self.file.pick(cell.concepts), self.file, names=self._names(cell),
            sampling=Sampling(**cell.sampling), n=n, retain_n=retain_n, seed=cell.seed, store=store,
            workspace=Workspace(home(self.folder, cell)), reference_pictures=self._pictures,
            allow_python_detectors=self.allow_python,
        )  # fmt: skip
        rates = [result["concepts"][name] for name in cell.concepts]
        return ", ".join(f"{rate['reference_rate']:.2f} -> {rate['rate']:.2f}" for rate in rates)

    def _attack(self, cell: Cell, store: CellStore, own: Path) -> str:
        from safeweights.audit.audit import audit

        # Nothing in a guard's model tells it from the start's: who fine-tunes it is taken to honour the mask.
        mask = {"mask": str(self._mask(cell))} if cell.method_name in GUARDS and cell.attack_name == "relearn" else {}
        attack = configure(resolve(ATTACKS, cell.attack_name, "attack"), {**cell.attack_given, **mask}, latent_pixels=self.pixels)
        (concept,) = self.file.pick([cell.concept])
        # Checkpoints are the cell's own, pictures are shared by all that look at the same model.
        record = audit(
            self._protected(cell), self.model, concept, attack, names=self._names(cell), sampling=Sampling(**cell.sampling),
            n=cell.counts["n"], seed=cell.seed, store=store, workspace=Workspace(own),
            allow_python_detectors=self.allow_python, pictures=home(self.folder, cell) / "pictures",
            reference_pictures=self._pictures, similarity=self._similarity if attack.access == "weights" else None,
        )  # fmt: skip
        return f"ASR {record.details['asr']['rate']:.2f}"

    @cached_property
    def _similarity(self) -> Similarity | None:
        """How alike pictures are; None where neither the benchmark names a model nor the concept file has one beside it."""
        from safeweights.metrics.backbones import Backbones, default_backbones
        from safeweights.metrics.similarity_gap import CosineSimilarity, PerceptualSimilarity

        wanted = self.spec.likeness
        named = Backbones(features=wanted.model) if wanted.model else default_backbones(self.file)
        if (embedder := named.open_features()) is None:
            return None
        cosine = wanted.kind == "cosine"
        return CosineSimilarity(embedder, wanted.mode) if cosine else PerceptualSimilarity(embedder, wanted.mode)

    @property
    def _pictures(self) -> Path:
        return self.folder / "work" / "pictures"

    @property
    def _protections(self) -> Workspace:
        return Workspace(self.folder / "work" / "protections")

    def _protected(self, cell: Cell) -> DiffusionModel:
        """The protected model; the last one is held, since its cells follow one another."""
        if self.held[0] != cell.model_key:
            self.held = cell.model_key, self.model.with_tensors(self._tensors(cell))
        return self.held[1]

    def _tensors(self, cell: Cell) -> Mapping[str, Tensor]:
        if cell.unedited:
            return {}
        kept = self._protections.load(cell.model_key)
        if kept is None:
            raise UserError(f"the protected weights of {cell.title} are gone; delete the record of its protection")
        return kept[0]

    def _names(self, cell: Cell) -> Names:
        from safeweights.audit.audit import Names

        return Names(
            model=_model_label(cell), reference=self.spec.model, method=cell.method, method_settings=cell.method_settings,
            hashes={"model": cell.model_key, **cell.inputs},
        )  # fmt: skip


def home(folder: Path, cell: Cell) -> Path:
    """Where the pictures and checkpoints of a cell's model lie until all its cells are measured."""
    # The unedited model's pictures are the reference's.
    return folder / "work" if cell.unedited else folder / "work" / "models" / cell.model_key[:24]


def forget(folder: Path, cell: Cell) -> None:
    """Delete what only the cells of this cell's model needed; its weights stay."""
    if not cell.unedited:
        shutil.rmtree(home(folder, cell), ignore_errors=True)


def _model_label(cell: Cell) -> str:
    """What reports call the protected model: all seeds of a method on a concept together."""
    return f"{cell.method}-{'+'.join(cell.concepts)}"


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=list).encode()).hexdigest()
