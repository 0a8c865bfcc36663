"""What a positive result must be told apart from: answers that look like reading the weights and are not.

Closed-form encoders make the expensive controls cheap: a whole pipeline is refitted on permuted pairs in one factorisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeweights.core.model import Conditioning, DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import sample
from safeweights.leakage.canonical import Factors, norm, phi_of
from safeweights.leakage.encoders import ridge
from safeweights.leakage.encoders.functional import Probe
from safeweights.leakage.lora_bank import bank_on, stack_of
from safeweights.leakage.metrics import Retrieval, cosines, percentile_ranks, retrieval


@dataclass(frozen=True)
class Arm:
    """One control: its retrieval, and what it must give."""

    name: str
    found: Retrieval
    expected: str


def simple(
    predicted: Tensor, gallery: Tensor, own: Sequence[int], *, centre: Tensor, nearest: Tensor | None = None, seed: int = 0
) -> list[Arm]:
    """The controls that need predictions only: prior mean, shuffled adapters, and the nearest training identity's target.

    ``predicted`` (n, D) are an encoder's answers, ``centre`` (D,) the training targets' mean.
    """
    count = len(predicted)
    rng = generator("controls", seed)
    order = torch.randperm(count, generator=rng)
    # Nobody keeps their own: a permutation without fixed points, by one turn of a cycle.
    shuffled = torch.empty_like(order)
    shuffled[order] = order.roll(1)
    prior = torch.zeros(count, len(gallery), dtype=torch.float64)
    arms = [
        Arm("prior mean", retrieval(prior, own, seed=seed), "chance"),
        Arm("shuffled adapters", retrieval(cosines(predicted[shuffled], gallery, centre), own, seed=seed), "chance"),
    ]
    if nearest is not None:
        arms.append(
            Arm("nearest training identity", retrieval(cosines(nearest, gallery, centre), own, seed=seed), "below the encoder")
        )
    return arms


def permuted_pairs(
    kernel: Tensor, cross: Tensor, targets: Tensor, gallery: Tensor, own: Sequence[int], *, times: int = 20, seed: int = 0
) -> Arm:
    """The encoder refitted ``times`` on training pairs whose targets were exchanged; all refits' ranks together.

    ``kernel`` (n, n) and ``cross`` (m, n) as for `ridge.fit` and `Ridge.predict`.
    """
    total = torch.zeros(len(cross), len(gallery), dtype=torch.float64)
    ranks: list[float] = []
    for time in range(times):
        scores = cosines(permuted_answers(kernel, cross, targets, time=time, seed=seed), gallery, targets.mean(0))
        ranks.append(float(percentile_ranks(scores, own).mean()))
        total += scores
    mean = retrieval(total / times, own, seed=seed)
    middle = torch.tensor(ranks, dtype=torch.float64)
    low, high = (float(middle.quantile(q)) for q in (0.025, 0.975))
    # The spread over refits is the honest interval: each refit is one draw of the null.
    return Arm("permuted pairs", _with(mean, float(middle.mean()), (low, high)), "chance")


def permuted_answers(kernel: Tensor, cross: Tensor, targets: Tensor, *, time: int = 0, seed: int = 0) -> Tensor:
    """What one refit of `permuted_pairs`, the ``time``-th, says (m, D)."""
    return ridge.fit(kernel, targets[exchanged(len(targets), time=time, seed=seed)]).predict(cross)


def exchanged(count: int, *, time: int = 0, seed: int = 0) -> Tensor:
    """Whose target each of ``count`` training adapters has in the ``time``-th refit on permuted pairs."""
    return torch.randperm(count, generator=generator("permuted pairs", seed, time))


def norm_equalised(adapters: Sequence[Factors]) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """The adapters with every layer's update at one length, the median over them: how long and how fast was trained is gone."""
    lengths = {
        name: torch.tensor([norm(*item[name]) for item in adapters if name in item])
        for name in {name: None for item in adapters for name in item}
    }
    return [
        {name: (a, b * (float(lengths[name].median()) / max(norm(a, b), 1e-12))) for name, (a, b) in item.items()}
        for item in adapters
    ]


def _with(found: Retrieval, rank: float, interval: tuple[float, float]) -> Retrieval:
    from dataclasses import replace

    return replace(found, rank=rank, interval=interval)


@torch.no_grad()
def draw_with(
    model: DiffusionModel,
    adapters: Sequence[Factors],
    states: Tensor,
    *,
    n: int = 2,
    sampling: Sampling,
    uncond: Conditioning | None = None,
    together: int = 8,
    seed: int = 0,
    workspace: Workspace | None = None,
) -> Tensor:
    """n pictures (N, n, 3, H, W) by each adapted model under its row of text states (N, L, D), the same noises for all."""
    rng = generator("drawn with adapters", seed)
    noise = torch.randn((n, *model.latent_shape), generator=rng)
    found = []
    for start in (workspace or Workspace()).track(range(0, len(adapters), together), "drawing with adapters"):
        group = adapters[start : start + together]
        stack = stack_of([phi_of(item) for item in group])
        c = Conditioning(states[start : start + together]).repeat(n)
        with bank_on(model, stack, torch.arange(len(group)).repeat_interleave(n)):
            pictures = sample(model, c, noise.repeat(len(group), 1, 1, 1), sampling, uncond=uncond, batch_size=n * len(group))
        found.append(pictures.view(len(group), n, *pictures.shape[1:]))
    return torch.cat(found)


def guessed_prompts(
    model: DiffusionModel,
    adapters: Sequence[Factors],
    texts: Sequence[str],
    *,
    levels: Sequence[float] = (0.75, 0.5),
    inputs: int = 2,
    seed: int = 0,
    workspace: Workspace | None = None,
) -> list[str]:
    """The text of ``texts`` under which each adapter changes the model's predictions most: a guess at its trigger.

    Needs no training and nothing but the file and the base model; the norm of `Probe`'s answer is what is compared.
    """
    strengths = []
    for place in (workspace or Workspace()).track(range(len(texts)), "guessing prompts"):
        probe = Probe(texts[place], levels=tuple(levels), inputs=inputs, seed=seed)
        strengths.append(probe.ask(model, adapters).flatten(1).norm(dim=1))
    return [texts[best] for best in torch.stack(strengths).argmax(0).tolist()]


def crossing(
    draw: Callable[[Sequence[int], Sequence[int]], Tensor],
    features: Callable[[Tensor], Tensor],
    gallery: Tensor,
    own: Sequence[int],
    *,
    centre: Tensor,
    seed: int = 0,
) -> dict[str, float]:
    """Whose identity a picture shows when the encoder read adapter i and adapter j draws: {"encoder": lift, "generator": lift}.

    ``draw(i, j)`` gives pictures (N, n, 3, H, W) for encoder inputs i and generators j, ``features`` their mean features (N, D).
    A lift is the mean cosine with that one's identity minus the mean with all others.
    """  # fmt: skip
    count = len(own)
    inputs = list(range(count))
    others = torch.arange(count).roll(1).tolist()
    scores = cosines(features(draw(inputs, others)), gallery, centre)
    mean = scores.mean(1)
    rows = torch.arange(count)
    place = torch.as_tensor(own)
    return {
        "encoder": float((scores[rows, place] - mean).mean()),
        "generator": float((scores[rows, place[others]] - mean).mean()),
    }


def residual(predicted: Tensor, facts: Mapping[str, Sequence[float]]) -> Tensor:
    """Predictions (n, D) without what a linear fit reads from how the adapters were trained (lr, steps, pictures, ...)."""
    columns = [torch.ones(len(predicted), dtype=torch.float64)]
    columns += [torch.tensor(values, dtype=torch.float64) for values in facts.values()]
    design = torch.stack(columns, 1)
    fitted = torch.linalg.lstsq(design, predicted.double()).solution
    # Settings about their means: else every prediction moves by the same offset, which cosines feel.
    settings = design[:, 1:] - design[:, 1:].mean(0)
    left: Tensor = predicted.double() - settings @ fitted[1:]
    return left


def explained(predicted: Tensor, values: Sequence[float]) -> float:
    """Leave-one-out R^2 of one training setting read from predictions (n, D): how much of it they still hold."""
    target = torch.tensor(values, dtype=torch.float64)[:, None]
    return 1 - ridge.loo_error(ridge.fit(ridge.linear(predicted - predicted.mean(0)), target), target)
