"""Was this very picture trained on? The loss it has with the adapter, calibrated by the loss it has without.

score(x) = mean over fixed (t, eps) of  L_base(x) - L_adapted(x)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeweights.core.intervals import wilson
from safeweights.core.model import Conditioning, DiffusionModel
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import add_noise, generator
from safeweights.leakage.canonical import Factors, phi_of
from safeweights.leakage.lora_bank import bank_on, stack_of
from safeweights.leakage.metrics import auc, tpr_at
from safeweights.records.record import Measurement


@dataclass(frozen=True)
class Losses:
    """Noise-prediction losses of n pictures (n,) without and with an adapter."""

    base: Tensor
    adapted: Tensor

    @property
    def scores(self) -> Tensor:
        """How much better the adapter knows each picture than the base model does."""
        return self.base - self.adapted


@torch.no_grad()
def losses(
    model: DiffusionModel,
    adapter: Factors,
    x_0: Tensor,
    c: Conditioning,
    *,
    levels: int = 8,
    seed: int = 0,
    batch_size: int = 32,
    workspace: Workspace | None = None,
) -> Losses:
    """Losses of latents x_0 (n, C, h, w) under c (one row) at ``levels`` timesteps, with the same noises for all pictures."""
    rng = generator("membership", seed)
    t = torch.linspace(0.1, 0.9, levels).mul(len(model.alpha)).long()
    noise = torch.randn((levels, *x_0.shape[1:]), generator=rng)
    rows = torch.arange(len(x_0)).repeat_interleave(levels)
    ts, eps = t.repeat(len(x_0)).to(x_0.device), noise.repeat(len(x_0), 1, 1, 1).to(x_0.device)
    stack = stack_of([phi_of(adapter)]) if len({len(a) for a, _ in adapter.values()}) == 1 else _padded(adapter)
    found: list[list[Tensor]] = [[], []]
    for start in (workspace or Workspace()).track(range(0, len(rows), batch_size), "membership"):
        part = slice(start, start + batch_size)
        x_t = add_noise(model, x_0[rows[part]], ts[part], eps[part])
        found[0].append((model.eps(x_t, ts[part], c) - eps[part]).square().flatten(1).mean(1))
        with bank_on(model, stack, torch.zeros(len(x_t), dtype=torch.long)):
            found[1].append((model.eps(x_t, ts[part], c) - eps[part]).square().flatten(1).mean(1))
    base, adapted = (torch.cat(part).float().cpu().view(len(x_0), levels).mean(1) for part in found)
    return Losses(base, adapted)


def _padded(adapter: Factors) -> dict[str, Tensor]:
    return {f"{name}/{end}": part[None] for name, pair in adapter.items() for end, part in zip(("down", "up"), pair, strict=True)}


@dataclass(frozen=True)
class Membership:
    """Members against non-members of one adapter, or pooled over several."""

    members: int
    others: int
    auc: float
    auc_interval: tuple[float, float]
    base_auc: float
    """The same by the base model's loss alone; away from 0.5 the two pools differ and the test proves nothing."""
    base_interval: tuple[float, float]
    hits: int
    fpr: float

    @property
    def tpr(self) -> float:
        """Share of the members found where at most 1 % of the non-members are."""
        return self.hits / self.members

    @property
    def fair(self) -> bool:
        """Whether the base model tells the pools apart no better than by chance."""
        return self.base_interval[0] <= 0.5 <= self.base_interval[1]

    def measurements(self) -> list[Measurement]:
        """Ready for a record."""
        why = "" if self.others >= 100 else f"with {self.others} non-members the false-positive rate is {self.fpr:.0%} at best"
        return [
            Measurement(name="membership_auc", value=self.auc, n=self.members, interval=self.auc_interval, better="lower"),
            Measurement(
                name="membership_tpr_at_1pct_fpr", value=self.tpr, n=self.members, interval=wilson(self.hits, self.members),
                better="lower", why=why,
            ),
            Measurement(name="membership_auc_base_only", value=self.base_auc, n=self.members, interval=self.base_interval),
        ]  # fmt: skip


def judge(members: Sequence[Losses], others: Sequence[Losses], *, seed: int = 0, resamples: int = 1000) -> Membership:
    """The test over adapters: one entry of members and of non-members for each, compared within the adapter.

    Scores are centred by the adapter's non-members before pooling; intervals are bootstrapped over adapters where there are
    several, over pictures where there is one.
    """
    pools = []
    for inside, outside in zip(members, others, strict=True):
        level, width = outside.scores.mean(), outside.scores.std(unbiased=False).clamp(min=1e-12)
        pools.append(((inside.scores - level) / width, (outside.scores - level) / width, -inside.base, -outside.base))
    whole = [torch.cat([pool[i] for pool in pools]) for i in range(4)]
    hits, fpr = tpr_at(whole[0], whole[1])
    rng = generator("membership intervals", seed)
    draws: list[list[float]] = [[], []]
    for _ in range(resamples):
        if len(pools) > 1:
            chosen = [pools[int(i)] for i in torch.randint(len(pools), (len(pools),), generator=rng)]
            for which, (a, b) in enumerate(((0, 1), (2, 3))):
                draws[which].append(sum(auc(pool[a], pool[b]) for pool in chosen) / len(chosen))
        else:
            ours = torch.randint(len(whole[0]), (len(whole[0]),), generator=rng)
            theirs = torch.randint(len(whole[1]), (len(whole[1]),), generator=rng)
            draws[0].append(auc(whole[0][ours], whole[1][theirs]))
            draws[1].append(auc(whole[2][ours], whole[3][theirs]))
    spans = [
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)) for values in draws
    ]
    calibrated, plain = [sum(auc(pool[a], pool[b]) for pool in pools) / len(pools) for a, b in ((0, 1), (2, 3))]
    return Membership(
        len(whole[0]), len(whole[1]), calibrated, (float(spans[0][0]), float(spans[0][1])), plain,
        (float(spans[1][0]), float(spans[1][1])), hits, fpr,
    )  # fmt: skip
