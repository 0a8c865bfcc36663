"""Many low-rank adapters trained at once beside one frozen model, each as if it were trained alone.

A is (M, r, in) and B (M, out, r) for every layer; a row of the batch belongs to one adapter. The sum over adapters of each
adapter's mean loss, an element-wise optimiser and clipping adapter by adapter make this exactly M separate runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safeweights.core.errors import UserError
from safeweights.core.model import Conditioning, DiffusionModel
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import Adapted, Adapter, Batch, Lesson, errors
from safeweights.diffusion.sampling import embed_all

Stack = Mapping[str, Tensor]
"""``<weight>/down`` (M, r, in) and ``<weight>/up`` (M, out, r) by the names of `Adapter.start`, without their ``lora/``."""


@contextmanager
def bank_on(model: DiffusionModel, stack: Stack, rows: Tensor, scale: float = 1.0) -> Iterator[None]:
    """``model`` with adapter ``rows[b]`` of the stack at work in row b of the batch; differentiable in the stack.

    A batch that is a whole number of times as long, as guidance makes it, repeats ``rows``. Raises UserError for factors beside
    anything but a linear or convolution layer.
    """
    handles = []
    count = next(iter(stack.values())).shape[0]
    each, rest = divmod(len(rows), count)
    # Equal neighbouring groups, the usual case, need no copy of the factors for every row.
    grouped = not rest and torch.equal(rows.cpu(), torch.arange(count).repeat_interleave(each))
    try:
        for name in [key.removesuffix("/down") for key in stack if key.endswith("/down")]:
            part, _, path = name.removesuffix(".weight").partition(".")
            root = model.denoiser if part == "unet" else model.text_encoder
            layer = root.get_submodule(path)
            if not isinstance(layer, nn.Linear) and not (isinstance(layer, nn.Conv2d) and layer.groups == 1):
                raise UserError(
                    f"a bank puts factors beside linear and convolution layers, and {name} is none; name other layers"
                )
            down, up = (stack[f"{name}/{end}"].to(layer.weight.device) for end in ("down", "up"))
            if not grouped:
                down, up = down[rows], up[rows]
            act = _linear(down, up) if isinstance(layer, nn.Linear) else _convolution(down, up, layer)
            handles.append(layer.register_forward_hook(_adding(act, down.dtype, scale, len(rows))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(act: Callable[[Tensor], Tensor], dtype: torch.dtype, scale: float, rows: int) -> Any:
    def add(layer: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = inputs[0].to(dtype)
        times, rest = divmod(len(x), rows)
        if rest:
            raise ValueError(f"a bank for {rows} rows was asked about {len(x)}")
        added = torch.cat([act(part) for part in x.chunk(times)])
        return out + (scale * added.reshape(out.shape)).to(out.dtype)

    return add


def _linear(down: Tensor, up: Tensor) -> Callable[[Tensor], Tensor]:
    """x (rows, ..., in) to up down x, neighbouring rows sharing their adapter."""

    def act(x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x.reshape(len(down), -1, x.shape[-1]), down.mT), up.mT)

    return act


def _convolution(down: Tensor, up: Tensor, layer: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    """The same beside a convolution: down has its kernel, up one of one pixel; every adapter is a group of channels."""
    count, rank = down.shape[:2]
    kernel = down.reshape(count * rank, layer.in_channels, *layer.kernel_size)
    back = up.reshape(count * layer.out_channels, rank, 1, 1)

    def act(x: Tensor) -> Tensor:
        each = x.reshape(count, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
        low = F.conv2d(each, kernel, None, layer.stride, layer.padding, layer.dilation, groups=count)
        high = F.conv2d(low, back, groups=count)
        return high.reshape(len(each), count, layer.out_channels, *high.shape[2:]).transpose(0, 1).flatten(0, 1)

    return act


def stack_of(phis: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The factors of several adapters of one shape, one above the other."""
    names = [name for name in phis[0] if name.startswith("lora/")]
    return {name.removeprefix("lora/"): torch.stack([phi[name].detach().float() for phi in phis]) for name in names}


def phi_of(stack: Stack, row: int) -> dict[str, Tensor]:
    """The factors of one adapter of a stack, named as `Adapter.start` names them."""
    return {f"lora/{name}": value[row].detach().clone() for name, value in stack.items()}


@dataclass
class AdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019) on a stack, with a learning rate for each adapter; equal to torch's, row by row."""

    lr: Tensor
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    steps: int = 0
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, stack: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """One step in place; adapters whose learning rate is 0 stay as they are."""
        self.steps += 1
        first, second = self.betas
        c1, c2 = 1 - first**self.steps, 1 - second**self.steps
        for name, value in stack.items():
            lr = self.lr.view(-1, *(1,) * (value.ndim - 1))
            m, v = self.moments.setdefault(name, (torch.zeros_like(value), torch.zeros_like(value)))
            gradient = gradients[name]
            m.lerp_(gradient, 1 - first)
            v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            value.mul_(1 - lr * self.weight_decay)
            value.sub_(lr * (m / c1) / ((v / c2).sqrt() + self.eps))


def clip_each(gradients: Mapping[str, Tensor], limit: float) -> dict[str, Tensor]:
    """Each adapter's gradients scaled to a norm of at most ``limit`` over all its layers together."""
    factor = (limit / (norms(gradients) + 1e-6)).clamp(max=1.0)
    return {name: value * factor.view(-1, *(1,) * (value.ndim - 1)) for name, value in gradients.items()}


def norms(stack: Mapping[str, Tensor]) -> Tensor:
    """The norm of each adapter's tensors (M,), over all layers together."""
    return torch.stack([value.flatten(1).square().sum(1) for value in stack.values()]).sum(0).sqrt()


def fit_bank(
    lessons: Sequence[Lesson],
    *,
    steps: int | Sequence[int],
    lr: float | Sequence[float],
    weight_decay: float = 1e-2,
    max_norm: float = 1.0,
    checkpoints: Sequence[int] = (),
    workspace: Workspace | None = None,
    description: str = "adapters",
) -> list[list[Adapted]]:
    """What `diffusion.adaptation.fit` makes of each lesson, all at once: at each of ``checkpoints`` and at its end.

    The lessons share their model and their adapter, which must be of low rank on linear layers of the denoiser only; ``steps``
    and ``lr`` are for all or one for each. Raises UserError for other adapters and for a loss that is not finite.
    """
    model, adapter = lessons[0].model, lessons[0].adapter
    if any(lesson.adapter != adapter or lesson.model is not model for lesson in lessons):
        raise ValueError("the lessons of a bank share their model and adapter")
    _check(adapter)
    count = len(lessons)
    lengths = [steps] * count if isinstance(steps, int) else list(steps)
    rates = torch.tensor([lr] * count if isinstance(lr, int | float) else list(lr), device=model.device)
    stack = stack_of([adapter.start(model, lesson.seed) for lesson in lessons])
    stack = {name: value.to(model.device).requires_grad_() for name, value in stack.items()}
    captions = list(dict.fromkeys(text for lesson in lessons for text in lesson.captions))
    row_of = {text: row for row, text in enumerate(captions)}
    encoded = embed_all(model, captions).states.float()
    optimiser = AdamW(rates.clone(), weight_decay)
    losses: list[list[float]] = [[] for _ in lessons]
    kept: list[dict[int, dict[str, Tensor]]] = [{} for _ in lessons]
    for step in (workspace or Workspace()).track(range(max(lengths)), description):
        running = [m for m in range(count) if step < lengths[m]]
        batches = [lessons[m].batch(step) for m in running]
        told = [row_of[lessons[m].captions[row]] for m, batch in zip(running, batches, strict=True) for row in batch.rows]
        active = stack if len(running) == count else {name: value[running] for name, value in stack.items()}
        batch = _joined(batches)
        # Where every picture of a batch counts alike, adapters have equal groups; priors make no difference to that.
        owner = torch.cat([torch.full((len(item.rows),), i) for i, item in enumerate(batches)])
        with bank_on(model, active, owner, adapter.scale):
            predicted = model.eps(batch.x_t, batch.t, Conditioning(encoded[told]))
        weighted = errors(model, predicted, batch) * batch.weight
        each = torch.zeros(len(running), device=weighted.device).index_add(0, owner.to(weighted.device), weighted)
        found = torch.autograd.grad(each.sum(), list(stack.values()))
        values = each.detach().tolist()
        if any(value != value or abs(value) == float("inf") for value in values):
            raise UserError(f"{description}: a loss is not finite at step {step}; set a lower lr")
        for m, value in zip(running, values, strict=True):
            losses[m].append(value)
        optimiser.lr = torch.tensor([rates[m] if step < lengths[m] else 0.0 for m in range(count)], device=rates.device)
        optimiser.step(stack, clip_each(dict(zip(stack, found, strict=True)), max_norm))
        for m in running:
            if step + 1 == lengths[m] or step + 1 in checkpoints:
                kept[m][step + 1] = phi_of(stack, m)
    return [[Adapted(adapter, phi, step, tuple(losses[m][:step])) for step, phi in sorted(kept[m].items())] for m in range(count)]


def _joined(batches: Sequence[Batch]) -> Batch:
    return Batch(
        torch.cat([item.x_t for item in batches]), torch.cat([item.t for item in batches]),
        torch.cat([item.eps for item in batches]), tuple(row for item in batches for row in item.rows),
        torch.cat([item.weight for item in batches]),
    )  # fmt: skip


def _check(adapter: Adapter) -> None:
    if adapter.targets is None or adapter.parameters is not None or adapter.token is not None:
        raise UserError("a bank trains low-rank factors only, no weights and no new words; use the lora method")
