"""E1: kernel ridge on the inner products of updates, which no factorisation changes.

K_ij = sum_l w_l < dW_i, dW_j >_l = sum_l w_l sum((B_i^T B_j) o (A_i A_j^T)),   w_l = 1 / median_i < dW_i, dW_i >_l
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from safeweights.leakage.canonical import Factors, canonical
from safeweights.leakage.encoders import ridge

Kind = Literal["update", "cosine", "left"]


def padded(adapters: Sequence[Factors], name: str) -> tuple[Tensor, Tensor]:
    """A (n, r, in) and B (n, out, r) of one layer, lower ranks and absent layers filled up with zeros."""
    present = [item[name] for item in adapters if name in item]
    rank = max(len(a) for a, _ in present)
    a0, b0 = present[0]
    a = torch.zeros(len(adapters), rank, a0.shape[1])
    b = torch.zeros(len(adapters), b0.shape[0], rank)
    for row, item in enumerate(adapters):
        if name in item:
            down, up = item[name]
            a[row, : len(down)], b[row, :, : len(down)] = down, up
    return a, b


def products(adapters: Sequence[Factors], others: Sequence[Factors], name: str) -> Tensor:
    """< dW_i, dW_j > of one layer for every pair (n, m), in r x r work per pair."""
    (a, b), (c, d) = padded(adapters, name), padded(others, name)
    left = torch.einsum("iop,joq->ipjq", b, d)
    right = torch.einsum("ipk,jqk->ipjq", a, c)
    return (left * right).sum((1, 3)).double()


def _norms(adapters: Sequence[Factors], name: str) -> Tensor:
    a, b = padded(adapters, name)
    return ((b.mT @ b) * (a @ a.mT)).sum((1, 2)).double()


def _left(adapters: Sequence[Factors], name: str) -> list[Factors]:
    """Each adapter's output side alone: < U_i U_i^T, U_j U_j^T > = || U_i^T U_j ||_F^2."""
    found: list[Factors] = []
    for item in adapters:
        u = canonical(*item[name]).u.float() if name in item else None
        found.append({} if u is None else {name: (u.mT.contiguous(), u)})
    return found


def gram(
    adapters: Sequence[Factors],
    others: Sequence[Factors] | None = None,
    *,
    layers: Sequence[str],
    kind: Kind,
    weights: Mapping[str, float],
) -> Tensor:
    """The kernel (n, m) summed over layers; ``cosine`` divides every layer's update by its norm, ``left`` keeps U alone."""
    rights = adapters if others is None else others
    total = torch.zeros(len(adapters), len(rights), dtype=torch.float64)
    for name in layers:
        mine = _left(adapters, name) if kind == "left" else adapters
        theirs = mine if others is None else _left(rights, name) if kind == "left" else rights
        if not any(name in item for item in mine) or not any(name in item for item in theirs):
            continue
        layer = products(mine, theirs, name)
        if kind == "cosine":
            lengths = [_norms(items, name).clamp(min=1e-20).rsqrt() for items in (mine, theirs)]
            layer = layer * lengths[0][:, None] * lengths[1][None]
        total += weights[name] * layer
    return total


def weights_of(adapters: Sequence[Factors], layers: Sequence[str], kind: Kind) -> dict[str, float]:
    """The layers' weights in a kernel: 1 / median squared norm where norms count, else all the same."""
    return {
        name: 1.0 / max(float(_norms(adapters, name).median()), 1e-20) if kind == "update" else 1.0 / len(layers)
        for name in layers
    }


@dataclass(frozen=True)
class Gram:
    """Predict the targets of an adapter from its inner products with adapters of known training data.

    Needs: factors or merged updates.   Cost: n^2 r^2 (in + out) a layer, one eigendecomposition of n x n.
    """

    name: ClassVar[str] = "gram"
    kind: Kind
    layers: tuple[str, ...]
    weights: Mapping[str, float]
    adapters: tuple[Factors, ...]
    ridge: ridge.Ridge

    @classmethod
    def fit(cls, adapters: Sequence[Factors], targets: Tensor, *, kinds: Sequence[Kind] = ("update", "cosine", "left")) -> Gram:
        """Fit each kind of kernel and keep the one whose leave-one-out answers point best at their targets.

        Each is fitted for the least squared error, as ever; between kinds the direction decides, since that is what a subject is
        found by, and the length of an answer follows the length of the update where a kernel keeps it.
        """
        layers = tuple(adapters[0])
        best: tuple[float, Gram] | None = None
        for kind in kinds:
            weights = weights_of(adapters, layers, kind)
            found = ridge.fit(gram(adapters, layers=layers, kind=kind, weights=weights), targets)
            error = -ridge.loo_cosine(found, targets)
            if best is None or error < best[0]:
                best = error, cls(kind, layers, weights, tuple(adapters), found)
        assert best is not None
        return best[1]

    def predict(self, adapters: Sequence[Factors]) -> Tensor:
        """Targets (m, D)."""
        return self.ridge.predict(gram(adapters, self.adapters, layers=self.layers, kind=self.kind, weights=self.weights))

    def compress(self, size: int = 24) -> Compressed:
        """The same function without the adapters it was fitted on, each layer seen through its ``size`` main directions.

        Exact where ``size`` reaches the layer's width; what it costs otherwise is measured, not assumed.
        """
        if self.kind == "left":
            raise ValueError("the left kernel is no linear function of the update")
        alpha = self.ridge.weight - self.ridge.weight.mean(0)
        left, right, core = {}, {}, {}
        offset = self.ridge.mean - (self.ridge.rows - self.ridge.rows.mean()) @ self.ridge.weight
        for name in self.layers:
            a, b = padded(self.adapters, name)
            if self.kind == "cosine":
                b = b * _norms(self.adapters, name).clamp(min=1e-20).rsqrt().float()[:, None, None]
            updates = torch.bmm(b, a).double()
            u = torch.linalg.eigh(torch.einsum("nok,npk->op", updates, updates))[1].flip(1)[:, :size]
            v = torch.linalg.eigh(torch.einsum("nok,noj->kj", updates, updates))[1].flip(1)[:, :size]
            small = torch.einsum("op,nok,kq->npq", u, updates, v)
            core[name] = torch.einsum("npq,nd->pqd", small, alpha).float() * self.weights[name]
            left[name], right[name] = u.float(), v.float()
        return Compressed(self.kind == "cosine", left, right, core, offset.float())


@dataclass(frozen=True)
class Compressed:
    """A fitted `Gram` as a linear function of the update: y = offset + sum_l < core_l, U_l^T dW_l V_l >."""

    name: ClassVar[str] = "gram"
    normalised: bool
    left: Mapping[str, Tensor]
    right: Mapping[str, Tensor]
    core: Mapping[str, Tensor]
    offset: Tensor

    def predict(self, adapters: Sequence[Factors]) -> Tensor:
        """Targets (m, D)."""
        total = self.offset.double().expand(len(adapters), -1).clone()
        for name, core in self.core.items():
            if not any(name in item for item in adapters):
                continue
            a, b = padded(adapters, name)
            if self.normalised:
                b = b * _norms(adapters, name).clamp(min=1e-20).rsqrt().float()[:, None, None]
            small = torch.einsum("op,nor,nrk,kq->npq", self.left[name], b, a, self.right[name])
            total += torch.einsum("npq,pqd->nd", small.double(), core.double())
        return total

    def tensors(self) -> dict[str, Tensor]:
        """Everything, ready for a safetensors file."""
        found = {"offset": self.offset, "normalised": torch.tensor(float(self.normalised))}
        for what, parts in (("left", self.left), ("right", self.right), ("core", self.core)):
            found |= {f"{what}/{name}": value.contiguous() for name, value in parts.items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Compressed:
        """The inverse of `tensors`."""
        parts: dict[str, dict[str, Tensor]] = {"left": {}, "right": {}, "core": {}}
        for key, value in tensors.items():
            what, _, name = key.partition("/")
            if what in parts:
                parts[what][name] = value.float()
        return cls(bool(tensors["normalised"] > 0.5), parts["left"], parts["right"], parts["core"], tensors["offset"].float())
