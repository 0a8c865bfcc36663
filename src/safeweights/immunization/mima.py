"""Multi-concept Model Immunization through Differentiable Model Merging (Zheng & Yeh, AAAI 2025, arXiv:2412.15320)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from safeweights.core.concept import Concept
from safeweights.immunization.bilevel import Merging


@dataclass(frozen=True, kw_only=True)
class MIMA(Merging):
    """Adapt the model to each concept alone, merge what came out, and move the model to where the merge knows none of them.

    max_{theta in S_u}  1/N sum_n L(x_u[n], c[n]; Merge({theta'_[n]}))   s.t.   theta'_[n] = argmin L(x_l[n], c[n]; theta)
    theta'_[n] = theta - alpha grad L(x_l[n], c[n]; theta),   Merge: `diffusion.merging.Merge` for keys and values, else the mean

    Needs: pictures of every concept, their folders' or drawn.   Cost: a pass forward and backward for each concept and level, one
    more to hold what is retained; merging is N products of d x d a matrix.
    Differs from the reference code: gradients flow through the merge and, with ``order=2``, through the users' step (there
    neither); the users' steps are a look-ahead that is undone; all that was changed is saved; concepts never share a batch entry;
    features are those of the concept's own term; what is retained is held to the base's predictions (there, to the noise).
    ``order=1`` is the paper's algorithm with d theta' / d theta taken for the identity; on the sandbox, as many seconds of it
    immunize better than of ``order=2``.
    """

    name: ClassVar[str] = "mima"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "parameters": "xattn", "adaptations": ("full",), "inner_lrs": (1e-5,), "horizon": 1, "inner": "sgd", "order": 2,
            "upper": "ascent", "steps": 500, "lr": 3e-5, "weight_decay": 1e-2, "keep": 1.0, "batch_size": 1, "pictures": 20,
            "retained": 200, "ddim_steps": 50, "guidance": 7.5, "ridge": 1e-4, "prior": 1e-6,
        },
    }  # fmt: skip

    def groups(self, concepts: Sequence[Concept]) -> list[list[int]]:
        return [[n] for n in range(len(concepts))]
