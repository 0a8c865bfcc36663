"""The registries: names of methods to where they live, resolved late so that listing them imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from safeweights.core.errors import UserError

ERASERS = {
    "ac": "safeweights.erasure.ac:AC",
    "advunlearn": "safeweights.erasure.advunlearn:AdvUnlearn",
    "erasediff": "safeweights.erasure.erasediff:EraseDiff",
    "esd": "safeweights.erasure.esd:ESD",
    "fmn": "safeweights.erasure.fmn:FMN",
    "salun": "safeweights.erasure.salun:SalUn",
    "scissorhands": "safeweights.erasure.scissorhands:Scissorhands",
    "mace": "safeweights.erasure.mace:MACE",
    "p-ac": "safeweights.erasure.p_ac:PAC",
    "p-esd": "safeweights.erasure.p_esd:PESD",
    "rece": "safeweights.erasure.rece:RECE",
    "spm": "safeweights.erasure.spm:SPM",
    "uce": "safeweights.erasure.uce:UCE",
}
PRUNE, PRUNED = "prune", "safeweights.erasure.pruning:Pruned"
"""The setting that every eraser takes, and what it puts around the eraser: prune what is left of the concept."""
IMMUNIZERS = {
    "compose": "safeweights.immunization.baselines:Compose",
    "imma": "safeweights.immunization.imma:IMMA",
    "jt": "safeweights.immunization.baselines:JT",
    "mima": "safeweights.immunization.mima:MIMA",
}
GUARDS = {
    "freezeasguard": "safeweights.freezing.freezeasguard:FreezeAsGuard",
    "gradient": "safeweights.freezing.baselines:Gradient",
    "one-shot": "safeweights.freezing.baselines:OneShot",
    "random": "safeweights.freezing.baselines:Random",
    "task-vector": "safeweights.freezing.baselines:TaskVector",
    "xattn": "safeweights.freezing.baselines:XAttn",
}
ATTACKS = {
    "concept-inversion": "safeweights.attacks.adversarial.concept_inversion:ConceptInversion",
    "latent-inversion": "safeweights.attacks.adversarial.latent_inversion:LatentInversion",
    "mask-revival": "safeweights.attacks.relearning.roots:MaskRevival",
    "no-attack": "safeweights.attacks.adversarial.baselines:NoAttack",
    "p4d": "safeweights.attacks.adversarial.p4d:P4D",
    "random": "safeweights.attacks.adversarial.baselines:RandomTokens",
    "relearn": "safeweights.attacks.relearning.relearn:Relearn",
    "replay": "safeweights.attacks.adversarial.replay:Replay",
    "ring-a-bell": "safeweights.attacks.adversarial.ring_a_bell:RingABell",
    "seed-search": "safeweights.attacks.adversarial.baselines:SeedSearch",
    "soft-prompt": "safeweights.attacks.adversarial.soft_prompt:SoftPrompt",
    "unlearndiffatk": "safeweights.attacks.adversarial.unlearndiffatk:UnlearnDiffAtk",
}
ADAPTATIONS = {
    "custom-diffusion": "safeweights.attacks.relearning.custom_diffusion:CustomDiffusion",
    "dreambooth": "safeweights.attacks.relearning.dreambooth:DreamBooth",
    "full": "safeweights.attacks.relearning.full:Full",
    "lora": "safeweights.attacks.relearning.lora:LoRA",
    "textual-inversion": "safeweights.attacks.relearning.textual_inversion:TextualInversion",
}
DETECTORS = {
    "image-classification": "safeweights.detectors.image_classification:ImageClassification",
    "clip": "safeweights.detectors.clip:ZeroShotCLIP",
    "nudenet": "safeweights.detectors.nudenet:NudeNet",
    "python": "safeweights.detectors.python:PythonDetector",
}


def resolve(registry: Mapping[str, str], name: str, what: str) -> type[Any]:
    """The class registered under a name. Raises UserError that lists the valid names."""
    if name not in registry:
        raise UserError(f"unknown {what} {name!r}; known are {', '.join(sorted(registry))}")
    module, attribute = registry[name].split(":")
    found: type[Any] = getattr(import_module(module), attribute)
    return found


def method(name: str, *, latent_pixels: int | None = None, **settings: Any) -> Any:
    """A ready eraser, immunizer, guard or attack by name: ``method("esd", steps=300)``. Settings as in `configure`.

    "random" is the attack; the guard of that name is had with ``configure(resolve(GUARDS, "random", "guard"), {...})``.
    Without ``latent_pixels`` or ``preset`` the settings are the defaults, tuned for sandbox-like models.
    """
    known = {**GUARDS, **ERASERS, **IMMUNIZERS, **ATTACKS}
    return configure(resolve(known, name, "method"), settings, latent_pixels=latent_pixels)


def parse_settings(pairs: Iterable[str]) -> dict[str, str]:
    """``["lr=1e-4", …]`` as given to ``--set``. Raises UserError for anything without '='."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set takes key=value, not {pair!r}")
        settings[key] = value
    return settings


def configure(cls: type[Any], settings: Mapping[str, Any], *, latent_pixels: int | None = None) -> Any:
    """An instance of a method or attack with those settings, typed and checked against its dataclass fields.

    A class may offer ``PRESETS``: a dict of named settings, "small" for sandbox-like models and "paper" for SD-size ones. The
    setting ``preset`` picks one; without it the size of the model decides (``latent_pixels``: h * w of its latents, below 32 * 32
    is small). Every eraser that does not prune by itself also takes ``prune`` and the settings that begin with ``prune_``: it is
    then put inside a `Pruned`.
    Raises UserError for an unknown key, a value of the wrong type, or a value the class refuses.
    """
    if PRUNE in settings and _is_eraser(cls):
        if getattr(cls, "prunes", False):
            raise UserError(f"{cls.name} prunes by itself; its budget says how much, {PRUNE} is for erasers that do not")
        inside = {key: value for key, value in settings.items() if key != PRUNE and not key.startswith(f"{PRUNE}_")}
        around = {key: value for key, value in settings.items() if key not in inside}
        if "preset" in settings:
            around["preset"] = settings["preset"]
        eraser = configure(cls, inside, latent_pixels=latent_pixels)
        return _build(resolve({PRUNE: PRUNED}, PRUNE, "setting"), around, latent_pixels, cls.name, eraser=eraser)
    return _build(cls, settings, latent_pixels, cls.name)


def _is_eraser(cls: type[Any]) -> bool:
    return ERASERS.get(getattr(cls, "name", "")) == f"{cls.__module__}:{cls.__qualname__}"


def _build(cls: type[Any], settings: Mapping[str, Any], latent_pixels: int | None, name: str, **ready: Any) -> Any:
    """An instance of ``cls`` from ``settings``, its preset and what is ``ready`` to be handed over as it is."""
    settings = dict(settings)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init and field.name not in ready}
    presets: Mapping[str, Mapping[str, Any]] = getattr(cls, "PRESETS", {})
    chosen = settings.pop("preset", None)
    if chosen is not None and chosen not in presets:
        raise UserError(f"{name}: unknown preset {chosen!r}; known are {', '.join(presets) or 'none'}")
    if chosen is None and presets and latent_pixels is not None:
        chosen = "small" if latent_pixels < 32 * 32 else "paper"
    values: dict[str, Any] = dict(presets[chosen]) if chosen else {}
    hints = typing.get_type_hints(cls)
    also = [PRUNE] if _is_eraser(cls) and not getattr(cls, "prunes", False) else []
    for key, value in settings.items():
        if key not in fields:
            raise UserError(f"{name}: unknown setting {key!r}; valid are {', '.join([*fields, 'preset', *also])}")
        values[key] = _convert(value, hints[key], f"{name}: {key}")
    try:
        return cls(**values, **ready)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def describe(instance: Any) -> dict[str, Any]:
    """Every setting of a method or attack after defaults, as JSON gives it back: lists, no tuples."""
    own = getattr(instance, "describe", None)
    told: dict[str, Any] = own() if callable(own) else dataclasses.asdict(instance)
    return {key: _plain(value) for key, value in told.items()}


def _plain(value: Any) -> Any:
    """A setting for JSON: a tuple as a list, a function by its name."""
    if callable(value):
        return getattr(value, "__qualname__", repr(value))
    return list(value) if isinstance(value, tuple) else value


def _convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` (often text from the command line) as the type of a field."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        options = typing.get_args(hint)
        for option in options:
            if value == option or str(value) == str(option):
                return option
        raise UserError(f"{where} must be one of {', '.join(map(str, options))}, not {value!r}")
    if origin in (types.UnionType, typing.Union):
        parts = typing.get_args(hint)
        if type(None) in parts and (value is None or value == "none"):
            return None
        # Narrow types first, text last: "3" is a number wherever a number is allowed.
        order = sorted((part for part in parts if part is not type(None)), key=lambda part: part is str)
        for part in order:
            try:
                return _convert(value, part, where)
            except UserError:
                continue
    elif hint is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "1", "false", "no", "0"):
            return str(value).lower() in ("true", "yes", "1")
    elif hint in (int, float):
        try:
            number = hint(value)
        except (TypeError, ValueError):
            number = None
        if (
            number is not None
            and math.isfinite(number)
            and not isinstance(value, bool)
            and (hint is float or not isinstance(value, float))
        ):
            return number
    elif hint is str and isinstance(value, str):
        return value
    elif origin is Callable:
        if callable(value):
            return value
        raise UserError(f"{where} is a function and can be given from Python only, not as {value!r}")
    elif origin is tuple and isinstance(value, str | list | tuple):
        items = value.split(",") if isinstance(value, str) else value
        return tuple(_convert(item, typing.get_args(hint)[0], where) for item in items)
    wanted = getattr(hint, "__name__", str(hint)).replace("typing.", "")
    raise UserError(f"{where} must be {wanted}, not {value!r}")
