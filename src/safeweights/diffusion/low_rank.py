"""Low-rank adapters beside frozen weights, W + up down (Hu et al., ICLR 2022, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safeweights.core.model import DiffusionModel
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parameters import select


class LowRank:
    """One adapter for each named weight of a linear or convolution layer; ``up`` starts at zero, so nothing changes at first.

    The model is not edited: inside `on` its layers add scale up(down(x)) to what they give. ``seed`` fixes the random ``down``,
    normal of that ``deviation`` (1 / sqrt(fan in) where none is given).
    """

    def __init__(
        self,
        model: DiffusionModel,
        names: Sequence[str],
        *,
        rank: int = 1,
        seed: int = 0,
        deviation: float | None = None,
        scale: float = 1.0,
    ) -> None:
        self.names, self.scale = list(names), scale
        self.down: dict[str, nn.Parameter] = {}
        self.up: dict[str, nn.Parameter] = {}
        self.shapes: dict[str, torch.Size] = {}
        weights = dict(model.named_parameters())
        for name in self.names:
            weight = weights[name]
            size = weight[0].numel() ** -0.5 if deviation is None else deviation
            down = torch.randn((rank, *weight.shape[1:]), generator=generator("low rank", seed, name)) * size
            self.down[name] = nn.Parameter(down.to(weight.device))
            self.up[name] = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
            self.shapes[name] = weight.shape

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {f"{name}/{end}": part[name] for name in self.names for end, part in (("down", self.down), ("up", self.up))}

    @torch.no_grad()
    def deltas(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The change of every weight that is the same as the adapter, scale up down, in float32; ``values`` as for `on`."""
        parts = values or self.parameters()
        return {
            name: self.scale * (parts[f"{name}/up"] @ parts[f"{name}/down"].flatten(1)).view(self.shapes[name])
            for name in self.names
        }

    @contextmanager
    def on(self, model: DiffusionModel) -> Iterator[None]:
        """The adapters at work in ``model``, whose weights they belong beside."""
        with beside(model, self.parameters(), self.scale):
            yield


@contextmanager
def beside(model: DiffusionModel, parts: Mapping[str, Tensor], scale: float = 1.0) -> Iterator[None]:
    """``model`` with factors ``<weight>/down`` (r, in, ...) and ``<weight>/up`` (out, r) at work; differentiable in both.

    They may be any tensors, so that a step of theirs can be unrolled.
    """
    handles = []
    try:
        for name in [key.removesuffix("/down") for key in parts if key.endswith("/down")]:
            part, _, path = name.removesuffix(".weight").partition(".")
            root = model.denoiser if part == "unet" else model.text_encoder
            hook = _adding(parts[f"{name}/down"], parts[f"{name}/up"], scale)
            handles.append(root.get_submodule(path).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(down: Tensor, up: Tensor, scale: float) -> Any:
    def add(layer: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = inputs[0].to(down.dtype)
        if isinstance(layer, nn.Linear):
            added = F.linear(F.linear(x, down), up)
        else:
            added = F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up[:, :, None, None])
        return out + (scale * added).to(out.dtype)

    return add


@dataclass(frozen=True)
class Factors:
    """The best approximation of a weight's change by one of a given rank: up (out, r) down (r, in, ...)."""

    down: Tensor
    up: Tensor
    error: float
    """|| change - up down ||_F."""
    norm: float
    """|| change ||_F."""

    @property
    def rank(self) -> int:
        return int(self.up.shape[1])

    @property
    def delta(self) -> Tensor:
        """up down, in the shape of the weight."""
        return (self.up @ self.down.flatten(1)).view(self.up.shape[0], *self.down.shape[1:])


def factor(change: Tensor, *, rank: int | None = None, energy: float = 1.0) -> Factors:
    """The truncated SVD of a change (out, in, ...), U_r S_r V_r^T, with S shared evenly by both factors (Eckart & Young, 1936).

    ``rank`` is the most singular values kept; without it, as many as hold ``energy``, in (0, 1], of the squared norm. Values
    below 1e-7 of the largest are rounding and never kept. Computed in float64 through the Gram matrix of the shorter side, which
    for a convolution of a large model is a tenth of the work of the SVD itself; returned in float32.
    """
    matrix = change.detach().double().flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    total = float(squares.sum())
    most = int((squares > 1e-14 * squares[0]).sum()) if total else 0
    if rank is None:
        held = squares.cumsum(0)
        rank = int((held < energy * total).sum()) + 1
    r = max(1, min(rank, most))
    sizes, vectors = squares[:r].sqrt(), vectors[:, :r]
    root = sizes.sqrt().clamp(min=torch.finfo(torch.float64).tiny ** 0.5)
    if wide:
        up, down = vectors * root, (vectors / root).T @ matrix
    else:
        up, down = matrix @ (vectors / root), (vectors * root).T
    up, down = up.float(), down.float()
    error = float((matrix - up.double() @ down.double()).norm())
    return Factors(down.view(r, *change.shape[1:]).contiguous(), up.contiguous(), error, float(matrix.norm()))


def layer_weights(model: DiffusionModel, group: str) -> list[str]:
    """The weights of linear and ungrouped convolution layers among the names of a group. Raises UserError as `select` does."""
    found = []
    for name in select(model.named_parameters(), group):
        part, _, path = name.rpartition(".")[0].partition(".")
        root = model.denoiser if part == "unet" else model.text_encoder
        layer = root.get_submodule(path)
        plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        if plain and name.endswith(".weight"):
            found.append(name)
    return found
