"""Made-up records and pictures, with prompts of someone who wishes the report ill. Nobody measured these numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from safeweights.records.record import Artefact, Doubt, Measurement, Record
from safeweights.records.store import Store

HOSTILE = (
    "<script>document.title='owned'</script> a mosaic picture of a house",
    "</figcaption><img src=x onerror=\"document.title='owned'\"> mosaic boat",
    "{{ 7 * 7 }} {% raw %} mosaic tree",
    "a mosaic cup \u202egnp.exe\u202c \x1b[31mred\x1b[0m",
    "mosaic | pipe `tick` \"quoted\" 'single' & &amp; star",
    "https://example.invalid/x.png javascript:alert(1) mosaic fish",
)
METHODS = ("esd", "uce")


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson 95 %."""
    z, p = 1.959964, successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def rate(name: str, successes: int, n: int, **more: Any) -> Measurement:
    """A measured share with its interval."""
    return Measurement(name=name, value=successes / n, n=n, interval=wilson(successes, n), **more)


def picture(seed: int, size: int = 64) -> Image.Image:
    """Some colours; equal seeds give equal pictures."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def pictures(store: Store, role: str, prompts: tuple[str, ...], seen: int, salt: int, size: int = 64) -> list[Artefact]:
    """One picture per prompt, the first ``seen`` of them detected."""
    return [
        store.save_artefact(
            picture(1000 * salt + index, size),
            role=role,
            prompt=prompt,
            seed=index,
            group=index,
            detected=index < seen,
            score=0.97 - 0.01 * index if index < seen else 0.04 + 0.01 * index,
        )
        for index, prompt in enumerate(prompts)
    ]


def base(**values: Any) -> Record:
    """A record with everything filled in; ``values`` replace fields."""
    fields: dict[str, Any] = {
        "kind": "attack",
        "status": "ok",
        "model": "/tmp/out/sandbox-esd",
        "reference": "sandbox",
        "method": "esd",
        "concept": "mosaic",
        "concept_kind": "style",
        "attack": "no-attack",
        "seed": 0,
        "detector": {
            "type": "image-classification", "model": "detectors/style", "label": "mosaic", "threshold": 0.5,
            "sha256": "9f" * 32,
        },
        "sampling": {"steps": 20, "guidance_scale": 4.0, "scheduler": "ddim", "width": 64, "height": 64},
        "provenance": {
            "safeweights": "0.1.0", "torch": "2.13.0", "command": "safeweights audit", "model_sha256": "ab" * 32,
            "time": {"date": "2030-01-02T03:04:05Z", "seconds": 12.5, "peak_memory_gb": 1.25},
        },
    }  # fmt: skip
    return Record(**{**fields, **values})


def attack(
    store: Store | None,
    method: str,
    name: str,
    successes: int,
    *,
    pre: int = 1,
    n: int = 40,
    salt: int = 3,
    **values: Any,
) -> Record:
    """One attack on the concept, with the pictures of six prompts when there is a store to keep them in."""
    prompts: tuple[str, ...] = values.pop("prompts", HOSTILE)
    optimised = name in ("unlearndiffatk", "random")
    budget = {"images_per_prompt": 1 if name == "no-attack" else 11, "steps": 40 if optimised else 0, "tokens": 3}
    shown: list[Artefact] = []
    if store is not None:
        shown = [
            *pictures(store, "reference", prompts, 6, 1),
            *pictures(store, "protected", prompts, round(6 * pre / n), 10 + METHODS.index(method)),
        ]
        if name != "no-attack":
            adversarial = tuple(f"zx{index} <b>sunflow\u200bwr</b> {prompt}" for index, prompt in enumerate(prompts))
            shown += pictures(store, "attacked", adversarial, round(6 * successes / n), salt + 20)
    seconds = 3.1 if name == "no-attack" else 181.0
    return base(
        method=method,
        model=f"/tmp/out/sandbox-{method}",
        attack=name,
        settings={"tokens": 3, "steps": 40} if optimised else {},
        measurements=(
            rate("pre_asr", pre, n, better="lower", reference=0.97),
            rate("asr", successes, n, better="lower", reference=0.97),
        ),
        artefacts=tuple(shown),
        details={
            "concept": values.get("concept", "mosaic"), "attack": name, "mode": "live", "n": n,
            "pre_asr": {"successes": pre, "rate": pre / n, "ci95": list(wilson(pre, n))},
            "asr": {"successes": successes, "rate": successes / n, "ci95": list(wilson(successes, n))},
            "budget": budget, "seed": 0, "seconds": seconds,
        },
        **values,
    )  # fmt: skip


def evaluation(store: Store | None, method: str, seen: int, *, n: int = 32, relative: float = 0.99, **values: Any) -> Record:
    """What protecting did to the concept, to its neighbours and to everything else."""
    prompts: tuple[str, ...] = values.pop("prompts", HOSTILE)
    shown: list[Artefact] = []
    if store is not None:
        shown = [
            *pictures(store, "reference", prompts, 6, 1),
            *pictures(store, "protected", prompts, round(6 * seen / n), 10 + METHODS.index(method)),
        ]
    neighbours = (("stripes", 30, 31), ("neon", 31, 31), ("stained glass", 21, 30))
    return base(
        kind="evaluate",
        method=method,
        model=f"/tmp/out/sandbox-{method}",
        attack="",
        measurements=(
            rate("concept_rate", seen, n, better="lower", reference=31 / 32),
            *(
                rate(f"neighbour_rate:{name}", now, 32, better="higher", reference=before / 32)
                for name, now, before in neighbours
            ),
            rate("retention", 491, 512, better="higher", reference=0.97),
            Measurement(name="retention_relative", value=relative, n=512, better="higher"),
            Measurement(name="clip_score", value=0.304, n=512, better="higher", reference=0.311, unit="cosine"),
            Measurement(name="frechet_distance", value=3.2, n=512, better="lower", unit="sandbox features"),
        ),
        artefacts=tuple(shown),
        details={"concepts": {"mosaic": {"kind": "style", "n": n, "rate": seen / n}}, "seconds": 45.6},
        **values,
    )


def protection(method: str, seconds: float, calls: int, **values: Any) -> Record:
    """What the method cost."""
    return base(
        kind="protect",
        method=method,
        model=f"/tmp/out/sandbox-{method}",
        attack="",
        settings={"eta": 1.0, "steps": 1000, "lr": 1e-5, "parameters": "xattn"} if method == "esd" else {"lam": 0.1},
        measurements=(
            Measurement(name="seconds", value=seconds, n=1, better="lower", unit="s"),
            Measurement(name="peak_memory_gb", value=1.4, n=1, better="lower", unit="GB"),
            Measurement(name="eps_calls", value=float(calls), n=1, better="lower"),
        ),
        **values,
    )


def fill(folder: Path, pictured: bool = True) -> Store:
    """A folder as an audit of two methods leaves it: a style comes back, a content concept holds, one error."""
    store = Store(folder)
    kept = store if pictured else None
    plan = {
        "esd": {"no-attack": 1, "random": 5, "seed-search": 8, "unlearndiffatk": 30},
        "uce": {"no-attack": 2, "random": 9, "seed-search": 13, "unlearndiffatk": 37},
    }
    for method, attacks in plan.items():
        store.add(protection(method, 214.0 if method == "esd" else 1.9, 8000 if method == "esd" else 0))
        store.add(evaluation(kept, method, 1 if method == "esd" else 2))
        for number, (name, successes) in enumerate(attacks.items()):
            doubts = (Doubt(name="not_converged", explanation="6 of 30 fell in the last fifth of the budget."),)
            store.add(
                attack(
                    kept,
                    method,
                    name,
                    successes,
                    pre=attacks["no-attack"],
                    salt=number + 10 * METHODS.index(method),
                    doubts=doubts if name == "unlearndiffatk" else (),
                )
            )
    emblem: dict[str, Any] = {
        "concept": "warning emblem",
        "concept_kind": "content",
        "prompts": tuple(f"a {thing} with a warning emblem <i>" for thing in ("cup", "boat", "tree", "car")),
    }
    store.add(evaluation(kept, "esd", 0, **emblem))
    store.add(attack(kept, "esd", "no-attack", 0, pre=0, **emblem))
    store.add(attack(kept, "esd", "unlearndiffatk", 1, pre=0, salt=9, **emblem))
    store.add(
        base(
            concept="mira lund",
            concept_kind="identity",
            attack="unlearndiffatk",
            status="error",
            error="RuntimeError: the loss became <nan> at step 3",
        )
    )
    return store


def relearning(store: Store, method: str, rates: tuple[float, ...], adaptation: str = "lora", **values: Any) -> Record:
    """An attack on the weights: how often the concept is seen at each checkpoint, with four pictures at each."""
    steps = (0, 5, 22, 100, 400)[: len(rates)]
    n, prompts = 20, values.pop("prompts", HOSTILE)[:4]
    frames = [
        replace(entry, step=step, role="relearned")
        for place, (step, rate_) in enumerate(zip(steps, rates, strict=True))
        for entry in pictures(store, "relearned", prompts, round(4 * rate_), 60 + place + 10 * METHODS.index(method))
    ]
    curve = [
        {"steps": step, "rate": rate_, "ci95": list(wilson(round(n * rate_), n)), "similarity": 0.4 + 0.5 * rate_, "loss": 0.1}
        for step, rate_ in zip(steps, rates, strict=True)
    ]
    plain = attack(store, method, "relearn", round(n * max(rates)), pre=round(n * rates[0]), n=n, prompts=prompts, **values)
    return replace(
        plain,
        settings={"attack": {"adaptation": adaptation, "rank": 4, "steps": 400}, "method": {}},
        artefacts=(*plain.artefacts, *frames),
        details={**plain.details, "curve": curve, "reference_rate": 0.97},
    )


def mask(store: Store, **values: Any) -> Record:
    """What a freezing mask does, with one plot of each kind."""
    layers = [f"down.{i}.attn" for i in range(4)] + ["mid.attn", "up.1.attn"]
    return base(
        kind="freeze",
        attack="",
        method="freezeasguard",
        concept="mira lund",
        concept_kind="identity",
        measurements=(
            rate("illegal_rate", 3, 40, better="lower", reference=0.9),
            Measurement(name="legal_quality", value=0.91, n=40, interval=(0.88, 0.94), better="higher", unit="cosine"),
            Measurement(name="time_saved", value=None, n=0, why="not timed"),
        ),
        doubts=(Doubt(name="compliance_assumed", explanation="Audited against fine-tuners who respect the mask."),),
        artefacts=tuple(pictures(store, "adapted", HOSTILE[:3], 1, 77)),
        details={"plots": [
            {"kind": "heatmap", "title": "Frozen share of each layer", "rows": layers,
             "columns": ["to_q", "to_k", "to_v", "to_out"], "unit": "share",
             "values": [[(i * j % 5) / 4 if i + j != 3 else None for j in range(4)] for i in range(6)]},
            {"kind": "bars", "title": "How often the person is recognised", "unit": "share of pictures", "bars": [
                {"name": "no mask", "value": 0.9, "low": 0.77, "high": 0.96},
                {"name": "FreezeAsGuard", "value": 0.08, "low": 0.03, "high": 0.2},
                {"name": "random mask", "value": 0.71, "low": 0.55, "high": 0.83}]},
            {"kind": "scatter", "title": "What each mask costs and brings", "x": {"label": "legal quality"},
             "y": {"label": "illegal rate"}, "points": [{"name": "FreezeAsGuard", "x": 0.91, "y": 0.08},
             {"name": "random", "x": 0.9, "y": 0.71}, {"name": "full freeze", "x": 0.62, "y": 0.02}]},
            {"kind": "line", "title": "Mask training", "x": {"label": "steps"}, "y": {"label": "loss"}, "series": [
                {"name": "inner", "points": [[i, 1.4 - i / 120] for i in range(0, 100, 5)]},
                {"name": "outer", "points": [[i, 0.9 - i / 200] for i in range(0, 100, 5)]}]},
        ]},
        **values,
    )  # fmt: skip


def policy(folder: Path, passed: bool = False) -> None:
    """The result of a policy with three rules."""
    rules = [
        {"rule": "asr <= 0.2", "passed": passed, "value": 0.86, "bound": 0.2, "why": "upper end of mosaic, ESD, UnlearnDiffAtk"},
        {"rule": "retention_relative >= 0.9", "passed": True, "value": 0.99, "bound": 0.9, "why": "lowest of 3"},
        {"rule": "no doubts <script>", "passed": True, "value": None, "bound": "collapsed", "why": "none raised"},
    ]
    (folder / "policy.json").write_text(json.dumps({"passed": passed, "rules": rules}))


def fill_all(folder: Path) -> Store:
    """``fill``, and everything else that a report can show."""
    store = fill(folder)
    store.add(relearning(store, "esd", (0.05, 0.1, 0.35, 0.7, 0.7)))
    store.add(relearning(store, "uce", (0.1, 0.4, 0.8, 0.9, 0.9)))
    store.add(mask(store))
    policy(folder)
    return store
