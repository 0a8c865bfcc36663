"""``safeweights evaluate``: is the concept gone when asked for plainly, and did the rest stay?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

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
from safeweights.core.concept import ConceptFile
from safeweights.core.errors import UserError
from safeweights.release.manifest import read_manifest
from safeweights.release.output import check_target, output_folder, write_json


@options.sampling
def command(
    model: options.Model,
    reference: options.Reference,
    output: options.Output,
    concept: Annotated[
        list[str] | None,
        typer.Option(
            "--concept", help="An erased concept; repeat for several. [default: those the model's manifest names, else all]"
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Pictures of each erased concept.")] = 32,
    retain_n: Annotated[
        int | None,
        typer.Option("--retain-n", min=1, help="Pictures of every other concept. [default: a quarter of --n, at least 4]"),
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
) -> None:
    """Judge a protected model against its reference: rates of the erased concepts, retention and picture quality."""
    from safeweights.audit.evaluate import evaluate
    from safeweights.models.door import open_model
    from safeweights.records.store import Store

    with speaking(as_json) as show:
        check_target(output, overwrite)
        check_sampling(given)
        file = concept_file(concepts_file, model, reference)
        concepts = with_detector(file, concept or protected(model, file))
        check_detectors(file, allow_python_detectors)
        backbones = backbones_of(file, clip_model, feature_model)
        before = open_model(reference, device=device, dtype=dtype)
        after = open_model(model, device=device, dtype=dtype)
        sampling = sampling_of(before, file.generation, given)
        names = names_of(model, reference, after, before, file)
        chosen: dict[str, Any] = {
            "model": model, "reference": reference, "concepts": [item.name for item in concepts], "n": n, "retain_n": retain_n,
            "backbones": asdict(backbones), "sampling": asdict(sampling), "seed": seed, "inputs": dict(names.hashes),
        }  # fmt: skip
        with output_folder(output, overwrite=overwrite, resume=resume, options=chosen) as out:
            store = Store(out.folder)
            for record in protection_records_of(model, reference, file):
                store.add(record)
            say(f"judging {', '.join(chosen['concepts'])} and what must stay")
            result = evaluate(
                after, before, concepts, file, names=names, sampling=sampling, n=n, retain_n=retain_n, seed=seed,
                store=store, workspace=workspace_in(out.work), backbones=backbones,
                allow_python_detectors=allow_python_detectors,
            )  # fmt: skip
            write_json(out.folder / "evaluate.json", result)
        show(result, *summary(result), f"records and pictures: {output}")


def check_detectors(file: ConceptFile, allow_python: bool) -> None:
    """Refuse, before any work is done, detectors that are code and not allowed."""
    for concept in file.concepts.values():
        if concept.detector is not None and concept.detector.type == "python" and not allow_python:
            raise UserError(
                f"concept {concept.name!r}: its detector {concept.detector.model!r} is code; "
                "allow it with --allow-python-detectors if you trust it"
            )


def protected(model: str, file: ConceptFile) -> Sequence[str] | None:
    """The concepts that the model's manifest says it was protected against, as far as the file knows them."""
    names = [str(name) for name in read_manifest(str(Path(model).expanduser())).get("concepts", ())]
    return [name for name in names if name in file.concepts] or None


def summary(result: Mapping[str, Any]) -> list[str]:
    """The JSON of ``evaluate`` for a reader."""
    lines = [
        f"{name}: {percent(entry['rate'])} of {entry['n']} pictures show it ({percent(entry['reference_rate'])} before)"
        for name, entry in result["concepts"].items()
    ]
    retention, clip, frechet = result["retention"], result["clip_score"], result["frechet_distance"]
    if retention["rate"] is not None:
        lines.append(
            f"retained: {percent(retention['rate'])} of {retention['n']} pictures ({percent(retention['relative'])} of before)"
        )
    if clip["model"] is not None:
        lines.append(f"CLIP score: {clip['model']:.3f} ({clip['reference']:.3f} before, cosine)")
    if frechet["value"] is not None:
        lines.append(f"Frechet distance: {frechet['value']:.3g} ({frechet['features']}, {frechet['n']} pictures)")
    return lines
