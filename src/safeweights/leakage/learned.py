"""Encoders trained by descent that `leakage train --also` adds to the closed forms: canonical tokens, the paper's network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel
from safeweights.core.workspace import Workspace
from safeweights.leakage.canonical import factors_of
from safeweights.leakage.encoders.tokens import Tokens
from safeweights.leakage.encoders.vnae import VNAE, Draw, Fitted
from safeweights.leakage.factory import Made

Learned = Tokens | Fitted
KINDS: dict[str, type[Tokens] | type[Fitted]] = {"tokens": Tokens, "vnae": Fitted}


def check(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once. Raises UserError for one that is no encoder of this kind."""
    if strange := [name for name in names if name not in KINDS]:
        raise UserError(f"unknown encoder {strange[0]!r}; besides the closed forms there are {', '.join(KINDS)}")
    return tuple(dict.fromkeys(names))


def fit(
    name: str, model: DiffusionModel, made: Sequence[Made], targets: Tensor, draw: Draw, *, steps: int = 400,
    seed: int = 0, workspace: Workspace | None = None,
) -> Learned:  # fmt: skip
    """One of `KINDS` on finished adapters (tokens) or on all their checkpoints (vnae), targets (n, D).

    ``draw`` gives training latents, which the network autoencoder reconstructs by the base model.
    """
    if name == "tokens":
        return Tokens.fit([factors_of(item.phi) for item in made], targets, steps=steps, seed=seed, workspace=workspace)
    adapters = [{step: factors_of(phi) for step, phi in item.after.items()} for item in made]
    return VNAE(steps=steps, seed=seed).fit(model, adapters, targets, draw, workspace=workspace)


def drawing(x_0: Tensor, each: int, shape: Sequence[int]) -> Draw:
    """Training latents by adapter from a bank x_0 (N, C, h, w) with ``each`` of every subject, in the adapters' order."""
    latents = x_0[: len(x_0) // each * each].view(-1, each, *shape)
    return lambda i, rng: latents[i, int(torch.randint(each, (1,), generator=rng))]


def load(name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Learned:
    """The inverse of an encoder's ``tensors`` and ``facts``.

    Raises KeyError, TypeError, ValueError, AttributeError or RuntimeError for others.
    """
    return KINDS[name].from_tensors(tensors, facts)
