"""``safeweights neurons``: where a concept's neurons sit, and whether a protected model's are gone or only silent."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from safeweights.cli import options
from safeweights.cli.common import check_sampling, concept_file, names_of, pick, sampling_of, say, speaking, workspace_in
from safeweights.core.errors import UserError
from safeweights.core.table import ATTACKS, configure, describe, parse_settings, resolve
from safeweights.release.output import check_target, output_folder, write_json


@options.sampling
def command(
    model: options.Model,
    reference: options.Reference,
    concept: options.OneConcept,
    output: options.Output,
    method: Annotated[str, typer.Option("--method", help="The attack that tries to wake the neurons.")] = "soft-prompt",
    n: Annotated[int, typer.Option("--n", min=2, help="Prompts a condition.")] = 16,
    pairs: Annotated[int, typer.Option("--pairs", min=3, help="Pairs of prompts that locate the neurons.")] = 32,
    settings: options.Settings = None,
    concepts_file: options.ConceptsFile = None,
    given: options.Given = options.NOTHING,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Locate the concept's neurons in the reference and measure how far they come back in the model, plainly and under attack."""
    from safeweights.models.door import open_model
    from safeweights.records.store import Store

    with speaking(as_json) as show:
        check_target(output, overwrite)
        check_sampling(given)
        if len(set(concept)) != 1:
            raise UserError("neurons takes one --concept; run it once for each")
        file = concept_file(concepts_file, model, reference)
        (aim,) = pick(file, concept)
        kind = resolve(ATTACKS, method, "attack")
        configure(kind, parse_settings(settings or ()))
        before, after = (open_model(name, device=device, dtype=dtype) for name in (reference, model))
        attack = configure(kind, parse_settings(settings or ()), latent_pixels=after.latent_shape[1] * after.latent_shape[2])
        sampling = sampling_of(before, file.generation, given)
        names = names_of(model, reference, after, before, file)
        from safeweights.audit.sensitivity import locate_neurons, sensitivity

        chosen: dict[str, Any] = {
            "model": model, "reference": reference, "concept": aim.name, "method": method, "settings": describe(attack), "n": n,
            "pairs": pairs, "sampling": asdict(sampling), "seed": seed, "inputs": dict(names.hashes),
        }  # fmt: skip
        with output_folder(output, overwrite=overwrite, resume=resume, options=chosen) as out:
            say(f"locating the neurons of {aim.name} in {reference}")
            located = locate_neurons(before, aim, sampling=sampling, n=pairs, seed=seed)
            say(f"waking {len(located.concept)} of them in {model} with {method}")
            record = sensitivity(
                after, before, aim, attack, located, names=names, sampling=sampling, n=n, seed=seed,
                workspace=workspace_in(out.work),
            )  # fmt: skip
            Store(out.folder).add(record)
            write_json(out.folder / "neurons.json", record.details)
        found = record.details["neurons"]
        show(
            record.details,
            f"{found['significant']} of {found['tested']} neurons answer {aim.name} (false discovery rate {found['q']:g}, "
            f"{found['pairs']} pairs); the {found['concept']} strongest are followed",
            *(
                f"{row['neurons']} neurons, {row['condition']}: {row['rho']:.2f} ({row['low']:.2f} to {row['high']:.2f}) of what "
                "they did before protection"
                for row in record.details["reactivation"]
            ),
            *(
                f"{row['neurons']} neurons, {row['condition']}: moved by {row['kappa']:.3g} per unit of text (before protection "
                f"{row['reference']:.3g})"
                for row in record.details["slope"]
            ),
        )
