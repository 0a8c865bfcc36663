"""The one descent loop: Adam on a loss, checked, checkpointed and resumed exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safeweights.core.errors import UserError
from safeweights.core.workspace import Workspace
from safeweights.diffusion.parallel import agree, average, join

OPTIMIZERS: dict[str, Any] = {
    "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adafactor": torch.optim.Adafactor,
}  # fmt: skip


def descend(
    parameters: Mapping[str, nn.Parameter],
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    optimizer: str = "adam",
    workspace: Workspace | None = None,
    description: str = "training",
    facts: Mapping[str, Any] | None = None,
    gradients: Callable[[int], None] | None = None,
    state: dict[str, Tensor] | None = None,
) -> list[float]:
    """Take ``steps`` optimiser steps on ``loss_at(step)``; the losses, one per step.

    ``loss_at`` must draw its randomness from ``noise.generator(seed, …, step)``, so that a run resumed from ``workspace`` ends
    with the very tensors of an undisturbed one. ``facts`` (JSON) describe the run: a checkpoint written under other facts is
    not resumed. ``gradients(step)`` may change gradients in place before the step (masks, projections). ``state`` are
    tensors that ``loss_at`` carries from step to step, replaced and never changed in place; they are kept and resumed too. An
    interrupt saves first.

    Under ``accelerate launch`` the gradients of all processes are averaged (see ``parallel``), the first one keeps checkpoints
    and all go on from its last one.

    Raises UserError for a loss or gradient that is not finite, naming the step.
    """
    rank, size = join()
    workspace = (workspace or Workspace()) if rank == 0 else Workspace()
    kind = OPTIMIZERS[optimizer](list(parameters.values()), lr=lr, weight_decay=weight_decay)
    described: dict[str, Any] = {
        "lr": lr, "weight_decay": weight_decay, "optimizer": optimizer,
        "shapes": {name: list(p.shape) for name, p in parameters.items()}, **(facts or {}),
    }  # fmt: skip
    described = json.loads(json.dumps(described))  # as it will be read again: a tuple comes back as a list
    losses = _resume(parameters, kind, described, workspace, steps, state)
    if size > 1:
        losses = _follow(parameters, kind, losses, state)
    saved = len(losses)
    carried = dict(state or {})

    def save() -> None:
        nonlocal saved
        if len(losses) == saved:
            return
        tensors: dict[str, Tensor] = {f"parameter/{name}": p.detach() for name, p in parameters.items()}
        for name, p in parameters.items():
            for key, value in kind.state[p].items():
                tensors[f"state/{key}/{name}"] = torch.as_tensor(value)
        tensors |= {f"carried/{name}": value for name, value in carried.items()}
        workspace.save("descent", tensors, {"facts": described, "losses": losses})
        saved = len(losses)

    try:
        for step in workspace.track(range(len(losses), steps), description):
            kind.zero_grad(set_to_none=True)
            loss = loss_at(step)
            if size > 1:
                loss.backward()  # type: ignore[no-untyped-call]
                told = average(parameters.values(), loss)
            else:
                told = loss.detach()
            value = float(told)
            if value != value or value in (float("inf"), float("-inf")):
                raise UserError(
                    f"{description}: the loss is {value} at step {step}; set a lower lr (it is {lr:g}) or lower rates of the rest"
                )
            if size == 1:
                loss.backward()  # type: ignore[no-untyped-call]
            if gradients is not None:
                gradients(step)
            # One number per parameter, one synchronisation per step.
            norms = [p.grad.detach().float().square().sum() for p in parameters.values() if p.grad is not None]
            if norms and not torch.isfinite(torch.stack(norms)).all():
                raise UserError(f"{description}: a gradient is not finite at step {step}; set a lower lr (it is {lr:g})")
            kind.step()
            losses.append(value)
            # As it was after a whole step: an interrupt in the middle of the next one must not save half of it.
            carried = dict(state or {})
            if len(losses) % workspace.every == 0 or len(losses) == steps:
                save()
    except KeyboardInterrupt:
        save()
        raise
    return losses


def _resume(
    parameters: Mapping[str, nn.Parameter],
    kind: Any,
    facts: Mapping[str, Any],
    workspace: Workspace,
    steps: int,
    state: dict[str, Tensor] | None,
) -> list[float]:
    """Load the last checkpoint of this very run, if there is one, into parameters, optimiser and state; the losses so far."""
    stored = workspace.load("descent")
    if stored is None or stored[1].get("facts") != facts or len(stored[1]["losses"]) > steps:
        return []
    tensors, told = stored
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
    for key, value in tensors.items():
        if key.startswith("carried/") and state is not None:
            name = key.removeprefix("carried/")
            state[name] = value.to(state[name].device)
        if key.startswith("state/"):
            _, what, name = key.split("/", 2)
            parameter = parameters[name]
            # Adam keeps its step count on the CPU and its moments beside the parameter.
            kind.state[parameter][what] = value.clone() if what == "step" else value.to(parameter.device).clone()
    return list(told["losses"])


def _follow(
    parameters: Mapping[str, nn.Parameter], kind: Any, losses: list[float], state: dict[str, Tensor] | None
) -> list[float]:
    """Where the first process goes on from, on all of them."""
    told = agree((losses, {name: p.detach().cpu() for name, p in parameters.items()}, kind.state_dict(), dict(state or {})))
    losses, tensors, optimizer, carried = told
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    kind.load_state_dict(optimizer)
    for name, value in carried.items():
        if state is not None:
            state[name] = value.to(state[name].device)
    return list(losses)
