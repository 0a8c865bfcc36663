"""Looking at cross-attention: which picture positions attend to which tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel


def cross_attentions(model: DiffusionModel) -> dict[str, nn.Module]:
    """The denoiser's cross-attention layers by name. Raises UserError for a model without any that can be read."""
    found = {
        name: module
        for name, module in model.denoiser.named_modules()
        if name.rpartition(".")[2] == "attn2" and all(hasattr(module, part) for part in ("to_q", "to_k", "heads"))
    }
    if not found:
        raise UserError(f"{model.name} has no cross-attention layers (attn2 with to_q and to_k) to read; choose another method")
    return found


@contextmanager
def attention_maps(model: DiffusionModel) -> Iterator[dict[str, Tensor]]:
    """A dict that every `eps` call fills with A_l (B, heads, positions, L), rows adding up to one; differentiable.

    Queries and keys are caught as they leave their projections and multiplied here once more, so that whatever kernel the layer
    uses itself goes on as it was.
    """
    maps: dict[str, Tensor] = {}
    handles = []
    for name, module in cross_attentions(model).items():
        caught: dict[str, Tensor] = {}

        def catch(_m: nn.Module, _i: Any, out: Tensor, *, what: str, caught: dict[str, Tensor]) -> None:
            caught[what] = out

        def multiply(layer: Any, _i: Any, _out: Any, *, name: str, caught: dict[str, Tensor]) -> None:
            maps[name] = attention(caught.pop("q"), caught.pop("k"), int(layer.heads))

        for what in ("q", "k"):
            part: nn.Module = getattr(module, f"to_{what}")
            handles.append(part.register_forward_hook(_with(catch, what=what, caught=caught)))
        handles.append(module.register_forward_hook(_with(multiply, name=name, caught=caught)))
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def attention(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) of queries (B, N, heads * d) and keys (B, L, heads * d): (B, heads, N, L)."""
    q, k = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k))
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)


def _with(hook: Any, **values: Any) -> Any:
    """A forward hook with values of its own loop round."""
    return lambda module, inputs, out: hook(module, inputs, out, **values)
