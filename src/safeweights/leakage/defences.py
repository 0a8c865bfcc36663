"""What a publisher can do to a finished adapter so that its file tells less, each as a function of the factors."""

from __future__ import annotations

import torch

from safeweights.diffusion.noise import generator
from safeweights.leakage.canonical import Factors, Token, canonical


def truncate(factors: Factors, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The best approximation of every update by that rank (Eckart & Young, 1936). Raises ValueError for a rank below 1."""
    if rank < 1:
        raise ValueError("the rank must be above zero")
    return {name: _pair(canonical(a, b), rank) for name, (a, b) in factors.items()}


def refactor(factors: Factors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The same updates in canonical factors, B = U sqrt(S), A = sqrt(S) V^T: what the seed left in the factors is gone."""
    return {name: _pair(canonical(a, b), len(a)) for name, (a, b) in factors.items()}


def _pair(token: Token, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    u, s, v = token.u[:, :rank], token.s[:rank].sqrt(), token.v[:, :rank]
    return (s[:, None] * v.mT).float().contiguous(), (u * s).float().contiguous()


def quantise(factors: Factors, bits: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every row of A and column of B rounded to 2^bits - 1 even steps around zero. Raises ValueError for less than 2 bits."""
    if bits < 2:
        raise ValueError("bits must be at least 2")
    top = 2 ** (bits - 1) - 1

    def rounded(value: torch.Tensor, dim: int) -> torch.Tensor:
        step = value.abs().amax(dim, keepdim=True).clamp(min=1e-12) / top
        found: torch.Tensor = (value / step).round().clamp(-top, top) * step
        return found

    return {name: (rounded(a, 1), rounded(b, 0)) for name, (a, b) in factors.items()}


def add_noise(factors: Factors, share: float, *, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Normal noise of ``share`` of each factor's root mean square. Raises ValueError for a negative share."""
    if share < 0:
        raise ValueError("the share must not be below zero")
    found = {}
    for name, (a, b) in factors.items():
        rng = generator("weight noise", seed, name)
        found[name] = (
            a + share * a.square().mean().sqrt() * torch.randn(a.shape, generator=rng).to(a),
            b + share * b.square().mean().sqrt() * torch.randn(b.shape, generator=rng).to(b),
        )
    return found


def difference(factors: Factors, other: Factors) -> float:
    """How far the updates of two adapters of the same layers lie apart, as a share of the first one's norm."""
    apart = whole = 0.0
    for name, (a, b) in factors.items():
        c, d = other[name]
        # B A - D C is of rank r + r': its norm needs no matrix of the weight's size.
        apart += canonical(torch.cat([a, c]), torch.cat([b, -d], 1)).s.square().sum().item()
        whole += canonical(a, b).s.square().sum().item()
    return float((apart / max(whole, 1e-30)) ** 0.5)


def scale(factors: Factors, norm: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every update at the Frobenius norm ``norm``: a control that hides how long and how fast was trained."""
    from safeweights.leakage.canonical import norm as length

    return {name: (a, b * (norm / max(length(a, b), 1e-12))) for name, (a, b) in factors.items()}


def random_directions(factors: Factors, *, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The same singular values between random orthonormal directions: a control that keeps the spectrum and nothing else."""
    found = {}
    for name, (a, b) in factors.items():
        s = canonical(a, b).s.float().sqrt()
        rng = generator("random directions", seed, name)
        u = torch.linalg.qr(torch.randn(b.shape, generator=rng))[0]
        v = torch.linalg.qr(torch.randn(a.shape[1], a.shape[0], generator=rng))[0]
        found[name] = (s[:, None] * v.mT).contiguous(), (u * s).contiguous()
    return found
