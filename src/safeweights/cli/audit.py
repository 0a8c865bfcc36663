"""``safeweights audit``: a whole suite of attacks and everyday events against a protected model, and what a policy says of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeweights.cli import options
from safeweights.cli.common import (
    backbones_of,
    check_sampling,
    concept_file,
    names_of,
    percent,
    protection_records_of,
    sampling_of,
    say,
    speaking,
    with_detector,
    workspace_in,
)
from safeweights.cli.evaluate import check_detectors, protected
from safeweights.core.errors import UserError
from safeweights.release.output import check_target, output_folder, write_json

if TYPE_CHECKING:
    from safeweights.audit.policy import Policy, Verdict
    from safeweights.audit.suites import Job, Suite


@options.sampling
def command(
    model: options.Model,
    reference: options.Reference,
    output: options.Output,
    suite: Annotated[str, typer.Option("--suite", help="quick, standard or full.")] = "quick",
    concept: Annotated[
        list[str] | None,
        typer.Option("--concept", help="A protected concept; repeat for several. [default: those the model's manifest names]"),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="Thresholds (YAML) that the records must keep; exit 1 where one does not.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Pictures of each concept. [default: the suite's]")] = None,
    prompts: Annotated[
        int | None, typer.Option("--prompts", min=1, help="Prompts attacked for each concept. [default: the suite's]")
    ] = None,
    replay: Annotated[
        list[Path] | None,
        typer.Option("--replay", help="The attack.json of an attack on another model, asked again of this one; repeatable."),
    ] = None,
    clip_model: options.ClipModel = None,
    feature_model: options.FeatureModel = None,
    concepts_file: options.ConceptsFile = None,
    allow_python_detectors: options.AllowPython = False,
    given: options.Given = options.NOTHING,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> int:
    """Attack a protected model in every way of a suite, judge what stayed, and hold it all against a policy."""
    from safeweights.audit.policy import load_policy
    from safeweights.audit.suites import pick_suite, plan
    from safeweights.models.door import open_model
    from safeweights.records.store import Store

    with speaking(as_json) as show:
        check_target(output, overwrite)
        check_sampling(given)
        chosen_suite = pick_suite(suite).sized(n=n, prompts=prompts)
        rules = load_policy(policy) if policy else None
        replays = read_replays(replay or ())
        file = concept_file(concepts_file, model, reference)
        concepts = with_detector(file, concept or protected(model, file))
        check_detectors(file, allow_python_detectors)
        backbones = backbones_of(file, clip_model, feature_model)
        before = open_model(reference, device=device, dtype=dtype)
        after = open_model(model, device=device, dtype=dtype)
        sampling = sampling_of(before, file.generation, given)
        names = names_of(model, reference, after, before, file)
        cells = plan(
            chosen_suite, concepts, file, sampling=sampling, seed=seed, inputs=names.hashes,
            latent_pixels=after.latent_shape[1] * after.latent_shape[2], replays=replays,
        )  # fmt: skip
        chosen: dict[str, Any] = {
            "model": model, "reference": reference, "suite": suite, "concepts": [item.name for item in concepts],
            "n": n, "prompts": prompts, "replay": replays, "backbones": asdict(backbones),
            "sampling": asdict(sampling), "seed": seed, "inputs": dict(names.hashes),
        }  # fmt: skip
        with output_folder(output, overwrite=overwrite, resume=resume, options=chosen) as out:
            from safeweights.audit.suites import Job

            # Records stay in the work folder until the end, where an interrupted run finds them.
            job = Job(
                model=after, reference=before, file=file, cells=cells, names=names, folder=out.work / "result",
                work=workspace_in(out.work), backbones=backbones, allow_python_detectors=allow_python_detectors,
                benign_steps=chosen_suite.benign_steps,
            )  # fmt: skip
            for record in protection_records_of(model, reference, file):
                Store(job.folder).add(record)
            result, verdict = conduct(job, chosen_suite, suite, rules)
            write_json(job.folder / "audit.json", result)
            if verdict is not None:
                write_json(job.folder / "policy.json", verdict.to_json())
            finish(job.folder, out.folder)
        show(result, *lines(result, verdict), f"report: {output / 'report.html'}")
        return exit_code(result)


def conduct(job: Job, suite: Suite, name: str, policy: Policy | None) -> tuple[dict[str, Any], Verdict | None]:
    """Measure what is open of an audit, hold the records against the policy, and return the JSON of ``audit``."""
    from safeweights.audit.policy import judge
    from safeweights.audit.suites import summarise

    started = time.perf_counter()
    for _, said in job.run(lambda line: say(line, always=True)):
        say(f"  {said}", always=True)
    records = job.records()
    verdict = judge(policy, records) if policy else None
    names = list(dict.fromkeys(name for cell in job.cells for name in cell.concepts))
    return {
        "model": job.names.model,
        "suite": {"name": name, "n": suite.n, "prompts": suite.prompts, "cells": len(job.cells)},
        **summarise(records, names),
        "policy": verdict.to_json() if verdict else None,
        "seconds": round(time.perf_counter() - started, 3),
    }, verdict


def finish(result: Path, folder: Path) -> None:
    """Copy what was measured into the output folder and write its report."""
    from safeweights.report.page import write_report

    shutil.copytree(result, folder, dirs_exist_ok=True)
    write_report(folder)


def exit_code(result: Mapping[str, Any]) -> int:
    """1 where the policy says no or something could not be measured."""
    failed = any(entry["failed"] for entry in result["concepts"].values())
    return 1 if failed or (result["policy"] is not None and not result["policy"]["passed"]) else 0


def read_replays(paths: Sequence[Path]) -> dict[str, str]:
    """The records to replay by concept. Raises UserError for what is no record of an attack."""
    found: dict[str, str] = {}
    for path in paths:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found[str(data["concept"])] = str(path)
        except OSError as error:
            raise UserError(f"--replay {path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--replay {path} is no attack.json of an attack") from None
    return found


def lines(result: Mapping[str, Any], verdict: Verdict | None) -> list[str]:
    """The JSON of ``audit`` for a reader."""
    told = []
    for name, entry in result["concepts"].items():
        worst = entry["worst_attack"]
        plain = f"{percent(entry.get('rate'))} asked plainly ({percent(entry.get('reference_rate'))} before)"
        if worst is None:
            told.append(f"{name}: {plain}; no attack was measured")
            continue
        low, high = worst["ci95"]
        told.append(
            f"{name}: {plain}; worst is {worst['attack']} ({worst['mode']}): {percent(worst['rate'])} of {worst['n']} "
            f"(95 % interval {percent(low)} to {percent(high)})"
        )
        told += [f"{name}: {label} was not measured: {error}" for label, error in entry["failed"].items()]
    if (stayed := result["retention"]) and stayed["rate"] is not None:
        told.append(f"retained: {percent(stayed['rate'])} of {stayed['n']} pictures ({percent(stayed['relative'])} of before)")
    if verdict is not None:
        told += verdict.lines()
        told.append(f"policy: {'passed' if verdict.passed else 'FAILED'}")
    return told
