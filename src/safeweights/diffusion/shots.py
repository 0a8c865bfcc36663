"""Pictures to learn a concept from: those of a folder, or those a model draws."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import Shots
from safeweights.diffusion.image_folder import read_native
from safeweights.diffusion.latent_bank import fingerprint
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import candidates_of, embed_all, generate, sample_latents


def concept_shots(
    model: DiffusionModel, concept: Concept, *, n: int, sampling: Sampling, seed: int, workspace: Workspace | None = None
) -> Shots:
    """n pictures of a concept with captions: the first of its folder, where it has one, else drawn for its prompts."""
    if concept.images is None:
        return drawn_shots(model, concept.texts, n=n, sampling=sampling, seed=seed, workspace=workspace)
    images, captions = read_native(model, concept.images, prompt=concept.term)
    return Shots.encode(model, images[:n], captions[:n])


@torch.no_grad()
def drawn_shots(
    model: DiffusionModel,
    prompts: Sequence[str],
    *,
    n: int,
    sampling: Sampling,
    seed: int,
    workspace: Workspace | None = None,
    batch_size: int = 32,
) -> Shots:
    """n pictures of the model's native size, the prompts in turn; a batch that ``workspace`` holds is not drawn again."""
    workspace = workspace or Workspace()
    facts: dict[str, Any] = {
        "prompts": list(prompts), "n": n, "seed": seed, "steps": sampling.steps, "guidance": sampling.guidance_scale,
        "batch": batch_size, "model": fingerprint(model),
    }  # fmt: skip
    captions = [prompts[i % len(prompts)] for i in range(n)]
    c, parts = embed_all(model, prompts), []
    for start in workspace.track(range(0, n, batch_size), "drawing pictures"):
        stored = workspace.load(f"shots-{start}")
        if stored is None or stored[1] != facts:
            runs = range(start, min(start + batch_size, n))
            x_T = torch.stack([torch.randn(model.latent_shape, generator=generator(seed, "x_T", run)) for run in runs])
            x_0 = sample_latents(model, c[[run % len(prompts) for run in runs]], x_T.to(model.device), sampling)
            stored = {"x_0": x_0.float().cpu()}, facts
            workspace.save(f"shots-{start}", *stored)
        parts.append(stored[0]["x_0"])
    return Shots(torch.cat(parts).to(model.device), tuple(captions))


def with_drawn_folder(concept: Concept, model: DiffusionModel, sampling: Sampling, n: int, folder: Path, seed: int) -> Concept:
    """The concept with a folder of n captioned pictures ``model`` draws of it, unless it has one.

    Where the publisher has taken a concept out, these are the pictures of it that the model from before still makes. A folder
    that an earlier run finished is taken as it is.
    """
    from PIL import Image

    if concept.images is not None:
        return concept
    # A name may hold anything; a folder's may not.
    folder = folder / hashlib.sha256(concept.name.encode()).hexdigest()[:16]
    if not (folder / "metadata.csv").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        texts = [concept.texts[i % len(concept.texts)] for i in range(n)]
        first = generator("drawn", seed, concept.name).initial_seed() % 2**31
        images = generate(model, candidates_of(texts, range(first, first + n)), sampling)
        for i, image in enumerate(images):
            waiting = folder / f".{i:04}.{os.getpid()}.png"  # another worker may be at the same folder
            Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(waiting)
            waiting.replace(folder / f"{i:04}.png")
        partial = folder / f".metadata.{os.getpid()}.partial"
        with partial.open("w", newline="", encoding="utf-8") as written:
            csv.writer(written).writerows([("file_name", "prompt"), *((f"{i:04}.png", text) for i, text in enumerate(texts))])
        partial.replace(folder / "metadata.csv")
    return replace(concept, images=folder)
