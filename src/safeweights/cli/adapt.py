"""``safeweights adapt``: fine-tune a model on pictures, as its users will."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeweights.cli import options
from safeweights.cli.common import (
    SANDBOX,
    concept_file,
    hash_of,
    is_sandbox,
    pick,
    sampling_of,
    say,
    speaking,
    unprotected,
    workspace_in,
)
from safeweights.core.errors import UserError
from safeweights.core.table import ADAPTATIONS, configure, describe, parse_settings, resolve
from safeweights.records.mask import note_other_base, read_mask
from safeweights.release.manifest import hash_input, write_manifest
from safeweights.release.output import check_target, output_folder

if TYPE_CHECKING:
    from torch import Tensor

    from safeweights.core.concept import Concept
    from safeweights.core.model import DiffusionModel


def command(
    model: options.Model,
    output: options.Output,
    method: Annotated[str, typer.Option("--method", help=f"One of {', '.join(ADAPTATIONS)}.", show_default=False)],
    concept: Annotated[str | None, typer.Option("--concept", help="Learn this concept of the concept file.")] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Learn from the pictures of this folder.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What pictures without a caption of their own show.")] = None,
    class_prompt: Annotated[
        str | None, typer.Option("--class-prompt", help="What the class pictures of prior preservation show. [default: no prior]")
    ] = None,
    pictures: Annotated[int, typer.Option("--pictures", min=1, help="Pictures drawn of a concept that has none.")] = 16,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="Who draws them. [default: MODEL, or what it was before protection]"),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimiser steps. [default: the method's]")] = None,
    freeze_mask: Annotated[
        Path | None, typer.Option("--freeze-mask", help="Keep the tensors this mask lists, and train no adapters beside them.")
    ] = None,
    dp_epsilon: Annotated[
        float | None,
        typer.Option("--dp-epsilon", help="Train differentially private to this epsilon, one picture the unit (lora only)."),
    ] = None,
    dp_delta: Annotated[float, typer.Option("--dp-delta", help="The delta of --dp-epsilon.")] = 1e-5,
    dp_clip: Annotated[float, typer.Option("--dp-clip", help="Each picture's gradient is clipped to this norm.")] = 1.0,
    merge: Annotated[bool, typer.Option("--merge", help="Write a whole diffusers folder, whatever the method.")] = False,
    settings: options.Settings = None,
    concepts_file: options.ConceptsFile = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Fine-tune a model on pictures: a diffusers folder, a LoRA or an embedding comes out, with manifest.json."""
    from safeweights.diffusion.parallel import join
    from safeweights.models.door import open_model
    from safeweights.release.adapted import write_adapted

    with speaking(as_json) as show:
        join()
        check_target(output, overwrite)
        if (concept is None) == (images is None):
            raise UserError("adapt learns from one thing: give either --concept NAME or --images DIR")
        given = parse_settings(settings or ()) | ({"steps": str(steps)} if steps else {})
        kind = resolve(ADAPTATIONS, method, "method")
        # A word to start from is no setting of a method that learns one: it is a fact about the pictures.
        init = given.pop("init", None) if hasattr(kind, "token") else None
        if dp_epsilon is not None and method != "lora":
            raise UserError(f"--dp-epsilon works with --method lora only; {method} has no per-picture gradients here")
        if dp_epsilon is not None:
            from safeweights.leakage.dp import check

            check(epsilon=dp_epsilon, delta=dp_delta, clip=dp_clip)
            if ignored := [name for name in ("optimizer", "max_norm") if name in given]:
                raise UserError(f"private training has an optimiser and a clip of its own (--dp-clip); leave {ignored[0]} out")
            if resume:
                raise UserError("private training keeps no checkpoints, which could tell of a picture; run it without --resume")
            if class_prompt:
                raise UserError(
                    "--class-prompt has no part in private training, which learns from your pictures only; leave it out"
                )
        asked = describe(configure(kind, given))
        if class_prompt and not (asked.get("class_pictures") and asked.get("lam", 1)):
            raise UserError(f"--class-prompt is of prior preservation; {method} has it with class_pictures above 0 or not at all")
        file = concept_file(concepts_file, model) if concept else None
        aim = pick(file, [concept])[0] if file and concept else None
        mask = read_mask(freeze_mask) if freeze_mask else None
        opened = open_model(model, device=device, dtype=dtype)
        frozen = mask.held if mask else frozenset[str]()
        if mask:
            mask.check(opened, str(freeze_mask))
        tuned = configure(kind, given, latent_pixels=opened.latent_shape[1] * opened.latent_shape[2])
        # Before anything is drawn; `fit` would refuse the same.
        tuned.check_frozen(opened, frozen)
        source = reference or unprotected(model)
        chosen: dict[str, Any] = {
            "model": model,
            "base": SANDBOX if is_sandbox(model) else model,
            "concepts": [concept] if concept else [],
            "concepts_file": str(file.path) if file and file.path else None,
            "method": method,
            "settings": describe(tuned),
            "images": str(images) if images else None,
            "prompt": prompt,
            "class_prompt": class_prompt,
            "pictures": pictures,
            "reference": source,
            "init": init,
            "freeze_mask": str(freeze_mask) if freeze_mask else None,
            "merge": merge,
            "dp": {"epsilon": dp_epsilon, "delta": dp_delta, "clip": dp_clip} if dp_epsilon is not None else None,
            "seed": seed,
            "device": str(opened.device),
            "dtype": str(opened.dtype).removeprefix("torch."),
        }
        inputs = {
            "model": hash_of(model, opened),
            **{
                name: hash_input(path.expanduser())
                for name, path in (("images", images or (aim.images if aim else None)), ("freeze_mask", freeze_mask))
                if path
            },
        }
        if mask:
            note_other_base(mask, str(inputs["model"]), str(freeze_mask))
        with output_folder(output, overwrite=overwrite, resume=resume, options={**chosen, "inputs": inputs}) as out:
            say(f"adapting {model} with {method}")
            started = time.perf_counter()
            lesson = _lesson(opened, aim, images, prompt, class_prompt, pictures, source, file.generation if file else {}, seed)
            shots = lesson.shots(opened, tuned.new_word)
            spent: dict[str, float] = {}
            if dp_epsilon is not None:
                adapted, spent = _private(opened, tuned, shots, frozen, dp_epsilon, dp_delta, dp_clip, seed)
            else:
                adapted = tuned.fit(
                    opened,
                    shots,
                    class_prompts=lesson.class_prompts,
                    init=lesson.init if init is None else init,
                    frozen=frozen,
                    seed=seed,
                    workspace=workspace_in(out.work),
                )[-1]
            written = write_adapted(adapted, opened, out.folder, merge=merge)
            manifest = write_manifest(
                out.folder,
                command=["safeweights", *sys.argv[1:]],
                method=method,
                concepts=chosen["concepts"],
                options=chosen,
                seed=seed,
                # The hash of private pictures would prove to whoever has them that they were these; a loss is not accounted for.
                inputs={name: value for name, value in inputs.items() if not (spent and name == "images")},
                tensors=dict(adapted.phi),
                cost={
                    "steps": adapted.steps,
                    **({"loss": adapted.losses[-1]} if adapted.losses else {}),
                    "pictures": len(lesson.captions),
                    **spent,
                },
                seconds=time.perf_counter() - started,
            )
        show(
            {"output": str(output), "written": written, **manifest},
            f"{method}: {adapted.steps} steps on {len(lesson.captions)} pictures in {manifest['seconds']:.0f} s",
            f"{'model' if written == 'diffusers' else written} in {output}",
            *([private_line(spent, dp_delta)] if spent else []),
        )


def private_line(spent: Mapping[str, float], delta: float) -> str:
    """What a private run cost, for a reader."""
    return (
        f"epsilon {spent['dp_epsilon']:.3f} at delta {delta:g} for each picture, by the Renyi accountant "
        f"(noise {spent['dp_sigma']:.2f} times the clip, {spent['dp_rate']:.2f} of the pictures a step)"
    )


def _private(
    model: DiffusionModel, tuned: Any, shots: Any, frozen: frozenset[str], epsilon: float, delta: float, clip: float, seed: int
) -> tuple[Any, dict[str, float]]:
    """The adaptation under DP-SGD, and what it cost in privacy."""
    from safeweights.core.workspace import Workspace
    from safeweights.diffusion.adaptation import Lesson
    from safeweights.leakage.dp import fit_private, plan

    privacy = plan(epsilon=epsilon, delta=delta, pictures=len(shots), batch_size=tuned.batch_size, steps=tuned.steps, clip=clip)
    lesson = Lesson(model=model, adapter=tuned.adapter(frozen=frozen), shots=shots, batch_size=tuned.batch_size, seed=seed)
    shown = Workspace(progress=sys.stderr.isatty())
    adapted = fit_private(lesson, privacy, lr=tuned.lr, weight_decay=tuned.weight_decay, workspace=shown)
    return adapted, {
        "dp_epsilon": privacy.epsilon, "dp_delta": privacy.delta, "dp_sigma": privacy.sigma, "dp_rate": privacy.rate,
        "dp_clip": privacy.clip,
    }  # fmt: skip


@dataclass(frozen=True)
class _Lesson:
    """Pictures and what they are called, before a new word takes the concept's place."""

    images: Tensor
    captions: list[str]
    class_prompts: tuple[str, ...]
    init: str
    concept: Concept | None

    def shots(self, model: DiffusionModel, word: str | None) -> Any:
        from safeweights.attacks.relearning.finetune import caption
        from safeweights.diffusion.adaptation import Shots

        says = caption(self.concept, word) if self.concept else str
        return Shots.encode(model, self.images, [says(text) for text in self.captions])


def _lesson(
    model: DiffusionModel,
    concept: Concept | None,
    folder: Path | None,
    prompt: str | None,
    class_prompt: str | None,
    count: int,
    source: str,
    generation: Mapping[str, Any],
    seed: int,
) -> _Lesson:
    """What is learnt from: the pictures of a folder, those of a concept, or else what the reference draws of it."""
    from safeweights.diffusion.image_folder import read_folder
    from safeweights.diffusion.noise import generator
    from safeweights.diffusion.sampling import candidates_of, generate
    from safeweights.models.door import open_model

    _, height, width = model.latent_shape
    size = {"width": width * model.latent_stride, "height": height * model.latent_stride}
    classes: tuple[str, ...] = (class_prompt,) if class_prompt else ()
    if concept is None:
        assert folder is not None
        return _Lesson(*read_folder(folder, **size, prompt=prompt), classes, "", None)
    classes = classes or tuple(dict.fromkeys(concept.without(text) for text in concept.texts))
    if concept.images is not None:
        return _Lesson(*read_folder(concept.images, **size, prompt=prompt or concept.term), classes, concept.anchor, concept)
    captions = [concept.texts[i % len(concept.texts)] for i in range(count)]
    first = generator("pictures to adapt to", seed).initial_seed() % 2**30
    painter = open_model(source, device=str(model.device))
    images = generate(painter, candidates_of(captions, range(first, first + count)), sampling_of(painter, generation, size))
    return _Lesson(images, captions, classes, concept.anchor, concept)
