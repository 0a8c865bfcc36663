"""``safeweights run``: protect, audit and release from one file; killed at any moment it goes on where it was."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeweights.cli import options
from safeweights.cli.audit import conduct, exit_code, lines
from safeweights.cli.common import SANDBOX, hash_of, is_sandbox, sampling_of, say, speaking, workspace_in
from safeweights.cli.evaluate import check_detectors
from safeweights.core.table import configure, describe, resolve
from safeweights.core.workspace import Meter, Workspace
from safeweights.records.machine import forget_peak_memory, peak_memory_gb, versions
from safeweights.records.record import Kind, Measurement, Record
from safeweights.release.manifest import hash_input, hash_tensor, write_manifest
from safeweights.release.output import check_target, output_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from safeweights.audit.policy import Verdict
    from safeweights.audit.suites import Cell
    from safeweights.core.concept import Concept
    from safeweights.core.method import Protection
    from safeweights.core.model import DiffusionModel, Sampling
    from safeweights.release.output import Output
    from safeweights.release.recipe import Plan, Step


FREEZE: Kind = "freeze"
PRUNE: Kind = "prune"
_MADE = ("command", "seed", "inputs", "cost", "seconds", "peak_memory_gb", "versions")
"""What a mask tells of how it was made."""


def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Steps, audit and release.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write. [default: the recipe's name]", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and about how long it takes.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps. [default: the recipe's]")] = None,
    allow_python_detectors: options.AllowPython = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that is not empty; steps and cells that are the same are kept.")
    ] = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> int:
    """Protect a model, audit it, hold it against a policy and write it in the forms of its release.

    Every step and every measurement is kept under a hash of all that decides it, and never made twice. Exit 1 where the policy
    says no.
    """
    from safeweights.release.recipe import load_recipe

    with speaking(as_json) as show:
        plan = load_recipe(recipe)
        target = output or Path(plan.recipe.name)
        # A kill may come when all is written and the process not yet ended; everything is kept then, nothing measured again.
        overwrite = overwrite or (resume and _made(target, recipe))
        if not dry_run:
            check_target(target, overwrite)
        check_detectors(plan.file, allow_python_detectors)
        work = Kitchen(plan, device or plan.recipe.device, allow_python_detectors)
        if dry_run:
            estimate = work.estimate()
            show(estimate, *estimate_lines(estimate))
            return 0
        result, verdict = work.cook(target, overwrite=overwrite, resume=resume)
        told = lines(result, verdict) if plan.suite is not None else []
        show(result, *told, f"model: {target / 'model'}", *([f"report: {target / 'report.html'}"] if plan.suite else []))
        return exit_code(result) if plan.suite is not None else 0


def _made(target: Path, recipe: Path) -> bool:
    """Whether ``target`` was finished by this very recipe."""
    from safeweights.release.recipe import NAME

    kept = target.expanduser() / NAME
    return (kept.parent / "run.json").is_file() and kept.is_file() and kept.read_bytes() == recipe.expanduser().read_bytes()


@dataclass
class Kitchen:
    """A recipe at work: the models it opens, and what each step starts from."""

    plan: Plan
    device: str
    allow_python_detectors: bool = False
    command: list[str] = field(default_factory=lambda: ["safeweights", *sys.argv[1:]])

    @cached_property
    def base(self) -> DiffusionModel:
        """The model as it is before any step."""
        from safeweights.models.door import open_model

        return open_model(self.plan.recipe.model, device=self.device, dtype=self.plan.recipe.dtype)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the model and of the concept file."""
        found = {"reference": hash_of(self.plan.recipe.model, self.base)}
        if self.plan.file.path is not None and (digest := hash_input(self.plan.file.path)):
            found["concepts"] = digest
        return found

    @property
    def pixels(self) -> int:
        """Latent pixels: what presets go by."""
        return self.base.latent_shape[1] * self.base.latent_shape[2]

    def method(self, step: Step) -> Any:
        """A step's method with all its settings."""
        from safeweights.release.recipe import registry_of

        return configure(resolve(registry_of(step.verb), step.method, "method"), step.settings, latent_pixels=self.pixels)

    def seed(self, step: Step) -> int:
        """A step's own seed, or the recipe's."""
        return self.plan.recipe.seed if step.seed is None else step.seed

    def pictures(self, step: Step) -> dict[str, str | None]:
        """SHA-256 of the pictures that a step's concepts bring, by concept."""
        return {c.name: hash_input(c.images) for c in self.plan.pick([*step.concepts, *step.legal]) if c.images}

    def keys(self) -> list[str]:
        """For each step the hash of all that decides what it makes."""
        from safeweights.release.recipe import chain_key

        before, found = self.hashes["reference"], []
        for step in self.plan.recipe.steps:
            inputs = {
                **self.hashes,
                "images": self.pictures(step),
                "dtype": str(self.base.dtype),
                "device": self.base.device.type,
            }
            before = chain_key(before, step, describe(self.method(step)), seed=self.seed(step), inputs=inputs)
            found.append(before)
        return found

    def cook(self, target: Path, *, overwrite: bool = False, resume: bool = False) -> tuple[dict[str, Any], Verdict | None]:
        """Do all of it and write ``target``; returns the JSON of ``run`` and what the policy says."""
        started = time.perf_counter()
        recipe = self.plan.recipe
        with output_folder(target, overwrite=overwrite, resume=resume, options={"model": recipe.model}) as out:
            self._inherit(out)
            model, chain, frozen, changed = self._protect(out)
            folder = out.folder / "model"
            model.save(folder)
            self._leave_masks(out, model, chain)
            self._manifest(folder, chain, changed)
            result: dict[str, Any] = {
                "output": str(target),
                "model": str(target / "model"),
                "steps": [_told(step) for step in chain],
            }
            verdict = None
            if self.plan.suite is not None:
                audited, verdict = self._audit(out, model, chain, frozen)
                result |= {
                    "report": str(target / "report.html"),
                    **{k: v for k, v in audited.items() if k not in ("model", "seconds")},
                }
            result["release"] = self._release(out.folder, target)
            self._write_frozen(out.folder, model, chain, frozen)
            self._leave_recipe(out.folder)
            _link(out.work / "steps", out.folder / "steps")
            result["seconds"] = round(time.perf_counter() - started, 3)
            write_json(out.folder / "run.json", result)
            if verdict is not None:
                write_json(out.folder / "policy.json", verdict.to_json())
            if self.plan.suite is not None:
                from safeweights.report.page import write_report

                write_report(out.folder)
        return result, verdict

    def _inherit(self, out: Output) -> None:
        """Take over the steps and records of the folder that is replaced; what is not the same is not asked for."""
        for name, place in (("steps", out.work / "steps"), ("records", out.work / "result" / "records"),
                            ("artefacts", out.work / "result" / "artefacts")):  # fmt: skip
            if not place.exists():
                _link(out.target / name, place)

    def _protect(self, out: Output) -> tuple[DiffusionModel, list[dict[str, Any]], dict[int, list[str]], dict[str, Tensor]]:
        """Every step, each on what the one before made, taken from the cache where it is there.

        Returns the model, what manifests tell of each step, the names that a step of that number freezes, and all that changed.
        """
        cache, model = Workspace(out.work / "steps"), self.base
        chain: list[dict[str, Any]] = []
        frozen: dict[int, list[str]] = {}
        changed: dict[str, Tensor] = {}
        for number, (step, key) in enumerate(zip(self.plan.recipe.steps, self.keys(), strict=True), start=1):
            head = f"step {number} of {len(self.plan.recipe.steps)}: {step.title}"
            kept = cache.load(key)
            if kept is not None and self._prunes(step) and "mask" not in kept[1]:
                kept = None  # an earlier version kept no masks
            if kept is None:
                say(head, always=True)
                protection, facts = self._step(step, key, model, out, edited=bool(changed))
                facts["mask"] = self._keep_mask(protection, out.work / "steps" / key)
                kept = dict(protection.tensors), facts
                # Whole or not at all: a kill before this line repeats the step from its own last checkpoint.
                cache.save(key, *kept)
                say(f"  {kept[1]['seconds']:.0f} s", always=True)
            else:
                say(f"{head}: kept", always=True)
            shutil.rmtree(out.work / "making" / key[:24], ignore_errors=True)
            tensors, facts = kept
            model = model.with_tensors(tensors)
            changed |= tensors
            if facts["frozen"]:
                frozen[number] = facts["frozen"]
            chain.append(
                {
                    "verb": step.verb, "method": step.method, "concepts": step.concepts, "key": key, "seed": self.seed(step),
                    "command": self.command, "options": {"settings": facts["settings"]},
                    "inputs": {**self.hashes, **{f"images of {name}": digest for name, digest in self.pictures(step).items()}},
                    "changed": {name: hash_tensor(tensor) for name, tensor in sorted(tensors.items())},
                    "frozen": len(facts["frozen"]), "partners": facts.get("partners", []),
                    "cost": facts["cost"], "seconds": facts["seconds"],
                    "peak_memory_gb": facts["peak_memory_gb"], "versions": facts["versions"],
                    **({"mask": facts["mask"]} if facts.get("mask") else {}),
                }
            )  # fmt: skip
        return model, chain, frozen, changed

    def _step(
        self, step: Step, key: str, model: DiffusionModel, out: Output, *, edited: bool
    ) -> tuple[Protection, dict[str, Any]]:
        """Make one protection; its checkpoints lie under its key."""
        from safeweights.diffusion.noise import generator
        from safeweights.diffusion.shots import with_drawn_folder

        forget_peak_memory()
        started, method, seed = time.perf_counter(), self.method(step), self.seed(step)
        folder = out.work / "making" / key[:24]

        def shown(names: list[str]) -> tuple[Concept, ...]:
            concepts, pictures = self.plan.pick(names), describe(method).get("pictures")
            if step.verb not in ("immunize", "freeze") or not edited or not pictures:
                return concepts
            # What an earlier step took out, the model itself can no longer draw.
            sampling = sampling_of(self.base, self.plan.file.generation, {})
            return tuple(
                with_drawn_folder(concept, self.base, sampling, pictures, folder / "drawn", seed) for concept in concepts
            )

        more = {"legal": shown(step.legal)} if step.verb == "freeze" else {}
        concepts = shown(step.concepts)
        own = replace(workspace_in(folder), meter=Meter(model.calls))
        protection = method.protect(model, concepts, retain=self.plan.file.retain, rng=generator(seed), workspace=own, **more)
        partners: tuple[str, ...] = ()
        if step.in_weights:
            from safeweights.freezing.rescale import apply_in_weights

            rewritten, rescaling = apply_in_weights(model, protection.frozen)
            protection, partners = replace(protection, tensors=rewritten.tensors), rescaling.partners
        return protection, {
            "settings": describe(method), "frozen": sorted(protection.frozen), "partners": list(partners),
            "cost": dict(protection.cost),
            "seconds": round(time.perf_counter() - started, 3), "peak_memory_gb": peak_memory_gb(), "versions": versions(),
        }  # fmt: skip

    def _prunes(self, step: Step) -> bool:
        """Whether a step's method prunes."""
        return bool(getattr(self.method(step), "prunes", False))

    @staticmethod
    def _keep_mask(protection: Protection, folder: Path) -> dict[str, Any] | None:
        """Write the mask of a step that prunes, and what undoes it, beside what the step made; what manifests say of it."""
        from safeweights.release.mask_files import write_masks

        shutil.rmtree(folder, ignore_errors=True)
        if protection.mask is None:
            return None
        folder.mkdir(parents=True)
        return write_masks(protection, owner=folder)

    @staticmethod
    def _leave_masks(out: Output, model: DiffusionModel, chain: list[dict[str, Any]]) -> None:
        """What ``prune`` needs, as ``erase --owner`` leaves it: the mask in the model's folder, what undoes it in ``owner``.

        Where several steps prune, the file and the owner's folder have the step's number. A mask that is hidden by noise is the
        owner's alone. The chain is told the files, and whether the finished model is still as this step pruned it.
        """
        from safeweights.release.mask_files import MASK, OWNER, masked_tensors, read_mask, state_of

        pruned = [(number, step) for number, step in enumerate(chain, start=1) if "mask" in step]
        for number, step in pruned:
            kept, alone = out.work / "steps" / step["key"], len(pruned) == 1
            owner = Path("owner") if alone else Path("owner") / f"step-{number}"
            file = read_mask(kept / MASK)
            if step["mask"]["fill"] == "zero":
                name = MASK if alone else f"mask-{number}.safetensors"
                shutil.copyfile(kept / MASK, out.folder / "model" / name)
                step["mask"] |= {"file": name, "sha256": hash_input(kept / MASK)}
            for name in (MASK, OWNER):
                _link(kept / name, out.folder / owner / name)
            step["mask"] |= {"owner": owner.as_posix(), "intact": state_of(masked_tensors(model, file), file) == "pruned"}

    def _manifest(self, folder: Path, chain: list[dict[str, Any]], changed: Mapping[str, Tensor]) -> None:
        recipe = self.plan.recipe
        base = SANDBOX if is_sandbox(recipe.model) else recipe.model
        cost: dict[str, float] = {}
        for step in chain:
            for name, value in step["cost"].items():
                cost[name] = cost.get(name, 0) + value
        manifest = write_manifest(
            folder, command=self.command, method=self.label, concepts=recipe.protected,
            options={"model": recipe.model, "base": base, "settings": self.settings},
            seed=recipe.seed, inputs=self.hashes, tensors=changed, cost=cost, seconds=sum(step["seconds"] for step in chain),
        )  # fmt: skip
        peaks = [step["peak_memory_gb"] for step in chain if step["peak_memory_gb"] is not None]
        manifest |= {
            "peak_memory_gb": max(peaks, default=None),
            "recipe": recipe.model_dump(exclude_defaults=True),
            "chain": chain,
        }
        write_json(folder / "manifest.json", manifest)

    @property
    def label(self) -> str:
        """What reports call the methods together."""
        return "+".join(dict.fromkeys(step.method for step in self.plan.recipe.steps))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of every step after defaults."""
        return {
            f"{n} {step.verb} {step.method}": describe(self.method(step))
            for n, step in enumerate(self.plan.recipe.steps, start=1)
        }

    def _write_frozen(
        self, folder: Path, model: DiffusionModel, chain: list[dict[str, Any]], frozen: Mapping[int, list[str]]
    ) -> None:
        """``MASK.json`` for the model that is released: what the last freeze step says must not be trained.

        Where several steps freeze, the earlier ones' masks have the step's number. The last one's also lies beside every whole
        model that leaves the house.
        """
        from safeweights.freezing.guard import mask_of
        from safeweights.records.mask import NAME, with_partners

        for number, names in frozen.items():
            step, made = self.plan.recipe.steps[number - 1], chain[number - 1]
            mask = mask_of(
                model, frozenset(names), step.method, made["options"]["settings"], illegal=step.concepts, legal=step.legal,
                base_sha256=hash_input(folder / "model"), made={name: made[name] for name in _MADE},
            )  # fmt: skip
            mask = with_partners(mask, made["partners"])
            last = number == max(frozen)
            write_json(folder / (NAME if last else f"MASK-{number}.json"), mask.as_json())
            for place in (folder / "model", folder / "release" / "diffusers") if last else ():
                if place.is_dir():
                    write_json(place / NAME, replace(mask, base_sha256=hash_input(place)).as_json())

    def cells(self, inputs: Mapping[str, str], sampling: Sampling) -> list[Cell]:
        """The cells of the audit."""
        from safeweights.audit.suites import plan

        assert self.plan.suite is not None
        return plan(
            self.plan.suite, self.plan.pick(self.plan.recipe.audited()), self.plan.file, sampling=sampling,
            seed=self.plan.recipe.seed, inputs=inputs, latent_pixels=self.pixels,
        )  # fmt: skip

    def _audit(
        self, out: Output, model: DiffusionModel, chain: list[dict[str, Any]], frozen: Mapping[int, list[str]]
    ) -> tuple[dict[str, Any], Verdict | None]:
        from safeweights.audit.audit import Names
        from safeweights.audit.suites import Job
        from safeweights.metrics.backbones import default_backbones
        from safeweights.records.store import Store
        from safeweights.release.manifest import protection_records

        recipe, suite = self.plan.recipe, self.plan.suite
        assert suite is not None
        assert recipe.audit is not None
        names = Names(
            model=recipe.name, reference=recipe.model, method=self.label, method_settings=self.settings,
            hashes={"model": str(hash_input(out.folder / "model")), **self.hashes},
        )  # fmt: skip
        job = Job(
            model=model, reference=self.base, file=self.plan.file, names=names, folder=out.work / "result",
            cells=self.cells(names.hashes, sampling_of(self.base, self.plan.file.generation, {})),
            work=workspace_in(out.work / "audit"), backbones=default_backbones(self.plan.file),
            allow_python_detectors=self.allow_python_detectors, benign_steps=suite.benign_steps,
        )  # fmt: skip
        result, verdict = conduct(job, suite, recipe.audit.suite, self.plan.policy)
        store = Store(out.folder)
        for record in job.records():
            store.add(record)
            for artefact in record.artefacts:
                _link(job.folder / artefact.path, out.folder / artefact.path)
        for step in chain:
            for record in protection_records(step, self.plan.file, model=recipe.name, reference=recipe.model):
                store.add(record)
        for record in self._maps(out, model, chain, frozen):
            store.add(record)
        return result, verdict

    def _maps(
        self, out: Output, model: DiffusionModel, chain: list[dict[str, Any]], frozen: Mapping[int, list[str]]
    ) -> Iterator[Record]:
        """For every step that freezes or prunes a record of how much, with a map of where."""
        from safeweights.records.depth_map import depth_map
        from safeweights.release.mask_files import MASK, read_mask

        sizes = {name: float(p.numel()) for name, p in model.named_parameters()}
        for number, (step, made) in enumerate(zip(self.plan.recipe.steps, chain, strict=True), start=1):
            if number in frozen:
                what, kind = dict.fromkeys(frozen[number], 1.0), FREEZE
                whole, said = dict.fromkeys(sizes, 1.0), "Share of tensors that are frozen"
            elif made.get("mask", {}).get("fill") == "zero":  # noise hides the places, also from readers
                where = read_mask(out.work / "steps" / made["key"] / MASK).mask.indices
                what, kind = {name: float(len(places)) for name, places in where.items()}, PRUNE
                whole, said = sizes, "Share of weights that are pruned"
            else:
                continue
            names = [name for name in whole if name.startswith("unet.")]
            share = sum(what.values()) / sum(whole[name] for name in names)
            yield Record(
                kind=kind, status="ok", model=self.plan.recipe.name, reference=self.plan.recipe.model, method=step.method,
                concept=", ".join(step.concepts), concept_kind="", attack="", seed=made["seed"],
                settings={"method": made["options"]["settings"]},
                measurements=(Measurement(name="masked_share", value=share, n=1, why=""),),
                details={"plots": [depth_map(what, whole, f"{said}: {step.method}")]},
                provenance={"inputs": made["inputs"], "versions": made["versions"]},
            )  # fmt: skip

    def _release(self, folder: Path, target: Path) -> dict[str, str]:
        """Every form of the release by ``export``, with a card that shows the records."""
        from safeweights.cli import export

        recipe, made = self.plan.recipe, {}
        base = Path(recipe.model).expanduser()
        for form in recipe.release.formats:
            place = Path("release") / (f"{recipe.name}.safetensors" if form == "single-file" else form)
            # Inside the folder, so that what is written names no place that is about to be renamed.
            with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
                export.command(
                    "model", place, form, base=str(base.resolve()) if base.exists() else recipe.model, title=recipe.name,
                    records=Path() if form == "diffusers" and self.plan.suite else None, device=self.device,
                )  # fmt: skip
            made[form] = str(target / place)
        return made

    def _leave_recipe(self, folder: Path) -> None:
        """The recipe travels with every folder that was made by it; a single file has it in its manifest."""
        from safeweights.release.manifest import NAME as MANIFEST
        from safeweights.release.manifest import hash_files, read_manifest
        from safeweights.release.recipe import NAME

        for place in (folder, folder / "model", *(path for path in sorted((folder / "release").glob("*")) if path.is_dir())):
            shutil.copyfile(self.plan.path, place / NAME)
            manifest = read_manifest(place)
            if "files" in manifest:  # 'verify' asks for every file that is there, and for no other
                write_json(place / MANIFEST, manifest | {"files": hash_files(place)})

    def estimate(self) -> dict[str, Any]:
        """The plan: for each step and for the audit about how many model calls, and from a few of them how many seconds."""
        from safeweights.audit.suites import seconds_per_call
        from safeweights.release.recipe import method_calls

        one = seconds_per_call(self.base)
        steps: list[dict[str, Any]] = []
        for step in self.plan.recipe.steps:
            calls = method_calls(self.method(step), len({*step.concepts, *step.legal}))
            steps.append({"step": step.title, "calls": calls, "seconds": round(calls * one, 1)})
        audit: dict[str, Any] | None = None
        if self.plan.suite is not None and self.plan.recipe.audit is not None:
            cells = self.cells(self.hashes, sampling_of(self.base, self.plan.file.generation, {}))
            calls = sum(cell.calls for cell in cells)
            audit = {
                "suite": self.plan.recipe.audit.suite, "cells": len(cells), "calls": calls, "seconds": round(calls * one, 1),
                "plan": [{"cell": cell.title, "calls": cell.calls} for cell in cells],
            }  # fmt: skip
        parts = [*steps, *([audit] if audit else [])]
        return {
            "steps": steps, "audit": audit, "release": list(dict.fromkeys(["diffusers", *self.plan.recipe.release.formats])),
            "calls": sum(part["calls"] for part in parts), "seconds": round(sum(part["seconds"] for part in parts), 1),
            "seconds_per_call": one,
        }  # fmt: skip


def estimate_lines(estimate: Mapping[str, Any]) -> list[str]:
    """The plan for a reader."""
    told = [
        f"step {number}: {part['step']}: about {part['calls']} model calls, {part['seconds']:.0f} s"
        for number, part in enumerate(estimate["steps"], start=1)
    ]
    if (audit := estimate["audit"]) is not None:
        told.append(
            f"audit {audit['suite']}: {audit['cells']} cells, about {audit['calls']} model calls, {audit['seconds']:.0f} s"
        )
        told += [f"  {cell['cell']}: {cell['calls']}" for cell in audit["plan"]]
    told.append(f"release: {', '.join(estimate['release'])}")
    total = f"{estimate['calls']} model calls of {1000 * estimate['seconds_per_call']:.2f} ms"
    return [*told, f"together about {estimate['seconds'] / 60:.1f} min ({total}; detectors and decoding not counted)"]


def _told(step: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON of ``run`` says of a step."""
    kept = ("verb", "method", "concepts", "key", "frozen", "seconds", "mask")
    return {**{name: step[name] for name in kept if name in step}, "changed": len(step["changed"])}


def _link(source: Path, place: Path) -> None:
    """Have a file or folder at another place too, without using the disk twice where the system can do that."""

    def one(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except FileExistsError:
            pass
        except OSError:
            shutil.copyfile(old, new)

    if source.is_dir():
        shutil.copytree(source, place, copy_function=one, dirs_exist_ok=True)
    elif source.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        one(str(source), str(place))
