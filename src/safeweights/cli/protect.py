"""What ``erase`` and ``immunize`` share: open, protect, write the folder and its manifest."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.cli.common import SANDBOX, hash_of, is_sandbox, pick, sampling_of, say, workspace_in
from safeweights.core.concept import ConceptFile
from safeweights.core.errors import UserError
from safeweights.core.table import configure, describe, resolve
from safeweights.release.manifest import hash_input, read_manifest, write_manifest
from safeweights.release.output import output_folder

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

    With ``draws``, concepts without pictures get the method's ``pictures`` of ``reference``, which is the model itself or, where
    its manifest names one, the model it was made from: what a protected model draws of a concept shows nothing of it.
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
        before = read_manifest(str(Path(model).expanduser())).get("options")
        source = reference or str(before.get("model") if isinstance(before, dict) and before.get("model") else model)
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
            masked = {"mask": _write_mask(protection, out.folder, owner, overwrite=overwrite or resume)}
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


def _write_mask(protection: Protection, folder: Path, owner: Path | None, *, overwrite: bool) -> dict[str, Any]:
    from safeweights.release.mask_files import MASK, write_masks

    assert protection.mask is not None
    # Noise hides the places: then only the owner gets the mask that tells them.
    told = write_masks(protection, mask=folder / MASK if protection.mask.fill == "zero" else None)
    if owner is not None:
        with output_folder(owner, overwrite=overwrite) as kept:
            write_masks(protection, owner=kept.folder)
    return told
