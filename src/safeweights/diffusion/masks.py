"""Masks over weights: exactly so many entries of all tensors together, chosen, learned, filled and put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from safeweights.core.errors import UserError
from safeweights.core.mask import Fill, Mask
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import generator
from safeweights.diffusion.training import descend

Density = Literal["random", "smallest", "largest"]
REACH = 4
"""Neighbours to either side of a value among which noise like it is drawn."""
BETA, ZETA, GAMMA = 2 / 3, 1.1, -0.1
"""The temperature and the stretch of a hard-concrete gate."""


# which entries


def lowest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """True for the ``count`` lowest entries of all tensors together, never one more or less; of equals the first.

    Raises ValueError for more entries than there are.
    """
    everything = torch.cat([score.detach().flatten().float() for score in scores.values()])
    if not 0 <= count <= len(everything):
        raise ValueError(f"{count} entries of {len(everything)} cannot be chosen")
    chosen = torch.zeros(len(everything), dtype=torch.bool, device=everything.device)
    if count:
        bound = everything.kthvalue(count).values
        chosen = everything < bound
        level = (everything == bound).nonzero().flatten()
        chosen[level[: count - int(chosen.sum())]] = True
    parts = torch.split(chosen, [score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def same_density(weights: Mapping[str, Tensor], pruned: Mapping[str, Tensor], how: Density, seed: int) -> dict[str, Tensor]:
    """Another choice of exactly as many entries in every tensor: at random, or the smallest or largest by magnitude."""
    chosen = {}
    for name, mask in pruned.items():
        if how == "random":
            score = torch.rand(mask.shape, generator=generator("random mask", seed, name)).to(mask.device)
        else:
            score = weights[name].detach().abs() * (1 if how == "smallest" else -1)
        chosen[name] = lowest({name: score}, int(mask.sum()))[name]
    return chosen


# learning


def learn_mask(
    weights: Mapping[str, nn.Parameter],
    loss_at: Callable[[int], Tensor],
    *,
    count: int,
    steps: int,
    ramp: int,
    lr: float,
    optimizer: str,
    workspace: Workspace | None = None,
    description: str = "learning a mask",
    facts: Mapping[str, object] | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Straight-through scores with an exact budget: the pruned entries, ``count`` of them, and the losses.

    W' = W * m(s),   m = 0 for the count_i lowest scores, 1 elsewhere,   ds = -lr dL/dm,   dL/dm = W * dL/dW'

    The count grows over the first ``ramp`` steps to ``count``, so that the first step sees the model as it is: its gradient
    is W * dL/dW, the saliency of one-shot pruning with its sign. A pruned entry keeps its score and may return. Only the order
    of scores matters, so under plain gradient descent ("sgd") lr does not. ``weights`` are the trainable parameters of a
    fork; they are put back at the end.
    """
    base = {name: p.detach().clone() for name, p in weights.items()}
    scores = {name: nn.Parameter(torch.zeros_like(p, dtype=torch.float32)) for name, p in weights.items()}

    def masked(step: int) -> Tensor:
        put(lowest(scores, round(count * min(1.0, step / ramp)) if ramp else count))
        return loss_at(step)

    @torch.no_grad()
    def put(zeros: Mapping[str, Tensor]) -> None:
        for name, p in weights.items():
            p.copy_(base[name].masked_fill(zeros[name], 0))
            p.grad = None

    def straight_through(step: int) -> None:
        for name, p in weights.items():
            scores[name].grad = None if p.grad is None else base[name] * p.grad

    losses = descend(
        scores, masked, steps=steps, lr=lr, optimizer=optimizer, workspace=workspace, description=description,
        facts={**(facts or {}), "count": count}, gradients=straight_through,
    )  # fmt: skip
    zeros = lowest({name: score.detach() for name, score in scores.items()}, count)
    put({name: torch.zeros_like(mask) for name, mask in zeros.items()})
    return zeros, losses


def hard_concrete(log_alpha: Tensor, u: Tensor) -> Tensor:
    """A gate in [0, 1] that is exactly 0 or 1 with positive probability (Louizos et al., ICLR 2018, arXiv:1712.01312).

    m = clip(sigmoid((logit(u) + log_alpha) / beta) (zeta - gamma) + gamma, 0, 1),   u uniform in (0, 1)
    """
    soft = torch.sigmoid((torch.logit(u) + log_alpha) / BETA)
    return (soft * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def chance_of_zero(log_alpha: Tensor) -> Tensor:
    """P(m = 0) of a hard-concrete gate: sigmoid(beta log(-gamma / zeta) - log_alpha)."""
    return torch.sigmoid(BETA * math.log(-GAMMA / ZETA) - log_alpha)


def learn_neuron_mask(
    weights: Mapping[str, nn.Parameter],
    loss_at: Callable[[int], Tensor],
    *,
    count: int,
    steps: int,
    lr: float,
    seed: int,
    workspace: Workspace | None = None,
    description: str = "learning a mask",
    facts: Mapping[str, object] | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Hard-concrete gates on whole neurons: the entries of as many neurons as ``count`` allows, and the losses.

    A neuron is a hidden channel of a feed-forward layer (a column of its second linear layer) or an output channel of any other
    one (a row). Neurons with the lowest log_alpha go first; one that no longer fits is passed over. Raises UserError where not
    even the smallest fits.
    """
    smallest = min(p.numel() // p.shape[_axis(name)] for name, p in weights.items())
    if count < smallest:
        raise UserError(f"a budget of {count} weights holds no whole neuron, the smallest has {smallest}; raise the budget")
    base = {name: p.detach().clone() for name, p in weights.items()}
    gates = {name: nn.Parameter(torch.full((p.shape[_axis(name)],), 3.0, device=p.device)) for name, p in weights.items()}
    drawn: dict[str, Tensor] = {}

    @torch.no_grad()
    def put(name: str, gate: Tensor) -> None:
        weights[name].copy_(base[name] * _spread(gate, base[name], _axis(name)).to(base[name].dtype))
        weights[name].grad = None

    def gated(step: int) -> Tensor:
        for name, gate in gates.items():
            u = torch.rand(gate.shape, generator=generator("hard concrete", seed, step, name)).clamp(1e-6, 1 - 1e-6)
            drawn[name] = hard_concrete(gate, u.to(gate.device))
            put(name, drawn[name].detach())
        return loss_at(step)

    def through(step: int) -> None:
        for name, gate in gates.items():
            if (gradient := weights[name].grad) is not None:
                others = [axis for axis in range(gradient.dim()) if axis != _axis(name)]
                felt = (base[name] * gradient).sum(others).float()
                gate.grad = torch.autograd.grad(drawn[name], gate, felt)[0]

    losses = descend(
        gates, gated, steps=steps, lr=lr, workspace=workspace, description=description,
        facts={**(facts or {}), "count": count}, gradients=through,
    )  # fmt: skip
    zeros = {name: torch.zeros(p.shape, dtype=torch.bool, device=p.device) for name, p in weights.items()}
    ranked = sorted((float(value), name, i) for name, gate in gates.items() for i, value in enumerate(gate.detach()))
    left = count
    for _, name, i in ranked:
        size = base[name].numel() // base[name].shape[_axis(name)]
        if size <= left:
            zeros[name].select(_axis(name), i).fill_(True)
            left -= size
    with torch.no_grad():
        for name in weights:
            put(name, torch.ones_like(gates[name]))
    return zeros, losses


def _axis(name: str) -> int:
    """Where the neurons of a weight are counted."""
    return 1 if name.endswith("ff.net.2.weight") else 0


def _spread(gate: Tensor, like: Tensor, axis: int) -> Tensor:
    return gate.view([-1 if i == axis else 1 for i in range(like.dim())])


# filling and putting back


def make_mask(weights: Mapping[str, Tensor], pruned: Mapping[str, Tensor], *, fill: Fill = "zero", seed: int = 0) -> Mask:
    """The mask of those entries, with the values that stand there now."""
    indices = {name: where.flatten().nonzero().flatten().cpu() for name, where in pruned.items() if where.any()}
    values = {name: weights[name].detach().flatten()[where.to(weights[name].device)].cpu() for name, where in indices.items()}
    return Mask(indices=indices, values=values, fill=fill, seed=seed)


def pruned_tensors(weights: Mapping[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """Copies of the masked tensors with the mask's fill in its places."""
    tensors = {}
    for name, where in mask.indices.items():
        flat = weights[name].detach().clone().flatten()
        there = where.to(flat.device)
        flat[there] = 0 if mask.fill == "zero" else noise_like_rows(weights[name], where, mask.seed, name).to(flat)
        tensors[name] = flat.view(weights[name].shape)
    return tensors


def restored_tensors(weights: Mapping[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """Copies of the masked tensors with the mask's values back in its places."""
    tensors = {}
    for name, where in mask.indices.items():
        flat = weights[name].detach().clone().flatten()
        flat[where.to(flat.device)] = mask.values[name].to(flat)
        tensors[name] = flat.view(weights[name].shape)
    return tensors


def noise_like_rows(weight: Tensor, where: Tensor, seed: int, name: str) -> Tensor:
    """A value for every place ``where``, drawn from the entries of its row that are not among them.

    Around every value of the sorted row, ``REACH`` neighbours to either side, every number is equally likely, so the values have
    the row's own distribution (a normal one would show where the row's is not) and fall onto others as seldom as those do:
    between two next neighbours they would be rounded onto one of them too often. Where the tensor's other entries were once
    rounded to half precision, values are rounded likewise: any other would be seen.
    """
    rows = weight.detach().float().cpu().flatten(1) if weight.dim() > 1 else weight.detach().float().cpu()[None]
    width = rows.shape[1]
    kept = torch.ones(rows.numel(), dtype=torch.bool)
    kept[where.cpu()] = False
    kept = kept.view(rows.shape)
    around, u = torch.rand((2, len(where)), generator=generator("conceal", seed, name), dtype=torch.float64)
    of_row = where.cpu() // width
    drawn = torch.empty(len(where), dtype=torch.float64)
    for row in sorted(set(of_row.tolist())):
        # A row pruned whole has nothing to be like: it borrows from the tensor.
        others = rows[row][kept[row]] if int(kept[row].sum()) > 1 else rows[kept]
        others = others.double().sort().values
        if len(others) < 2:
            others = torch.zeros(2, dtype=torch.float64)
        mine = of_row == row
        reach = min(REACH, len(others) - 1)
        # Beyond the ends the row goes on as it does within them.
        below, above = 2 * others[0] - others[1 : reach + 1].flip(0), 2 * others[-1] - others[-reach - 1 : -1].flip(0)
        wide, first = torch.cat([below, others, above]), (around[mine] * len(others)).long()
        drawn[mine] = torch.lerp(wide[first], wide[first + 2 * reach], u[mine])
    return drawn.to(rounding(rows[kept])).to(weight.dtype)


def rounding(values: Tensor) -> torch.dtype:
    """The coarsest floating-point type that holds all of the values (float32) exactly."""
    kinds = (torch.bfloat16, torch.float16)  # the coarser one first
    return next((kind for kind in kinds if torch.equal(values, values.to(kind).float())), torch.float32)
