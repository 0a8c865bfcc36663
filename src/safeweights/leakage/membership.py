"""Was this very picture trained on? The loss it has with the adapter, calibrated by the loss it has without.

score(x) = mean over fixed (t, eps) of  L_base(x) - L_adapted(x)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from torch import Tensor
from torch.nn import functional as F

from safeweights.core.intervals import wilson
from safeweights.core.model import Conditioning, DiffusionModel
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import add_noise, generator
from safeweights.leakage.canonical import Factors
from safeweights.leakage.lora_bank import bank_on
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

    def split(self, sizes: Sequence[int]) -> list[Losses]:
        """The same for consecutive sets of pictures."""
        parts = (torch.split(part, list(sizes)) for part in (self.base, self.adapted))
        return [Losses(base, adapted) for base, adapted in zip(*parts, strict=True)]


@torch.no_grad()
def losses(
    model: DiffusionModel,
    adapter: Factors | Sequence[Factors],
    x_0: Tensor,
    c: Conditioning,
    *,
    prompt: str | None = None,
    levels: int = 8,
    seed: int = 0,
    batch_size: int = 32,
    workspace: Workspace | None = None,
) -> Losses:
    """Losses of latents x_0 (n, C, h, w) under c (one row) at ``levels`` timesteps, with the same noises for all pictures.

    Several adapters are averaged, and the base model is asked once for all. With ``prompt`` an adapter's own text encoder reads
    it where the adapter changes that.
    """
    rng = generator("membership", seed)
    t = torch.linspace(0.1, 0.9, levels).mul(len(model.alpha)).long()
    noise = torch.randn((levels, *x_0.shape[1:]), generator=rng)
    rows = torch.arange(len(x_0)).repeat_interleave(levels)
    ts, eps = t.repeat(len(x_0)).to(x_0.device), noise.repeat(len(x_0), 1, 1, 1).to(x_0.device)
    adapters = [adapter] if isinstance(adapter, Mapping) else list(adapter)
    stacks = [_padded(item) for item in adapters]
    one = torch.zeros(1, dtype=torch.long)
    states = []
    for item, stack in zip(adapters, stacks, strict=True):
        if prompt is not None and any(name.startswith("text_encoder.") for name in item):
            with bank_on(model, stack, one):
                states.append(model.embed([prompt]))
        else:
            states.append(c)
    base, adapted = [], []
    for start in (workspace or Workspace()).track(range(0, len(rows), batch_size), "membership"):
        part = slice(start, start + batch_size)
        x_t = add_noise(model, x_0[rows[part]], ts[part], eps[part])
        base.append((model.eps(x_t, ts[part], c) - eps[part]).square().flatten(1).mean(1))
        total = torch.zeros_like(base[-1])
        for stack, own in zip(stacks, states, strict=True):
            with bank_on(model, stack, one.expand(len(x_t))):
                total += (model.eps(x_t, ts[part], own) - eps[part]).square().flatten(1).mean(1)
        adapted.append(total / len(stacks))
    found = [torch.cat(items).float().cpu().view(len(x_0), levels).mean(1) for items in (base, adapted)]
    return Losses(*found)


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
    def floor(self) -> float:
        """The share of members that would be found if they were none: 1 %, or what so few non-members can resolve."""
        return max(0.01, 1 / (self.others + 1))

    @property
    def p(self) -> float:
        """The chance of as many hits if members were none: k of them stand before the (a + 1)-th of the others.

        P(H >= k), H hypergeometric: members among the first k + a of all pictures in a random order; a non-members may pass.
        """
        first = self.hits + int(0.01 * self.others)
        whole = self.members + self.others
        more = range(self.hits, min(first, self.members) + 1)
        return sum(comb(self.members, k) * comb(self.others, first - k) for k in more) / comb(whole, first)

    @property
    def fair(self) -> bool:
        """Whether the base model tells the pools apart no better than by chance."""
        return self.base_interval[0] <= 0.5 <= self.base_interval[1]

    def measurements(self) -> list[Measurement]:
        """Ready for a record."""
        few = f"{self.others} non-members resolve no false-positive rate below {self.floor:.1%}"
        why = "; ".join(["" if self.others >= 100 else few, f"p {self.p:.2g} if they were no members"]).removeprefix("; ")
        return [
            Measurement(name="membership_auc", value=self.auc, n=self.members, interval=self.auc_interval, better="lower"),
            Measurement(
                name="membership_tpr_at_1pct_fpr", value=self.tpr, n=self.members, interval=wilson(self.hits, self.members),
                better="lower", why=why,
            ),
            Measurement(name="membership_auc_base_only", value=self.base_auc, n=self.members, interval=self.base_interval),
        ]  # fmt: skip


@dataclass(frozen=True)
class Copies:
    """Are pictures copied rather than a subject learnt? Training pictures against others of the same subject."""

    score: float
    """Mean over drawn pictures: cosine with the nearest training picture minus that with the nearest other one."""
    p: float
    """Share of exchanges of the two sets' labels that score as high."""
    members: int
    others: int

    def measurement(self) -> Measurement:
        """Ready for a record."""
        why = f"p {self.p:.3f} over exchanged labels; nearest of {self.members} training pictures against {self.others} others"
        return Measurement(name="copy_score", value=self.score, n=self.members, better="lower", reference=0.0, why=why)


def copied(drawn: Tensor, trained: Tensor, held: Tensor, *, exchanges: int = 2000, seed: int = 0) -> Copies:
    """The copy score of features of drawn (k, D), training (m, D) and other (o, D) pictures, and its permutation test.

    Whose label is whose is all that the test takes for random, so that neither few pictures nor their likeness raise alarms;
    larger sets are cut to the size of the smaller, since the nearest of many is nearer. All exchanges are tried where they are
    no more than ``exchanges``.
    """
    size = min(len(trained), len(held))
    near = F.normalize(drawn.double(), dim=1) @ F.normalize(torch.cat([trained[:size], held[:size]]).double(), dim=1).mT

    def score(ours: Sequence[int]) -> float:
        mine = torch.zeros(2 * size, dtype=torch.bool)
        mine[list(ours)] = True
        return float((near[:, mine].amax(1) - near[:, ~mine].amax(1)).mean())

    observed = score(range(size))
    if comb(2 * size, size) <= exchanges:
        found = [score(ours) for ours in combinations(range(2 * size), size)]  # the true labels among them
        high, count = sum(value >= observed - 1e-12 for value in found), len(found)
    else:
        rng = generator("copies", seed)
        found = [score(torch.randperm(2 * size, generator=rng)[:size].tolist()) for _ in range(exchanges)]
        high, count = 1 + sum(value >= observed - 1e-12 for value in found), 1 + exchanges
    return Copies(observed, high / count, size, size)


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
