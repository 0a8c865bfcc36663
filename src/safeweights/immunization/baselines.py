"""What MIMA is measured against (Zheng & Yeh, AAAI 2025, arXiv:2412.15320): IMMA on all concepts at once, and IMMAs merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from safeweights.core.concept import Concept
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.drawn_set import retained_prompts
from safeweights.diffusion.merging import concept_features, text_features
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parameters import select
from safeweights.immunization.bilevel import Bilevel, Merging
from safeweights.immunization.imma import PAPER


@dataclass(frozen=True, kw_only=True)
class JT(Bilevel):
    """Joint training: IMMA against one user who learns all concepts together.

    max_theta  mean_n L(x_u[n], c[n]; theta, phi*)   s.t.   phi* = argmin_phi mean_n L(x_l[n], c[n]; theta, phi)

    Needs: pictures of every concept.   Cost: as MIMA, without the merge.
    Differs from the reference code: none was released; words to be learnt stay one for each concept.
    """

    name: ClassVar[str] = "jt"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"small": {}, "paper": PAPER}

    def groups(self, concepts: Sequence[Concept]) -> list[list[int]]:
        return [[*range(len(concepts))]]


@dataclass(frozen=True, kw_only=True)
class Compose(Merging):
    """IMMA for every concept alone, merged afterwards: keys and values in closed form, all else averaged.

    theta = Merge({theta_[n]}),   theta_[n] = IMMA of concept n

    Needs: pictures of every concept.   Cost: IMMA for each concept.
    Differs from the reference code: queries are averaged (there merged in closed form on picture features).
    """

    name: ClassVar[str] = "compose"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {**PAPER, "ridge": 1e-4, "prior": 1e-6},
    }

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
        workspace = workspace or Workspace()
        seed, calls, parts = rng.initial_seed(), model.calls.eps, []
        for concept in concepts:
            alone = generator("compose", seed, concept.name)
            parts.append(
                super().protect(model, [concept], retain=retain, rng=alone, workspace=workspace.child(f"alone {concept.name}"))
            )
        features = [concept_features(model, concept) for concept in concepts]
        merge = self.fuse(features, text_features(model, retained_prompts(concepts, retain)))
        base = dict(model.named_parameters())
        merged = merge.tensors(base, [part.tensors for part in parts], select(base.items(), "xattn_kv"))
        return Protection(
            method=self.name,
            concepts=tuple(concept.name for concept in concepts),
            tensors={name: value.detach() for name, value in merged.items()},
            settings=describe(self),
            cost={
                "steps": self.steps * len(concepts), "eps_calls": model.calls.eps - calls, "loss": parts[-1].cost["loss"],
            },
        )  # fmt: skip
