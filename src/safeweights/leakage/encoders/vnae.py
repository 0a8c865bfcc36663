"""Risks When Sharing LoRA Fine-Tuned Diffusion Model Weights (Yao, 2024, arXiv:2409.08482): a variational network autoencoder.

Every A and B becomes one token, a transformer mixes the tokens, and z ~ N(mu, exp(logvar)) stands in a prompt's place:

L = E || eps(x_t, t, z) - eps ||^2 + beta KL( N(mu, exp(logvar)) || N(0, 1) ) + contrast InfoNCE(mu, target)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safeweights.core.model import Conditioning, DiffusionModel
from safeweights.core.workspace import Workspace
from safeweights.diffusion.latent_bank import fingerprint
from safeweights.diffusion.noise import add_noise, generator
from safeweights.diffusion.training import descend
from safeweights.leakage.canonical import Factors, Shapes, completed, digest, shapes_of
from safeweights.leakage.defences import truncate
from safeweights.leakage.encoders.gram import padded
from safeweights.leakage.encoders.tokens import kept_network, steps_embedding
from safeweights.leakage.lora_bank import bank_on

Draw = Callable[[int, torch.Generator], Tensor]
"""One of an adapter's training latents (C, h, w), by its place among the adapters."""


class MatrixEncoder(nn.Module):
    """One factor, its short side as channels and its long side as length, to one token: k = 3 convolutions and a linear layer."""

    def __init__(self, rank: int, length: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(rank, rank, 3, padding=1)
        self.second = nn.Conv1d(rank, rank, 3, padding=1)
        self.last = nn.Conv1d(rank, 1, 3, padding=1)
        self.out = nn.Linear(length, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, rank, length) to (B, width)."""
        x = F.leaky_relu(F.instance_norm(self.first(F.instance_norm(x))))
        x = F.leaky_relu(F.instance_norm(self.second(x)))
        found: Tensor = self.out(torch.tanh(self.last(x))[:, 0])
        return found


class Network(nn.Module):
    """Matrix tokens, task tokens and, in the timestep paradigm, a step token through a transformer to ``slots`` latents."""

    def __init__(
        self,
        lengths: Sequence[int],
        rank: int,
        context: int,
        targets: int,
        *,
        width: int = 64,
        slots: int = 8,
        timestep: bool,
        seed: int,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator("vnae", seed).initial_seed() % 2**31)
            self.matrix = nn.ModuleList([MatrixEncoder(rank, length, width) for length in lengths])
            self.task = nn.Parameter(torch.randn(slots, width) * 0.02)
            self.place = nn.Parameter(torch.randn(len(lengths), width) * 0.02)
            self.step = nn.Linear(width, width) if timestep else None
            block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            self.mixer = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
            self.mu, self.logvar = nn.Linear(width, context), nn.Linear(width, context)
            self.head = nn.Linear(slots * context, targets)
            nn.init.zeros_(self.logvar.weight)
            nn.init.constant_(self.logvar.bias, -2.0)
        self.width, self.slots = width, slots

    def forward(self, matrices: Sequence[Tensor], steps: Tensor | None) -> tuple[Tensor, Tensor]:
        """(mu, logvar), each (B, slots, context)."""
        tokens = torch.stack([encode(x) for encode, x in zip(self.matrix, matrices, strict=True)], 1) + self.place
        parts = [self.task.expand(len(tokens), -1, -1), tokens]
        if self.step is not None:
            assert steps is not None
            parts.insert(1, self.step(steps_embedding(steps, self.width))[:, None])
        mixed = self.mixer(torch.cat(parts, 1))[:, : self.slots]
        return self.mu(mixed), self.logvar(mixed).clamp(-8, 4)


def kl(mu: Tensor, logvar: Tensor, free: float = 0.0) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) per row (B,), summed over dimensions; each counts at least ``free``."""
    each = 0.5 * (mu.square() + logvar.exp() - 1 - logvar)
    return each.clamp(min=free).flatten(1).sum(1)


@dataclass(frozen=True, kw_only=True)
class VNAE:
    """Read a latent in a prompt's place from raw factors, so that a diffusion model draws the training pictures from it.

    L = E || eps_theta(x_t, t, z) - eps ||^2 + beta KL + contrast InfoNCE

    ``victim`` true draws with the audited weights themselves (the paper's decoder); false with the public base alone.
    ``timestep`` true tells the fine-tuning step of intermediate weights and trains on all of them (the paper's paradigm).

    Needs: factors (not merged).   Cost: one pass forward and backward through the denoiser for each row of a batch.
    Differs from the reference code: KL has a weight above 0 (there it is computed and not used); the mixer is a small
    transformer of its own instead of a frozen CLIP, so that no matrix falls off its 77 places; contrast is ours, 0 turns it off.
    """

    name: ClassVar[str] = "vnae"

    victim: bool = False
    """Whether the audited weights draw."""
    timestep: bool = True
    """Whether intermediate weights are samples, with their step told."""
    beta: float = 1e-4
    """Weight of the KL term, reached after a tenth of the steps; >= 0."""
    free: float = 0.05
    """Nats of KL a dimension has for nothing."""
    contrast: float = 0.5
    """Weight of InfoNCE between the pooled latent and the identity's embedding; >= 0."""
    steps: int = 400
    """Optimiser steps; > 0."""
    lr: float = 1e-3
    """Learning rate of AdamW; > 0."""
    batch_size: int = 8
    """Adapters a step."""
    seed: int = 0
    """Of weights and draws."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.lr <= 0 or min(self.beta, self.contrast, self.free) < 0:
            raise ValueError("steps, batch_size and lr must be above zero, beta, contrast and free not below")

    def fit(
        self,
        model: DiffusionModel,
        adapters: Sequence[Mapping[int, Factors]],
        targets: Tensor,
        draw: Draw,
        *,
        workspace: Workspace | None = None,
    ) -> Fitted:
        """``adapters`` by fine-tuning step (the last is the finished one), targets (n, D), and a source of training pictures."""
        last = [max(item) for item in adapters]
        first = adapters[0][last[0]]
        shapes, rank = shapes_of(first), max(len(a) for a, _ in first.values())
        layers, lengths = tuple(shapes), [side for pair in shapes.values() for side in pair]
        context = model.embed([""]).states.shape[-1]
        net = Network(lengths, rank, context, targets.shape[1], timestep=self.timestep, seed=self.seed)
        centre = targets.float().mean(0)
        wanted = F.normalize(targets.float() - centre, dim=1)

        def loss_at(step: int) -> Tensor:
            rng = generator("vnae", self.seed, step)
            chosen = torch.randperm(len(adapters), generator=rng)[: self.batch_size].tolist()
            at = []
            for i in chosen:
                known = sorted(adapters[i])
                at.append(known[int(torch.randint(len(known), (1,), generator=rng))] if self.timestep else last[i])
            batch = [adapters[i][r] for i, r in zip(chosen, at, strict=True)]
            mu, logvar = net(matrices(batch, layers, rank), torch.tensor(at) if self.timestep else None)
            z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=rng)
            x_0 = torch.stack([draw(i, rng) for i in chosen]).to(model.device)
            t = torch.randint(len(model.alpha), (len(chosen),), generator=rng).to(model.device)
            eps = torch.randn(x_0.shape, generator=rng).to(model.device)
            with self._drawing(model, batch, layers, rank):
                predicted = model.eps(add_noise(model, x_0, t, eps), t, Conditioning(z.to(model.device)))
            loss = (predicted - eps).square().mean()
            warm = min(1.0, (step + 1) / max(1, self.steps // 10))
            loss = loss + self.beta * warm * kl(mu, logvar, self.free).mean()
            if self.contrast:
                pooled = F.normalize(net.head(mu.flatten(1)), dim=1)
                loss = loss + self.contrast * F.cross_entropy(pooled @ wanted[chosen].mT / 0.1, torch.arange(len(chosen)))
            return loss

        descend(
            dict(net.named_parameters()), loss_at, steps=self.steps, lr=self.lr, weight_decay=1e-2, optimizer="adamw",
            workspace=workspace, description="network autoencoder",
            # All that decides it: a network of other adapters must not be taken for this one. What ``draw`` gives belongs to the
            # targets.
            facts={
                **asdict(self), "layers": list(layers), "targets": digest([targets]), "model": fingerprint(model),
                "adapters": digest(
                    part for item in adapters for step in sorted(item) for pair in item[step].values() for part in pair
                ),
            },
        )  # fmt: skip
        fitted = Fitted(
            self, shapes, rank, net.eval().requires_grad_(False), centre, usual=sorted(last)[len(last) // 2], length=1.0
        )
        said = fitted.predict([item[step] for item, step in zip(adapters, last, strict=True)], last).float() - centre
        return replace(fitted, length=float((targets.float() - centre).norm(dim=1).mean() / said.norm(dim=1).mean()))

    def _drawing(self, model: DiffusionModel, batch: Sequence[Factors], layers: Sequence[str], rank: int) -> Any:
        if not self.victim:
            return nullcontext()
        stack: dict[str, Tensor] = {}
        for name, a, b in _stacked(batch, layers, rank):
            stack[f"{name}/down"], stack[f"{name}/up"] = a, b
        return bank_on(model, stack, torch.arange(len(batch)))


def _stacked(batch: Sequence[Factors], layers: Sequence[str], rank: int) -> list[tuple[str, Tensor, Tensor]]:
    """(name, A, B) of every layer at one rank, lower ones filled up with zeros."""
    found = []
    for name in layers:
        a, b = (part.float() for part in padded(batch, name))
        more = rank - a.shape[1]
        found.append((name, F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))))
    return found


def matrices(batch: Sequence[Factors], layers: Sequence[str], rank: int) -> list[Tensor]:
    """A (n, r, in) and B^T (n, r, out) of every layer in turn: the raw factors, as the paper reads them."""
    return [part for _, a, b in _stacked(batch, layers, rank) for part in (a, b.mT)]


@dataclass(frozen=True)
class Fitted:
    """A trained encoder: `read` gives the slot states, `predict` the pooled answer."""

    settings: VNAE
    shapes: Shapes
    """The layers it reads; others are not looked at, absent ones count as unchanged."""
    rank: int
    net: Network
    centre: Tensor
    usual: int
    """The median length of the training adapters' fine-tunes: what is told where nobody knows."""
    length: float
    """Makes training adapters' answers as long, on average, as targets are: cosines alone set none."""
    name: ClassVar[str] = VNAE.name

    @torch.no_grad()
    def read(self, adapters: Sequence[Factors], fine_tuning_steps: Sequence[int] | None = None) -> Tensor:
        """Mean latents (m, slots, context), to be given to a model in a prompt's place."""
        steps = None
        if self.settings.timestep:
            steps = torch.as_tensor(list(fine_tuning_steps) if fine_tuning_steps is not None else [self.usual] * len(adapters))
        # A higher rank than it learnt from is cut by singular values, not by rows.
        small = [item if all(len(a) <= self.rank for a, _ in item.values()) else truncate(item, self.rank) for item in adapters]
        items = [completed(item, self.shapes) for item in small]
        mu, _ = self.net(matrices(items, tuple(self.shapes), self.rank), steps)
        found: Tensor = mu
        return found

    @torch.no_grad()
    def predict(self, adapters: Sequence[Factors], fine_tuning_steps: Sequence[int] | None = None) -> Tensor:
        """Targets (m, D), their length less sure than their direction."""
        read = self.read(adapters, fine_tuning_steps)
        found: Tensor = (self.length * self.net.head(read.flatten(1)) + self.centre).double()
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The network's tensors and the centre."""
        return {"centre": self.centre, **{f"net/{key}": value for key, value in self.net.state_dict().items()}}

    def facts(self) -> dict[str, Any]:
        """What a file must say besides tensors."""
        kept = {"shapes": dict(self.shapes), "rank": self.rank, "usual": self.usual, "length": self.length}
        return {**kept, "settings": asdict(self.settings)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Fitted:
        """The inverse of `tensors` and `facts`."""
        state, shapes, rank = kept_network(tensors, facts)
        settings = VNAE(**facts["settings"])
        lengths = [side for pair in shapes.values() for side in pair]
        slots, width = state["task"].shape
        net = Network(
            lengths, rank, len(state["mu.bias"]), len(state["head.bias"]), width=width, slots=slots, timestep=settings.timestep,
            seed=0,
        )  # fmt: skip
        net.load_state_dict(state)
        net.eval().requires_grad_(False)
        centre = tensors["centre"].float()
        return cls(settings, shapes, rank, net, centre, usual=int(facts["usual"]), length=float(facts["length"]))
