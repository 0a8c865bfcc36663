"""E2: a small transformer over canonical tokens, one for each layer and singular direction (as in W2T, arXiv:2603.15990).

A singular pair (u, v) is known up to one common sign; tokens are phi(u, v) + phi(-u, -v), which knows none (Lim et al., 2022,
arXiv:2202.13013).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import generator
from safeweights.diffusion.training import descend
from safeweights.leakage.canonical import Factors, Shapes, canonical, completed, digest, shapes_of
from safeweights.leakage.encoders.gram import padded


def steps_embedding(steps: Tensor, width: int) -> Tensor:
    """Sinusoids (B, width) of fine-tuning steps (B,): the timestep of the timestep paradigm, not a diffusion time."""
    half = width // 2
    frequency = torch.exp(-torch.arange(half) * (torch.log(torch.tensor(1e3)) / half))
    angle = steps.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def kept_network(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> tuple[dict[str, Tensor], Shapes, int]:
    """Of a kept encoder: its network's state, the shapes of the layers it reads, and their rank."""
    state = {key.removeprefix("net/"): value.float() for key, value in tensors.items() if key.startswith("net/")}
    shapes = {name: (int(width), int(out)) for name, (width, out) in facts["shapes"].items()}
    return state, shapes, int(facts["rank"])


class Mixer(nn.Module):
    """Layer tokens (B, layers, rank, out + in) to targets: a hidden layer each, embeddings, two transformer layers."""

    def __init__(self, sizes: Sequence[int], rank: int, targets: int, *, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator("token encoder", seed).initial_seed() % 2**31)
            self.into = nn.ModuleList([nn.Linear(size, width) for size in sizes])
            self.even = nn.ModuleList([nn.Linear(width, width) for _ in sizes])
            self.layer = nn.Parameter(torch.randn(len(sizes), 1, width) * 0.02)
            self.place = nn.Parameter(torch.randn(1, rank, width) * 0.02)
            self.strength = nn.Linear(1, width)
            self.step = nn.Linear(width, width)
            block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=True)
            self.body = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
            self.out = nn.Linear(width, targets)
        self.width = width

    def forward(self, u: Sequence[Tensor], s: Tensor, steps: Tensor | None = None) -> Tensor:
        """u: per layer (B, rank, out + in), pairs; s (B, layers, rank), log strengths; steps (B,) or None without them."""
        parts = [even(F.silu(linear(x)) + F.silu(linear(-x))) for linear, even, x in zip(self.into, self.even, u, strict=True)]
        x = torch.stack(parts, 1) + self.layer + self.place + self.strength(s[..., None])
        x = x.flatten(1, 2)
        if steps is not None:
            x = torch.cat([self.step(steps_embedding(steps, self.width))[:, None], x], 1)
        found: Tensor = self.out(self.body(x).mean(1))
        return found


@dataclass(frozen=True)
class Prepared:
    """Canonical tokens of n adapters: ``u`` per layer (n, rank, out + in), ``s`` (n, layers, rank)."""

    u: tuple[Tensor, ...]
    s: Tensor

    def rows(self, index: Tensor) -> Prepared:
        """Some of the adapters."""
        return Prepared(tuple(part[index] for part in self.u), self.s[index])

    def scales(self) -> Tensor:
        """Root mean square of every layer's tokens (layers,)."""
        return torch.stack([part.square().mean().sqrt().clamp(min=1e-12) for part in self.u])

    def over(self, scales: Tensor) -> Prepared:
        """Tokens divided by those of their layer."""
        return Prepared(tuple(part / scale for part, scale in zip(self.u, scales, strict=True)), self.s)


def prepare(adapters: Sequence[Factors], layers: Sequence[str], rank: int) -> Prepared:
    """(U, V) sqrt(S) and log S of every layer, lower ranks filled up with zeros."""
    us, ss = [], []
    for name in layers:
        token = canonical(*padded(adapters, name))
        scaled = (torch.cat([token.u, token.v], 1) * token.s.sqrt()[:, None]).mT.float()[:, :rank]
        us.append(F.pad(scaled, (0, 0, 0, rank - scaled.shape[1])))
        s = token.s.float()[:, :rank]
        ss.append(F.pad(s, (0, rank - s.shape[1])).clamp(min=1e-6).log())
    return Prepared(tuple(us), torch.stack(ss, 1))


@dataclass(frozen=True)
class Tokens:
    """Fit by cosine and InfoNCE to the targets.

    Needs: factors or merged updates.   Cost: one small transformer pass over layers * rank tokens.
    """

    name: ClassVar[str] = "tokens"
    shapes: Shapes
    """The layers it reads; others are not looked at, absent ones count as unchanged."""
    rank: int
    net: Mixer
    centre: Tensor
    scales: Tensor
    """Root mean square of the training adapters' tokens, by layer: an answer must not depend on who else is asked."""
    usual: int | None
    """The median fine-tuning step it learnt from, told where nobody knows; None without the timestep paradigm."""
    length: float
    """Makes training adapters' answers as long, on average, as targets are: cosines alone set none."""

    @classmethod
    def fit(
        cls,
        adapters: Sequence[Factors],
        targets: Tensor,
        *,
        fine_tuning_steps: Sequence[int] | None = None,
        subjects: Sequence[int] | None = None,
        steps: int = 300,
        lr: float = 1e-3,
        batch_size: int = 32,
        seed: int = 0,
        workspace: Workspace | None = None,
    ) -> Tokens:
        """``fine_tuning_steps`` (n) turns the timestep paradigm on; ``subjects`` (n) tells which adapters are of one identity."""
        shapes = shapes_of(adapters[0])
        rank = max(len(a) for a, _ in adapters[0].values())
        ready, centre = prepare(adapters, tuple(shapes), rank), targets.float().mean(0)
        scales = ready.scales()
        ready = ready.over(scales)
        wanted = F.normalize(targets.float() - centre, dim=1)
        who = torch.as_tensor(list(subjects) if subjects is not None else list(range(len(adapters))))
        told = torch.as_tensor(list(fine_tuning_steps)) if fine_tuning_steps is not None else None
        net = Mixer([part.shape[-1] for part in ready.u], rank, targets.shape[1], seed=seed)
        net.train()

        def loss_at(step: int) -> Tensor:
            rng = generator("token encoder", seed, step)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rng.initial_seed() % 2**31)
                rows = torch.randint(len(adapters), (min(batch_size, len(adapters)),), generator=rng)
                part = ready.rows(rows)
                out = net(part.u, part.s, None if told is None else told[rows])
            out = F.normalize(out, dim=1)
            cosine = 1 - (out * wanted[rows]).sum(1).mean()
            logits = out @ wanted[rows].mT / 0.1
            same = (who[rows][:, None] == who[rows][None]).float()
            contrast = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
            return cosine + 0.5 * contrast

        descend(
            dict(net.named_parameters()), loss_at, steps=steps, lr=lr, weight_decay=1e-2, optimizer="adamw", workspace=workspace,
            description="token encoder",
            facts={
                "seed": seed, "batch": batch_size, "layers": list(shapes), "targets": digest([targets]),
                "adapters": digest([*ready.u, ready.s]), "told": digest([told] if told is not None else []), "who": digest([who]),
            },
        )  # fmt: skip
        net.eval().requires_grad_(False)
        length = (targets.float() - centre).norm(dim=1).mean() / net(ready.u, ready.s, told).norm(dim=1).mean()
        usual = None if told is None else int(told.median())
        return cls(shapes, rank, net, centre, scales, usual, float(length))

    @torch.no_grad()
    def predict(self, adapters: Sequence[Factors], fine_tuning_steps: Sequence[int] | None = None) -> Tensor:
        """Targets (m, D), their length less sure than their direction; ``fine_tuning_steps`` for an encoder fitted with them."""
        items = [completed(item, self.shapes) for item in adapters]
        ready = prepare(items, tuple(self.shapes), self.rank).over(self.scales)
        steps = None
        if self.usual is not None:
            steps = torch.as_tensor(list(fine_tuning_steps) if fine_tuning_steps is not None else [self.usual] * len(adapters))
        found: Tensor = (self.length * self.net(ready.u, ready.s, steps) + self.centre).double()
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The network's tensors, the centre and the scales."""
        return {"centre": self.centre, "scales": self.scales, **{f"net/{key}": x for key, x in self.net.state_dict().items()}}

    def facts(self) -> dict[str, Any]:
        """What a file must say besides tensors."""
        return {"shapes": dict(self.shapes), "rank": self.rank, "usual": self.usual, "length": self.length}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Tokens:
        """The inverse of `tensors` and `facts`."""
        state, shapes, rank = kept_network(tensors, facts)
        net = Mixer([width + out for width, out in shapes.values()], rank, len(state["out.bias"]))
        net.load_state_dict(state)
        net.eval().requires_grad_(False)
        parts = tensors["centre"].float(), tensors["scales"].float()
        usual = None if facts["usual"] is None else int(facts["usual"])
        return cls(shapes, rank, net, *parts, usual, float(facts["length"]))
