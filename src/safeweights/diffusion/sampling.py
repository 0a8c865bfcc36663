"""Sampling: DDIM with classifier-free guidance (Song et al., ICLR 2021, arXiv:2010.02502; Ho & Salimans, arXiv:2207.12598)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safeweights.core.attack import Candidate
from safeweights.core.errors import UserError
from safeweights.core.model import SCHEDULERS, Conditioning, DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import initial_noise, predict_x0


def ddim_timesteps(model: DiffusionModel, steps: int) -> Tensor:
    """The timesteps (steps,) of a DDIM run, highest first; equal to diffusers' DDIMScheduler.

    Raises UserError for less than one step or more steps than the model was trained with.
    """
    total = len(model.alpha)
    if not 1 <= steps <= total:
        raise UserError(f"steps must be from 1 to {total}, not {steps}")
    if model.grid.spacing == "leading":
        t = (torch.arange(steps) * (total // steps)).flip(0) + model.grid.offset
    elif model.grid.spacing == "trailing":
        t = torch.arange(total, 0, -total / steps, dtype=torch.float64)[:steps].round().long() - 1
    else:
        t = torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long().flip(0)
    return t.clamp(max=total - 1).to(model.device)


def predictions(model: DiffusionModel, x_t: Tensor, t: Tensor, c: Conditioning, uncond: Conditioning) -> tuple[Tensor, Tensor]:
    """(eps_0, eps_c), without and with the prompt, in one call of 2B samples. ``c`` and ``uncond`` have B rows or one."""
    both = Conditioning.cat([part.repeat(len(x_t)) if len(part) == 1 else part for part in (uncond, c)])
    eps_0, eps_c = model.eps(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return eps_0, eps_c


def guided(model: DiffusionModel, x_t: Tensor, t: Tensor, c: Conditioning, uncond: Conditioning | None, scale: float) -> Tensor:
    """Classifier-free guidance, eps_0 + scale (eps_c - eps_0); a scale of 1 asks for eps_c alone."""
    if scale == 1.0:
        return model.eps(x_t, t, c)
    if uncond is None:
        raise ValueError("guidance other than 1 needs the unconditional embedding")
    eps_0, eps_c = predictions(model, x_t, t, c, uncond)
    return eps_0 + scale * (eps_c - eps_0)


def ddim_step(model: DiffusionModel, x_t: Tensor, t: int, t_next: int | None, eps: Tensor) -> Tensor:
    """x at t_next from x at t (deterministic, eta = 0); ``t_next`` None is the step that ends in the picture."""
    rows = torch.full((len(x_t),), t, device=x_t.device)
    x_0 = predict_x0(model, x_t, rows, eps)
    alpha = model.grid.final_alpha if t_next is None else float(model.alpha[t_next])
    sigma = math.sqrt(max(1 - alpha**2, 0.0))
    return alpha * x_0 + sigma * eps


def _with_uncond(model: DiffusionModel, sampling: Sampling, uncond: Conditioning | None) -> Conditioning | None:
    return model.embed([""]) if uncond is None and sampling.guidance_scale != 1.0 else uncond


@dataclass(frozen=True)
class Trajectory:
    """A DDIM run of B latents: everything (steps, B, C, h, w) except ``t`` (steps,)."""

    x: Tensor
    """x[n] is exactly the state the model is asked about at t[n]; the final x_0 is not among them."""
    t: Tensor
    eps_none: Tensor
    """The unconditional noise predictions, …"""
    eps_c: Tensor
    """… and the conditional ones."""


@torch.no_grad()
def trajectory(
    model: DiffusionModel, c: Conditioning, x_T: Tensor, sampling: Sampling, *, uncond: Conditioning | None = None
) -> Trajectory:
    """A DDIM run from x_T (B, C, h, w) with all it asks the model, at a cost of 2 B calls a step."""
    uncond = model.embed([""]) if uncond is None else uncond
    timesteps = ddim_timesteps(model, sampling.steps).tolist()
    x, states, without, given = x_T, [], [], []
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        eps_0, eps_c = predictions(model, x, torch.full((len(x),), t, device=x.device), c, uncond)
        states.append(x)
        without.append(eps_0)
        given.append(eps_c)
        x = ddim_step(model, x, t, t_next, eps_0 + sampling.guidance_scale * (eps_c - eps_0))
    return Trajectory(torch.stack(states), torch.tensor(timesteps, device=x.device), torch.stack(without), torch.stack(given))


def ddim_run(
    model: DiffusionModel,
    c: Conditioning,
    x_T: Tensor,
    sampling: Sampling,
    *,
    uncond: Conditioning | None = None,
    checkpoints: bool = False,
) -> Tensor:
    """x_0 from x_T (B, C, h, w) by DDIM; without ``uncond`` unguided, under c alone. Differentiable.

    ``checkpoints`` computes every step again on the way back, so that the activations of one step at a time are kept.
    """
    from torch.utils.checkpoint import checkpoint

    def step(x: Tensor, t: int, t_next: int | None) -> Tensor:
        rows = torch.full((len(x),), t, device=x.device)
        scale = 1.0 if uncond is None else sampling.guidance_scale
        return ddim_step(model, x, t, t_next, guided(model, x, rows, c, uncond, scale))

    x = x_T
    timesteps = ddim_timesteps(model, sampling.steps).tolist()
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        x = checkpoint(step, x, t, t_next, use_reentrant=False) if checkpoints else step(x, t, t_next)
    return x


@torch.no_grad()
def invert(model: DiffusionModel, c: Conditioning, x_0: Tensor, sampling: Sampling, *, iterations: int = 1) -> Tensor:
    """The x_T (B, C, h, w) that `ddim_run` takes to x_0, unguided under c: DDIM backwards.

    A step x' = a x + b eps(x, t) is undone by iterating x <- (x' - b eps(x, t)) / a from x'; one iteration is the usual DDIM
    inversion, more solve the step where the iteration contracts (Pan et al., ICCV 2023, arXiv:2309.04907).
    """
    timesteps = ddim_timesteps(model, sampling.steps).tolist()
    x = x_0
    for t, t_next in reversed(list(zip(timesteps, [*timesteps[1:], None], strict=True))):
        rows, there = torch.full((len(x),), t, device=x.device), x
        zero = torch.zeros_like(x)
        a = ddim_step(model, torch.ones_like(x), t, t_next, zero)
        b = ddim_step(model, zero, t, t_next, torch.ones_like(x))
        for _ in range(iterations):
            x = (there - b * model.eps(x, rows, c)) / a
    return x


@torch.no_grad()
def sample_latents(
    model: DiffusionModel, c: Conditioning, x_T: Tensor, sampling: Sampling, *, uncond: Conditioning | None = None
) -> Tensor:
    """x_0 (B, C, h, w) from x_T of unit variance under ``sampling``."""
    uncond = _with_uncond(model, sampling, uncond)
    if sampling.scheduler == "ddim":
        return ddim_run(model, c, x_T, sampling, uncond=uncond)
    if sampling.scheduler not in SCHEDULERS:
        raise UserError(f"unknown scheduler {sampling.scheduler!r}; known are {', '.join(SCHEDULERS)}")
    scheduler = model.sampler(sampling.scheduler)
    scheduler.set_timesteps(sampling.steps)
    x = x_T * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        eps = guided(model, x_in, t.to(x.device).expand(len(x)), c, uncond, sampling.guidance_scale)
        x = scheduler.step(eps, t, x).prev_sample
    return x


@torch.no_grad()
def sample(
    model: DiffusionModel,
    c: Conditioning,
    noise: Sequence[int] | Tensor,
    sampling: Sampling,
    *,
    uncond: Conditioning | None = None,
    batch_size: int = 32,
    workspace: Workspace | None = None,
) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] on the CPU, float32.

    ``noise`` are N seeds or initial latents (N, C, h, w) of unit variance; ``c`` has N rows or one.
    """
    uncond = _with_uncond(model, sampling, uncond)
    count = len(noise)
    pictures = []
    for start in (workspace or Workspace()).track(range(0, count, batch_size), "sampling"):
        rows = slice(start, min(start + batch_size, count))
        if isinstance(noise, Tensor):
            x_T = noise[rows].to(model.device)
        else:
            x_T = torch.cat([initial_noise(model, seed, sampling) for seed in noise[rows]])
        x_0 = sample_latents(model, c if len(c) == 1 else c[rows], x_T, sampling, uncond=uncond)
        pictures.append(model.decode(x_0).float().cpu())
    return torch.cat(pictures)


@torch.no_grad()
def generate(
    model: DiffusionModel,
    candidates: Sequence[Candidate],
    sampling: Sampling,
    *,
    batch_size: int = 32,
    workspace: Workspace | None = None,
) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] of N candidates on the CPU. Every distinct prompt, and the empty one, is embedded once.

    A candidate's ``states`` replace its encoded prompt, its ``latents`` the noise of its seed.
    """
    texts = list(dict.fromkeys(candidate.prompt for candidate in candidates if candidate.states is None))
    encoded = dict(zip(texts, embed_all(model, texts).states, strict=True)) if texts else {}
    states = [encoded[item.prompt] if item.states is None else item.states.to(model.device) for item in candidates]
    noise = torch.cat(
        [
            initial_noise(model, item.seed, sampling) if item.latents is None else item.latents[None].to(model.device)
            for item in candidates
        ]
    )
    return sample(model, Conditioning(torch.stack(states)), noise, sampling, batch_size=batch_size, workspace=workspace)


def finite(model: DiffusionModel, images: Tensor) -> Tensor:
    """The pictures. Raises UserError where one is not finite: as pixels it would be black, and a detector would see nothing."""
    broken = int((~torch.isfinite(images)).flatten(1).any(1).sum())
    if broken:
        raise UserError(
            f"{model.name} draws {broken} of {len(images)} pictures that are not finite; its weights or its precision overflow, "
            "try --dtype float32"
        )
    return images


def candidates_of(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Candidate, ...]:
    """Plain candidates, one per (prompt, seed)."""
    return tuple(Candidate(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True))


@torch.no_grad()
def embed_all(model: DiffusionModel, prompts: Sequence[str], batch_size: int = 64) -> Conditioning:
    """`embed` in pieces, so that thousands of prompts fit."""
    return Conditioning.cat(
        [model.embed(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    ).detach()


def by_guidance(scales: Sequence[float | None], batch_size: int = 32) -> list[list[int]]:
    """The places in ``scales`` in batches of one guidance each, at most ``batch_size`` together."""
    batches = []
    for scale in dict.fromkeys(scales):
        same = [i for i, other in enumerate(scales) if other == scale]
        batches += [same[start : start + batch_size] for start in range(0, len(same), batch_size)]
    return batches


def at_guidance(sampling: Sampling, guidance: float | None) -> Sampling:
    """``sampling`` with a prompt's own guidance, where it has one."""
    return sampling if guidance is None else replace(sampling, guidance_scale=guidance)
