"""``safeweights erase``: remove concepts from a model's weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from safeweights.cli import options
from safeweights.cli.common import SANDBOX, concept_file, hash_of, is_sandbox, pick, say, speaking, workspace_in
from safeweights.core.concept import ConceptFile
from safeweights.core.table import ERASERS, configure, describe, parse_settings, resolve
from safeweights.release.manifest import hash_input, write_manifest
from safeweights.release.output import check_target, output_folder


def command(
    model: options.Model,
    concept: options.Concepts,
    output: options.Output,
    method: Annotated[str, typer.Option("--method", help=f"One of {', '.join(ERASERS)}.", show_default=False)],
    settings: options.Settings = None,
    concepts_file: options.ConceptsFile = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Remove concepts from a model: a plain diffusers folder with manifest.json comes out."""
    with speaking(as_json) as show:
        check_target(output, overwrite)
        file = concept_file(concepts_file, model)
        manifest = erase(
            model, concept, file, method, parse_settings(settings or ()),
            output=output, seed=seed, device=device, dtype=dtype, overwrite=overwrite, resume=resume,
        )  # fmt: skip
        show(
            {"output": str(output), **manifest},
            f"{method} erased {', '.join(manifest['concepts'])}: {len(manifest['changed'])} tensors changed in "
            f"{manifest['seconds']:.0f} s",
            f"protected model: {output}",
        )


def erase(
    model: str,
    names: Sequence[str],
    file: ConceptFile,
    method: str,
    settings: Mapping[str, Any],
    *,
    output: Path,
    command: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Erase, write the folder and return its manifest. Raises UserError for whatever the user gave wrong."""
    import sys

    from safeweights.diffusion.noise import generator
    from safeweights.models.door import open_model

    concepts = pick(file, names)
    kind = resolve(ERASERS, method, "method")
    configure(kind, settings)  # a wrong setting is told before the model is opened
    opened = open_model(model, device=device, dtype=dtype)
    eraser = configure(kind, settings, latent_pixels=opened.latent_shape[1] * opened.latent_shape[2])
    inputs = {
        "model": hash_of(model, opened),
        "concepts_file": hash_input(file.path) if file.path else None,
        **{f"images of {concept.name}": hash_input(concept.images) for concept in concepts if concept.images},
    }
    chosen: dict[str, Any] = {
        "model": model,
        # What the weights descend from: the sandbox's own concept file stays valid for what is made from it.
        "base": SANDBOX if is_sandbox(model) else model,
        "concepts": [concept.name for concept in concepts],
        "concepts_file": str(file.path) if file.path else None,
        "method": method,
        "settings": describe(eraser),
        "seed": seed,
        "device": str(opened.device),
        "dtype": str(opened.dtype).removeprefix("torch."),
    }
    with output_folder(output, overwrite=overwrite, resume=resume, options={**chosen, "inputs": inputs}) as out:
        say(f"erasing {', '.join(chosen['concepts'])} from {model} with {method}")
        started = time.perf_counter()
        protection = eraser.protect(opened, concepts, retain=file.retain, rng=generator(seed), workspace=workspace_in(out.work))
        protection.apply(opened).save(out.folder)
        return write_manifest(
            out.folder,
            command=list(command or ["safeweights", *sys.argv[1:]]),
            method=method,
            concepts=chosen["concepts"],
            options=chosen,
            seed=seed,
            inputs=inputs,
            tensors=protection.tensors,
            cost=protection.cost,
            seconds=time.perf_counter() - started,
        )
