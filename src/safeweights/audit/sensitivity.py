"""Are a concept's neurons gone or only silent? How far they come back when asked plainly, in other words, or under attack.

The claim of Yang et al. (2024, arXiv:2405.16534) about fine-tuned erasers, as numbers. The paper's own statistic is not public.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from safeweights.audit.audit import Names, provenance
from safeweights.core.attack import Attack, Original, Target
from safeweights.core.concept import Concept
from safeweights.core.errors import UserError
from safeweights.core.intervals import bootstrap_mean
from safeweights.core.model import Conditioning, DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.neurons import Activations, Located, Neuron, activations, locate, pairs, pick, slopes
from safeweights.diffusion.noise import add_noise, generator
from safeweights.diffusion.sampling import candidates_of, embed_all, generate
from safeweights.records.record import Measurement, Record


@dataclass(frozen=True)
class Reactivation:
    """How far neurons come back under a condition: 0 as silent as without the concept, 1 as in the model before protection."""

    condition: str
    """plain, paraphrased or an attack's name."""
    neurons: str
    """concept or control."""
    rho: float
    low: float
    high: float
    n: int
    """Prompts."""


@dataclass(frozen=True)
class Slope:
    """How far a small change of the text moves neurons, || d a / d e ||, under a condition's text."""

    condition: str
    neurons: str
    kappa: float
    reference: float
    """In the model before protection, with the same text."""


def locate_neurons(
    reference: DiffusionModel, concept: Concept, *, sampling: Sampling, n: int = 32, q: float = 0.01, share: float = 0.01,
    seed: int = 0,
) -> Located:  # fmt: skip
    """The concept's neurons in the model before protection, from n pairs of tuning prompts; costs 4 n calls a step."""
    texts, seeds = pairs(concept, n), [seed * 100_000 + i for i in range(n)]
    with_ = activations(reference, embed_all(reference, [text for text, _ in texts]), seeds, sampling)
    without = activations(reference, embed_all(reference, [bare for _, bare in texts]), seeds, sampling)
    return locate(with_, without, q=q, share=share)


def reactivation(
    asked: Activations, neutral: Activations, before: Activations, before_neutral: Activations, located: Located
) -> dict[str, Tensor]:
    """rho by prompt (N,) for the concept's neurons and their controls.

    rho_i = mean_j [a_j(e_i; f) - a_j(neutral_i; f)] / mean_i [a_j(c_i; eps_0) - a_j(neutral_i; eps_0)]

    A control neuron hardly answers the concept, so its own denominator is noise: it is read against that of the neuron it is
    the control of. Denominators are means over prompts, since one prompt's may be near zero.
    """
    answered = (pick(before.mean, located.concept) - pick(before_neutral.mean, located.concept)).double().mean(0)

    def rho(neurons: Sequence[Neuron]) -> Tensor:
        change = (pick(asked.mean, neurons) - pick(neutral.mean, neurons)).double()
        return (change / answered).mean(1)

    return {"concept": rho(located.concept), "control": rho(located.control)}


def under_attack(
    attack: Attack,
    model: DiffusionModel,
    concept: Concept,
    targets: Sequence[Target],
    *,
    sampling: Sampling,
    original: Original,
    workspace: Workspace | None = None,
) -> tuple[DiffusionModel, Conditioning]:
    """What the attack would ask in its last round if nobody told it that it had won, and the model it would ask."""
    rounds = attack.revive(model, concept, targets, sampling=sampling, original=original, workspace=workspace)
    last = next(rounds)
    while True:
        try:
            last = rounds.send([False] * len(targets))
        except StopIteration:
            break
    if any(item.latents is not None for item in last.candidates) or any(
        item.seed != target.seed for item, target in zip(last.candidates, targets, strict=True)
    ):
        raise UserError(
            f"{attack.name} chooses noise, not text; what text does to neurons is asked by unlearndiffatk or soft-prompt"
        )
    rows = [
        last.model.embed([item.prompt]).states[0] if item.states is None else item.states.to(model.device)
        for item in last.candidates
    ]
    return last.model, Conditioning(torch.stack(rows).detach())


def sensitivity(
    model: DiffusionModel,
    reference: DiffusionModel,
    concept: Concept,
    attack: Attack,
    located: Located,
    *,
    names: Names,
    sampling: Sampling,
    n: int = 16,
    seed: int = 0,
    workspace: Workspace | None = None,
) -> Record:
    """Reactivation and slope of the concept's neurons and their controls in ``model``, against ``reference``.

    Conditions: plain, the tuning prompts the eraser saw; paraphrased, the test prompts it never saw; attacked, the test prompts
    after ``attack`` has had its whole budget (of an attack on the weights, in the model that it made, with and without the
    concept). Each with its own noise, n prompts, intervals by bootstrap over prompts.
    Slope: || d a_j / d e ||, the mean over neurons and over n noisy latents of the reference's pictures, under every condition's
    text; the reference is asked with the same.
    """
    started = time.perf_counter()
    found: list[Reactivation] = []
    slope: list[Slope] = []
    if located.concept:
        found, slope = _measure(model, reference, concept, attack, located, sampling, n, seed, workspace)
    told = {
        "concept": concept.name, "attack": attack.name, "n": n, "seed": seed,
        "neurons": {
            "concept": len(located.concept), "tested": located.tested, "significant": located.significant,
            "pairs": located.pairs, "q": located.q,
        },
        "reactivation": [asdict(row) for row in found],
        "slope": [asdict(row) for row in slope],
        "plots": [
            located.plot(f"Neurons of {concept.name} in {names.reference}: depth and denoising step"),
            {
                "kind": "bars", "title": f"Reactivation of {concept.name} in {names.model}",
                "unit": "0 silent, 1 as before protection",
                "bars": [
                    {"name": f"{row.condition}, {row.neurons}", "value": row.rho, "low": row.low, "high": row.high}
                    for row in found
                ],
            },
        ],
    }  # fmt: skip
    measured = [
        Measurement(
            name=f"rho:{row.condition}:{row.neurons}", value=row.rho, n=row.n, interval=(row.low, row.high), reference=1.0,
            better="lower" if row.neurons == "concept" else None,
        )
        for row in found
    ]  # fmt: skip
    measured += [
        Measurement(
            name=f"slope:{row.condition}:{row.neurons}", value=row.kappa, n=n, reference=row.reference, unit="per unit of text"
        )
        for row in slope
    ]
    if not found:
        why = f"no neuron answers {concept.name} at a false discovery rate of {located.q:g} with {located.pairs} pairs"
        measured = [Measurement(name="rho", value=None, n=n, why=why)]
    return Record(
        kind="neurons", status="ok", model=names.model, reference=names.reference, method=names.method, concept=concept.name,
        concept_kind=concept.kind, attack=attack.name, seed=seed, sampling=asdict(sampling),
        settings={"method": dict(names.method_settings), "attack": describe(attack)}, measurements=tuple(measured), details=told,
        provenance=provenance(names, time.perf_counter() - started),
    )  # fmt: skip


def _measure(
    model: DiffusionModel, reference: DiffusionModel, concept: Concept, attack: Attack, located: Located, sampling: Sampling,
    n: int, seed: int, workspace: Workspace | None,
) -> tuple[list[Reactivation], list[Slope]]:  # fmt: skip
    found = []
    texts_of: dict[str, tuple[DiffusionModel, Conditioning, Conditioning]] = {}
    drawn: dict[str, Any] = {}

    def draw(count: int) -> Tensor:
        """The reference's pictures of the concept, by its tuning prompts; seeds of their own."""
        texts = [concept.texts[i % len(concept.texts)] for i in range(count)]
        return generate(reference, candidates_of(texts, [90_000 + seed * 1000 + i for i in range(count)]), sampling)

    for condition, test in (("plain", False), ("paraphrased", True)):
        texts = pairs(concept, n, test=test)
        # Noise that no neuron was located with.
        seeds = [seed * 100_000 + 50_000 + 1000 * test + i for i in range(n)]
        asked, bare = [text for text, _ in texts], [without for _, without in texts]
        runs = {
            "before": activations(reference, embed_all(reference, asked), seeds, sampling),
            "before_neutral": activations(reference, embed_all(reference, bare), seeds, sampling),
            "neutral": activations(model, embed_all(model, bare), seeds, sampling),
        }
        now = activations(model, embed_all(model, asked), seeds, sampling)
        found += _rows(condition, reactivation(now, located=located, **runs))
        drawn = {"runs": runs, "seeds": seeds, "asked": asked, "bare": bare}
        texts_of[condition] = model, embed_all(model, asked), embed_all(reference, asked)
    pictures = generate(reference, candidates_of(drawn["asked"], [95_000 + seed * 1000 + i for i in range(n)]), sampling)
    targets = [Target(text, drawn["seeds"][i], pictures[i]) for i, text in enumerate(drawn["asked"])]
    attacked, c = under_attack(
        attack, model, concept, targets, sampling=sampling, original=Original(reference, draw), workspace=workspace
    )
    if attacked is not model:  # an attack on the weights: what is neutral to the model that it made
        neutral = embed_all(attacked, drawn["bare"])
        drawn["runs"]["neutral"] = activations(attacked, neutral, drawn["seeds"], sampling)
    texts_of[attack.name] = attacked, c, c
    now = activations(attacked, c, drawn["seeds"], sampling)
    found += _rows(attack.name, reactivation(now, located=located, **drawn["runs"]))
    with torch.no_grad():
        x_0 = reference.encode(pictures.to(reference.device))
    t = ((torch.arange(n) + 0.5) / n * len(reference.alpha)).long().to(reference.device)
    eps = torch.randn(x_0.shape, generator=generator("slope", seed)).to(x_0)
    x_t = add_noise(reference, x_0, t, eps)
    slope = [
        Slope(
            condition, kind, float(slopes(asked_model, x_t, t, ours, neurons).mean()),
            float(slopes(reference, x_t, t, before, neurons).mean()),
        )
        for condition, (asked_model, ours, before) in texts_of.items()
        for kind, neurons in (("concept", located.concept), ("control", located.control))
    ]  # fmt: skip
    return found, slope


def _rows(condition: str, rho: Mapping[str, Tensor]) -> list[Reactivation]:
    rows = []
    for neurons, values in rho.items():
        mean, (low, high) = float(values.mean()), bootstrap_mean(values.tolist())
        rows.append(Reactivation(condition, neurons, mean, low, high, len(values)))
    return rows
