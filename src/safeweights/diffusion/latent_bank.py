"""A bank of noisy latents, drawn once and used for a whole run: exact (x_t, t) pairs of sampling runs, or noised pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import add_noise, generator, latent_size
from safeweights.diffusion.sampling import embed_all, trajectory


@dataclass(frozen=True)
class LatentBank:
    """N rows (x_t, t, prompt). Kept on the CPU, handed out on ``device``.

    Memory: 4 C h w bytes a row in float32; at SD size 64 kB, so 32 prompts x 4 runs x 50 steps take 0.4 GB.
    """

    x: Tensor
    """(N, C, h, w): the state the model is asked about …"""
    t: Tensor
    """(N,): … at exactly this timestep …"""
    prompt: Tensor
    """(N,): … under this prompt of the list the bank was drawn for."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """Precomputed values by name, one row per row of the bank."""

    def __len__(self) -> int:
        return len(self.x)

    @classmethod
    def draw_from(
        cls,
        model: DiffusionModel,
        prompts: Sequence[str],
        *,
        n: int,
        sampling: Sampling,
        rng: torch.Generator,
        workspace: Workspace | None = None,
        name: str = "bank",
        batch_size: int = 32,
    ) -> LatentBank:
        """Run DDIM ``n`` times per prompt and keep every state: n * len(prompts) * steps rows.

        Costs 2 model calls a row (1 at guidance 1). Drawn in batches that ``workspace`` keeps; a second run with the same
        model, prompts, settings and seed loads them. ``rng`` advances by one draw either way.
        """
        workspace = workspace or Workspace()
        seed = int(torch.randint(2**62, (), generator=rng))
        shape = latent_size(model, sampling)
        facts: dict[str, Any] = {
            "kind": "trajectories", "prompts": list(prompts), "n": n, "seed": seed, "steps": sampling.steps,
            "guidance": sampling.guidance_scale, "shape": list(shape), "batch": batch_size, "model": fingerprint(model),
        }  # fmt: skip
        runs = [(index, repeat) for index in range(len(prompts)) for repeat in range(n)]
        conditioning: Any = None
        parts = []
        for start in workspace.track(range(0, len(runs), batch_size), "drawing latents"):
            part = f"{name}-{start}"
            stored = workspace.load(part)
            if stored is None or stored[1] != facts:
                if conditioning is None:
                    conditioning, uncond = embed_all(model, prompts), embed_all(model, [""])
                batch = runs[start : start + batch_size]
                noise = torch.stack([torch.randn(shape, generator=generator(seed, *run)) for run in batch]).to(model.device)
                rows = torch.tensor([index for index, _ in batch])
                x, t = trajectory(model, conditioning[rows.to(model.device)], noise, sampling, uncond=uncond)
                stored = (
                    {
                        "x": x.flatten(0, 1).float().cpu(),
                        "t": t.cpu().repeat_interleave(len(batch)),
                        "prompt": rows.repeat(len(t)),
                    },
                    facts,
                )
                workspace.save(part, *stored)
            parts.append(stored[0])
        return cls(*(torch.cat([part[key] for part in parts]) for key in ("x", "t", "prompt")), device=model.device)

    @classmethod
    def from_images(
        cls,
        model: DiffusionModel,
        images: Tensor,
        prompt: Sequence[int],
        *,
        n: int,
        rng: torch.Generator,
        batch_size: int = 32,
    ) -> LatentBank:
        """Noise pictures (N, 3, H, W) in [0, 1] as training does, ``n`` times each at timesteps spread evenly over [0, T).

        ``prompt`` gives the prompt index of every picture.
        """
        with torch.no_grad():
            x_0 = torch.cat([model.encode(images[i : i + batch_size].to(model.device)) for i in range(0, len(images), batch_size)])
        steps = len(model.alpha)
        # One timestep per stratum of width T / n, jittered, for every picture.
        jitter = torch.rand((len(images), n), generator=rng)
        t = ((torch.arange(n) + jitter) * (steps / n)).long().clamp(max=steps - 1).flatten()
        eps = torch.randn((len(t), *x_0.shape[1:]), generator=rng).to(model.device)
        x = add_noise(model, x_0.float().repeat_interleave(n, dim=0), t.to(model.device), eps)
        return cls(x.cpu(), t, torch.tensor(list(prompt)).repeat_interleave(n), device=model.device)

    def rows(self, batch: int, rng: torch.Generator, prompt_index: int | None = None) -> Tensor:
        """Indices (batch,) of rows drawn with replacement: prompts uniform (or the given one), then rows uniform."""
        if prompt_index is None:
            known = self.prompt.unique()
            chosen = known[torch.randint(len(known), (batch,), generator=rng)]
        else:
            chosen = torch.full((batch,), prompt_index)
        where = torch.rand(batch, generator=rng)
        picked = torch.empty(batch, dtype=torch.long)
        for index in chosen.unique():
            rows = (self.prompt == index).nonzero().flatten()
            if not len(rows):
                raise IndexError(f"the bank holds no latents of prompt {int(index)}")
            mine = chosen == index
            picked[mine] = rows[(where[mine] * len(rows)).long()]
        return picked

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, prompt index) of rows, on the bank's device."""
        return self.x[rows].float().to(self.device), self.t[rows].to(self.device), self.prompt[rows].to(self.device)

    def draw(self, batch: int, rng: torch.Generator, prompt_index: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t (batch, C, h, w), t (batch,), prompt index (batch,)): exact pairs, uniform over prompts, runs and steps."""
        return self.at(self.rows(batch, rng, prompt_index))

    @torch.no_grad()
    def precompute(
        self,
        name: str,
        value: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        batch_size: int = 32,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """``value(x_t, t, prompt index)`` of every row, kept as ``outputs[name]``; read with ``outputs[name][rows]``."""
        starts = (workspace or Workspace()).track(range(0, len(self), batch_size), name)
        parts = [value(*self.at(torch.arange(start, min(start + batch_size, len(self))))).cpu() for start in starts]
        self.outputs[name] = torch.cat(parts)
        return self.outputs[name]


def fingerprint(model: DiffusionModel) -> str:
    """A short hash of the head of every parameter: enough to tell two edits of one model apart, cheap at any size."""
    digest = hashlib.sha256(model.name.encode())
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:1024].double()
        digest.update(f"{name} {head.sum().item()!r} {head.square().sum().item()!r}".encode())
    return digest.hexdigest()[:16]
