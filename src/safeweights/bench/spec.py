"""What a benchmark measures: a YAML file, checked before anything is opened. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from safeweights.core.concept import Concept, ConceptFile, load_concepts
from safeweights.core.errors import UserError
from safeweights.core.table import ATTACKS, ERASERS, GUARDS, IMMUNIZERS, configure, resolve

NONE = "none"
"""The method that changes nothing: what the unedited model gives."""
METHODS = {**ERASERS, **IMMUNIZERS, **GUARDS}
SANDBOX = "sandbox"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+=-]{0,59}$")]
"""What tables and file names call a method or an attack."""


class _Named(_Part):
    name: str
    label: Label | None = None
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name


class Start(_Part):
    """What a method finds: the model with its concepts already erased."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)


class MethodEntry(_Named):
    """A method under a label; the same method may stand there several times with other settings."""

    start: Annotated[Start, BeforeValidator(lambda value: _entry(value))] | None = None
    """An eraser that goes first; the method then protects what it left. Concepts without pictures get the unedited model's."""
    together: bool = False
    """Protect the concepts of each of the benchmark's ``groups`` in one model, not each concept in its own."""
    only: list[str] = Field(default_factory=list)
    """With ``together``: the method protects these of a group alone, the rest is only erased by ``start``; all, where left out.
    Groups without one of them are left out."""

    per_concept: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings for single concepts, on top of ``settings``."""
    attacks: list[str] | None = None
    """Labels of the attacks on its models; all where left out."""

    def settings_for(self, concept: str) -> dict[str, Any]:
        """The settings given for one concept; defaults and presets come on top of nothing here."""
        return {**self.settings, **self.per_concept.get(concept, {})}


class AttackEntry(_Named):
    """An attack under a label."""

    joint: bool = False
    """For relearn on models that protect ``together``: the user learns all concepts of the group at once, as in MIMA's paper."""


def _entry(value: Any) -> Any:
    """``- uce`` stands for ``- {name: uce}``."""
    return {"name": value} if isinstance(value, str) else value


class Evaluation(_Part):
    """How many pictures tell what asking plainly gives."""

    n: int = Field(default=32, ge=1)
    """Pictures of the erased concept."""
    retain_n: int | None = Field(default=None, ge=1)
    """Pictures of every other concept; a quarter of ``n``, at least 4, where left out."""


class Likeness(_Part):
    """How alike pictures are, for attacks that bring a concept back by degrees."""

    kind: Literal["cosine", "perceptual"] = "cosine"
    """Cosine of features (CLIP, DINO), or one minus the mean distance of unit features of all layers (LPIPS, unweighted)."""
    mode: Literal["clean", "paper"] = "clean"
    """Pictures as they are, or as the published evaluation shows them: 64 pixels wide, in the upper half of their range."""
    model: str | None = None
    """A folder or Hub id; the ``embedder`` beside the concept file, where left out."""


class Generation(_Part):
    """How to draw, where it differs from the concept file."""

    width: int | None = Field(default=None, ge=8)
    height: int | None = Field(default=None, ge=8)
    steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0)
    scheduler: Literal["ddim", "lms", "dpm", "euler", "pndm"] | None = None


def _share(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("above 1 it must be a whole number")
    return value


Share = Annotated[float, AfterValidator(_share)]


class Resources(_Part):
    """What one cell takes on a Ray cluster; a quarter of a GPU lets four cells share one."""

    cpus: Share = Field(default=1, gt=0)
    gpus: Share = Field(default=0, ge=0)


class Bench(_Part):
    """A benchmark: every method on every concept with every seed, each judged plainly and under every attack."""

    version: Literal[1]
    model: str = SANDBOX
    concepts_file: str | None = None
    """Relative to the benchmark's own file; the sandbox model has its own."""
    concepts: list[str] = Field(min_length=1)
    groups: list[Annotated[list[str], Field(min_length=1)]] = Field(default_factory=list)
    """Which concepts methods with ``together`` protect in one model: all of the benchmark's, where left out."""
    benign: list[str] = Field(default_factory=list)
    """Concepts nobody objects to: attacks that fine-tune also learn these on models that protect ``together``, and guards take
    them for legal ones."""
    methods: list[Annotated[MethodEntry, BeforeValidator(_entry)]] = Field(min_length=1)
    attacks: list[Annotated[AttackEntry, BeforeValidator(_entry)]] = Field(default_factory=list)
    seeds: list[Annotated[int, Field(ge=0, le=2**31 - 1)]] = Field(default_factory=lambda: [0], min_length=1)
    evaluation: Evaluation = Evaluation()
    likeness: Likeness = Likeness()
    prompts: int | None = Field(default=None, ge=1)
    """Prompts attacked; all test prompts of the concept where left out."""
    generation: Generation = Generation()
    device: str = "auto"
    dtype: str | None = None
    retries: int = Field(default=2, ge=0)
    """How often a cell whose worker died is begun again."""
    resources: Resources = Resources()

    def group_of(self, concept: str) -> tuple[str, ...]:
        """The concepts that are protected together with this one, in the file's order."""
        found = next((group for group in self.groups if concept in group), self.concepts)
        return tuple(found)

    def baselines(self) -> dict[str, str]:
        """For every method's label that of the one it is compared with: the same start, or none, and no method after it."""
        plain = [entry for entry in self.methods if entry.name == NONE]
        found = {}
        for entry in self.methods:
            same = [other for other in plain if (other.start, other.together) == (entry.start, entry.together)]
            same += [other for other in plain if other.start == entry.start]
            found[entry.title] = same[0].title if same else entry.title
        return found

    def file(self) -> ConceptFile:
        """The concept file. Raises UserError where a model other than the sandbox names none."""
        if self.concepts_file is not None:
            return load_concepts(self.concepts_file)
        if self.model != SANDBOX:
            raise UserError(f"the benchmark of {self.model} needs 'concepts_file' (only the sandbox model has its own)")
        from safeweights.sandbox.files import sandbox_concepts

        return sandbox_concepts()

    def narrowed(
        self,
        *,
        concepts: Sequence[str] | None = None,
        methods: Sequence[str] | None = None,
        attacks: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Self:
        """Only these of the file's concepts, methods, attacks (by label) and seeds. Raises UserError for one it lacks."""
        own: dict[str, tuple[Any, dict[Any, Any]]] = {
            "concepts": (concepts, {name: name for name in self.concepts}),
            "methods": (methods, {entry.title: entry for entry in self.methods}),
            "attacks": (attacks, {entry.title: entry for entry in self.attacks}),
            "seeds": (seeds, {seed: seed for seed in self.seeds}),
        }
        changed: dict[str, Any] = {}
        for what, (wanted, known) in own.items():
            if wanted:
                if strange := [item for item in wanted if item not in known]:
                    raise UserError(f"the benchmark has no {what[:-1]} {strange[0]!r}; it has {', '.join(map(str, known))}")
                changed[what] = [item for key, item in known.items() if key in wanted]
        if "concepts" in changed and any(entry.together for entry in changed.get("methods", self.methods)):
            # A group is one model: it is kept whole, or not at all.
            groups = self.groups or [self.concepts]
            for group in groups:
                if 0 < len(set(group) & set(changed["concepts"])) < len(group):
                    raise UserError(f"{', '.join(group)} are protected together; choose all of them or none")
            changed["groups"] = [group for group in groups if set(group) <= set(changed["concepts"])]
        elif "concepts" in changed:
            changed["groups"] = []
        if "attacks" in changed:
            left = {entry.title for entry in changed["attacks"]}
            changed["methods"] = [
                entry if entry.attacks is None else entry.model_copy(update={"attacks": [a for a in entry.attacks if a in left]})
                for entry in changed.get("methods", self.methods)
            ]
        return self.model_copy(update=changed)


def load_bench(path: str | Path) -> Bench:
    """Read and check a benchmark file.

    Raises UserError, one line, for a missing or malformed file, an unknown key, method, attack, setting or concept, a label
    given twice, and a concept that nothing can judge.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"benchmark file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"benchmark file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        line = f" at line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise UserError(f"benchmark file {path} is not valid YAML{line}; mend the syntax there") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must be a mapping with the keys {', '.join(Bench.model_fields)}")
    if "leakage" in data:
        raise UserError(f"{path} is a plan for another program: python benchmarks/leakage.py {path} -o DIR")
    if isinstance(given := data.get("concepts_file"), str) and not Path(given).expanduser().is_absolute():
        data["concepts_file"] = str((path.parent / given).resolve())
    # Workers elsewhere have another working directory.
    for attack in data.get("attacks") or ():
        settings = attack.get("settings") if isinstance(attack, dict) else None
        if isinstance(settings, dict) and isinstance(source := settings.get("source"), str) and source:
            settings["source"] = str((path.parent / Path(source).expanduser()).resolve())
    if isinstance(model := data.get("model"), str) and model != SANDBOX and Path(model).expanduser().exists():
        data["model"] = str(Path(model).expanduser().resolve())
    try:
        spec = Bench.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}") from None
    try:
        _check(spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return spec


def judged(spec: Bench, file: ConceptFile) -> tuple[Concept, ...]:
    """The benchmark's concepts. Raises UserError for an unknown one and for one without a detector."""
    concepts = file.pick(spec.concepts)
    for concept in (*concepts, *file.pick(spec.benign)):
        if concept.detector is None:
            raise UserError(f"concept {concept.name!r}: a detector is missing; add 'detector:' to it in the concept file")
    return concepts


def _check(spec: Bench) -> None:
    """What the types cannot say: names that exist, settings that are valid, labels that are told apart."""
    file = spec.file()
    judged(spec, file)
    for what, titles in (
        ("concept", [*spec.concepts, *spec.benign]),
        ("method label", [entry.title for entry in spec.methods]),
        ("attack label", [entry.title for entry in spec.attacks]),
        ("seed", spec.seeds),
    ):
        for item in titles:
            if list(titles).count(item) > 1:
                raise UserError(f"{what} {item!r} stands there twice; give each its own")
    if spec.benign and not any(entry.together for entry in spec.methods):
        raise UserError("'benign' concepts are learnt on models that protect together; no method has 'together: true'")
    grouped = [name for group in spec.groups for name in group]
    if spec.groups and sorted(grouped) != sorted(spec.concepts):
        odd = sorted(set(grouped) ^ set(spec.concepts)) or [name for name in grouped if grouped.count(name) > 1]
        raise UserError(f"'groups' must hold every concept of the benchmark once; look at {odd[0]!r}")
    known = {entry.title for entry in spec.attacks}
    for entry in spec.methods:
        if entry.start is not None:
            _configured(ERASERS, entry.start.name, "eraser", entry.start.settings)
        if strange := [name for name in entry.only if name not in spec.concepts]:
            raise UserError(f"method {entry.title!r}: 'only' names {strange[0]!r}, which is none of the benchmark's concepts")
        if entry.only and not entry.together:
            raise UserError(f"method {entry.title!r}: 'only' chooses among concepts in one model; it needs 'together: true'")
        if entry.together and entry.per_concept:
            raise UserError(f"method {entry.title!r}: one model for several concepts has one set of settings, no per_concept")
        for name in entry.per_concept:
            if name not in file.concepts:
                raise UserError(f"method {entry.title!r}: unknown concept {name!r} in per_concept")
        for name in entry.attacks or ():
            if name not in known:
                raise UserError(f"method {entry.title!r}: unknown attack {name!r}; it has {', '.join(known) or 'none'}")
        if entry.name == NONE:
            if entry.settings or entry.per_concept:
                raise UserError("the method 'none' changes nothing and has no settings")
            continue
        for settings in (entry.settings, *(entry.settings_for(name) for name in entry.per_concept)):
            _configured(METHODS, entry.name, "method", settings)
    for attack in spec.attacks:
        _configured(ATTACKS, attack.name, "attack", attack.settings)
        if attack.joint and (attack.name != "relearn" or "along" in attack.settings):
            raise UserError(f"attack {attack.title!r}: 'joint' is for relearn, and says itself what is learnt 'along'")


def _configured(registry: Mapping[str, str], name: str, what: str, settings: Mapping[str, Any]) -> None:
    configure(resolve(registry, name, what), settings)


def _first(error: ValidationError) -> str:
    """The first thing wrong, in one line."""
    found = error.errors(include_url=False)[0]
    *outer, last = found["loc"] or ("",)
    where = ".".join(str(part) for part in outer)
    if found["type"] == "extra_forbidden":
        return f"unknown key {last!r}{f' in {where}' if where else ''}; known are {', '.join(_keys(outer))}"
    if found["type"] == "missing":
        return f"the key {last!r} is missing{f' in {where}' if where else ''}"
    return f"{'.'.join(str(part) for part in found['loc'])}: {found['msg'][:1].lower()}{found['msg'][1:]}"


def _keys(place: Sequence[int | str]) -> list[str]:
    parts: dict[str, type[BaseModel]] = {
        "methods": MethodEntry, "start": Start, "attacks": AttackEntry, "evaluation": Evaluation, "likeness": Likeness,
        "generation": Generation, "resources": Resources,
    }  # fmt: skip
    return list((parts.get(str(place[0]), Bench) if place else Bench).model_fields)
