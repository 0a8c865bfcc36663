"""Frozen layers that keep nothing for a gradient nobody takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _FrozenConv2d(torch.autograd.Function):
    """A convolution whose weight is a constant: only the weight is kept, and only the gradient of the input is computed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, (stride, padding, dilation, groups)
        return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        # The input's gradient is the transposed convolution; what the stride left over is added at the end.
        rest = [
            size - ((out - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1)
            for i, (size, out) in enumerate(zip(ctx.shape[2:], grads[0].shape[2:], strict=True))
        ]
        x = torch.nn.functional.conv_transpose2d(grads[0], weight, None, stride, padding, rest, groups, dilation)
        return x, None, None, None, None, None, None


@contextmanager
def lean(module: nn.Module) -> Iterator[None]:
    """Frozen convolutions of ``module`` keep no activations inside; what they give is the same.

    PyTorch keeps a convolution's input whenever anything of it needs a gradient; a linear layer already does without. What is
    trained is decided when a layer runs.
    """
    changed: list[nn.Module] = []
    try:
        for layer in module.modules():
            if type(layer) in (nn.Conv2d, nn.GroupNorm):
                layer.forward = _convolving(layer) if isinstance(layer, nn.Conv2d) else _norming(layer)  # type: ignore
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            layer.__dict__.pop("forward", None)


def _convolving(layer: nn.Conv2d) -> Any:
    def forward(x: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained or not x.requires_grad or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            plain: Tensor = layer._conv_forward(x, weight, bias)
            return plain
        out: Tensor = _FrozenConv2d.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        return out

    return forward


def _norming(layer: nn.GroupNorm) -> Any:
    def forward(x: Tensor) -> Tensor:
        if x.requires_grad or layer.weight is None or not layer.weight.requires_grad:
            return nn.functional.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
        # The first trained norm behind frozen layers: PyTorch 2.13's backward crashes where a channels-last input needs no
        # gradient and the gain does, so gain and shift are kept out of it.
        shape = (1, -1, *(1,) * (x.ndim - 2))
        out = nn.functional.group_norm(x, layer.num_groups, eps=layer.eps) * layer.weight.view(shape)
        return out if layer.bias is None else out + layer.bias.view(shape)

    return forward
