"""What ``erase`` and ``immunize`` share: open, protect, write the folder and its manifest."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.cli.common import SANDBOX, hash_of, is_sandbox, pick, sampling_of, say, workspace_in
from safeweights.core.concept import Concept, ConceptFile
from safeweights.core.table import configure, describe, resolve
from safeweights.release.manifest import hash_input, read_manifest, write_manifest
from safeweights.release.output import output_folder

if TYPE_CHECKING:
    from safeweights.core.model import Sampling


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
) -> dict[str, Any]:
    """Protect, write the folder and return its manifest. Raises UserError for whatever the user gave wrong.

    With ``draws``, concepts without pictures get the method's ``pictures`` of ``reference``, which is the model itself or, where
    its manifest names one, the model it was made from: what a protected model draws of a concept shows nothing of it.
    """
    from safeweights.diffusion.noise import generator
    from safeweights.diffusion.parallel import join
    from safeweights.models.door import open_model

    join()
    concepts = pick(file, names)
    kind = resolve(registry, method, "method")
    configure(kind, settings)  # a wrong setting is told before the model is opened
    opened = open_model(model, device=device, dtype=dtype)
    protector = configure(kind, settings, latent_pixels=opened.latent_shape[1] * opened.latent_shape[2])
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
        "settings": describe(protector),
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
            sampling, n = sampling_of(opened, file.generation, {}), describe(protector)["pictures"]
            concepts = tuple(_with_pictures(concept, other, sampling, n, out.work / "drawn", seed) for concept in concepts)
        protection = protector.protect(
            opened, concepts, retain=file.retain, rng=generator(seed), workspace=workspace_in(out.work)
        )
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


def _with_pictures(concept: Concept, model: Any, sampling: Sampling, n: int, folder: Path, seed: int) -> Concept:
    """The concept with a folder of pictures ``model`` draws of it, captioned; one drawn before an interrupt is taken as it is."""
    import csv

    from PIL import Image

    from safeweights.diffusion.noise import generator
    from safeweights.diffusion.sampling import candidates_of, generate

    if concept.images is not None:
        return concept
    folder = folder / concept.name
    if not (folder / "metadata.csv").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        texts = [concept.texts[i % len(concept.texts)] for i in range(n)]
        first = generator("drawn", seed, concept.name).initial_seed() % 2**31
        images = generate(model, candidates_of(texts, range(first, first + n)), sampling)
        for i, image in enumerate(images):
            Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{i:04}.png")
        partial = folder / "metadata.partial"
        with partial.open("w", newline="", encoding="utf-8") as written:
            csv.writer(written).writerows([("file_name", "prompt"), *((f"{i:04}.png", text) for i, text in enumerate(texts))])
        partial.replace(folder / "metadata.csv")
    return replace(concept, images=folder)
