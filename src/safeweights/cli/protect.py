"""What ``erase`` and ``immunize`` share: open, protect, write the folder and its manifest."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.cli.common import SANDBOX, hash_of, is_sandbox, pick, sampling_of, say, unprotected, workspace_in
from safeweights.core.concept import ConceptFile
from safeweights.core.errors import UserError
from safeweights.core.table import configure, describe, resolve
from safeweights.release.manifest import hash_input, write_manifest
from safeweights.release.output import check_target, output_folder

if TYPE_CHECKING:
    from safeweights.core.method import Protection


def protect(
    model: str,
    names: Sequence[str],
    file: ConceptFile,
    method: str,
    settings: Mapping[str, Any],
    *,
    registry: Mapping[str, str],
    doing: str,
    output: Path,
    draws: bool = False,
    reference: str | None = None,
    command: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    owner: Path | None = None,
) -> dict[str, Any]:
    """Protect, write the folder and return its manifest. Raises UserError for whatever the user gave wrong.

    A method that prunes also leaves its mask there, unless noise hides the pruned places: then only ``owner``, a folder for
    what undoes the pruning, gets one.

    With ``draws``, concepts without pictures get the method's ``pictures`` of ``reference``, by default the model before anybody
    protected it, as far as manifests tell: what a protected model draws of a concept shows nothing of it.
    """
    from safeweights.diffusion.noise import generator
    from safeweights.diffusion.parallel import join
    from safeweights.diffusion.shots import with_drawn_folder
    from safeweights.models.door import open_model

    join()
    concepts = pick(file, names)
    kind = resolve(registry, method, "method")
    configure(kind, settings)  # a wrong setting is told before the model is opened
    opened = open_model(model, device=device, dtype=dtype)
    protector = configure(kind, settings, latent_pixels=opened.latent_shape[1] * opened.latent_shape[2])
    if owner is not None and not getattr(protector, "prunes", False):
        raise UserError(f"{method} prunes nothing that --owner could undo; use p-esd or p-ac, or add --set prune=0.01")
    how = describe(protector)
    if owner is not None and how.get("control") == "movement":
        raise UserError("control=movement fine-tunes and prunes nothing; there is nothing for --owner to undo")
    if owner is not None:
        check_owner(owner, output, overwrite=overwrite, resume=resume, method=method, concepts=names, settings=how)
    if owner is None and "noise" in (how.get("conceal"), how.get("prune_conceal")):
        say("note: noise hides what is pruned and no mask is written; without --owner nobody can undo it")
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
        "settings": how,
        "seed": seed,
        "device": str(opened.device),
        "dtype": str(opened.dtype).removeprefix("torch."),
    }
    if draws:
        source = reference or unprotected(model)
        if source != model and any(concept.images is None for concept in concepts):
            other = open_model(source, device=device, dtype=dtype)
            inputs["reference"] = hash_of(source, other)
        chosen["reference"] = source
    with output_folder(output, overwrite=overwrite, resume=resume, options={**chosen, "inputs": inputs}) as out:
        say(f"{doing} {', '.join(chosen['concepts'])} from {model} with {method}")
        started = time.perf_counter()
        if "reference" in inputs:
            sampling, n = sampling_of(opened, file.generation, {}), how["pictures"]
            concepts = tuple(with_drawn_folder(concept, other, sampling, n, out.work / "drawn", seed) for concept in concepts)
        protection = protector.protect(
            opened, concepts, retain=file.retain, rng=generator(seed), workspace=workspace_in(out.work)
        )
        protection.apply(opened).save(out.folder)
        masked: dict[str, Any] = {}
        if protection.mask is not None:
            masked = {"mask": _write_mask(protection, out.folder, owner)}
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
            **masked,
        )


def check_owner(
    owner: Path, output: Path, *, overwrite: bool, resume: bool, method: str, concepts: Sequence[str], settings: Mapping[str, Any]
) -> None:
    """Refuse, before any work is done, an owner's folder that the output would swallow, or one that holds something else.

    A run that was killed after it wrote the owner's folder finds its own files there and may replace them.
    """
    here, there = (path.expanduser().resolve() for path in (owner, output))
    if here == there or here.is_relative_to(there) or there.is_relative_to(here):
        raise UserError(f"--owner {owner} and -o {output} lie in one another; what undoes the pruning needs a folder of its own")
    if resume and not overwrite and here.is_dir() and there.with_name(f".{there.name}.work").is_dir():
        from safeweights.release.mask_files import MASK, OWNER, read_mask

        wanted = {"method": method, "concepts": list(concepts), "settings": dict(settings)}
        wanted = json.loads(json.dumps(wanted, default=str))
        if {path.name for path in here.iterdir()} <= {MASK, OWNER} and (here / MASK).is_file():
            overwrite = dict(read_mask(here / MASK).facts) == wanted
    check_target(owner, overwrite)


def _write_mask(protection: Protection, folder: Path, owner: Path | None) -> dict[str, Any]:
    from safeweights.release.mask_files import MASK, write_masks

    assert protection.mask is not None
    # Noise hides the places: then only the owner gets the mask that tells them.
    told = write_masks(protection, mask=folder / MASK if protection.mask.fill == "zero" else None)
    if owner is not None:
        with output_folder(owner, overwrite=True) as kept:  # it was looked at before the run
            write_masks(protection, owner=kept.folder)
    return told
