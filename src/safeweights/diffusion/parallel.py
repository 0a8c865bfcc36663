"""One descent on several devices: every process draws the same batch, works on its rows of it, and gradients are averaged.

    accelerate launch --num_processes 4 -m safeweights erase …

grad L = 1/R sum_r grad L_r,   L_r the loss on the rows r, r + R, r + 2 R, … of the batch

Since draws depend on seed and step only, the processes agree on the batch without talking, and what comes out is what one
process gives, up to the rounding of a sum. A loss that does not part its batch is computed by all alike: as right, and no
faster. A process begun alone does none of this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from safeweights.core.launch import processes


def join() -> tuple[int, int]:
    """Meet the other processes, before a model is opened, so that each takes a device of its own; rank and number."""
    rank, size = processes()
    if size > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    return rank, size


def part(rows: Tensor) -> Tensor:
    """This process's rows of those drawn, for a loss that is a mean over rows: all of them where they cannot be parted evenly."""
    rank, size = processes()
    return rows if size == 1 or len(rows) % size else rows[rank::size]


def average(parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Make every process's gradients their mean, in place; the mean loss. One message for each type of number."""
    from torch import distributed

    size = processes()[1]
    mean = loss.detach().float().clone()
    distributed.all_reduce(mean)
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:  # of which parameters it is depends on the loss, so on all processes it is the same
            by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_type.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        for gradient, mine in zip(gradients, torch.split(flat / size, [gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mine.view_as(gradient))
    return mean / size


def agree(told: Any) -> Any:
    """What the first process says, on all: where a resumed run goes on from."""
    from torch import distributed

    box = [told]
    distributed.broadcast_object_list(box)
    return box[0]
