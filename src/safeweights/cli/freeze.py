"""``safeweights freeze``: choose what fine-tuning must leave alone, check who did, and put the freeze into the weights."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeweights.cli import options
from safeweights.cli.common import (
    SANDBOX,
    concept_file,
    hash_of,
    is_sandbox,
    model_path,
    percent,
    pick,
    sampling_of,
    say,
    speaking,
    workspace_in,
)
from safeweights.core.table import GUARDS, configure, describe, parse_settings, resolve
from safeweights.records.mask import NAME, note_other_base, read_mask, with_partners
from safeweights.release.manifest import hash_input, read_manifest, write_manifest
from safeweights.release.output import check_file_target, check_target, output_file, output_folder, write_json

if TYPE_CHECKING:
    from safeweights.core.model import DiffusionModel

app = typer.Typer(help="Freeze the tensors that illegal fine-tuning needs.", no_args_is_help=True, rich_markup_mode=None)

MaskFile = Annotated[Path, typer.Argument(help="The MASK.json of 'freeze learn'.", show_default=False)]
Base = Annotated[str, typer.Argument(help="The model that was fine-tuned, as for MODEL elsewhere.", show_default=False)]


@app.command("learn")
def learn(
    model: options.Model,
    illegal: Annotated[
        list[str], typer.Option("--illegal", help="A concept nobody may fine-tune on; repeat for several.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The mask file to write.", show_default=False)],
    legal: Annotated[
        list[str] | None,
        typer.Option("--legal", help="A concept that fine-tuning must still learn; repeat for several. [default: none]"),
    ] = None,
    ratio: Annotated[float, typer.Option("--ratio", help="Share of the UNet to freeze, above 0 and below 1.")] = 0.3,
    budget: Annotated[str, typer.Option("--budget", help="What the share counts: tensors or parameters.")] = "tensors",
    method: Annotated[str, typer.Option("--method", help=f"One of {', '.join(GUARDS)}.")] = "freezeasguard",
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="Who draws concepts without pictures. [default: MODEL, or what it was before protection]"
        ),
    ] = None,
    settings: options.Settings = None,
    concepts_file: options.ConceptsFile = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Learn which UNet tensors to freeze, so that illegal concepts are not learnt and legal ones still are; writes MASK.json."""
    from safeweights.diffusion.noise import generator
    from safeweights.diffusion.shots import with_drawn_folder
    from safeweights.freezing.guard import mask_of, unet_shapes
    from safeweights.models.door import open_model
    from safeweights.records.machine import peak_memory_gb, versions

    with speaking(as_json) as show:
        check_file_target(output, overwrite)
        given = {**parse_settings(settings or ()), "ratio": ratio, "budget": budget}
        kind = resolve(GUARDS, method, "method")
        configure(kind, given)
        file = concept_file(concepts_file, model)
        banned, allowed = pick(file, illegal), pick(file, legal or ())
        opened = open_model(model, device=device, dtype=dtype)
        guard = configure(kind, given, latent_pixels=opened.latent_shape[1] * opened.latent_shape[2])
        inputs: dict[str, str | None] = {
            "model": hash_of(model, opened),
            "concepts_file": hash_input(file.path) if file.path else None,
            **{f"images of {c.name}": hash_input(c.images) for c in (*banned, *allowed) if c.images},
        }
        chosen: dict[str, Any] = {
            "model": model,
            "base": SANDBOX if is_sandbox(model) else model,
            "illegal": [concept.name for concept in banned],
            "legal": [concept.name for concept in allowed],
            "concepts_file": str(file.path) if file.path else None,
            "method": method,
            "settings": describe(guard),
            "reference": reference or str(read_manifest(str(Path(model).expanduser())).get("options", {}).get("model") or model),
            "seed": seed,
            "device": str(opened.device),
            "dtype": str(opened.dtype).removeprefix("torch."),
        }
        painter: DiffusionModel | None = None
        wanted = int(describe(guard).get("pictures", 0))
        if chosen["reference"] != model and wanted and any(concept.images is None for concept in (*banned, *allowed)):
            # What is drawn follows from who draws, the settings and the seed.
            painter = open_model(chosen["reference"], device=device, dtype=dtype)
            inputs["reference"] = hash_of(chosen["reference"], painter)
        with output_file(output, overwrite=overwrite, resume=resume, options={**chosen, "inputs": inputs}) as out:
            say(f"learning which {budget} of {model} to freeze with {method}")
            started = time.perf_counter()
            if painter is not None:
                # A model that cannot draw the concepts any more learns from pictures of one that can.
                sampling = sampling_of(opened, file.generation, {})
                banned, allowed = (
                    tuple(with_drawn_folder(concept, painter, sampling, wanted, out.work / "drawn", seed) for concept in side)
                    for side in (banned, allowed)
                )
            protection = guard.protect(
                opened, banned, legal=allowed, retain=file.retain, rng=generator(seed), workspace=workspace_in(out.work)
            )
            shapes = unet_shapes(opened)
            mask = mask_of(
                opened, protection.frozen, method, describe(guard), illegal=chosen["illegal"], legal=chosen["legal"],
                base_sha256=inputs["model"],
                made={
                    "command": ["safeweights", *sys.argv[1:]], "options": chosen, "seed": seed, "inputs": inputs,
                    "cost": dict(protection.cost), "seconds": round(time.perf_counter() - started, 3),
                    "peak_memory_gb": peak_memory_gb(), "versions": versions(),
                },
            )  # fmt: skip
            write_json(out.folder / out.target.name, mask.as_json())
        show(
            {"output": str(output), "tensors": len(shapes), **mask.as_json()},
            f"{method} freezes {len(mask.frozen)} of {len(shapes)} tensors ({percent(mask.achieved['tensors'])}), "
            f"{percent(mask.achieved['parameters'])} of the parameters, in {mask.made['seconds']:.0f} s",
            f"mask: {output}",
        )


@app.command("verify")
def verify(
    base: Base,
    finetuned: Annotated[
        str, typer.Argument(help="What came back: a diffusers folder, a .safetensors file, or a LoRA.", show_default=False)
    ],
    mask_file: MaskFile,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Check, tensor by tensor, whether a fine-tune left the frozen tensors alone; exit 0 if so, 1 if not."""
    from safeweights.freezing.enforce import verify as compare_with
    from safeweights.models.door import open_model

    with speaking(as_json) as show:
        mask = read_mask(mask_file)
        opened = open_model(base, device=device)
        mask.check(opened, mask_file)
        matches = note_other_base(mask, hash_of(base, opened), mask_file)
        place = model_path(base)
        config = place if place is not None and place.is_dir() else None
        found = compare_with(opened, finetuned, mask.held, config=config, device=device)
        told = {"base": base, "finetuned": finetuned, "mask": str(mask_file), "base_matches": matches, **found.as_json()}
        if found.complied:
            show(told, f"complied: all {found.checked} frozen tensors are as they were released")
        else:
            first = found.violations[0]
            show(
                told,
                f"not complied: {len(found.violations)} violations; {found.checked} frozen tensors checked",
                f"first: {first.tensor}: {first.why}",
            )
    if not found.complied:
        raise typer.Exit(1)


@app.command("apply")
def apply(
    model: options.Model,
    mask_file: MaskFile,
    output: options.Output,
    in_weights: Annotated[
        bool, typer.Option("--in-weights", help="Rewrite the weights so that optimisers hardly move what is frozen.")
    ] = False,
    power: Annotated[
        int, typer.Option("--power", min=1, max=12, help="Frozen tensors become 2^POWER times as large (--in-weights).")
    ] = 6,
    exact: Annotated[
        bool, typer.Option("--exact", help="Leave out first convolutions, whose rewriting is exact but for a norm's eps.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a model with its mask beside it; --in-weights also rewrites the weights, pictures unchanged."""
    from safeweights.core.method import Protection
    from safeweights.freezing.rescale import apply_in_weights, deviation
    from safeweights.models.door import open_model

    with speaking(as_json) as show:
        check_target(output, overwrite)
        mask = read_mask(mask_file)
        opened = open_model(model, device=device, dtype=dtype)
        mask.check(opened, mask_file)
        inputs = {"model": hash_of(model, opened), "mask": hash_input(mask_file.expanduser())}
        note_other_base(mask, str(inputs["model"]), mask_file)
        chosen: dict[str, Any] = {
            "model": model,
            "base": SANDBOX if is_sandbox(model) else model,
            "mask": str(mask_file),
            "in_weights": in_weights,
            "settings": {"power": power, "exact": exact} if in_weights else {},
            "device": str(opened.device),
            "dtype": str(opened.dtype).removeprefix("torch."),
        }
        told: dict[str, Any] = {}
        with output_folder(output, overwrite=overwrite, options={**chosen, "inputs": inputs}) as out:
            started = time.perf_counter()
            protection, protected = Protection(method="freeze", concepts=mask.illegal, frozen=mask.frozen), opened
            if in_weights:
                protection, rescaling = apply_in_weights(opened, mask.frozen, power=power, nearly=not exact)
                protected = protection.apply(opened)
                mask = with_partners(mask, rescaling.partners)
                told = {
                    "stiff": len(rescaling.stiff), "beside": len(rescaling.beside), "partners": len(rescaling.partners),
                    "unreached": list(rescaling.unreached), "deviation": deviation(opened, protected),
                }  # fmt: skip
            protected.save(out.folder)
            # The file beside the model speaks of the model beside it.
            written = replace(mask, base_sha256=hash_input(out.folder), made={**mask.made, "learned_on": mask.base_sha256})
            write_json(out.folder / NAME, written.as_json())
            manifest = write_manifest(
                out.folder,
                command=["safeweights", *sys.argv[1:]],
                method=protection.method,
                concepts=mask.illegal,
                options=chosen,
                seed=0,
                inputs=inputs,
                tensors=protection.tensors,
                cost={"frozen": len(mask.frozen), **({"deviation": told["deviation"]} if told else {})},
                seconds=time.perf_counter() - started,
            )
        lines = [f"model with its mask: {output}"]
        if told:
            lines.insert(
                0,
                f"{told['stiff']} of {len(mask.frozen)} frozen tensors are in the weights, {len(told['unreached'])} cannot be; "
                f"predictions differ by {told['deviation']:.1e} at most",
            )
        show({"output": str(output), **told, **manifest}, *lines)
