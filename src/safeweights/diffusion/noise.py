"""Noise levels, noising and the two forms of a prediction: x_t = alpha_t x_0 + sigma_t eps, v = alpha_t eps - sigma_t x_0."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel, Sampling


def levels(model: DiffusionModel, t: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha_t, sigma_t) at timesteps t (B,), shaped (B, 1, 1, 1).

    Between two integer timesteps sigma / alpha is interpolated linearly, as the samplers that ask for fractional timesteps do.
    """
    if not t.is_floating_point():
        alpha, sigma = model.alpha[t], model.sigma[t]
    else:
        low = t.floor().long().clamp(0, len(model.alpha) - 1)
        high = (low + 1).clamp(max=len(model.alpha) - 1)
        ratio = torch.lerp(model.sigma[low] / model.alpha[low], model.sigma[high] / model.alpha[high], t.to(model.alpha) - low)
        alpha = (1 + ratio**2).rsqrt()
        sigma = ratio * alpha
    return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


def add_noise(model: DiffusionModel, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t for x_0 and eps (B, C, h, w) at timesteps t (B,)."""
    alpha, sigma = levels(model, t)
    return alpha * x_0 + sigma * eps


def predict_x0(model: DiffusionModel, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The x_0 that a noise prediction implies."""
    alpha, sigma = levels(model, t)
    return (x_t - sigma * eps) / alpha


def v_to_eps(model: DiffusionModel, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """eps = alpha_t v + sigma_t x_t."""
    alpha, sigma = levels(model, t)
    return alpha * v + sigma * x_t


def eps_to_v(model: DiffusionModel, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = (eps - sigma_t x_t) / alpha_t, the inverse of `v_to_eps`."""
    alpha, sigma = levels(model, t)
    return (eps - sigma * x_t) / alpha


def generator(*seeds: int | str) -> torch.Generator:
    """A CPU generator from a hash of its arguments: ``generator(seed, "esd", step)`` is independent for every step."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def latent_size(model: DiffusionModel, sampling: Sampling | None = None) -> tuple[int, int, int]:
    """(C, h, w) for pictures of that size, the model's own without ``sampling``.

    Raises UserError for a size that is no multiple of the model's latent stride.
    """
    channels, height, width = model.latent_shape
    if sampling is not None:
        if sampling.width % model.latent_stride or sampling.height % model.latent_stride:
            raise UserError(
                f"pictures of {sampling.width}x{sampling.height} do not fit this model; "
                f"width and height must be multiples of {model.latent_stride}"
            )
        height, width = sampling.height // model.latent_stride, sampling.width // model.latent_stride
    return channels, height, width


def initial_noise(model: DiffusionModel, seed: int, sampling: Sampling | None = None) -> Tensor:
    """x_T (1, C, h, w) of a prompt's seed: drawn on the CPU, as ``torch.manual_seed(seed)`` in front of a pipeline does."""
    noise = torch.randn((1, *latent_size(model, sampling)), generator=torch.Generator().manual_seed(seed))
    return noise.to(model.device)


def random_noise(model: DiffusionModel, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Standard normal of that shape on the model's device, the same on every kind of device for a CPU generator."""
    return torch.randn(shape, generator=rng, device=rng.device).to(model.device)
