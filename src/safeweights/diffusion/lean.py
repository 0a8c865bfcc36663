"""Frozen convolutions that keep nothing for a gradient nobody takes."""

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
        # Asked for the input's gradient alone, the kernel reads of the input nothing but its shape.
        shape_only = grads[0].new_empty(1).expand(ctx.shape)
        x = torch.ops.aten.convolution_backward(
            grads[0], shape_only, weight, None, stride, padding, dilation, False, [0], groups, [True, False, False]
        )[0]
        return x, None, None, None, None, None, None


@contextmanager
def lean(module: nn.Module) -> Iterator[None]:
    """Frozen convolutions of ``module`` keep no activations inside; what they give is the same.

    PyTorch keeps a convolution's input whenever anything of it needs a gradient; a linear layer already does without. First
    derivatives only. A convolution whose weight or bias is to be trained (by then) is left as it is.
    """
    changed: list[nn.Conv2d] = []

    def forward_of(layer: nn.Conv2d) -> Any:
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

    try:
        for layer in module.modules():
            if type(layer) is nn.Conv2d:
                layer.forward = forward_of(layer)  # type: ignore[method-assign]
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            layer.__dict__.pop("forward", None)
