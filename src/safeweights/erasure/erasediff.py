"""EraseDiff: Erasing Undesirable Influence in Diffusion Models (Wu et al., CVPR 2025, arXiv:2401.05779)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from safeweights.core.concept import Concept
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.drawn_set import DrawnSets, Target
from safeweights.diffusion.training import descend


@dataclass(frozen=True, kw_only=True)
class EraseDiff:
    """Retain under the constraint that the concept's pictures are predicted as something else: a bilevel problem, to first order.

    min_theta L_r(theta)   s.t.   q(theta) = L_f(theta) - L_f(theta_K) <= 0,   theta_K = K gradient steps from theta on L_f
    theta <- theta - Adam(grad L_r + lam grad q),   lam given, or  max(0, eta - <grad L_r, grad q> / |grad q|^2)
    L_f = E || eps_theta(x_f, c_f) - eps_o(x_f, c_pseudo) ||^2

    Needs: prompts to retain.   Cost: two student passes forward and backward a step, ``inner`` + 1 more on the forget batch where
    inner passes are taken, one more backward where lam is found; pictures, noise and the base model's predictions are made once.
    Differs from the reference code: grad q = grad L_f(theta) - grad L_f(theta_K), the way from theta to theta_K taken as a shift
    (there L_f(theta_K) is a constant without gradient, so that inner passes only stir Adam's moments; inner=0 is that gradient);
    inner passes are plain gradient steps on the step's own batch; the pseudo target is the base model's and c_pseudo each prompt
    without its concept (there: the network being trained, one fixed prompt); target=base retains predictions instead of the loss.
    """

    name: ClassVar[str] = "erasediff"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "parameters": "noxattn", "lr": 1e-5, "steps": 250, "batch_size": 16, "lam": 1.0, "target": "noise", "pictures": 800,
            "retained": 800, "noises": 1, "ddim_steps": 50, "guidance": 7.5,
        },
    }  # fmt: skip

    parameters: str = "xattn"
    """What is trained: noxattn (the paper's for content), full (its for objects), xattn, or another parameter group."""
    lam: float | None = None
    """Weight of the constraint; none: the least that still lowers q, max(0, eta - <grad L_r, grad q> / |grad q|^2)."""
    eta: float = 1.0
    """How fast q must fall where lam is found: at least eta |grad q|^2 a unit step; > 0."""
    inner: int = 0
    """Gradient steps K to theta_K; 0 takes L_f(theta_K) as a constant."""
    inner_lr: float = 1e-2
    """Rate of the inner gradient steps; > 0."""
    target: Target = "base"
    """What retained pictures keep: the plain diffusion loss (noise, the paper's), or the base model's predictions (base)."""
    steps: int = 100
    """Optimiser steps; > 0."""
    lr: float = 3e-4
    """Adam's learning rate; > 0."""
    batch_size: int = 4
    """Noisy latents of each of the two sets a step; > 0."""
    pictures: int = 27
    """Pictures drawn once for each concept, its term and prompts in turn; > 0."""
    retained: int = 40
    """Retained pictures drawn once, the prompts in turn; > 0."""
    noises: int = 20
    """Noisy latents made of each picture; > 0."""
    ddim_steps: int = 20
    """DDIM steps of a picture; > 0."""
    guidance: float = 4.0
    """Guidance of the pictures (only of those; the regression is unguided)."""

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size, self.pictures, self.retained, self.noises, self.ddim_steps)
        if min(counts) < 1 or min(self.lr, self.eta, self.inner_lr) <= 0:
            raise ValueError("steps, batch_size, pictures, retained, noises, ddim_steps, lr, eta and inner_lr must be above zero")
        if self.inner < 0 or (self.lam is not None and self.lam < 0):
            raise ValueError("inner and lam must not be below zero")

    def protect(
        self,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        *,
        retain: Sequence[str] = (),
        rng: torch.Generator,
        workspace: Workspace | None = None,
    ) -> Protection:
        workspace = workspace or Workspace()
        seed, calls = rng.initial_seed(), model.calls.eps
        sets = DrawnSets.draw(
            model, concepts, retain,
            pictures=self.pictures, retained=self.retained, noises=self.noises,
            sampling=Sampling(steps=self.ddim_steps, guidance_scale=self.guidance), seed=seed, workspace=workspace,
        )  # fmt: skip
        student = model.fork(self.parameters)
        forget = sets.forgetting(student, self.batch_size, "erasediff", seed)
        keep = sets.retaining(student, self.batch_size, self.target, "erasediff", seed)
        trained = student.trainable()
        losses = descend(
            trained,
            lambda step: self._loss([*trained.values()], lambda: forget(step), lambda: keep(step)),
            steps=self.steps,
            lr=self.lr,
            workspace=workspace,
            description="erasing (erasediff)",
            facts={"seed": seed, "texts": [sets.forget.prompts, sets.retain.prompts], "settings": describe(self)},
        )
        return Protection(
            method=self.name,
            concepts=tuple(concept.name for concept in concepts),
            tensors=student.edited(),
            settings=describe(self),
            cost={"steps": self.steps, "eps_calls": model.calls.eps - calls, "loss": losses[-1]},
        )

    def _loss(self, parameters: Sequence[nn.Parameter], forget: Callable[[], Tensor], keep: Callable[[], Tensor]) -> Tensor:
        """A scalar whose gradient is the step's direction, grad L_r + lam grad q. The two give L_f and L_r where theta stands."""
        if self.inner == 0 and self.lam is not None:
            return keep() + self.lam * forget()
        if self.inner:
            below = after_inner_steps(parameters, forget, self.inner, self.inner_lr)
        else:
            below = [torch.zeros_like(p) for p in parameters]
        L_f, L_r = forget(), keep()
        if self.lam is not None:
            lam = self.lam
        else:
            g_r, g_f = (
                torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
                for loss in (L_r, L_f)
            )
            g_q = [g - k for g, k in zip(g_f, below, strict=True)]
            lam = constraint_weight(g_r, g_q, self.eta)
        # The gradient at theta_K enters as a linear term: its own gradient is that constant, its value here is zero.
        shift = torch.stack([(k * (p - p.detach())).sum() for p, k in zip(parameters, below, strict=True)]).sum()
        return L_r + lam * (L_f - shift)


def constraint_weight(g_r: Sequence[Tensor], g_q: Sequence[Tensor], eta: float) -> float:
    """max(0, eta - <g_r, g_q> / |g_q|^2): the least lam >= 0 with <g_r + lam g_q, g_q> >= eta |g_q|^2; 0 where g_q is zero.

    g_r + lam g_q is the direction nearest to g_r that lowers q that fast (Liu et al., NeurIPS 2022, arXiv:2209.08709).
    """
    inner = torch.stack([(r * q).sum() for r, q in zip(g_r, g_q, strict=True)]).sum()
    square = torch.stack([q.square().sum() for q in g_q]).sum()
    return max(0.0, eta - float(inner / square)) if float(square) > 0 else 0.0


def after_inner_steps(parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor], steps: int, lr: float) -> list[Tensor]:
    """The loss's gradient at theta_K, ``steps`` gradient steps from theta; the parameters come back bit for bit."""
    kept = [p.detach().clone() for p in parameters]

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(loss(), list(parameters), allow_unused=True, materialize_grads=True))

    for _ in range(steps):
        found = gradients()
        with torch.no_grad():
            for p, g in zip(parameters, found, strict=True):
                p.sub_(lr * g)
    found = gradients()
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
    return found
