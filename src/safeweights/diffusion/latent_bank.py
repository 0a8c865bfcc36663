"""A bank of noisy latents, drawn once and used for a whole run: exact (x_t, t) of sampling runs, or noised pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import add_noise, generator
from safeweights.diffusion.parallel import part
from safeweights.diffusion.sampling import embed_all, trajectory


@dataclass(frozen=True)
class Batch:
    """Rows of a bank on its device: ``x_t`` (B, C, h, w), ``t`` (B,), ``prompt`` (B,), and where in the bank they stand."""

    x_t: Tensor
    t: Tensor
    prompt: Tensor
    rows: Tensor
    outputs: Mapping[str, Tensor]
    """What the bank knows of these rows, by name."""

    @property
    def eps_none(self) -> Tensor:
        """The drawn-from model's unconditional prediction (banks of trajectories)."""
        return self.outputs["eps_none"]

    @property
    def eps_c(self) -> Tensor:
        """The drawn-from model's prediction under the row's prompt (banks of trajectories)."""
        return self.outputs["eps_c"]


@dataclass(frozen=True)
class LatentBank:
    """N rows (x_t, t, prompt). Kept on the CPU, handed out on ``device``.

    Memory: 4 C h w bytes a row and stored tensor, three of them for trajectories in float32; at SD size 64 kB each, so 64
    trajectories of 50 steps take 0.6 GB.
    """

    prompts: tuple[str, ...]
    x: Tensor
    """(N, C, h, w): the state the model is asked about …"""
    t: Tensor
    """(N,): … at exactly this timestep …"""
    prompt: Tensor
    """(N,): … under this one of ``prompts``."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """Values by name, one row per row of the bank."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.x)

    @classmethod
    def sample(
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
        """Run DDIM ``n`` times, the prompts in turn, and keep every state: n * steps rows, with "eps_none" and "eps_c".

        Latents have the model's native size. Costs 2 model calls a row. Drawn in batches that ``workspace`` keeps; a second
        run with the same model, prompts, settings and seed loads them. ``rng`` advances by one draw either way.
        """
        workspace = workspace or Workspace()
        seed = int(torch.randint(2**62, (), generator=rng))
        facts: dict[str, Any] = {
            "prompts": list(prompts), "n": n, "seed": seed, "steps": sampling.steps, "guidance": sampling.guidance_scale,
            "batch": batch_size, "model": fingerprint(model),
        }  # fmt: skip
        embedded: Any = None
        parts = []
        for start in workspace.track(range(0, n, batch_size), "drawing latents"):
            stored = workspace.load(f"{name}-{start}")
            if stored is None or stored[1] != facts:
                embedded = embedded or (embed_all(model, prompts), embed_all(model, [""]))
                runs = range(start, min(start + batch_size, n))
                noise = torch.stack([torch.randn(model.latent_shape, generator=generator(seed, run)) for run in runs])
                rows = torch.tensor([run % len(prompts) for run in runs])
                c = embedded[0][rows.to(model.device)]
                run = trajectory(model, c, noise.to(model.device), sampling, uncond=embedded[1])
                tensors = {"x": run.x, "eps_none": run.eps_none, "eps_c": run.eps_c}
                tensors = {key: value.flatten(0, 1).float().cpu() for key, value in tensors.items()}
                tensors |= {"t": run.t.cpu().repeat_interleave(len(rows)), "prompt": rows.repeat(len(run.t))}
                stored = tensors, facts
                workspace.save(f"{name}-{start}", *stored)
            parts.append(stored[0])
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        outputs = {key: whole[key] for key in ("eps_none", "eps_c")}
        return cls(tuple(prompts), whole["x"], whole["t"], whole["prompt"], outputs, model.device)

    @classmethod
    def draw_from(cls, model: DiffusionModel, prompts: Sequence[str], *, n: int, **options: Any) -> LatentBank:
        """`sample` with ``n`` runs for every prompt."""
        return cls.sample(model, prompts, n=n * len(prompts), **options)

    @classmethod
    def from_images(
        cls,
        model: DiffusionModel,
        images: Tensor,
        prompts: Sequence[str],
        *,
        n: int,
        rng: torch.Generator,
        batch_size: int = 32,
    ) -> LatentBank:
        """Noise pictures (N, 3, H, W) in [0, 1] as training does, ``n`` times each at timesteps spread evenly over [0, T).

        ``prompts`` holds one prompt per picture. The noise is kept as output "eps".
        """
        with torch.no_grad():
            pieces = [images[i : i + batch_size].to(model.device) for i in range(0, len(images), batch_size)]
            x_0 = torch.cat([model.encode(piece) for piece in pieces]).float().repeat_interleave(n, dim=0)
        steps = len(model.alpha)
        # One timestep in each of n strata of width T / n, for every picture.
        jitter = torch.rand((len(images), n), generator=rng)
        t = ((torch.arange(n) + jitter) * (steps / n)).long().clamp(max=steps - 1).flatten()
        eps = torch.randn(x_0.shape, generator=rng).to(model.device)
        x = add_noise(model, x_0, t.to(model.device), eps).cpu()
        distinct = list(dict.fromkeys(prompts))
        prompt = torch.tensor([distinct.index(text) for text in prompts]).repeat_interleave(n)
        return cls(tuple(distinct), x, t, prompt, {"eps": eps.cpu()}, model.device)

    def draw(self, batch: int, rng: torch.Generator, prompt_index: int | Tensor | None = None, *, parted: bool = False) -> Batch:
        """``batch`` exact pairs with replacement: prompts uniform (or the given one, or one given per row), then rows uniform.

        ``parted`` among several processes gives each its own of these rows, for a loss that is a mean over rows.
        """
        if prompt_index is None:
            known = torch.unique(self.prompt)
            chosen = known[torch.randint(len(known), (batch,), generator=rng)]
        else:
            chosen = torch.as_tensor(prompt_index).cpu().expand(batch)
        where = torch.rand(batch, generator=rng)
        rows = torch.empty(batch, dtype=torch.long)
        for index in torch.unique(chosen):
            held = (self.prompt == index).nonzero().flatten()
            if not len(held):
                raise IndexError(f"the bank holds no latents of prompt {int(index)}")
            mine = chosen == index
            rows[mine] = held[(where[mine] * len(held)).long()]
        return self.at(part(rows) if parted else rows)

    def at(self, rows: Tensor) -> Batch:
        """The given rows."""
        outputs = {key: value[rows].to(self.device) for key, value in self.outputs.items()}
        x_t, t, prompt = (tensor[rows].to(self.device) for tensor in (self.x, self.t, self.prompt))
        return Batch(x_t, t, prompt, rows, outputs)

    @classmethod
    def join(cls, banks: Sequence[LatentBank]) -> LatentBank:
        """The rows of all banks, with the outputs that all have; prompts follow one another, equal ones are not joined."""
        if len(banks) == 1:
            return banks[0]
        first = [sum(len(bank.prompts) for bank in banks[:i]) for i in range(len(banks))]
        shared = set.intersection(*(set(bank.outputs) for bank in banks))
        return cls(
            tuple(text for bank in banks for text in bank.prompts),
            torch.cat([bank.x for bank in banks]),
            torch.cat([bank.t.cpu() for bank in banks]),
            torch.cat([bank.prompt.cpu() + start for bank, start in zip(banks, first, strict=True)]),
            {name: torch.cat([bank.outputs[name].cpu() for bank in banks]) for name in sorted(shared)},
            banks[0].device,
        )

    @torch.no_grad()
    def precompute(
        self,
        name: str,
        value: Callable[[Batch], Tensor],
        *,
        batch_size: int = 32,
        workspace: Workspace | None = None,
    ) -> None:
        """Keep ``value(batch)`` of every row as output ``name``, so that a fixed teacher is asked once."""
        starts = (workspace or Workspace()).track(range(0, len(self), batch_size), name)
        parts = [value(self.at(torch.arange(i, min(i + batch_size, len(self))))).cpu() for i in starts]
        self.outputs[name] = torch.cat(parts)


def fingerprint(model: DiffusionModel) -> str:
    """A short hash of the head of every parameter: enough to tell two edits of one model apart, cheap at any size."""
    digest = hashlib.sha256(model.name.encode())
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:1024].double()
        digest.update(f"{name} {head.sum().item()!r} {head.square().sum().item()!r}".encode())
    return digest.hexdigest()[:16]
