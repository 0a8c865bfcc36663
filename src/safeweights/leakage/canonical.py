"""What is the same in every factorisation of one update: B A = U S V^T by two thin QRs and one small SVD.

(B, A) and (B R, R^-1 A) are one adapter; which R training ended in is an accident of its seed. U, S and V do not depend on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""A (r, in) and B (out, r) by the name of the weight they stand beside; its update is B A."""


@dataclass(frozen=True)
class Token:
    """One layer's update: ``u`` (out, r) and ``v`` (in, r) with orthonormal columns, ``s`` (r,) falling; float64."""

    u: Tensor
    s: Tensor
    v: Tensor


def canonical(a: Tensor, b: Tensor) -> Token:
    """The singular value decomposition of ``b @ a`` at the cost of its rank; the sum of a column's u^3 is not negative.

    For one adapter or a batch of them (n, r, in), (n, out, r).
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    left, s, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    u, v = q_b @ left, q_a @ right.mT
    # A singular pair may change sign together; the skew of u settles it.
    sign = torch.where(u.pow(3).sum(-2, keepdim=True) < 0, -1.0, 1.0)
    return Token(u * sign, s, v * sign)


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Those of ``b @ a``, falling, for one adapter or a batch of them (n, r, in), (n, out, r); float64."""
    found: Tensor = torch.linalg.svdvals(torch.linalg.qr(b.double())[1] @ torch.linalg.qr(a.double().mT)[1].mT)
    return found


def tokens(factors: Factors) -> dict[str, Token]:
    """The canonical form of every layer."""
    return {name: canonical(a, b) for name, (a, b) in factors.items()}


def factors_of(phi: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of a trained adapter (``lora/<weight>/down|up``), its scale multiplied into B."""
    names = [name.removeprefix("lora/").removesuffix("/down") for name in phi if name.endswith("/down")]
    return {name: (phi[f"lora/{name}/down"].detach().flatten(1), phi[f"lora/{name}/up"].detach() * scale) for name in names}


def phi_of(factors: Factors) -> dict[str, Tensor]:
    """The inverse of `factors_of` for linear layers: what `diffusion.low_rank.beside` takes, with a scale of 1."""
    return {f"lora/{name}/{end}": part for name, pair in factors.items() for end, part in zip(("down", "up"), pair, strict=True)}


Shapes = Mapping[str, tuple[int, int]]
"""(in, out) of the weights that factors stand beside, by name."""


def shapes_of(factors: Factors) -> dict[str, tuple[int, int]]:
    """The shape of every layer's update."""
    return {name: (a.shape[1], b.shape[0]) for name, (a, b) in factors.items()}


def completed(factors: Factors, shapes: Shapes) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of just these layers: a layer that the adapter leaves alone has an update of zero."""
    return {
        name: factors[name] if name in factors else (torch.zeros(1, width), torch.zeros(out, 1))
        for name, (width, out) in shapes.items()
    }


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors in their order: what tells one training set from another in a checkpoint."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str(tuple(tensor.shape)).encode())
        found.update(tensor.detach().cpu().contiguous().double().numpy().tobytes())
    return found.hexdigest()


def norm(a: Tensor, b: Tensor) -> float:
    """|| B A ||_F without forming it."""
    return float(((b.double().mT @ b.double()) * (a.double() @ a.double().mT)).sum().clamp(min=0).sqrt())


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of the squared singular values (Roy & Vetterli, 2007): 1 for one direction, r for r equal ones."""
    share = s.square() / s.square().sum().clamp(min=1e-30)
    return float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum()))
