"""Attack a protected model and judge what comes out. The attack proposes; this module samples, detects, doubts and records."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.audit import doubts as doubt
from safeweights.audit.pictures import Painter
from safeweights.audit.relearning import Checkpoint, plots, steps_to_recovery, strongest
from safeweights.audit.statistics import wilson
from safeweights.core.attack import Access, Attack, Candidate, Original, Target
from safeweights.core.concept import Concept, Prompt
from safeweights.core.detector import Detector
from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.detectors.load import open_detector
from safeweights.records.machine import peak_memory_gb, versions
from safeweights.records.record import Artefact, Measurement, Record
from safeweights.records.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from safeweights.metrics.similarity_gap import Similarity

SHOWN = 8
"""Prompts whose pictures are kept for the report."""
FRAMES = 4
"""Prompts whose pictures are kept at every checkpoint of an attack that changes the weights."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a record calls the models, and what proves which they were."""

    model: str
    reference: str
    method: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the inputs: "model", "reference", "concepts"."""
    method_settings: Mapping[str, Any] = field(default_factory=dict)


def audit(
    model: DiffusionModel,
    reference: DiffusionModel,
    concept: Concept,
    attack: Attack,
    *,
    names: Names,
    sampling: Sampling,
    seed: int = 0,
    n: int | None = None,
    store: Store | None = None,
    workspace: Workspace | None = None,
    detector: Detector | None = None,
    allow_python_detectors: bool = False,
    pictures: Path | None = None,
    reference_pictures: Path | None = None,
    similarity: Similarity | None = None,
) -> Record:
    """Attack ``concept`` on ``model`` with ``n`` prompts (all its test prompts by default) and record the success rate.

    The concept's test prompts are attacked, each with its own seed and, where it has one, guidance; more prompts than there are
    repeat them with other seeds. A picture of the concept for each prompt is made by ``reference`` with another seed: the attack
    never sees a judged picture.
    ``pictures`` and ``reference_pictures`` are folders where audits of the same model find what others drew; without them the
    workspace keeps its own.
    An attack that changes the weights is one model for all prompts: every prompt is asked at every checkpoint, the rate is that
    of the best one (with the prompts seen before), and the record tells the whole curve; ``similarity`` measures its pictures
    against the reference's of the same prompts.
    Raises UserError where the concept has no detector.
    """
    workspace = workspace or Workspace()
    attack = _seeded(attack, seed)
    detector = detector or open_detector(concept.detector, concept=concept.name, allow_python=allow_python_detectors)
    started = time.perf_counter()
    prompts = choose_prompts(concept, n=n, seed=seed)
    own = workspace.folder / "pictures" if workspace.folder else None
    before = Painter(reference, sampling, names.hashes.get("reference", names.reference), reference_pictures or own)
    pictures = pictures or own
    after = Painter(model, sampling, names.hashes.get("model", names.model), pictures)

    # What the attacker has pictures of, the reference may never have known: then it is read against those he did not learn from.
    own_pictures = getattr(attack, "shown", None)
    given = own_pictures(concept, reference) if own_pictures else None
    asked = (
        before.ask(prompts, workspace=workspace, what="reference pictures") if given is None else given[repeated(given, prompts)]
    )
    there = detector.detect(asked).present
    folder = None if attack.access == "prompt" or given is not None else attackers_pictures(concept, reference)
    if attack.access == "prompt" or given is not None:
        shown: list[Any] = [None] * len(prompts)
    elif folder is not None:
        shown = [folder[i] for i in repeated(folder, prompts)]
    else:
        shown = concept_pictures(before, detector, prompts, seed=seed, workspace=workspace)
    targets = [Target(p.text, p.seed or 0, picture) for p, picture in zip(prompts, shown, strict=True)]

    def examples(count: int) -> Tensor:
        import torch

        if folder is not None:
            return folder[[i % len(folder) for i in range(count)]]
        own = [Prompt(concept.texts[i % len(concept.texts)]) for i in range(count)]
        key = _seed("examples for the attack", seed)
        return torch.stack(concept_pictures(before, detector, own, seed=key, workspace=workspace))

    original = Original(reference, examples)
    alike = None if similarity is None else lambda images: similarity.each(images, asked)
    outcome = _run(attack, after, concept, targets, [p.guidance for p in prompts], detector, original, workspace, alike)

    plain = outcome.images[0]
    successes = [row is not None for row in outcome.fell_in]
    if outcome.curve:
        successes = [a or b for a, b in zip(outcome.curve[0].seen, strongest(outcome.curve).seen, strict=True)]
    pre = sum(round_ == 0 for round_ in outcome.fell_in)
    n_prompts = len(prompts)
    reference_rate = int(there.sum()) / n_prompts
    pre_asr = Measurement(
        name="pre_asr",
        value=pre / n_prompts,
        n=n_prompts,
        interval=wilson(pre, n_prompts),
        better="lower",
        reference=reference_rate,
    )
    asr = Measurement(
        name="asr", value=sum(successes) / n_prompts, n=n_prompts, interval=wilson(sum(successes), n_prompts), better="lower",
        reference=reference_rate,
    )  # fmt: skip
    seen_before = Measurement(
        name="reference_rate", value=reference_rate, n=n_prompts, interval=wilson(int(there.sum()), n_prompts)
    )
    extra, curve = _read_curve(outcome.curve if _fine_tunes(attack) else (), reference_rate, similarity, concept)
    fallen = [sum(row == r for row in outcome.fell_in) for r in range(outcome.rounds)]
    found = [
        *doubt.not_there_before(seen_before),
        *doubt.few_samples(asr),
        *doubt.gradients(outcome.facts),
        *doubt.not_converged(fallen[1:], n_prompts),
        *([] if concept.test_prompts else [doubt.judged_on_own_prompts()]),
        *doubt.compliance_assumed(getattr(attack, "mask", "")),
    ]
    origin = getattr(attack, "origin", None)
    source: Mapping[str, Any] = origin() if origin else {}
    found += doubt.same_model(source.get("model_sha256"), names.hashes.get("model"))
    seconds = time.perf_counter() - started
    budget = attack.budget
    details = {
        "concept": concept.name,
        "attack": attack.name,
        "model": names.model,
        "model_sha256": names.hashes.get("model"),
        "settings": describe(attack),
        **({"transferred_from": dict(source)} if source else {}),
        "mode": attack.mode,
        "n": n_prompts,
        "pre_asr": _rate(pre, n_prompts),
        "asr": _rate(sum(successes), n_prompts),
        "reference_rate": reference_rate,
        "access": str(attack.access),
        "budget": {
            "tokens": budget.tokens,
            "steps": budget.gradient_steps // max(budget.timesteps, 1),
            "timesteps": budget.timesteps,
            "images_per_prompt": budget.images,
        },
        "detector": detector.describe(),
        "prompts_sha256": prompts_hash(prompts),
        "fallen_per_round": fallen,
        # What is not finite is told by a doubt: JSON has no number for it.
        "rounds": [{key: value for key, value in facts.items() if math.isfinite(value)} for facts in outcome.facts],
        "found": [
            {
                "prompt": t.prompt,
                "seed": t.seed,
                "adversarial_prompt": c.prompt,
                "adversarial_seed": c.seed,
                "input": "weights"
                if outcome.curve
                else "text"
                if c.states is None and c.latents is None
                else "embeddings"
                if c.latents is None
                else "latent",
                "guidance": sampling.guidance_scale if p.guidance is None else p.guidance,
                "success": s,
            }
            for p, t, c, s in zip(prompts, targets, outcome.last, successes, strict=True)
        ],
        "seed": seed,
        "seconds": round(seconds, 3),
        **curve,
    }
    record = Record(
        kind="attack", status="ok", model=names.model, reference=names.reference, method=names.method,
        concept=concept.name, concept_kind=concept.kind, attack=attack.name, seed=seed,
        detector=detector.describe(), sampling=asdict(sampling),
        settings={"attack": describe(attack), "method": dict(names.method_settings)},
        measurements=(pre_asr, asr, seen_before, *extra), doubts=tuple(found),
        artefacts=tuple(_keep_pictures(store, attack.name, targets, outcome, asked, plain, there)) if store else (),
        details=details, provenance=provenance(names, seconds),
    )  # fmt: skip
    if store:
        store.add(record)
    return record


@dataclass
class _Outcome:
    """What a run of an attack gave: per target the round it fell in (None: it stands) and its last candidate and picture."""

    fell_in: list[int | None]
    last: list[Candidate]
    images: list[Tensor]
    scores: list[float]
    plain_scores: list[float]
    facts: list[dict[str, float]]
    rounds: int
    curve: list[Checkpoint]
    """Of an attack that changes the weights: every prompt at every checkpoint."""
    frames: list[tuple[Tensor, list[float]]]
    """The first pictures at each checkpoint of a fine-tune, and their scores."""


def _run(
    attack: Attack,
    painter: Painter,
    concept: Concept,
    targets: Sequence[Target],
    guidance: Sequence[float | None],
    detector: Detector,
    original: Original,
    workspace: Workspace,
    alike: Callable[[Tensor], list[float]] | None = None,
) -> _Outcome:
    """Play the attack's rounds, each target drawn with its own guidance. One that falls leaves; what it fell to is kept.

    None leaves where the weights change: an attacker has one model for all prompts.
    """
    import torch

    fell: list[int | None] = [None] * len(targets)
    last = [Candidate(t.prompt, t.seed) for t in targets]
    shown: list[Any] = [None] * len(targets)
    scores = [0.0] * len(targets)
    plain_scores: list[float] = []
    plain = None
    facts: list[dict[str, float]] = []
    curve: list[Checkpoint] = []
    frames: list[tuple[Tensor, list[float]]] = []
    rounds = attack.revive(painter.model, concept, targets, sampling=painter.sampling, original=original, workspace=workspace)
    standing = list(range(len(targets)))
    number, revival = 0, next(rounds, None)
    while revival is not None:
        reader = painter if revival.model is painter.model else Painter(revival.model, painter.sampling, "revived")
        images = reader.draw(
            revival.candidates, [guidance[i] for i in standing], workspace=workspace, what=f"judging round {number}"
        )
        detection = detector.detect(images)
        if plain is None:
            plain, plain_scores = images, detection.score.tolist()
        present = [bool(seen) for seen in detection.present]
        for row, i in enumerate(standing):
            if fell[i] is not None:
                continue
            last[i], shown[i], scores[i] = revival.candidates[row], images[row], float(detection.score[row])
            if present[row]:
                fell[i] = number
        if attack.access == Access.WEIGHTS:
            told = revival.facts
            likeness = tuple(alike(images)) if alike else ()
            curve.append(Checkpoint(int(told.get("steps", number)), tuple(present), likeness, told.get("loss")))
            if _fine_tunes(attack):
                frames.append((images[:FRAMES], detection.score[:FRAMES].tolist()))
            present = [False] * len(present)
        if revival.facts:
            facts.append(dict(revival.facts))
        standing = [i for row, i in enumerate(standing) if not present[row]]
        number += 1
        try:
            revival = rounds.send(present)
        except StopIteration:
            revival = None
    if plain is None:
        raise UserError(f"attack {attack.name!r} proposed nothing")
    return _Outcome(fell, last, [plain, torch.stack(shown)], scores, plain_scores, facts, number, curve, frames)


def _seeded(attack: Any, seed: int) -> Any:
    """An attack that draws by itself (batches, the start of factors) varies with the audit's seed."""
    return replace(attack, seed=attack.seed + seed) if hasattr(attack, "seed") else attack


def _fine_tunes(attack: Attack) -> bool:
    """Whether an attack that changes the weights does so step by step: others have rounds, but no curve over steps."""
    return hasattr(attack, "checkpoints")


def _read_curve(
    curve: Sequence[Checkpoint], reference_rate: float, similarity: Similarity | None, concept: Concept
) -> tuple[list[Measurement], dict[str, Any]]:
    """What a curve adds to a record: measurements and details; nothing without one."""
    if not curve:
        return [], {}
    back, best = steps_to_recovery(curve, reference_rate), strongest(curve)
    measurements = [back]
    if similarity is not None:
        n = len(best.seen)
        measurements.append(Measurement(name="similarity", value=best.similarity, n=n, better="lower", unit=similarity.name))
    steps = None if back.value is None else int(back.value)
    return measurements, {
        "curve": [point.to_json() for point in curve], "best_steps": best.steps, "steps_to_recovery": steps,
        "plots": plots(curve, concept.name),
    }  # fmt: skip


def attackers_pictures(concept: Concept, model: DiffusionModel) -> Tensor | None:
    """What attackers have of a concept's own folder, the last half; None without a folder.

    Publishers take as many of the first as their method's settings say, so of a small folder some of the same.
    """
    from safeweights.diffusion.image_folder import read_native

    if concept.images is None:
        return None
    images, _ = read_native(model, concept.images, prompt=concept.term)
    return images[len(images) // 2 :]


def repeated(pictures: Tensor, prompts: Sequence[Prompt]) -> list[int]:
    """A picture for each prompt, in turn."""
    return [i % len(pictures) for i in range(len(prompts))]


def choose_prompts(concept: Concept, *, n: int | None, seed: int) -> list[Prompt]:
    """The first ``n`` test prompts (the concept's prompts where it has none), each with a seed; if short, again with others."""
    source = concept.test_prompts or concept.prompts
    count = len(source) if n is None else n
    if count < 1:
        raise UserError(f"--n must be at least 1, not {count}")
    chosen = []
    for number in range(count):
        prompt = source[number % len(source)]
        again = number // len(source)
        own = prompt.seed is not None and again == 0
        chosen.append(Prompt(prompt.text, prompt.seed if own else _seed("judged", seed, number), prompt.guidance))
    return chosen


def concept_pictures(
    painter: Painter, detector: Detector, prompts: Sequence[Prompt], *, seed: int, workspace: Workspace, tries: int = 3
) -> list[Tensor]:
    """For each prompt a picture of the concept by the reference model, with seeds no judged picture has.

    A picture the detector does not recognise is drawn again, ``tries`` times at most: an attacker would pick one that
    shows it.
    """
    pictures: list[Any] = [None] * len(prompts)
    missing = list(range(len(prompts)))
    for attempt in range(tries):
        asked = [replace(prompts[i], seed=_seed("shown to the attack", seed, i, attempt)) for i in missing]
        images = painter.ask(asked, workspace=workspace, what="pictures for the attack")
        present = detector.detect(images).present
        for row, i in enumerate(missing):
            if bool(present[row]) or pictures[i] is None:
                pictures[i] = images[row]
        missing = [i for row, i in enumerate(missing) if not present[row]]
        if not missing:
            break
    return pictures


def provenance(names: Names, seconds: float) -> dict[str, Any]:
    """Hashes and versions; under "time" what differs from run to run."""
    from safeweights import __version__

    return {
        "safeweights": __version__,
        "inputs": dict(names.hashes),
        "versions": versions(),
        "time": {
            "seconds": round(seconds, 3),
            "peak_memory_gb": peak_memory_gb(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    }


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of prompts, seeds and guidance, in order."""
    return hashlib.sha256(json.dumps([[p.text, p.seed, p.guidance] for p in prompts]).encode()).hexdigest()


def _seed(*key: Any) -> int:
    """A seed below 2**31 that depends on all of ``key``, so that judged, shown and drawn pictures never share noise."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") >> 1


def _rate(successes: int, n: int) -> dict[str, Any]:
    low, high = wilson(successes, n)
    return {"successes": successes, "rate": successes / n, "ci95": [round(low, 4), round(high, 4)]}


def _keep_pictures(
    store: Store,
    attack: str,
    targets: Sequence[Target],
    outcome: _Outcome,
    asked: Tensor,
    plain: Tensor,
    there: Tensor,
) -> list[Artefact]:
    """Save the first prompts' pictures before, after and under attack."""
    kept = []
    for i, target in enumerate(targets[:SHOWN]):
        fell = outcome.fell_in[i]
        rows = [
            ("reference", asked[i], target.prompt, target.seed, bool(there[i]), None),
            ("protected", plain[i], target.prompt, target.seed, fell == 0, outcome.plain_scores[i]),
        ]
        if attack != "no-attack":
            candidate = outcome.last[i]
            rows.append(
                (
                    "attacked",
                    outcome.images[1][i],
                    candidate.prompt,
                    candidate.seed,
                    fell is not None,
                    outcome.scores[i],
                )
            )
        for role, image, prompt, seed, detected, score in rows:
            kept.append(store.save_artefact(
                image.numpy(), role=role, prompt=prompt, seed=seed, group=i, detected=detected, score=score
            ))  # fmt: skip
    for point, (images, scores) in zip(outcome.curve if outcome.frames else (), outcome.frames, strict=True):
        for i, image in enumerate(images):
            kept.append(store.save_artefact(
                image.numpy(), role="relearned", prompt=targets[i].prompt, seed=targets[i].seed, group=i, detected=point.seen[i],
                score=scores[i], step=point.steps,
            ))  # fmt: skip
    return kept
