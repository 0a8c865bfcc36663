"""Pictures of what an encoder says, drawn by the public base model: no weight of the audited adapter is in it.

z -> a few vectors in the place of a prompt's text states -> the frozen base model. What such pictures show of a person can only
have come from the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safeweights.core.model import Conditioning, DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import add_noise, generator
from safeweights.diffusion.sampling import sample
from safeweights.diffusion.training import descend


class Slot(nn.Module):
    """z (B, D) to text states (B, tokens, width); standardises z first. A row of NaN is the unconditional slot."""

    centre: Tensor
    spread: Tensor

    def __init__(self, size: int, width: int, tokens: int = 8, hidden: int = 192, *, seed: int = 0) -> None:
        super().__init__()
        self.tokens, self.width = tokens, width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator("slot", seed).initial_seed() % 2**31)
            self.body = nn.Sequential(nn.Linear(size, hidden), nn.SiLU(), nn.Linear(hidden, tokens * width))
        self.empty = nn.Parameter(torch.zeros(tokens, width))
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))

    def forward(self, z: Tensor) -> Tensor:
        absent = z.isnan().any(1)
        scaled = (z.nan_to_num() - self.centre) / self.spread
        states = self.body(scaled).view(len(z), self.tokens, self.width)
        return torch.where(absent[:, None, None], self.empty[None].to(states.dtype), states)


@dataclass(frozen=True)
class Taught:
    """What a slot learns from: latents x_0 (N, C, h, w) and, for each, the place of its subject among ``z`` (P, D)."""

    x_0: Tensor
    subject: Tensor
    z: Tensor
    noise: Tensor
    """(D,), how far encoders are off: z is shaken by that much, so that the slot takes their mistakes for what they are."""


def teach(
    model: DiffusionModel,
    taught: Taught,
    *,
    steps: int = 800,
    lr: float = 1e-3,
    batch_size: int = 8,
    dropout: float = 0.1,
    seed: int = 0,
    workspace: Workspace | None = None,
) -> Slot:
    """Fit a slot: min E || eps_base(x_t, t, slot(z + noise)) - eps ||^2, the base model frozen; some rows are without z."""
    width = model.embed([""]).states.shape[-1]
    slot = Slot(taught.z.shape[1], width, seed=seed)
    slot.centre.copy_(taught.z.mean(0))
    slot.spread.copy_(taught.z.std(0).clamp(min=1e-6))
    with torch.no_grad():
        # From the empty prompt's states, which the model knows how to read.
        slot.empty.copy_(model.embed([""]).states[0, : slot.tokens].float())
    slot.to(model.device)

    def loss_at(step: int) -> Tensor:
        rng = generator("slot", seed, step)
        rows = torch.randint(len(taught.x_0), (batch_size,), generator=rng)
        z = taught.z[taught.subject[rows]].float()
        z = z + taught.noise * torch.randn(z.shape, generator=rng)
        z[torch.rand(batch_size, generator=rng) < dropout] = float("nan")
        x_0 = taught.x_0[rows].to(model.device)
        t = torch.randint(len(model.alpha), (batch_size,), generator=rng).to(model.device)
        eps = torch.randn(x_0.shape, generator=rng).to(model.device)
        predicted = model.eps(add_noise(model, x_0, t, eps), t, Conditioning(slot(z.to(model.device))))
        return (predicted - eps).square().mean()

    descend(
        dict(slot.named_parameters()), loss_at, steps=steps, lr=lr, workspace=workspace, description="teaching the generator",
        facts={
            "batch": batch_size, "dropout": dropout, "seed": seed, "pictures": len(taught.x_0),
            "z": float(taught.z.double().abs().sum()),
        },
    )  # fmt: skip
    return slot.requires_grad_(False)


@torch.no_grad()
def reconstruct(
    model: DiffusionModel,
    slot: Slot,
    z: Tensor,
    *,
    n: int = 4,
    steps: int = 10,
    guidance: float = 2.0,
    seed: int = 0,
    workspace: Workspace | None = None,
) -> Tensor:
    """n pictures (N, n, 3, H, W) in [0, 1] for each z (N, D); the same noises for every z."""
    rng = generator("reconstructions", seed)
    noise = torch.randn((n, *model.latent_shape), generator=rng).repeat(len(z), 1, 1, 1)
    states = slot(z.float().to(model.device).repeat_interleave(n, 0))
    empty = Conditioning(slot(torch.full_like(z[:1], float("nan")).float().to(model.device)))
    sampling = Sampling(steps=steps, guidance_scale=guidance)
    pictures = sample(model, Conditioning(states), noise, sampling, uncond=empty, workspace=workspace)
    return pictures.view(len(z), n, *pictures.shape[1:])


def slot_of(tensors: Mapping[str, Tensor]) -> Slot:
    """A slot from its tensors."""
    hidden, size = tensors["body.0.weight"].shape
    tokens, width = tensors["empty"].shape
    slot = Slot(size, width, tokens, hidden)
    slot.load_state_dict({key: value.float() for key, value in tensors.items()})
    return slot.requires_grad_(False)
