"""A concept the publisher does not want made, and the file that lists them. No torch at import."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safeweights.core.errors import UserError
from safeweights.core.text import whole_words

Kind = Literal["style", "object", "identity", "content"]
KINDS: tuple[Kind, ...] = ("style", "object", "identity", "content")
DETECTOR_TYPES = ("image-classification", "clip", "nudenet", "python")

# Column names in use by published prompt sets, by alias.
PROMPT_COLUMNS = ("prompt", "adv_prompt", "sensitive prompt", "target_prompt", "text")
SEED_COLUMNS = ("seed", "evaluation_seed", "sd_seed")
GUIDANCE_COLUMNS = ("guidance", "evaluation_guidance", "sd_guidance_scale")


@dataclass(frozen=True)
class Prompt:
    """A prompt with what its CSV row fixes: the seed of its noise and its guidance scale, where given."""

    text: str
    seed: int | None = None
    guidance: float | None = None


@dataclass(frozen=True, kw_only=True)
class DetectorSpec:
    """How a concept is recognised; paths are absolute or Hub ids."""

    type: str
    model: str = ""
    label: str = ""
    threshold: float = 0.5
    texts: tuple[str, ...] = ()
    """Zero-shot texts of a ``clip`` detector, the concept's own first."""


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A style, object, identity or kind of content.

    ``prompts`` ask for it; ``term`` are the words inside the prompts that name it; ``anchor`` is the neutral stand-in.
    """

    name: str
    kind: Kind
    prompts: tuple[Prompt, ...]
    term: str
    anchor: str = ""
    test_prompts: tuple[Prompt, ...] = ()
    """Prompts only audits ask with; no method learns from them. Empty: audits use ``prompts`` and say so."""
    images: Path | None = None
    detector: DetectorSpec | None = None
    neighbours: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts without their seeds."""
        return tuple(prompt.text for prompt in self.prompts)

    def without(self, text: str) -> str:
        """The text with the concept taken out: a style or content is left out, an object or person becomes the anchor.

        A text that does not contain the concept's term becomes the anchor as a whole.
        """
        pattern = whole_words(self.term)
        if not pattern.search(text):
            return self.anchor
        anchor = self.anchor if self.kind in ("object", "identity") else ""
        return " ".join(pattern.sub(lambda _: anchor, text).split())


@dataclass(frozen=True, kw_only=True)
class ConceptFile:
    """All concepts of a file by name, how to sample, and the prompts that must stay as they were."""

    concepts: Mapping[str, Concept]
    retain: tuple[str, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def pick(self, names: Iterable[str]) -> tuple[Concept, ...]:
        """The concepts of those names, in that order. Raises UserError for an unknown one."""
        picked = []
        for name in names:
            if name not in self.concepts:
                raise UserError(f"unknown concept {name!r}; this file knows: {', '.join(self.concepts)}")
            picked.append(self.concepts[name])
        return tuple(picked)


def load_concepts(path: str | Path) -> ConceptFile:
    """Read a concept file (YAML, version 1). Relative paths are relative to it.

    Raises UserError for a missing or malformed file, an unknown key, an empty or missing prompt, an unknown kind, detector or
    neighbour.
    """
    import yaml

    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"concept file {path} does not exist; give one with --concepts-file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"concept file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        line = f" at line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise UserError(f"concept file {path} is not valid YAML{line}; mend the syntax there") from None
    top = _mapping(data, f"{path}", {"version", "generation", "concepts", "retain"}, required={"version", "concepts"})
    if top["version"] != 1:
        raise UserError(f"{path}: version {top['version']!r} is not known; this release reads version 1")
    entries = top["concepts"]
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: 'concepts' must name at least one concept")
    concepts = {str(name): _concept(str(name), entry, path) for name, entry in entries.items()}
    for concept in concepts.values():
        for neighbour in concept.neighbours:
            if neighbour not in concepts:
                raise UserError(f"{path}: concept {concept.name!r} has unknown neighbour {neighbour!r}")
    retain = _mapping(top.get("retain") or {}, f"{path}: retain", {"prompts", "prompts_csv"})
    return ConceptFile(
        concepts=concepts,
        retain=tuple(prompt.text for prompt in _prompts(retain, f"{path}: retain", path.parent)),
        generation=_generation(top.get("generation") or {}, path),
        path=path,
    )


def read_prompts_csv(path: str | Path) -> tuple[Prompt, ...]:
    """Prompts of a CSV file; the column names of the field's published prompt sets are accepted by alias.

    Raises UserError for a missing file, a missing prompt column, an empty prompt or a seed or guidance that is no number.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"prompt file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"prompt file {path} cannot be read as CSV: {error}") from None
    if not rows:
        raise UserError(f"prompt file {path} holds no rows")
    columns = list(rows[0])
    column = next((name for name in PROMPT_COLUMNS if name in columns), None)
    if column is None:
        raise UserError(f"prompt file {path} has no prompt column; name one of its columns {', '.join(PROMPT_COLUMNS)}")
    prompts = []
    for number, row in enumerate(rows, start=2):
        text = (row[column] or "").strip()
        if not text:
            raise UserError(f"{path} line {number}: the prompt is empty")
        where = f"{path} line {number}"
        seed = _number(row, SEED_COLUMNS, where)
        prompts.append(Prompt(text, None if seed is None else int(seed), _number(row, GUIDANCE_COLUMNS, where)))
    return tuple(prompts)


def _number(row: Mapping[str, str | None], aliases: tuple[str, ...], where: str) -> float | None:
    for name in aliases:
        if value := (row.get(name) or "").strip():
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise UserError(f"{where}: {name} {value!r} is not a number")
            return number
    return None


def _mapping(value: Any, where: str, known: set[str], required: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a mapping with the keys {', '.join(sorted(known))}")
    for key in value:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(sorted(known))}")
    for key in sorted(required or set()):
        if key not in value:
            raise UserError(f"{where}: the key {key!r} is missing")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, not {value!r}")
    return value


def _inside(value: Any, where: str, base: Path) -> Path:
    """A path relative to the concept file."""
    path = Path(_text(value, where)).expanduser()
    return path if path.is_absolute() else base / path


def _prompts(entry: Mapping[str, Any], where: str, base: Path, key: str = "prompts") -> tuple[Prompt, ...]:
    """The prompts listed under ``key`` and those of the CSV file under ``key``_csv."""
    listed = entry.get(key) or []
    if not isinstance(listed, list):
        raise UserError(f"{where}: {key!r} must be a list of texts")
    prompts = []
    for number, value in enumerate(listed, start=1):
        if not _text(value, f"{where}: prompt {number}").strip():
            raise UserError(f"{where}: prompt {number} is empty; write what to ask for or leave it out")
        prompts.append(Prompt(value.strip()))
    if entry.get(f"{key}_csv"):
        prompts.extend(read_prompts_csv(_inside(entry[f"{key}_csv"], f"{where}: {key}_csv", base)))
    return tuple(prompts)


def _concept(name: str, entry: Any, path: Path) -> Concept:
    where = f"{path}: concept {name!r}"
    known = {
        "kind",
        "prompts",
        "prompts_csv",
        "test_prompts",
        "test_prompts_csv",
        "term",
        "anchor",
        "images",
        "detector",
        "neighbours",
    }
    entry = _mapping(entry, where, known, required={"kind"})
    if entry["kind"] not in KINDS:
        raise UserError(f"{where}: kind {entry['kind']!r} is not known; use one of {', '.join(KINDS)}")
    prompts = _prompts(entry, where, path.parent)
    if not prompts:
        raise UserError(f"{where} has no prompts; add 'prompts' or 'prompts_csv'")
    images = None
    if entry.get("images"):
        images = _inside(entry["images"], f"{where}: images", path.parent)
        if not images.is_dir():
            raise UserError(f"{where}: the image folder {images} does not exist")
    neighbours = entry.get("neighbours") or []
    if not isinstance(neighbours, list):
        raise UserError(f"{where}: 'neighbours' must be a list of concept names")
    return Concept(
        name=name,
        kind=entry["kind"],
        prompts=prompts,
        test_prompts=_prompts(entry, where, path.parent, "test_prompts"),
        term=_text(entry.get("term") or name, f"{where}: term"),
        anchor=_text(entry.get("anchor") or "", f"{where}: anchor"),
        images=images,
        detector=_detector(entry["detector"], where, path.parent) if entry.get("detector") else None,
        neighbours=tuple(str(neighbour) for neighbour in neighbours),
    )


def _detector(entry: Any, where: str, base: Path) -> DetectorSpec:
    where = f"{where}: detector"
    entry = _mapping(entry, where, {"type", "model", "label", "threshold", "texts"}, required={"type"})
    if entry["type"] not in DETECTOR_TYPES:
        raise UserError(f"{where}: type {entry['type']!r} is not known; use one of {', '.join(DETECTOR_TYPES)}")
    threshold = entry.get("threshold", 0.5)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise UserError(f"{where}: threshold must be a number from 0 to 1, not {threshold!r}")
    model = _text(entry.get("model") or "", f"{where}: model")
    # A folder beside the file wins; anything else is taken for a Hub id (or module:function) and looked up when used.
    if model and (local := _inside(model, where, base)).exists():
        model = str(local.resolve())
    return DetectorSpec(
        type=entry["type"],
        model=model,
        label=_text(entry.get("label") or "", f"{where}: label"),
        threshold=float(threshold),
        texts=tuple(_text(text, f"{where}: texts") for text in entry.get("texts") or ()),
    )


def _generation(entry: Any, path: Path) -> dict[str, Any]:
    known = {"width": int, "height": int, "steps": int, "guidance_scale": float, "scheduler": str}
    entry = _mapping(entry, f"{path}: generation", set(known))
    values = {}
    for key, value in entry.items():
        wanted = known[key]
        if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            raise UserError(f"{path}: generation: {key} must be {'text' if wanted is str else 'a number'}, not {value!r}")
        if isinstance(value, int | float) and value <= 0:
            raise UserError(f"{path}: generation: {key} must be above zero, not {value!r}")
        values[key] = wanted(value)
    return values
