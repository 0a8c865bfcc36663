"""A recipe: from a model to its release in one file, checked before anything is opened. No torch at import."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from safeweights.audit.policy import Policy, Rule, first_error, load_policy, parse_policy, read_yaml
from safeweights.audit.suites import Suite, pick_suite
from safeweights.core.concept import Concept, ConceptFile, load_concepts
from safeweights.core.errors import UserError
from safeweights.core.table import ERASERS, GUARDS, IMMUNIZERS, PRUNE, configure, describe, resolve
from safeweights.release.export import FORMATS

SANDBOX = "sandbox"
NAME = "recipe.yaml"
"""What a recipe is called beside the model it made."""
Verb = Literal["erase", "prune", "immunize", "freeze"]
VERBS: tuple[Verb, ...] = ("erase", "prune", "immunize", "freeze")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=-]{0,59}$")]


class Step(_Part):
    """One protection: ``- erase: {method: esd, concepts: [mosaic]}``."""

    verb: Verb
    method: str
    concepts: list[str] = Field(min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the method, as for ``--set``."""
    legal: list[str] = Field(default_factory=list)
    """Of freeze: the concepts that must stay easy to learn."""
    in_weights: bool = False
    """Of freeze: also rewrite the weights so that optimisers hardly move what is frozen, as ``freeze apply --in-weights``."""
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1)
    """The recipe's where left out."""

    @property
    def title(self) -> str:
        """For a line of progress."""
        return f"{self.verb} {', '.join(self.concepts)} with {self.method}"


def _step(value: Any) -> Any:
    """``{erase: {…}}`` becomes ``{verb: erase, …}``."""
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in VERBS:
        raise ValueError(f"a step is one of {', '.join(VERBS)} with its settings below it")
    ((verb, entry),) = value.items()
    if not isinstance(entry, dict) or "verb" in entry:
        raise ValueError(f"{verb} needs the keys method and concepts")
    return {"verb": verb, **entry}


class AuditPart(_Part):
    """What is measured of the protected model."""

    suite: str = "quick"
    concepts: list[str] = Field(default_factory=list)
    """All that the steps protect against where left out."""
    n: int | None = Field(default=None, ge=1)
    """Pictures of each concept; the suite's number where left out."""
    prompts: int | None = Field(default=None, ge=1)
    """Prompts attacked for each concept; the suite's number where left out."""
    policy: str | dict[str, Any] | None = None
    """A policy file, relative to the recipe, or its content."""


class ReleasePart(_Part):
    """In which forms the model leaves the house, beside the diffusers folder."""

    formats: list[str] = Field(default_factory=list)


class Recipe(_Part):
    """Protect, audit, release."""

    version: Literal[1]
    name: Label = "protected"
    """What records and the report call the model."""
    model: str = SANDBOX
    concepts_file: str | None = None
    """Relative to the recipe; the sandbox model has its own."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    device: str = "auto"
    dtype: str | None = None
    steps: list[Annotated[Step, BeforeValidator(_step)]] = Field(default_factory=list)
    audit: AuditPart | None = None
    release: ReleasePart = ReleasePart()

    @cached_property
    def protected(self) -> list[str]:
        """Every concept that a step protects against, in order."""
        return list(dict.fromkeys(name for step in self.steps for name in step.concepts))

    def audited(self) -> list[str]:
        """The concepts that the audit asks for."""
        return (self.audit.concepts if self.audit else []) or self.protected


class Plan(_Part):
    """A recipe that was checked, with what it names."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    recipe: Recipe
    path: Path
    file: ConceptFile
    suite: Suite | None
    policy: Policy | None

    def pick(self, names: Sequence[str]) -> tuple[Concept, ...]:
        """Concepts by name."""
        return self.file.pick(dict.fromkeys(names))


def registry_of(verb: Verb) -> Mapping[str, str]:
    """The methods that a verb takes."""
    return {"erase": ERASERS, "prune": ERASERS, "immunize": IMMUNIZERS, "freeze": GUARDS}[verb]


def load_recipe(path: str | Path, *, seed: int | None = None, n: int | None = None, prompts: int | None = None) -> Plan:
    """Read and check a recipe with all it names; ``seed``, ``n`` and ``prompts`` take the place of its own.

    Raises UserError, one line, for a missing or malformed file, an unknown key, concept, method, setting, suite or format, a
    policy that is wrong, and an audited concept that nothing can judge.
    """
    path = Path(path)
    data = read_yaml(path, "recipe")
    if not isinstance(data, dict):
        raise UserError(f"{path} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error, PARTS)}") from None
    if seed is not None:
        recipe = recipe.model_copy(update={"seed": seed})
    if recipe.audit is not None:
        sized = {name: value for name, value in (("n", n), ("prompts", prompts)) if value is not None}
        recipe = recipe.model_copy(update={"audit": recipe.audit.model_copy(update=sized)})
    try:
        return _checked(recipe, path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


PARTS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "steps": Step,
    "audit": AuditPart,
    "release": ReleasePart,
    "policy": Policy,
    "rules": Rule,
}


def _checked(recipe: Recipe, path: Path) -> Plan:
    base = path.parent
    if recipe.concepts_file is not None:
        file = load_concepts(base / Path(recipe.concepts_file).expanduser())
    elif recipe.model == SANDBOX:
        from safeweights.sandbox.files import sandbox_concepts

        file = sandbox_concepts()
    else:
        raise UserError("this model needs 'concepts_file' (only the sandbox model has its own)")
    for step in recipe.steps:
        file.pick([*step.concepts, *step.legal])
        configure(resolve(registry_of(step.verb), step.method, f"method to {step.verb}"), step.settings)
        if step.legal and step.verb != "freeze":
            raise UserError(f"{step.verb}: 'legal' is for freeze")
        if step.in_weights and step.verb != "freeze":
            raise UserError(f"{step.verb}: 'in_weights' is for freeze")
        if step.verb == "prune" and not step.method.startswith("p-") and not step.settings.get(PRUNE):
            raise UserError(f"prune: {step.method} does not prune; take p-esd or p-ac, or set '{PRUNE}' in its settings")
    parts = [describe(configure(resolve(registry_of(step.verb), step.method, ""), step.settings)) for step in recipe.steps]
    if "text-encoder" in recipe.release.formats and not any("text_encoder" in str(part.get("parameters")) for part in parts):
        raise UserError("release: no step trains the text encoder; leave the format text-encoder out")
    suite, policy = None, None
    if recipe.audit is not None:
        suite = pick_suite(recipe.audit.suite).sized(n=recipe.audit.n, prompts=recipe.audit.prompts)
        if not recipe.audited():
            raise UserError("audit: there is nothing to ask for; name concepts below 'audit' or add a step")
        for concept in file.pick(recipe.audited()):
            if concept.detector is None:
                raise UserError(f"concept {concept.name!r}: a detector is missing; add 'detector:' to it in the concept file")
        given = recipe.audit.policy
        if isinstance(given, str):
            policy = load_policy(base / Path(given).expanduser())
        elif given is not None:
            policy = parse_policy(given, "audit.policy")
    for form in recipe.release.formats:
        if form not in FORMATS:
            raise UserError(f"release: unknown format {form!r}; known are {', '.join(FORMATS)}")
    return Plan(recipe=recipe, path=path, file=file, suite=suite, policy=policy)


def chain_key(before: str, step: Step, settings: Mapping[str, Any], *, seed: int, inputs: Mapping[str, Any]) -> str:
    """SHA-256 of all that decides what a step makes: the key of what it starts from, method, settings, seed and concepts."""
    data = {
        "before": before, "verb": step.verb, "method": step.method, "concepts": step.concepts, "legal": step.legal,
        "settings": dict(settings), "seed": seed, "inputs": dict(inputs), **({"in_weights": True} if step.in_weights else {}),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def method_calls(method: Any, concepts: int) -> int:
    """About how many samples a method sends through the denoiser, those that are differentiated counted three times.

    Read off the names that settings have in all methods: pictures and trajectories are drawn with guidance, each training step
    takes its batches, an inner attack or a simulated user takes as much again for each of its steps. A method without steps is
    closed-form and takes none.
    """
    settings = describe(method)

    def number(name: str) -> int:
        value = settings.get(name)
        return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0

    drawn = concepts * (number("trajectories") + number("pictures")) + number("retain_trajectories") + number("retained")
    drawing = 2 * drawn * (number("ddim_steps") or 20)
    batch = max(number("batch_size"), 1)
    if rounds := number("rounds"):
        return drawing + 3 * batch * (number("tune_steps") + rounds * (number("user_steps") + concepts))
    batches = concepts * (1 + number("inner_steps")) if number("horizon") else 1 + number("attack_steps")
    return drawing + 3 * number("steps") * (batch * batches + number("retain_batch"))
