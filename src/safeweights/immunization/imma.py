"""IMMA: Immunizing text-to-image Models against Malicious Adaptation (Zheng & Yeh, ECCV 2024, arXiv:2311.18815)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from safeweights.core.concept import Concept
from safeweights.core.errors import UserError
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel
from safeweights.core.workspace import Workspace
from safeweights.immunization.bilevel import Bilevel

PAPER: Mapping[str, Any] = {
    "parameters": "attention", "inner_lrs": (1e-4,), "horizon": 1000, "inner": "adam", "order": 1, "upper": "ascent",
    "steps": 1000, "lr": 1e-5, "weight_decay": 1e-2, "keep": 0.0, "batch_size": 1, "pictures": 40, "ddim_steps": 50,
    "guidance": 7.5,
}  # fmt: skip
"""The published setting against re-learning with low-rank adapters."""


@dataclass(frozen=True, kw_only=True)
class IMMA(Bilevel):
    """Move one concept's weights to where adapting to it does not help.

    max_{theta in S_u}  L(x_u, c; theta, phi*)   s.t.   phi* = argmin_phi L(x_l, c; theta, phi)                       (eq. 3)
    (1)  phi <- phi - alpha grad_phi L(x_l, c; theta, phi)     (2)  theta_u <- theta_u + beta grad_theta L(x_u, c; theta, phi)

    Needs: pictures of the concept, its folder's or drawn.   Cost: two passes forward and backward a step, one more to hold what
    is retained.
    Differs from the reference code: a user's own weights are a look-ahead, never kept in the model (there, adapting the weights
    themselves moved them for good, and what was moved outside S_u was lost when saved); the two levels see different pictures;
    users start anew after ``horizon`` steps; the loss is bounded and what is retained is held, unless ``preset=paper``.
    """

    name: ClassVar[str] = "imma"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"small": {}, "paper": PAPER}

    def groups(self, concepts: Sequence[Concept]) -> list[list[int]]:
        return [[*range(len(concepts))]]

    def protect(
        self,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        *,
        retain: Sequence[str] = (),
        rng: torch.Generator,
        workspace: Workspace | None = None,
    ) -> Protection:
        if len(concepts) != 1:
            raise UserError("imma immunizes one concept; use mima for several, or its baselines jt and compose")
        return super().protect(model, concepts, retain=retain, rng=rng, workspace=workspace)
