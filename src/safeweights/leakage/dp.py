"""Differentially private adapters by DP-SGD (Abadi et al., CCS 2016, arXiv:1607.00133).

Accounted with Renyi divergences (Mironov et al., 2019, arXiv:1908.10530).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.core.model import Conditioning
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import Adapted, Batch, Lesson, errors
from safeweights.diffusion.noise import add_noise
from safeweights.diffusion.sampling import embed_all
from safeweights.leakage.lora_bank import AdamW, bank_on, clip_each, phi_of, stack_of


@dataclass(frozen=True)
class Privacy:
    """What a run may cost and how: the unit is one picture with its caption.

    Every picture joins a step on its own with probability ``rate`` (Poisson); its gradient is clipped to ``clip`` and normal
    noise of ``sigma`` times ``clip`` is added to the sum.
    """

    epsilon: float
    """Accounted, not asked for: the Renyi accountant's value for ``steps`` steps at ``delta``."""
    delta: float
    sigma: float
    rate: float
    steps: int
    clip: float


def check(*, epsilon: float, delta: float, clip: float) -> None:
    """Raise UserError for an epsilon, delta or clip outside its range."""
    if not epsilon > 0 or epsilon == float("inf"):
        raise UserError(f"--dp-epsilon must be a finite number above zero, not {epsilon:g}")
    if not 0 < delta < 1:
        raise UserError(f"--dp-delta must lie between 0 and 1, not {delta:g}")
    if not 0 < clip < float("inf"):
        raise UserError(f"--dp-clip must be a finite number above zero, not {clip:g}")


def plan(*, epsilon: float, delta: float, pictures: int, batch_size: int, steps: int, clip: float = 1.0) -> Privacy:
    """The least noise that keeps ``steps`` steps within ``epsilon``, found and accounted by Opacus.

    Raises UserError for an epsilon, delta or clip outside its range.
    """
    check(epsilon=epsilon, delta=delta, clip=clip)
    from opacus.accountants.utils import get_noise_multiplier

    rate = min(1.0, batch_size / pictures)
    try:
        sigma = float(
            get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=rate,
                steps=steps,
                accountant="rdp",
                epsilon_tolerance=epsilon / 1000,
            )
        )
    except (ValueError, ArithmeticError) as error:
        raise UserError(
            f"no noise reaches epsilon {epsilon:g} in {steps} steps ({error}); take fewer steps or a larger epsilon"
        ) from None
    return Privacy(spent(sigma=sigma, rate=rate, steps=steps, delta=delta), delta, sigma, rate, steps, clip)


def spent(*, sigma: float, rate: float, steps: int, delta: float) -> float:
    """epsilon after that many steps, by Opacus' Renyi accountant."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    return float(accountant.get_epsilon(delta=delta))


def per_sample(lesson: Lesson, stack: dict[str, Tensor], batch: Batch, states: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients (B, ...) and losses (B,) of each row of a batch alone: one copy of the adapter per row, one backward pass.

    ``stack`` holds one adapter (1, ...).
    """
    count = len(batch.t)
    copies = {name: value.detach().expand(count, *value.shape[1:]).clone().requires_grad_() for name, value in stack.items()}
    with bank_on(lesson.model, copies, torch.arange(count), lesson.adapter.scale):
        predicted = lesson.model.eps(batch.x_t, batch.t, Conditioning(states))
    each = errors(lesson.model, predicted, batch)
    found = torch.autograd.grad(each.sum(), list(copies.values()))
    return dict(zip(copies, found, strict=True)), each.detach()


def fit_private(
    lesson: Lesson,
    privacy: Privacy,
    *,
    lr: float,
    weight_decay: float = 0.0,
    rng: torch.Generator | None = None,
    workspace: Workspace | None = None,
) -> Adapted:
    """Train one adapter under ``privacy``; a lesson's ``prior`` is public and not used.

    ``rng`` draws who joins and the noise. Without one they come from the system's randomness and are not repeatable: whoever
    knows the noise can take it off again. Nothing is kept between steps and no loss is told, so that only what is accounted for
    is ever written. Raises UserError where a gradient is not finite.
    """
    model, shots = lesson.model, lesson.shots
    rng = rng or torch.Generator().manual_seed(secrets.randbits(62))
    stack = {name: value.to(model.device) for name, value in stack_of([lesson.adapter.start(model, lesson.seed)]).items()}
    encoded = embed_all(model, shots.captions).states.float()
    optimiser = AdamW(torch.tensor([lr], device=model.device), weight_decay)
    expected = privacy.rate * len(shots)
    for _ in (workspace or Workspace()).track(range(privacy.steps), "private adapting"):
        joined = (torch.rand(len(shots), generator=rng) < privacy.rate).nonzero()[:, 0]
        total = {name: torch.zeros_like(value) for name, value in stack.items()}
        if len(joined):
            batch = _batch(lesson, joined, rng)
            found, _losses = per_sample(lesson, stack, batch, encoded[joined.to(encoded.device)])
            if not all(torch.isfinite(value).all() for value in found.values()):
                raise UserError("private adapting: a gradient is not finite; set a lower lr")
            total = {name: value.sum(0, keepdim=True) for name, value in clip_each(found, privacy.clip).items()}
        noisy = {
            name: (value + privacy.sigma * privacy.clip * torch.randn(value.shape, generator=rng).to(value)) / expected
            for name, value in total.items()
        }
        optimiser.step(stack, noisy)
    return Adapted(lesson.adapter, phi_of(stack, 0), privacy.steps, ())


def _batch(lesson: Lesson, rows: Tensor, rng: torch.Generator) -> Batch:
    model = lesson.model
    x_0 = lesson.shots.x_0[rows.to(lesson.shots.x_0.device)]
    t = torch.randint(len(model.alpha), (len(rows),), generator=rng).to(x_0.device)
    eps = torch.randn(x_0.shape, generator=rng).to(x_0.device)
    return Batch(add_noise(model, x_0, t, eps), t, eps, tuple(rows.tolist()), torch.ones(len(rows), device=x_0.device))
