"""FreezeAsGuard: Mitigating Illegal Adaptation of Diffusion Models via Selective Tensor Freezing
(Huang & Gao, 2024, arXiv:2405.17472)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import clip
from safeweights.diffusion.training import descend
from safeweights.freezing.guard import Budget, TunedGuard, blend, facts_of, signal

DECAY = 0.9
"""Of the running means that normalise the signal."""


@dataclass(frozen=True, kw_only=True)
class FreezeAsGuard(TunedGuard):
    """Find the tensors whose freezing hurts illegal fine-tuning most and legal fine-tuning least: one mask for all classes.

    upper:  min_m 1/2 [-L_ill(theta(m)) + lambda L_leg(theta(m))]   s.t.  sum_i n_i m_i = rho sum_i n_i
    lower:  theta^ft = argmin L(theta(m); D_ill u D_leg),   theta_i(m) = m_i theta_i^pre + (1 - m_i) theta_i^ft
    dL/dw_i = <theta_i^pre - theta_i^ft, dL/dtheta_i> m_i (1 - m_i) / T,   m_i = sigmoid((w_i - tau) / T)

    Needs: pictures of illegal and of legal concepts, a folder's or drawn.   Cost: a round is ``user_steps`` passes forward and
    back of one batch and one of a batch for each concept; four copies of the UNet.
    Differs from the reference code (whose mask is mostly its random start): tau is found by bisection, so that the ratio holds
    exactly at every round, where there a penalty that overshoots saturates the sigmoids; T falls; the lower level is AdamW, not
    gradient descent below the resolution of bfloat16; theta(m) is mixed anew each round from the stored pair; the signal is
    normalised; each level has pictures of its own and every batch holds all concepts; masks are named, not positions.
    """

    name: ClassVar[str] = "freezeasguard"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {},
        "paper": {"pictures": 100, "tune_steps": 2000, "tune_lr": 1e-5, "rounds": 500},
    }

    rounds: int = 60
    """Steps of the mask, K; > 0."""
    user_steps: int = 2
    """Steps of the simulated user between two steps of the mask, J; > 0."""
    mask_lr: float = 0.1
    """How far a signal that never changes sign moves w in one round; > 0."""
    hot: float = 1.0
    """Temperature T of the first round; > 0."""
    cold: float = 0.1
    """Temperature T of the last round, reached geometrically; > 0."""
    normalise: Literal["tensor", "all"] = "tensor"
    """What the signal is divided by: its own running mean size (how sure it is), or that of all tensors (how much it matters)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.rounds, self.user_steps) < 1 or min(self.mask_lr, self.hot, self.cold) <= 0:
            raise ValueError("rounds, user_steps, mask_lr, hot and cold must be above zero")

    def temperature(self, number: int) -> float:
        """T of a round."""
        return float(self.hot * (self.cold / self.hot) ** (number / max(self.rounds - 1, 1)))

    def scores(
        self,
        model: DiffusionModel,
        budget: Budget,
        illegal: Sequence[Concept],
        legal: Sequence[Concept],
        *,
        seed: int,
        workspace: Workspace,
    ) -> tuple[Tensor, dict[str, float]]:
        sides = self.sides(model, illegal, legal, seed=seed, workspace=workspace)
        start = {name: value.detach().clone() for name, value in sides.start().items()}
        tuned = sides.start()
        # w, the running mean of the signal and that of its size; ``before/`` is theta^ft as the last step found it.
        state = {key: torch.zeros(len(budget.units), dtype=torch.float64) for key in ("w", "mean", "size", "m")}
        state |= {f"before/{name}": value for name, value in start.items()}

        def loss_at(step: int) -> Tensor:
            number, within = divmod(step - self.tune_steps, self.user_steps)
            if number >= 0:
                self._held_back(tuned, state, budget)
            if number >= 0 and within == 0:
                self._turn(number, budget, sides, start, tuned, state)
            theta = blend(start, tuned, budget, state["m"]) if number >= 0 else tuned
            return sides.user.loss(theta, sides.user.batch(step))

        losses = descend(
            tuned,
            loss_at,
            # Steps after the last turn of the mask would change nothing.
            steps=self.tune_steps + (self.rounds - 1) * self.user_steps + 1,
            lr=self.tune_lr,
            weight_decay=1e-2,
            optimizer="adamw",
            workspace=workspace,
            description=f"learning the mask ({self.name})",
            facts=facts_of(self, illegal, legal, seed),
            gradients=clip(tuned, 1.0),
            state=state,
        )
        return state["w"], {"steps": len(losses), "rounds": self.rounds, "loss": losses[-1]}

    def _held_back(self, tuned: dict[str, Any], state: dict[str, Tensor], budget: Budget) -> None:
        """Of the step just taken a tensor keeps 1 - m_i: Adam's steps do not shrink with their gradient."""
        with torch.no_grad():
            for unit, share in zip(budget.units, state["m"].tolist(), strict=True):
                for name in unit.names:
                    if share > 0:
                        tuned[name].lerp_(state[f"before/{name}"], share)
                    state[f"before/{name}"] = tuned[name].detach().clone()

    def _turn(self, number: int, budget: Budget, sides: Any, start: Any, tuned: Any, state: dict[str, Tensor]) -> None:
        """One step of the mask on the objective at theta(m)."""
        T = self.temperature(number)
        m = budget.soft(state["w"], T)
        with torch.no_grad():
            theta = blend(start, tuned, budget, m)
        s = signal(start, tuned, sides.slopes(theta, number), budget)
        if self.budget == "parameters":
            s = s / budget.sizes  # what an entry is worth: the budget counts entries
        g = s * m * (1 - m) / T
        state["mean"] = DECAY * state["mean"] + (1 - DECAY) * g
        state["size"] = DECAY * state["size"] + (1 - DECAY) * g.abs()
        size = state["size"] if self.normalise == "tensor" else state["size"].mean().expand_as(g)
        # Both means start at zero, so their ratio needs no correction.
        state["w"] = state["w"] - self.mask_lr * state["mean"] / size.clamp(min=1e-30)
        state["m"] = budget.soft(state["w"], T)
