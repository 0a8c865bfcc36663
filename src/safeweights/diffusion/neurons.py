"""Neurons of a concept: which channels answer it, found by paired activations; how strongly they answer; how easily they wake.

Two papers look for them so: Yang et al. (2024, arXiv:2405.16534) and Chavhan et al. (ICLR 2025, arXiv:2405.19237).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeweights.core.concept import Concept
from safeweights.core.errors import UserError
from safeweights.core.model import Conditioning, DiffusionModel, Sampling
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import ddim_step, ddim_timesteps, predictions

SITES = re.compile(r"(.*\.)?(ff\.net\.0|attn2\.to_[kv])$")
"""Modules whose output channels are neurons: the gated hidden layer of a feed-forward block, keys and values of the text."""


@contextlib.contextmanager
def listening(model: DiffusionModel) -> Iterator[dict[str, Tensor]]:
    """Inside the block, after every model call: mean absolute activation over tokens of each layer's channels, (B, J).

    Layers are in the order in which they run in the first call. Differentiable. Raises UserError for a model without such layers.
    """
    heard: dict[str, Tensor] = {}

    def listen(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            heard[name] = output.float().abs().flatten(1, -2).mean(1)

        return hook

    layers = [(name, module) for name, module in model.denoiser.named_modules() if SITES.fullmatch(name)]
    if not layers:
        raise UserError(f"{model.name} has no feed-forward or cross-attention layers whose neurons could be listened to")
    hooks = [module.register_forward_hook(listen(name)) for name, module in layers]
    try:
        yield heard
    finally:
        for handle in hooks:
            handle.remove()


@dataclass(frozen=True)
class Activations:
    """Mean absolute activations: by layer (steps, N, J), for N conditions along their own DDIM runs."""

    layers: Mapping[str, Tensor]
    t: tuple[int, ...]
    """The timesteps, noisiest first."""

    @property
    def mean(self) -> dict[str, Tensor]:
        """By layer (N, J): the mean over steps."""
        return {name: value.mean(0) for name, value in self.layers.items()}


@torch.no_grad()
def activations(
    model: DiffusionModel, c: Conditioning, seeds: Sequence[int], sampling: Sampling, *, batch_size: int = 16
) -> Activations:
    """Activations under c (N rows) along guided DDIM runs from the noise of N seeds; the guided branch is listened to.

    Costs 2 N model calls a step.
    """
    uncond = model.embed([""])
    timesteps = ddim_timesteps(model, sampling.steps).tolist()
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(seeds), batch_size):
        rows = slice(start, start + batch_size)
        noise = [torch.randn(model.latent_shape, generator=generator("neurons", seed)) for seed in seeds[rows]]
        x = torch.stack(noise).to(model.device)
        run: dict[str, list[Tensor]] = {}
        with listening(model) as heard:
            for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
                eps_0, eps_c = predictions(model, x, torch.full((len(x),), t, device=x.device), c[rows], uncond)
                for name, value in heard.items():
                    run.setdefault(name, []).append(value[len(x) :].cpu())
                x = ddim_step(model, x, t, t_next, eps_0 + sampling.guidance_scale * (eps_c - eps_0))
        for name, values in run.items():
            parts.setdefault(name, []).append(torch.stack(values))
    return Activations({name: torch.cat(values, dim=1) for name, values in parts.items()}, tuple(timesteps))


def pairs(concept: Concept, n: int, *, test: bool = False) -> list[tuple[str, str]]:
    """n pairs of a prompt with the concept and the same without it, the concept's tuning or test prompts in turn.

    A prompt that says nothing without the concept but the anchor is paired with that.
    """
    texts = [prompt.text for prompt in concept.test_prompts] if test and concept.test_prompts else [*concept.texts]
    return [(texts[i % len(texts)], concept.without(texts[i % len(texts)])) for i in range(n)]


def paired_t(difference: Tensor) -> Tensor:
    """t (…) of differences (N, …): mean / (std / sqrt(N)); 0 where all are zero."""
    mean, std = difference.double().mean(0), difference.double().std(0)
    t = mean / (std / len(difference) ** 0.5)
    return torch.where((mean == 0) & (std == 0), torch.zeros_like(t), t)


def p_values(t: Tensor, n: int) -> Tensor:
    """One-sided p of t with n - 1 degrees of freedom: the chance of so high a t without an effect."""
    from scipy.special import stdtr

    return torch.from_numpy(stdtr(n - 1, -t.double().cpu().numpy())).reshape(t.shape)


def benjamini_hochberg(p: Tensor, q: float) -> Tensor:
    """True for the hypotheses (N,) rejected at false discovery rate q (Benjamini & Hochberg, 1995)."""
    count = p.numel()
    ordered, order = p.double().flatten().sort()
    below = (ordered <= q * torch.arange(1, count + 1, dtype=torch.float64) / count).nonzero().flatten()
    rejected = torch.zeros(count, dtype=torch.bool)
    if len(below):
        rejected[order[: int(below[-1]) + 1]] = True
    return rejected.view(p.shape)


@dataclass(frozen=True)
class Neuron:
    """A channel of a layer."""

    layer: str
    channel: int


@dataclass(frozen=True)
class Located:
    """The concept's neurons, each with a control: a neuron of its layer as active as it that does not answer the concept."""

    concept: tuple[Neuron, ...]
    control: tuple[Neuron, ...]
    tested: int
    significant: int
    """Neurons that pass the test, of which ``concept`` are the strongest that have a control."""
    pairs: int
    q: float
    depth: Mapping[str, tuple[float, ...]]
    """By layer, in order of depth: the share of its neurons that answer the concept, step by step, noisiest first."""
    t: tuple[int, ...]

    def plot(self, title: str) -> dict[str, Any]:
        """Where in depth and time the concept's neurons sit, as a heat map for a report."""
        return {
            "kind": "heatmap", "title": title, "rows": list(self.depth), "columns": [str(t) for t in self.t],
            "values": [list(row) for row in self.depth.values()], "unit": "share of the layer's neurons",
        }  # fmt: skip


def locate(with_: Activations, without: Activations, *, q: float = 0.01, share: float = 0.01) -> Located:
    """Neurons more active with the concept than without, over pairs that differ in nothing else.

    One-sided paired t on the means over steps, Benjamini-Hochberg at ``q`` over all neurons; of those that pass the strongest by
    effect size, at most ``share`` of all neurons. Controls: |t| < 1, same layer, nearest mean activation without the concept,
    none twice. Steps are tested one by one for ``depth``, all steps together corrected. Raises UserError for fewer than 3 pairs.
    """
    a, b = with_.mean, without.mean
    names, n = list(a), len(next(iter(a.values())))
    if n < 3:
        raise UserError(f"{n} pairs cannot tell a concept's neurons from chance; give at least 3")
    sizes = [a[name].shape[1] for name in names]
    t = torch.cat([paired_t(a[name] - b[name]) for name in names])
    passed = benjamini_hochberg(p_values(t, n), q)
    effect = torch.where(passed, t, torch.full_like(t, -torch.inf))
    layer_of = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(sizes))
    start = torch.tensor([0, *sizes]).cumsum(0)
    level = torch.cat([b[name].double().mean(0) for name in names])
    free = t.abs() < 1
    concept: list[Neuron] = []
    control: list[Neuron] = []
    for index in effect.argsort(descending=True, stable=True).tolist():
        if not passed[index] or len(concept) >= max(1, round(share * len(t))):
            break
        fit = free & (layer_of == layer_of[index])
        if not fit.any():
            continue
        nearest = int(torch.where(fit, (level - level[index]).abs(), torch.full_like(level, torch.inf)).argmin())
        free[nearest] = False
        layer = int(layer_of[index])
        concept.append(Neuron(names[layer], index - int(start[layer])))
        control.append(Neuron(names[layer], nearest - int(start[layer])))
    each = {name: paired_t((with_.layers[name] - without.layers[name]).transpose(0, 1)) for name in names}
    flat = benjamini_hochberg(p_values(torch.cat([value.flatten() for value in each.values()]), n), q)
    parts = torch.split(flat, [value.numel() for value in each.values()])
    depth = {
        name: tuple(part.view(value.shape).double().mean(1).tolist())
        for (name, value), part in zip(each.items(), parts, strict=True)
    }
    return Located(tuple(concept), tuple(control), len(t), int(passed.sum()), n, q, depth, with_.t)


def pick(values: Mapping[str, Tensor], neurons: Sequence[Neuron]) -> Tensor:
    """Of values by layer (N, J), those of the neurons: (N, len(neurons))."""
    return torch.stack([values[neuron.layer][:, neuron.channel] for neuron in neurons], dim=1)


def slopes(
    model: DiffusionModel, x_t: Tensor, t: Tensor, c: Conditioning, neurons: Sequence[Neuron], *, batch_size: int = 16
) -> Tensor:
    """|| d a_j / d e ||_2 of every neuron (len(neurons),), the mean over rows: how far a small change of the text moves it.

    x_t (B, C, h, w), t (B,), c: B rows of text states e. Costs a pass forward and one backward a neuron.
    """
    total = torch.zeros(len(neurons), dtype=torch.float64)
    for start in range(0, len(x_t), batch_size):
        rows = slice(start, start + batch_size)
        states = c[rows].states.detach().clone().requires_grad_()
        with listening(model) as heard:
            model.eps(x_t[rows], t[rows], Conditioning(states))
            values = pick(heard, neurons).sum(0)
        for j, value in enumerate(values):
            (gradient,) = torch.autograd.grad(value, states, retain_graph=j < len(neurons) - 1)
            total[j] += gradient.double().flatten(1).norm(dim=1).sum().cpu()
    return total / len(x_t)
