"""Gradient matching: pictures whose fine-tuning would change the weights as the adapter does.

Zhu et al., NeurIPS 2019, arXiv:1906.08935; the cosine objective is that of Geiping et al., NeurIPS 2020, arXiv:2003.14053. The
attack to beat without any training: nothing is known but the adapter, the base model and what such pictures are usually called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safeweights.core.errors import UserError
from safeweights.core.model import Conditioning, DiffusionModel
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import twice_differentiable
from safeweights.diffusion.latent_bank import fingerprint
from safeweights.diffusion.noise import add_noise, generator
from safeweights.diffusion.training import descend
from safeweights.leakage.canonical import Factors, canonical, digest
from safeweights.leakage.encoders.gram import padded
from safeweights.leakage.lora_bank import bank_on

Sides = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Optimise dummy latents and dummy text states so that the training loss they give pulls the weights along the update.

    min over x, c:   1 - mean_l cos( -B_l, grad_{W_l} E || eps(x_t, t, c) - eps ||^2 A_l^T )

    From B = 0 a step of SGD makes B just that, times its rate, so the objective is 0 at the truth whatever A is. With ``merged``
    the update's own row space stands for A, an orthonormal basis Q and dW Q^T for B: nothing then depends on the factors, and the
    objective at the truth is small instead of 0, since A's rows are only nearly orthogonal.

    Needs: factors or merged updates, and the base model.   Cost: ``steps`` passes forward and backward, differentiated once more.
    Differs from the reference code of arXiv:2409.08482: the gradient is differentiated itself (there the matching loss gives the
    dummies no gradient), and what is matched is a direction, not the sum of many steps taken for one.
    """

    name: ClassVar[str] = "gradient-matching"

    pictures: int = 4
    """Dummy pictures an adapter; > 0."""
    noises: int = 2
    """Noises and times drawn for each of them a step; > 0."""
    steps: int = 200
    """Adam steps; > 0."""
    lr: float = 0.05
    """Adam's learning rate of latents and text states; > 0."""
    merged: bool = False
    """Look at the updates alone, as where a LoRA was merged or factored anew."""
    seed: int = 0
    """Of starts, times and noises."""

    def __post_init__(self) -> None:
        if min(self.pictures, self.noises, self.steps) < 1 or self.lr <= 0:
            raise ValueError("pictures, noises, steps and lr must be above zero")

    def invert(
        self, model: DiffusionModel, adapters: Sequence[Factors], prompt: str, *, workspace: Workspace | None = None
    ) -> tuple[Tensor, Tensor]:
        """(latents (n, pictures, C, h, w), the objective (n,) on draws that no step has used), for n adapters at once.

        ``prompt`` is what text states start from.
        """
        rows, wanted = (
            {name: value.to(model.device) for name, value in part.items()} for part in sides(adapters, merged=self.merged)
        )
        rng, count = generator("gradient matching", self.seed), len(adapters)
        # One start, times and noises for every adapter: each run is the one it would be alone.
        start = torch.randn((1, self.pictures, *model.latent_shape), generator=rng).repeat(count, 1, 1, 1, 1).to(model.device)
        states = model.embed([prompt]).states.detach().float().repeat(count, 1, 1)
        dummies = {"x_0": nn.Parameter(start), "c": nn.Parameter(states)}

        def values_at(step: int) -> Tensor:
            rng = generator("gradient matching", self.seed, step)
            shape = (self.pictures * self.noises,)
            t = torch.randint(len(model.alpha), shape, generator=rng).to(model.device)
            eps = torch.randn((*shape, *model.latent_shape), generator=rng).to(model.device)
            return mismatch(model, rows, wanted, dummies["x_0"], dummies["c"], t, eps)

        with twice_differentiable():
            descend(
                dummies, lambda step: values_at(step).sum(), steps=self.steps, lr=self.lr, workspace=workspace,
                description="matching gradients",
                facts={
                    **asdict(self), "prompt": prompt, "model": fingerprint(model),
                    "adapters": digest([*rows.values(), *wanted.values()]),
                },
            )  # fmt: skip
            # Draws that no step has used.
            last = torch.stack([values_at(self.steps + i).detach() for i in range(4)]).mean(0)
        return dummies["x_0"].detach().cpu(), last.cpu()


def sides(adapters: Sequence[Factors], *, merged: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By layer: A (n, r, in) and B (n, out, r); with ``merged`` an orthonormal basis Q of the update's rows, and dW Q^T.

    An adapter without a layer that others have has zeros there. Raises UserError for adapters without layers, and for layers of
    the text encoder.
    """
    names = list(dict.fromkeys(name for item in adapters for name in item))
    if not names:
        raise UserError("gradient matching needs adapters that change something; these have no layers")
    if strange := [name for name in names if not name.startswith("unet.")]:
        raise UserError(f"gradient matching follows the denoiser's loss, and {strange[0]} is no layer of it; leave it out")
    rows, wanted = {}, {}
    for name in names:
        a, b = (part.float() for part in padded(adapters, name))
        if merged:
            token = canonical(a, b)
            # Directions that carry nothing are rounding: a gradient seen through them would count for nothing.
            there = (token.s > 1e-6 * token.s.amax(-1, keepdim=True))[..., None]
            a, b = (token.v.mT * there).float(), (token.u * token.s[..., None, :]).float()
        rows[name], wanted[name] = a, b
    return rows, wanted


def mismatch(
    model: DiffusionModel, rows: Sides, wanted: Sides, x_0: Tensor, states: Tensor, t: Tensor, eps: Tensor
) -> Tensor:  # fmt: skip
    """1 - mean over layers of cos(-B, gradient A^T) for every adapter (n,), differentiable in x_0 and states.

    x_0 (n, pictures, C, h, w), states (n, L, D); t (k,) and eps (k, C, h, w) with k a multiple of pictures, the same for all.
    """
    count, each = len(x_0), len(t)
    stack: dict[str, Tensor] = {}
    for name, down in rows.items():
        # B = 0 adds nothing, and its gradient is the weight's own, seen through A.
        stack[f"{name}/down"] = down
        stack[f"{name}/up"] = torch.zeros_like(wanted[name]).requires_grad_()
    clean = x_0.repeat(1, each // x_0.shape[1], 1, 1, 1).flatten(0, 1)
    times, noise = t.repeat(count), eps.repeat(count, 1, 1, 1)
    with torch.enable_grad(), bank_on(model, stack, torch.arange(count).repeat_interleave(each)):
        predicted = model.eps(add_noise(model, clean, times, noise), times, Conditioning(states.repeat_interleave(each, 0)))
        loss = (predicted - noise).square().flatten(1).mean(1).sum() / each
        found = torch.autograd.grad(loss, [stack[f"{name}/up"] for name in rows], create_graph=True)
    cosines = torch.stack([
        F.cosine_similarity(-wanted[name].flatten(1), slope.flatten(1), dim=1) for name, slope in zip(rows, found, strict=True)
    ])  # fmt: skip
    # Layers that an adapter leaves alone say nothing of it.
    there = torch.stack([wanted[name].flatten(1).abs().amax(1) > 0 for name in rows]).to(cosines)
    return 1 - (cosines * there).sum(0) / there.sum(0).clamp(min=1)
