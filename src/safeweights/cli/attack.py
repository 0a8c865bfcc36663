"""``safeweights attack``: try to bring an erased concept back with prompts alone."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safeweights.cli import options
from safeweights.cli.common import (
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
)  # fmt: skip
from safeweights.core.errors import UserError
from safeweights.core.table import ATTACKS, configure, describe, parse_settings, resolve
from safeweights.release.output import check_target, output_folder, write_json

if TYPE_CHECKING:
    from safeweights.records.record import Record


@options.sampling
def command(
    model: options.Model,
    reference: options.Reference,
    concept: options.OneConcept,
    output: options.Output,
    method: Annotated[str, typer.Option("--method", help=f"One of {', '.join(ATTACKS)}.", show_default=False)],
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Prompts to attack. [default: all test prompts of the concept]")
    ] = None,
    settings: options.Settings = None,
    feature_model: options.FeatureModel = None,
    likeness: Annotated[
        Literal["clean", "paper"],
        typer.Option(help="Re-learnt pictures are compared as they are, or as the published evaluation shows them."),
    ] = "clean",
    concepts_file: options.ConceptsFile = None,
    allow_python_detectors: options.AllowPython = False,
    given: options.Given = options.NOTHING,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Attack one concept of a protected model; a detector decides what counts as success."""
    from safeweights.detectors.load import open_detector
    from safeweights.metrics.backbones import Backbones, default_backbones
    from safeweights.models.door import open_model
    from safeweights.records.store import Store

    with speaking(as_json) as show:
        check_target(output, overwrite)
        check_sampling(given)
        if len(set(concept)) != 1:
            raise UserError("attack takes one --concept; run it once for each")
        file = concept_file(concepts_file, model, reference)
        (aim,) = with_detector(file, concept)
        kind = resolve(ATTACKS, method, "attack")
        configure(kind, parse_settings(settings or ()))  # a wrong setting is told before anything is opened
        features = Backbones(features=feature_model or default_backbones(file).features)
        embedder = features.open_features() if kind.access == "weights" else None
        detector = open_detector(aim.detector, concept=aim, allow_python=allow_python_detectors)
        before = open_model(reference, device=device, dtype=dtype)
        after = open_model(model, device=device, dtype=dtype)
        pixels = after.latent_shape[1] * after.latent_shape[2]
        attack = configure(kind, parse_settings(settings or ()), latent_pixels=pixels)
        sampling = sampling_of(before, file.generation, given)
        names = names_of(model, reference, after, before, file)
        chosen: dict[str, Any] = {
            "model": model, "reference": reference, "concept": aim.name, "method": method, "settings": describe(attack),
            "n": n, "feature_model": feature_model, "likeness": likeness, "sampling": asdict(sampling), "seed": seed,
            "inputs": dict(names.hashes),
        }  # fmt: skip
        from safeweights.audit.audit import audit
        from safeweights.metrics.similarity_gap import CosineSimilarity

        with output_folder(output, overwrite=overwrite, resume=resume, options=chosen) as out:
            store = Store(out.folder)
            for record in protection_records_of(model, reference, file):
                store.add(record)
            say(f"attacking {aim.name} with {method}")
            record = audit(
                after, before, aim, attack, names=names, sampling=sampling, n=n, seed=seed,
                store=store, workspace=workspace_in(out.work), detector=detector,
                similarity=CosineSimilarity(embedder, likeness) if embedder else None,
            )  # fmt: skip
            write_json(out.folder / "attack.json", record.details)
            write_found(out.folder / "prompts.csv", record.details.get("found", ()))
        show(record.details, *_lines(record), f"records and pictures: {output}")


def write_found(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """The adversarial prompts that succeeded that are text, in the columns that ``generate --prompts-csv`` and others read."""
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(["case_number", "prompt", "evaluation_seed", "evaluation_guidance", "original_prompt"])
        for number, row in enumerate(found):
            if row["success"] and row.get("input", "text") == "text":
                writer.writerow([number, row["adversarial_prompt"], row["adversarial_seed"], row["guidance"], row["prompt"]])


def _lines(record: Record) -> list[str]:
    details = record.details
    low, high = details["asr"]["ci95"]
    lines = [
        f"{details['attack']} on {details['concept']}: {percent(details['asr']['rate'])} of {details['n']} prompts succeed "
        f"(95 % interval {percent(low)} to {percent(high)}), {percent(details['pre_asr']['rate'])} without the attack",
    ]
    if details.get("curve"):
        back = details["steps_to_recovery"]
        steps = ", ".join(f"{point['steps']}: {percent(point['rate'])}" for point in details["curve"])
        lines.append(
            f"after so many steps of fine-tuning {steps}; {'never back' if back is None else f'back after {back} steps'}"
        )
    return [*lines, *(f"doubt {doubt.name}: {doubt.explanation}" for doubt in record.doubts)]
