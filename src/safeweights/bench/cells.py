"""The cells of a benchmark, and measuring one: protect, evaluate or attack. Each leaves one record, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safeweights.bench.spec import METHODS, NONE, SANDBOX, Bench, judged
from safeweights.core.concept import ConceptFile
from safeweights.core.errors import UserError
from safeweights.core.model import Sampling
from safeweights.core.table import ATTACKS, configure, describe, resolve
from safeweights.core.workspace import Meter, Workspace
from safeweights.records.machine import forget_peak_memory, peak_memory_gb, versions
from safeweights.records.record import Record
from safeweights.records.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from safeweights.audit.audit import Names
    from safeweights.core.model import DiffusionModel

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

    @property
    def title(self) -> str:
        """What people call it: "esd mosaic seed 0 unlearndiffatk"."""
        return f"{self.method} {self.concept} seed {self.seed} {self.attack or self.kind}"

    @cached_property
    def key(self) -> str:
        """SHA-256 of all that decides what is measured."""
        return _digest({name: value for name, value in asdict(self).items() if not name.endswith("_given")})

    @cached_property
    def model_key(self) -> str:
        """The key of the cell that protects; the reference's own hash for the method that changes nothing."""
        if self.method_name == NONE:
            return self.inputs["reference"]
        return replace(self, kind="protect", attack="", attack_name="", attack_settings={}, counts={}, sampling={}).key


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
                    common: dict[str, Any] = {
                        "concept": concept.name, "concept_kind": concept.kind, "method": entry.title, "method_name": entry.name,
                        "method_given": given, "seed": seed, "inputs": inputs, "method_settings": {},
                    }  # fmt: skip
                    if entry.name != NONE:
                        method = configure(resolve(METHODS, entry.name, "method"), given, latent_pixels=pixels)
                        common["method_settings"] = describe(method)
                        yield Cell(kind="protect", counts={}, sampling={}, **common)
                    counts: dict[str, int | None] = {"n": spec.evaluation.n, "retain_n": spec.evaluation.retain_n}
                    yield Cell(kind="evaluate", counts=counts, sampling=sampling, **common)
                    for attack in spec.attacks:
                        if entry.attacks is None or attack.title in entry.attacks:
                            yield Cell(
                                kind="attack", counts={"n": spec.prompts}, sampling=sampling, attack=attack.title,
                                attack_name=attack.name, attack_given=attack.settings, attack_settings=attacks[attack.title],
                                **common,
                            )  # fmt: skip

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

    def finished(self) -> dict[str, Record]:
        """The records of measured cells by key."""
        return {str(r.provenance["cell"]): r for r in self.records() if r.status == "ok" and "cell" in r.provenance}

    def recorded(self, cell: Cell) -> bool:
        """Whether this cell's record is there already: a worker may have died between writing it and saying so."""
        prefix = self.path(failure(cell, "")).stem.rpartition("-")[0]
        return any(
            json.loads(path.read_bytes()).get("status") == "ok"
            for path in self.cells.glob(f"{prefix}-*.json")
            if cell.key in path.read_text(encoding="utf-8")
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
            started = time.perf_counter()
            method = configure(resolve(METHODS, cell.method_name, "method"), cell.method_given, latent_pixels=self.pixels)
            (concept,) = self.file.pick([cell.concept])
            protection = method.protect(
                self.model, [concept], retain=self.file.retain, rng=generator(cell.seed),
                workspace=Workspace(own, meter=Meter(self.model.calls)),
            )  # fmt: skip
            facts = {
                "seconds": time.perf_counter() - started,
                "peak_memory_gb": peak_memory_gb(),
                "cost": dict(protection.cost),
            }
            # First the weights, then the record: a kill between the two costs nothing.
            self._protections.save(cell.key, protection.tensors, facts)
            kept = dict(protection.tensors), facts
        tensors, facts = kept
        manifest = {
            **facts, "method": cell.method, "concepts": [cell.concept], "seed": cell.seed, "command": ["safeweights", "bench"],
            "options": {"settings": dict(cell.method_settings)}, "changed": list(tensors), "inputs": dict(cell.inputs),
            "versions": versions(),
        }  # fmt: skip
        for record in protection_records(manifest, self.file, model=_model_label(cell), reference=self.spec.model):
            store.add(record)
        return f"{len(tensors)} tensors"

    def _evaluate(self, cell: Cell, store: CellStore, own: Path) -> str:
        from safeweights.audit.evaluate import evaluate

        n, retain_n = cell.counts["n"], cell.counts["retain_n"]
        assert n is not None
        result = evaluate(
            self._protected(cell), self.model, self.file.pick([cell.concept]), self.file, names=self._names(cell),
            sampling=Sampling(**cell.sampling), n=n, retain_n=retain_n, seed=cell.seed, store=store,
            workspace=Workspace(home(self.folder, cell)), reference_pictures=self._pictures,
            allow_python_detectors=self.allow_python,
        )  # fmt: skip
        rates = result["concepts"][cell.concept]
        return f"{rates['reference_rate']:.2f} -> {rates['rate']:.2f}"

    def _attack(self, cell: Cell, store: CellStore, own: Path) -> str:
        from safeweights.audit.audit import audit

        attack = configure(resolve(ATTACKS, cell.attack_name, "attack"), cell.attack_given, latent_pixels=self.pixels)
        (concept,) = self.file.pick([cell.concept])
        # Checkpoints are the cell's own, pictures are shared by all that look at the same model.
        record = audit(
            self._protected(cell), self.model, concept, attack, names=self._names(cell), sampling=Sampling(**cell.sampling),
            n=cell.counts["n"], seed=cell.seed, store=store, workspace=Workspace(own),
            allow_python_detectors=self.allow_python, pictures=home(self.folder, cell) / "pictures",
            reference_pictures=self._pictures,
        )  # fmt: skip
        return f"ASR {record.details['asr']['rate']:.2f}"

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
        if cell.method_name == NONE:
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
    return folder / "work" if cell.method_name == NONE else folder / "work" / "models" / cell.model_key[:24]


def forget(folder: Path, cell: Cell) -> None:
    """Delete what only the cells of this cell's model needed; its weights stay."""
    if cell.method_name != NONE:
        shutil.rmtree(home(folder, cell), ignore_errors=True)


def _model_label(cell: Cell) -> str:
    """What reports call the protected model: all seeds of a method on a concept together."""
    return f"{cell.method}-{cell.concept}"


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=list).encode()).hexdigest()
