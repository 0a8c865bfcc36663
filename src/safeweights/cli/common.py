"""What every command does the same way: talk, open models, read concept files, choose the sampling."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safeweights.core.concept import Concept, ConceptFile, load_concepts
from safeweights.core.errors import UserError
from safeweights.core.launch import follows
from safeweights.core.model import SCHEDULERS, Sampling

if TYPE_CHECKING:
    from safeweights.audit.audit import Names
    from safeweights.core.model import DiffusionModel
    from safeweights.core.workspace import Workspace
    from safeweights.metrics.backbones import Backbones
    from safeweights.records.record import Record

SANDBOX = "sandbox"


class Show(Protocol):
    """Print the result of a command: the JSON object, or lines for a reader."""

    def __call__(self, data: Mapping[str, Any], *lines: str) -> None: ...


@contextlib.contextmanager
def speaking(as_json: bool) -> Iterator[Show]:
    """Inside the block everything printed goes to stderr; only the result reaches stdout."""
    stdout = sys.stdout

    def show(data: Mapping[str, Any], *lines: str) -> None:
        if follows():
            return
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False, default=str) if as_json else "\n".join(lines)
        print(text, file=stdout, flush=True)

    with contextlib.redirect_stdout(sys.stderr):
        yield show


def full_command(context: Any) -> list[str]:
    """The command that ``context`` (typer's) runs, with every option that decides its result, so that it can be given again.

    Read from the command itself, defaults too: none can be left out.
    """
    words: list[str] = context.command_path.split()
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if parameter.name in ("overwrite", "resume", "as_json", "help") or value is None or value is False:
            continue
        values = list(value) if isinstance(value, list | tuple) else [value]
        if parameter.param_type_name == "argument":
            words += map(str, values)
            continue
        name = max(parameter.opts, key=len)
        words += [word for item in values for word in ([name] if item is True else [name, str(item)])]
    return words


def say(text: str, *, always: bool = False) -> None:
    """One line of progress on stderr, for a person; a log gets it only with ``always``, so that errors stand alone there."""
    if always or sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def workspace_in(folder: Path) -> Workspace:
    """A workspace that draws progress bars where a person can see them."""
    from safeweights.core.workspace import Workspace

    return Workspace(folder, progress=sys.stderr.isatty())


def concept_file(path: Path | None, *models: str) -> ConceptFile:
    """The named concept file, or the sandbox's own where one of the models is the sandbox's or was made from it."""
    if path is not None:
        return load_concepts(path)
    if not any(is_sandbox(model) for model in models):
        for model in models:
            check_model(model)
        raise UserError("this model needs a concept file: give one with --concepts-file (only the sandbox model has its own)")
    from safeweights.sandbox.files import sandbox_concepts

    return sandbox_concepts()


def check_model(name: str) -> None:
    """Refuse a path that does not exist; a Hub id is looked up when it is opened."""
    if not Path(name).expanduser().exists() and (
        name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".safetensors")
    ):
        raise UserError(f"{name} does not exist; give a diffusers folder, a .safetensors file, a Hub id or 'sandbox'")


def is_sandbox(model: str) -> bool:
    """Whether a model is the sandbox's, or was made from it by this program."""
    from safeweights.release.manifest import read_manifest
    from safeweights.sandbox.files import weights_folder

    if model == SANDBOX or Path(model).expanduser().resolve() == (weights_folder() / "model").resolve():
        return True
    options = read_manifest(str(Path(model).expanduser())).get("options")
    return isinstance(options, dict) and options.get("base") == SANDBOX


def pick(file: ConceptFile, names: Sequence[str]) -> tuple[Concept, ...]:
    """The named concepts, each once."""
    return file.pick(dict.fromkeys(names))


def with_detector(file: ConceptFile, names: Sequence[str] | None) -> tuple[Concept, ...]:
    """The named concepts, or all that have a detector. Raises UserError for a named one without, and where none has."""
    if names:
        concepts = pick(file, names)
        for concept in concepts:
            if concept.detector is None:
                raise UserError(
                    f"concept {concept.name!r}: a detector is missing, so nothing can decide whether a picture shows it; "
                    "add 'detector:' to it in the concept file"
                )
        return concepts
    found = tuple(concept for concept in file.concepts.values() if concept.detector is not None)
    if not found:
        raise UserError("no concept of the file has a detector: a detector is missing; add 'detector:' to at least one")
    if skipped := [concept.name for concept in file.concepts.values() if concept.detector is None]:
        say(f"left out, since a detector is missing: {', '.join(skipped)}")
    return found


def check_sampling(given: Mapping[str, Any]) -> None:
    """Refuse, before a model is opened, overrides that no model can take."""
    if (scheduler := given.get("scheduler")) is not None and scheduler not in SCHEDULERS:
        raise UserError(f"unknown scheduler {scheduler!r}; known are {', '.join(SCHEDULERS)}")
    guidance = given.get("guidance_scale")
    if guidance is not None and not abs(guidance) < float("inf"):
        raise UserError(f"--guidance-scale must be a finite number, not {guidance}")


def sampling_of(model: DiffusionModel, generation: Mapping[str, Any], given: Mapping[str, Any]) -> Sampling:
    """How to draw from a model: what was asked for, else what the concept file says, else the model's own picture size."""
    _, height, width = model.latent_shape
    own = {"width": width * model.latent_stride, "height": height * model.latent_stride}
    sampling = Sampling(**{**own, **generation, **{key: value for key, value in given.items() if value is not None}})
    # A concept file's values come unchecked; a bad one must not be found out after an hour.
    check_sampling(asdict(sampling))
    stride = model.latent_stride
    if sampling.steps < 1 or sampling.steps > len(model.alpha):
        raise UserError(f"steps must be from 1 to {len(model.alpha)}, not {sampling.steps}")
    if min(sampling.width, sampling.height) < stride or sampling.width % stride or sampling.height % stride:
        raise UserError(f"pictures of {sampling.width}x{sampling.height} do not fit this model; use multiples of {stride}")
    return sampling


def model_path(name: str) -> Path | None:
    """Where a model's files lie; None for a Hub id."""
    if name == SANDBOX:
        from safeweights.sandbox.files import model_folder

        return model_folder()
    path = Path(name).expanduser()
    return path if path.exists() else None


def hash_of(name: str, model: DiffusionModel) -> str:
    """SHA-256 of a model as opened: its files, or its tensors for a Hub id."""
    from safeweights.release.manifest import hash_model

    return hash_model(model, model_path(name))


def backbones_of(file: ConceptFile, clip_model: str | None, feature_model: str | None) -> Backbones:
    """The networks that quality is measured with: those named, else those beside the concept file.

    Raises UserError for one that cannot be opened, before anything is drawn.
    """
    from safeweights.metrics.backbones import Backbones, default_backbones

    own = default_backbones(file)
    found = Backbones(clip_model or own.clip, feature_model or own.features)
    found.open_clip(), found.open_features()
    return found


def names_of(model: str, reference: str, opened: DiffusionModel, opened_reference: DiffusionModel, file: ConceptFile) -> Names:
    """What records call these models; the method and its settings are read from the model's manifest."""
    from safeweights.audit.audit import Names
    from safeweights.release.manifest import hash_input, read_manifest

    manifest = read_manifest(str(Path(model).expanduser()))
    options = manifest.get("options")
    hashes = {"model": hash_of(model, opened), "reference": hash_of(reference, opened_reference)}
    if file.path is not None and (digest := hash_input(file.path)):
        hashes["concepts"] = digest
    return Names(
        model=model,
        reference=reference,
        method=str(manifest.get("method", "")),
        hashes=hashes,
        method_settings=dict(options.get("settings", {})) if isinstance(options, dict) else {},
    )


def protection_records_of(model: str, reference: str, file: ConceptFile) -> list[Record]:
    """What the model's protection cost, where its manifest says so."""
    from safeweights.release.manifest import protection_records, read_manifest

    manifest = read_manifest(str(Path(model).expanduser()))
    try:
        steps = manifest.get("chain") or ([manifest] if manifest else [])
        return [record for step in steps for record in protection_records(step, file, model=model, reference=reference)]
    except (KeyError, TypeError, AttributeError):
        return []  # a manifest of another program or version


def unprotected(model: str) -> str:
    """The model as it was before anybody protected it, as far as manifests tell; itself where there is none."""
    from safeweights.core.table import ADAPTATIONS
    from safeweights.release.manifest import lineage

    steps = lineage(model)
    # What somebody taught a model belongs to it: only protections are gone back behind.
    return next((name for name, manifest in steps if manifest.get("method") in (None, "", *ADAPTATIONS)), steps[-1][0])


def percent(value: float | None) -> str:
    """A rate for a reader."""
    return "not measured" if value is None else f"{100 * value:.1f} %"
