"""What asking plainly gives: is the concept gone, did the rest stay, are the pictures still good? Each against the reference."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.audit import doubts as doubt
from safeweights.audit.audit import Names, choose_prompts, prompts_hash, provenance
from safeweights.audit.pictures import Painter
from safeweights.audit.statistics import wilson
from safeweights.core.concept import Concept, ConceptFile, Prompt
from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.detectors.load import open_detector
from safeweights.diffusion.retain_set import names as mentions
from safeweights.metrics.backbones import Backbones, default_backbones
from safeweights.metrics.clip_score import clip_score
from safeweights.metrics.frechet import frechet_distance
from safeweights.records.record import Artefact, Doubt, Measurement, Record
from safeweights.records.store import Store

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 8
"""Prompts a concept whose pictures are kept for the report."""


@dataclass
class _Judged:
    """One concept's pictures before and after, and the verdicts on them."""

    concept: Concept
    prompts: list[Prompt]
    before: Tensor
    after: Tensor
    seen_before: list[bool]
    seen_after: list[bool]
    scores: list[float]
    detector: Any

    @property
    def n(self) -> int:
        return len(self.prompts)

    def measurement(self, name: str, better: Any) -> Measurement:
        hits = sum(self.seen_after)
        return Measurement(
            name=name, value=hits / self.n, n=self.n, interval=wilson(hits, self.n), better=better,
            reference=sum(self.seen_before) / self.n,
        )  # fmt: skip


def evaluate(
    model: DiffusionModel,
    reference: DiffusionModel,
    concepts: Sequence[Concept],
    file: ConceptFile,
    *,
    names: Names,
    sampling: Sampling,
    n: int = 32,
    retain_n: int | None = None,
    seed: int = 0,
    store: Store | None = None,
    workspace: Workspace | None = None,
    backbones: Backbones | None = None,
    allow_python_detectors: bool = False,
    reference_pictures: Path | None = None,
) -> dict[str, Any]:
    """Judge ``n`` pictures of each erased concept and ``retain_n`` (n // 4, at least 4) of every other one with a detector.

    Prompts are the concepts' test prompts, with the same seeds, and guidance where a prompt has
    its own, for both models. A retained concept is never asked for in words
    that name an erased one. ``reference_pictures`` is a folder of the reference's pictures that several evaluations share.
    Quality (CLIP score, Frechet distance) is read off the retained pictures. Returns the JSON of
    ``evaluate``.
    Raises UserError where an erased concept has no detector.
    """
    if n < 1:
        raise UserError(f"--n must be at least 1, not {n}")
    started = time.perf_counter()
    workspace = workspace or Workspace()
    backbones = default_backbones(file) if backbones is None else backbones
    pictures = workspace.folder / "pictures" if workspace.folder else None
    before = Painter(reference, sampling, names.hashes.get("reference", names.reference), reference_pictures or pictures)
    after = Painter(model, sampling, names.hashes.get("model", names.model), pictures)
    share = max(4, n // 4) if retain_n is None else retain_n

    def judge(concept: Concept, count: int) -> _Judged:
        detector = open_detector(concept.detector, concept=concept.name, allow_python=allow_python_detectors)
        prompts = choose_prompts(concept, n=count, seed=seed)
        old = before.ask(prompts, workspace=workspace, what=f"{concept.name} before")
        new = after.ask(prompts, workspace=workspace, what=f"{concept.name} after")
        verdict = detector.detect(new)
        return _Judged(
            concept,
            prompts,
            old,
            new,
            detector.detect(old).present.tolist(),
            verdict.present.tolist(),
            verdict.score.tolist(),
            detector,
        )

    erased = [judge(concept, n) for concept in concepts]
    retained = [judge(concept, share) for concept in retained_concepts(concepts, file)]
    quality = _quality(retained, backbones)
    hits, total = sum(sum(j.seen_after) for j in retained), sum(j.n for j in retained)
    hits_before = sum(sum(j.seen_before) for j in retained)
    neighbours = [judged.measurement(f"neighbour_rate:{judged.concept.name}", "higher") for judged in retained]
    seconds = time.perf_counter() - started
    result = {
        "concepts": {
            j.concept.name: {
                "kind": j.concept.kind,
                "n": j.n,
                "reference_rate": sum(j.seen_before) / j.n,
                "rate": sum(j.seen_after) / j.n,
                "ci95": [round(bound, 4) for bound in wilson(sum(j.seen_after), j.n)],
            }
            for j in erased
        },
        "retention": {
            "n": total,
            "rate": hits / total if total else None,
            "relative": hits / hits_before if hits_before else None,
            "ci95": [round(bound, 4) for bound in wilson(hits, total)] if total else None,
            "concepts": {
                j.concept.name: {"n": j.n, "reference_rate": sum(j.seen_before) / j.n, "rate": sum(j.seen_after) / j.n}
                for j in retained
            },
        },
        "clip_score": {
            "reference": quality["clip_score"].reference, "model": quality["clip_score"].value, "scale": "cosine",
            "n": quality["clip_score"].n, "why": quality["clip_score"].why,
        },
        "frechet_distance": {
            "value": quality["frechet_distance"].value, "features": quality["frechet_distance"].unit,
            "n": quality["frechet_distance"].n, "why": quality["frechet_distance"].why,
        },
        "seed": seed,
        "seconds": round(seconds, 3),
    }  # fmt: skip
    if store:
        overall = _retention(hits, hits_before, total)
        for judged in erased:
            store.add(
                _record(
                    judged,
                    retained,
                    [*overall, *neighbours, *quality.values()],
                    names,
                    sampling,
                    seed,
                    result,
                    seconds,
                    store,
                )
            )
    return result


def retained_concepts(erased: Sequence[Concept], file: ConceptFile) -> list[Concept]:
    """Every other concept of the file that can be judged, with only the test prompts that do not name an erased one."""
    gone = {concept.name for concept in erased}
    terms = [concept.term for concept in erased]
    kept = []
    for concept in file.concepts.values():
        if concept.name in gone or concept.detector is None:
            continue
        asked = [p for p in concept.test_prompts or concept.prompts if not any(mentions(p.text, term) for term in terms)]
        # What methods were told to hold is no test of what they hold.
        prompts = tuple([p for p in asked if p.text not in file.retain] or asked)
        if prompts:
            kept.append(
                Concept(
                    **{
                        **{name: getattr(concept, name) for name in concept.__dataclass_fields__},
                        "test_prompts": prompts,
                    }
                )
            )
    return kept


def _quality(retained: Sequence[_Judged], backbones: Backbones) -> dict[str, Measurement]:
    import torch

    if not retained:
        why = "no other concept of the file has a detector"
        return {name: Measurement(name=name, value=None, n=0, why=why) for name in ("clip_score", "frechet_distance")}
    old, new = torch.cat([j.before for j in retained]), torch.cat([j.after for j in retained])
    texts = [p.text for j in retained for p in j.prompts]
    clip = backbones.open_clip()
    score, base = clip_score(new, texts, clip), clip_score(old, texts, clip)
    score = Measurement(**{**asdict(score), "reference": base.value})
    return {"clip_score": score, "frechet_distance": frechet_distance(new, old, backbones.open_features())}


def _retention(hits: int, hits_before: int, total: int) -> list[Measurement]:
    if not total:
        why = "no other concept of the file has a detector"
        return [Measurement(name=name, value=None, n=0, why=why) for name in ("retention", "retention_relative")]
    relative = hits / hits_before if hits_before else None
    low, high = wilson(hits, total)
    scale = total / hits_before if hits_before else 1.0
    return [
        Measurement(
            name="retention", value=hits / total, n=total, interval=(low, high), better="higher", reference=hits_before / total
        ),
        Measurement(
            name="retention_relative", value=relative, n=total, better="higher",
            interval=(low * scale, high * scale) if hits_before else None,
            why="" if hits_before else "the reference model shows none of the retained concepts",
        ),
    ]  # fmt: skip


def _record(
    judged: _Judged,
    retained: Sequence[_Judged],
    shared: Sequence[Measurement],
    names: Names,
    sampling: Sampling,
    seed: int,
    result: dict[str, Any],
    seconds: float,
    store: Store,
) -> Record:
    import torch

    concept, rate = judged.concept, judged.measurement("concept_rate", "lower")
    before = Measurement(name="reference_rate", value=rate.reference, n=judged.n)
    # Other kinds' pictures show whether the detector fires where it should not.
    others = [j for j in retained if not any(mentions(p.text, concept.term) for p in j.prompts)]
    alarms = int(judged.detector.detect(torch.cat([j.before for j in others])).present.sum()) if others else 0
    doubts: list[Doubt] = [
        *doubt.not_there_before(before),
        *doubt.few_samples(rate),
        *doubt.collapsed([m for m in shared if m.name.startswith("neighbour_rate:")]),
        *doubt.trigger_happy_detector(alarms, sum(j.n for j in others), judged.detector.describe().get("false_positive")),
        *([] if concept.test_prompts else [doubt.judged_on_own_prompts()]),
    ]
    return Record(
        kind="evaluate", status="ok", model=names.model, reference=names.reference, method=names.method,
        concept=concept.name, concept_kind=concept.kind, attack="", seed=seed,
        detector=judged.detector.describe(), sampling=asdict(sampling), settings={"method": dict(names.method_settings)},
        measurements=(rate, *shared), doubts=tuple(doubts), artefacts=tuple(_artefacts(judged, store)),
        details={**result, "prompts_sha256": prompts_hash(judged.prompts)}, provenance=provenance(names, seconds),
    )  # fmt: skip


def _artefacts(judged: _Judged, store: Store) -> list[Artefact]:
    kept = []
    for i, prompt in enumerate(judged.prompts[:SHOWN]):
        pairs = [
            ("reference", judged.before, judged.seen_before, None),
            ("protected", judged.after, judged.seen_after, judged.scores[i]),
        ]
        for role, images, seen, score in pairs:
            kept.append(store.save_artefact(
                images[i].numpy(), role=role, prompt=prompt.text, seed=prompt.seed or 0, group=i, detected=bool(seen[i]),
                score=score,
            ))  # fmt: skip
    return kept
