"""``safeweights demo``: the whole job on the sandbox in a few minutes: protect, judge, attack, report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeweights.cli import options
from safeweights.cli.common import SANDBOX, names_of, sampling_of, say, speaking, workspace_in
from safeweights.cli.erase import erase
from safeweights.release.manifest import hash_input
from safeweights.release.output import check_target, output_folder, write_json

if TYPE_CHECKING:
    from safeweights.core.concept import ConceptFile
    from safeweights.core.model import DiffusionModel
    from safeweights.core.workspace import Workspace

PROTECTIONS = (("esd", "mosaic"), ("uce", "mosaic"), ("esd", "emblem"))
ATTACKS = ("no-attack", "random", "seed-search", "unlearndiffatk", "soft-prompt")
IMAGES = 6
"""Pictures a prompt that every attack but no-attack may have judged; small, so that two cores are done within ten minutes."""
SETTINGS: dict[str, dict[str, Any]] = {
    "no-attack": {},
    "random": {"images": IMAGES},
    "seed-search": {"images": IMAGES},
    "unlearndiffatk": {"timesteps": IMAGES - 1, "steps": 20},
    "soft-prompt": {"images": IMAGES},
}


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = Path("safeweights-demo"),
    n: Annotated[int, typer.Option("--n", min=1, help="Pictures of an erased concept; half as many prompts are attacked.")] = 16,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Erase two concepts from the sandbox, attack the result and write OUTPUT/report.html."""
    with speaking(as_json) as show:
        check_target(output, overwrite)
        from safeweights.sandbox.files import model_folder, sandbox_concepts

        chosen = {"n": n, "seed": seed, "sandbox": hash_input(model_folder())}
        started = time.perf_counter()
        with output_folder(output, overwrite=overwrite, resume=resume, options=chosen) as out:
            # Finished stages stay in the work folder, where an interrupted run finds them.
            job = Demo(out.work / "result", sandbox_concepts(), n, seed, device, workspace_in(out.work / "drawn"))
            job.run()
            concepts, summary = job.concepts(), job.summary()
            shutil.copytree(job.folder, out.folder, dirs_exist_ok=True)
        report, seconds = output / "report.html", round(time.perf_counter() - started, 1)
        show(
            {"report": str(report), "concepts": concepts, "seconds": seconds},
            summary,
            f"done in {seconds:.0f} s; open {report}",
        )


@dataclass(frozen=True)
class Demo:
    """The stages, each in a folder of its own under ``folder``; one that is finished is not repeated."""

    folder: Path
    file: ConceptFile
    n: int
    seed: int
    device: str
    workspace: Workspace

    def run(self) -> None:
        """All stages in order."""
        from safeweights.report.page import write_report

        self.folder.mkdir(parents=True, exist_ok=True)
        for method, concept in PROTECTIONS:
            self.protect(method, concept)
            self.judge(method, concept)
            for attack in ATTACKS:
                self.attack(method, concept, attack)
            self.doubt(method, concept)
        write_report(self.folder)

    def protect(self, method: str, concept: str) -> None:
        """Erase the concept and note what that cost."""
        from safeweights.records.store import Store
        from safeweights.release.manifest import protection_records

        name = f"{method}-{concept}"
        folder = self.folder / "models" / name
        if not (folder / "manifest.json").is_file():
            say(f"erasing {concept} with {method}", always=True)
            manifest = erase(
                SANDBOX, [concept], self.file, method, {}, output=folder, seed=self.seed, device=self.device, resume=True,
                command=["safeweights", "erase", SANDBOX, "--concept", concept, "--method", method, "-o", name],
            )  # fmt: skip
            say(f"  {manifest['seconds']:.0f} s", always=True)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for record in protection_records(manifest, self.file, model=name, reference=SANDBOX):
            Store(self.folder).add(record)

    def judge(self, method: str, concept: str) -> None:
        """Ask plainly for the erased concept and for everything else."""
        from safeweights.audit.evaluate import evaluate
        from safeweights.records.store import Store

        def stage(model: DiffusionModel) -> dict[str, Any]:
            return evaluate(
                model, self.reference, self.file.pick([concept]), self.file, names=self.names(method, concept, model),
                sampling=sampling_of(self.reference, self.file.generation, {}), n=self.n, retain_n=max(1, self.n // 8),
                seed=self.seed, store=Store(self.folder), workspace=self.workspace,
            )  # fmt: skip

        self.once(f"judging {concept} after {method}", f"evaluate/{method}-{concept}.json", method, concept, stage)

    def attack(self, method: str, concept: str, attack: str) -> None:
        """Try to bring the erased concept back."""
        from safeweights.audit.audit import audit
        from safeweights.core.table import ATTACKS, configure, resolve
        from safeweights.records.store import Store

        def stage(model: DiffusionModel) -> dict[str, Any]:
            pixels = model.latent_shape[1] * model.latent_shape[2]
            return audit(
                model, self.reference, self.file.pick([concept])[0],
                configure(resolve(ATTACKS, attack, "attack"), SETTINGS[attack], latent_pixels=pixels),
                names=self.names(method, concept, model), sampling=sampling_of(self.reference, self.file.generation, {}),
                n=max(1, self.n // 2), seed=self.seed, store=Store(self.folder), workspace=self.workspace,
            ).details  # fmt: skip

        self.once(
            f"attacking {concept} after {method}: {attack}", f"attack/{method}-{concept}-{attack}.json", method, concept, stage
        )

    def doubt(self, method: str, concept: str) -> None:
        """Mark attacks that do worse than a simpler one."""
        from safeweights.audit.doubts import weak_attack
        from safeweights.records.store import Store

        store = Store(self.folder)
        records = [
            record
            for record in store.records()
            if record.kind == "attack" and record.model == f"{method}-{concept}" and record.concept == concept
        ]
        found = weak_attack(records)
        for record in records:
            others = tuple(doubt for doubt in record.doubts if doubt.name != "weak_attack")
            if found.get(record.attack):
                store.add(replace(record, doubts=(*others, *found[record.attack])))

    def once(self, what: str, file: str, method: str, concept: str, stage: Callable[[DiffusionModel], dict[str, Any]]) -> None:
        """Run a stage on a protected model unless its result is there."""
        path = self.folder / file
        if path.is_file():
            return
        say(what, always=True)
        started = time.perf_counter()
        result = stage(self.protected(method, concept))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        say(f"  {time.perf_counter() - started:.0f} s", always=True)

    @cached_property
    def reference(self) -> DiffusionModel:
        from safeweights.models.door import open_model

        return open_model(SANDBOX, device=self.device)

    def protected(self, method: str, concept: str) -> DiffusionModel:
        from safeweights.models.door import open_model

        return open_model(self.folder / "models" / f"{method}-{concept}", device=self.device)

    def names(self, method: str, concept: str, model: DiffusionModel) -> Any:
        """Names that do not depend on where the demo is written."""
        folder = str(self.folder / "models" / f"{method}-{concept}")
        return replace(names_of(folder, SANDBOX, model, self.reference, self.file), model=f"{method}-{concept}")

    def concepts(self) -> dict[str, Any]:
        """By concept and method: its rate before, after and under each attack."""
        found: dict[str, Any] = {}
        for method, concept in PROTECTIONS:
            judged = json.loads((self.folder / f"evaluate/{method}-{concept}.json").read_text(encoding="utf-8"))
            attacks = {
                attack: json.loads((self.folder / f"attack/{method}-{concept}-{attack}.json").read_text(encoding="utf-8"))["asr"]
                for attack in ATTACKS
            }
            found.setdefault(concept, {})[method] = {
                **judged["concepts"][concept], "retention": judged["retention"]["rate"], "attacks": attacks,
            }  # fmt: skip
        return found

    def summary(self) -> str:
        """The verdicts in words."""
        from safeweights.records.store import Store
        from safeweights.report.tables import summary

        return summary(Store(self.folder).records())
