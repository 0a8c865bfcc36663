"""Train a small model on a few processor cores: one process a core, shared memory, exact continuation.

Every worker reads the same shared parameters and writes its own gradient; then each updates the tensors it owns
(Muon for matrices, Adam for the rest) and the next step begins. Two processes of one thread each are faster here
than one process of two threads. All randomness is a function of (seed, step, rank), so a run that was killed
continues from its last checkpoint to bit-identical weights.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from safeweights.core.errors import UserError
from safeweights.core.workspace import Workspace

BARRIER_SECONDS = 600.0
STATE = ("weights", "average", "first", "second")
"""What of `_Flat` the next step depends on."""


class Task(Protocol):
    """A model and the loss of one worker's share of a batch."""

    @property
    def model(self) -> nn.Module: ...

    def loss(self, step: int, rank: int, workers: int) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How to optimise."""

    steps: int
    muon_lr: float = 1.5e-3
    """Peak rate for matrices; an update has root mean square 0.2 times this."""
    adam_lr: float = 1e-3
    """Peak rate for biases, norms, embeddings and the outermost layers."""
    warmup: int = 100
    ema: float = 0.998
    """Decay of the averaged weights; 0 keeps the last ones."""
    clip: float = 1.0
    """Largest norm of each worker's gradient."""
    seed: int = 0


Report = Callable[[int, float], None]


def _is_matrix(name: str, parameter: Tensor) -> bool:
    outermost = ("embedding", "conv_in", "conv_out", "position", "classifier", "heads")
    return parameter.ndim >= 2 and not any(word in name for word in outermost)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices to a batch (..., m, n), roughly: five Newton-Schulz steps."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    turned: Tensor = x.mT if tall else x
    return turned


@dataclass
class _Flat:
    """All parameters of a model, one after the other, in shared memory."""

    weights: Tensor
    average: Tensor
    first: Tensor  # momentum, or Adam's first moment
    second: Tensor  # Adam's second moment
    gradients: Tensor  # (workers, size)

    @staticmethod
    def of(model: nn.Module, workers: int) -> _Flat:
        start = torch.cat([p.detach().reshape(-1).float() for p in model.parameters()])
        zeros = [torch.zeros_like(start) for _ in range(2)]
        gradients = torch.zeros(workers, start.numel())
        flat = _Flat(start, start.clone(), zeros[0], zeros[1], gradients)
        for tensor in vars(flat).values():
            tensor.share_memory_()
        return flat

    def attach(self, model: nn.Module, rank: int) -> None:
        """Make the model's parameters and gradients views of these."""
        place = 0
        for p in model.parameters():
            end = place + p.numel()
            p.data = self.weights[place:end].view(p.shape)
            p.grad = self.gradients[rank, place:end].view(p.shape)
            place = end


class _Optimizer:
    """Updates the tensors that one worker owns."""

    def __init__(self, model: nn.Module, flat: _Flat, fitting: Fitting, rank: int, workers: int) -> None:
        self._flat, self._fitting = flat, fitting
        self._rest: list[tuple[int, int]] = []
        shapes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        place = 0
        for name, p in model.named_parameters():
            span = (place, place + p.numel())
            place = span[1]
            if _is_matrix(name, p):
                shapes.setdefault((p.shape[0], p.numel() // p.shape[0]), []).append(span)
            elif rank == 0:
                self._rest.append(span)
        # Every shape's matrices are dealt out in turn; the heaviest shapes first, so that the shares are alike.
        dealt = 0
        self._matrices: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for shape in sorted(shapes, key=lambda s: -s[0] * s[1] * min(s)):
            for span in shapes[shape]:
                if dealt % workers == rank:
                    self._matrices.setdefault(shape, []).append(span)
                dealt += 1

    def rate(self, step: int) -> float:
        """Share of the peak learning rate: a short rise, then a half cosine."""
        f = self._fitting
        rise = min(1.0, (step + 1) / max(1, min(f.warmup, f.steps // 4)))
        return rise * 0.5 * (1 + float(torch.cos(torch.tensor(step / f.steps * torch.pi, dtype=torch.float64))))

    def step(self, step: int) -> None:
        f, flat, rate = self._fitting, self._flat, self.rate(step)
        for (rows, columns), spans in self._matrices.items():
            updates = []
            for a, b in spans:
                gradient = flat.gradients[:, a:b].mean(0)
                momentum = flat.first[a:b].mul_(0.95).add_(gradient)
                updates.append(gradient.add_(momentum, alpha=0.95).view(rows, columns))
            turned = orthogonal(torch.stack(updates)) * (f.muon_lr * rate * 0.2 * max(rows, columns) ** 0.5)
            for (a, b), update in zip(spans, turned, strict=True):
                flat.weights[a:b].sub_(update.reshape(-1))
                self._follow(step, a, b)
        for a, b in self._rest:
            gradient = flat.gradients[:, a:b].mean(0)
            first = flat.first[a:b].lerp_(gradient, 0.1) / (1 - 0.9 ** (step + 1))
            second = flat.second[a:b].lerp_(gradient * gradient, 0.02) / (1 - 0.98 ** (step + 1))
            flat.weights[a:b].sub_(first / (second.sqrt() + 1e-8), alpha=f.adam_lr * rate)
            self._follow(step, a, b)

    def _follow(self, step: int, a: int, b: int) -> None:
        decay = min(self._fitting.ema, (1 + step) / (10 + step)) if self._fitting.ema else 0.0
        self._flat.average[a:b].lerp_(self._flat.weights[a:b], 1 - decay)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread inside, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _steps(
    task: Task,
    flat: _Flat,
    fitting: Fitting,
    rank: int,
    workers: int,
    start: int,
    barrier: Any,
    after: Callable[[int, float], None],
) -> None:
    flat.attach(task.model, rank)
    optimizer = _Optimizer(task.model, flat, fitting, rank, workers)
    task.model.train()
    mine = flat.gradients[rank]
    for step in range(start, fitting.steps):
        mine.zero_()
        loss = task.loss(step, rank, workers)
        loss.backward()  # type: ignore[no-untyped-call]
        value = float(loss.detach())
        mine.mul_(min(1.0, fitting.clip / (float(mine.norm()) + 1e-6)))
        if barrier is not None:
            barrier.wait(BARRIER_SECONDS)  # every gradient is there
        optimizer.step(step)
        if barrier is not None:
            barrier.wait(BARRIER_SECONDS)  # every parameter is new
        after(step, value)


def die_with(parent: int) -> None:
    """End this process when its parent ends, so that a killed training leaves no orphan."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _worker(
    make: Callable[[], Task], flat: _Flat, fitting: Fitting, rank: int, workers: int, start: int, barrier: Any, pid: int
) -> None:
    threading.Thread(target=die_with, args=(pid,), daemon=True).start()
    torch.set_num_threads(1)
    _steps(make(), flat, fitting, rank, workers, start, barrier, lambda step, loss: None)


def load(checkpoint: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors of a checkpoint (the flat "weights", "average", "first", "second", and "buffer/<name>") and its step."""
    kept = Workspace(checkpoint.parent).load(checkpoint.stem)
    if kept is None:
        raise UserError(f"{checkpoint} is missing; run the training stage that writes it first")
    tensors, facts = kept
    return tensors, int(facts["step"])


def _set_buffers(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(tensors[f"buffer/{name}"])


def averaged(model: nn.Module, checkpoint: Path) -> int:
    """Load a checkpoint's averaged weights (and buffers) into a fresh model; the number of steps it has seen."""
    tensors, step = load(checkpoint)
    place = 0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(tensors["average"][place : place + p.numel()].view(p.shape))
            place += p.numel()
        _set_buffers(model, tensors)
    return step


def fit(
    make: Callable[[], Task],
    checkpoint: Path,
    fitting: Fitting,
    *,
    workers: int = 2,
    report: Report | None = None,
    checkpoint_seconds: float = 120.0,
) -> nn.Module:
    """Optimise the task's model and return it with the averaged weights.

    `make` builds the task and must be picklable when `workers` > 1, since every further worker calls it for itself.
    Continues from `checkpoint`, a ``.safetensors`` file, where it exists; the result does not depend on how often it was
    interrupted.
    Models with buffers that training changes (batch norm) need `workers=1`.
    """
    with one_thread():
        torch.manual_seed(fitting.seed)
        task = make()
        start = 0
        flat = _Flat.of(task.model, workers)
        if checkpoint.exists():
            tensors, start = load(checkpoint)
            for name in STATE:
                getattr(flat, name).copy_(tensors[name])
            _set_buffers(task.model, tensors)

        def save(step: int) -> None:
            state = {name: getattr(flat, name) for name in STATE}
            buffers = {f"buffer/{name}": buffer for name, buffer in task.model.named_buffers()}
            Workspace(checkpoint.parent).save(checkpoint.stem, {**state, **buffers}, {"step": step})

        last = time.monotonic()

        def after(step: int, loss: float) -> None:
            nonlocal last
            if report is not None:
                report(step + 1, loss)
            if time.monotonic() - last > checkpoint_seconds or step + 1 == fitting.steps:
                save(step + 1)
                last = time.monotonic()

        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if start < fitting.steps:
            context = torch.multiprocessing.get_context("spawn")
            barrier = context.Barrier(workers) if workers > 1 else None
            others = [
                context.Process(target=_worker, args=(make, flat, fitting, r, workers, start, barrier, os.getpid()), daemon=True)
                for r in range(1, workers)
            ]
            for process in others:
                process.start()
            try:
                _steps(task, flat, fitting, 0, workers, start, barrier, after)
            except threading.BrokenBarrierError as error:
                raise UserError("a training process has gone away; run the same command again to go on") from error
            finally:
                for process in others:
                    process.join(30)
                    if process.is_alive():
                        process.terminate()
        for p in task.model.parameters():
            p.grad = None
        averaged(task.model, checkpoint)
        return task.model.eval()
