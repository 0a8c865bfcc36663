"""The adaptation step: what a way of fine-tuning moves, phi, and its loss on given pictures as a function of phi.

The user's command, the attack that re-learns and the inner loop of immunizers all take this one step. Everything is a function of
tensors, so that phi can be descended on (`training.descend`), or unrolled and differentiated (`unroll` and `at`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from safeweights.core.errors import UserError
from safeweights.core.launch import processes
from safeweights.core.model import Conditioning, DiffusionModel
from safeweights.core.text import whole_words
from safeweights.core.workspace import Workspace
from safeweights.diffusion.lean import lean
from safeweights.diffusion.low_rank import LowRank, beside
from safeweights.diffusion.noise import add_noise, eps_to_v, generator
from safeweights.diffusion.parameters import select
from safeweights.diffusion.sampling import embed_all
from safeweights.diffusion.search import insert_tokens, put_embeddings, term_ids
from safeweights.diffusion.training import descend

Phi = Mapping[str, Tensor]
"""What an adaptation moves, by name: weights by their own names, ``lora/<weight>/down|up``, ``token`` (k, D)."""
TOKEN = "token"
ATTENTION = r"unet\.(.*\.)?attn[12]\.to_(q|k|v|out\.0)\.weight"


@contextmanager
def at(model: DiffusionModel, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these values as its named parameters while inside; differentiable in them, the model itself unchanged.

    A part shared with another model (a fork's frozen half) is changed for both while inside.
    """
    parts = {"unet": model.denoiser, "text_encoder": model.text_encoder}
    kept: list[tuple[nn.Module, str, Any]] = []
    try:
        for name, tensor in tensors.items():
            part, _, path = name.partition(".")
            owner_path, _, leaf = path.rpartition(".")
            owner = parts[part].get_submodule(owner_path)
            kept.append((owner, leaf, owner._parameters[leaf]))
            owner._parameters[leaf] = tensor  # type: ignore[assignment]
        yield
    finally:
        for owner, leaf, parameter in reversed(kept):
            owner._parameters[leaf] = parameter


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention by plain matrix products while inside: the fused kernels have no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


@dataclass(frozen=True)
class Batch:
    """Noised pictures of a step: ``x_t``, ``eps`` (B, C, h, w), ``t``, ``weight`` (B,); ``rows`` of the lesson's captions."""

    x_t: Tensor
    t: Tensor
    eps: Tensor
    rows: tuple[int, ...]
    weight: Tensor
    """What each row counts; instance rows add up to one, prior rows to the prior's weight."""


@dataclass(frozen=True)
class Shots:
    """Pictures to learn from, encoded once: ``x_0`` (N, C, h, w) in float32, and the caption of each."""

    x_0: Tensor
    captions: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.x_0) != len(self.captions) or not len(self.x_0):
            raise UserError(f"there are {len(self.x_0)} pictures and {len(self.captions)} captions; give at least one of each")

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    @torch.no_grad()
    def encode(cls, model: DiffusionModel, images: Tensor, captions: Sequence[str], *, batch_size: int = 8) -> Shots:
        """Pictures (N, 3, H, W) in [0, 1] with N captions, or one for all."""
        if len(captions) == 1:
            captions = [*captions] * len(images)
        pieces = [model.encode(images[i : i + batch_size].to(model.device)) for i in range(0, len(images), batch_size)]
        return cls(torch.cat(pieces).float(), tuple(captions))


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A way of fine-tuning: which of three things move, alone or together.

    ``parameters``: the model's own weights: names, or a group or several ("full+text_encoder"; with the text encoder among them,
    captions are encoded anew at every step). ``targets``: low-rank factors of ``rank`` beside these weights (a pattern or names),
    W + alpha / rank up down. ``token``: a word of the captions whose place ``vectors`` free embeddings take.
    """

    parameters: str | tuple[str, ...] | None = None
    targets: str | tuple[str, ...] | None = None
    rank: int = 4
    alpha: float | None = None
    """None is the rank, so that up down counts once."""
    token: str | None = None
    init: str = ""
    """The words whose mean embedding the token starts from; "" is the mean of the whole vocabulary."""
    vectors: int = 1
    frozen: frozenset[str] = frozenset()
    """Names that may not move, nor have factors beside them."""

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def fork(self, model: DiffusionModel) -> DiffusionModel:
        """The model to adapt: a copy of what moves itself, in float32; nothing of it is trainable but through phi."""
        return model.fork(self.weights(model)) if self.parameters is not None else model

    def weights(self, model: DiffusionModel) -> list[str]:
        """The names of the weights that move themselves. Raises UserError where a freeze leaves none."""
        if self.parameters is None:
            return []
        named = [*model.named_parameters()]
        if not isinstance(self.parameters, str):
            return self._allowed(select(named, self.parameters))
        return self._allowed([name for group in self.parameters.split("+") for name in select(named, group)])

    def touches(self, model: DiffusionModel) -> list[str]:
        """The names of the weights that move, or that factors add to."""
        named = [*model.named_parameters()]
        names: list[str] = []
        if self.targets is not None:
            names = _matching(named, self.targets) if isinstance(self.targets, str) else select(named, self.targets)
        return [*self.weights(model), *(name for name in names if name not in self.frozen)]

    def low_rank(self, model: DiffusionModel, seed: int = 0) -> LowRank | None:
        """The factors beside the targets; None for an adapter without."""
        if self.targets is None:
            return None
        named = [*model.named_parameters()]
        names = _matching(named, self.targets) if isinstance(self.targets, str) else select(named, self.targets)
        # A deviation of 1 / rank is what diffusers' training scripts start their adapters with.
        return LowRank(model, self._allowed(names), rank=self.rank, seed=seed, deviation=1 / self.rank, scale=self.scale)

    def start(self, model: DiffusionModel, seed: int = 0) -> dict[str, nn.Parameter]:
        """phi before the first step, detached from the model: the model with it in is the model itself (but for the token)."""
        named = dict(model.named_parameters())
        phi = {name: nn.Parameter(named[name].detach().clone()) for name in self.weights(model)}
        if factors := self.low_rank(model, seed):
            phi |= {f"lora/{name}": value for name, value in factors.parameters().items()}
        if self.token is not None:
            rows = model.vocabulary.float()
            rows = rows[term_ids(model, self.init)] if self.init else rows
            phi[TOKEN] = nn.Parameter(rows.mean(0, keepdim=True).repeat(self.vectors, 1))
        return phi

    @contextmanager
    def on(self, model: DiffusionModel, phi: Phi) -> Iterator[None]:
        """The model with phi in it: its weights replaced, its factors at work. Differentiable in phi and in the model's own."""
        own = {name: value for name, value in phi.items() if name != TOKEN and not name.startswith("lora/")}
        with at(model, own), beside(model, _factors(phi), self.scale):
            yield

    def ask(self, model: DiffusionModel, captions: Sequence[str]) -> Callable[[Phi, Sequence[int]], Conditioning]:
        """(phi, rows) -> text states of these captions, to be called inside `on`; encoded once where nothing in phi changes them.

        Raises UserError for a caption that holds the token more than once.
        """
        captions = list(captions)
        held = [len(whole_words(self.token).findall(caption)) if self.token else 0 for caption in captions]
        if any(count > 1 for count in held):
            raise UserError(f"the caption {captions[held.index(max(held))]!r} holds {self.token!r} more than once; name it once")
        moving = any(name.startswith("text_encoder.") for name in self.touches(model))
        fixed = None if moving else embed_all(model, captions)
        ids, places = self._ids(model, [caption for caption, count in zip(captions, held, strict=True) if count])
        where = {row: i for i, row in enumerate(row for row, count in enumerate(held) if count)}

        def states(phi: Phi, rows: Sequence[int]) -> Conditioning:
            rows = list(rows)
            c = model.embed([captions[row] for row in rows]) if fixed is None else fixed[rows]
            told = [i for i, row in enumerate(rows) if row in where]
            if not told:
                return c
            mine = [where[rows[i]] for i in told]
            free = phi[TOKEN].expand(len(told), -1, -1)
            said = model.embed_tokens(put_embeddings(model, ids[mine], places[mine], free), ids[mine]).states
            return Conditioning(c.states.index_copy(0, torch.tensor(told, device=said.device), said.to(c.states.dtype)))

        return states

    @torch.no_grad()
    def tensors(self, model: DiffusionModel, phi: Phi) -> dict[str, Tensor]:
        """The weights of ``model`` that phi changes, factors merged, in float32."""
        merged = {name: value.detach() for name, value in phi.items() if name != TOKEN and not name.startswith("lora/")}
        if factors := self.low_rank(model):
            named = dict(model.named_parameters())
            for name, delta in factors.deltas(_factors(phi)).items():
                merged[name] = merged.get(name, named[name]).float() + delta
        return merged

    def _ids(self, model: DiffusionModel, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        if not captions or self.token is None:
            empty = torch.empty(0, 0, dtype=torch.long)
            return empty, empty
        # Apart from its neighbours, as a tokenizer that knows the word would read it: ">," is one piece to BPE.
        token = whole_words(self.token)
        captions = [token.sub(lambda _: f" {self.token} ", caption) for caption in captions]
        return insert_tokens(model, model.tokenize(captions), self.vectors, "replace", term_ids(model, self.token))

    def _allowed(self, names: Sequence[str]) -> list[str]:
        allowed = [name for name in names if name not in self.frozen]
        if not allowed:
            raise UserError("every weight this adaptation would move is frozen; choose another method or a smaller mask")
        return allowed


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One adaptation of one model on given pictures: draws its steps and gives their loss.

    ``prior`` are pictures of the class with captions that do not name what is learnt (prior preservation). ``model`` should be
    `Adapter.fork` of what is adapted. Step n of a seed is always the same batch.
    """

    model: DiffusionModel
    adapter: Adapter
    shots: Shots
    prior: Shots | None = None
    prior_weight: float = 1.0
    batch_size: int = 1
    seed: int = 0
    _ask: list[Any] = field(default_factory=list, repr=False)

    @property
    def captions(self) -> tuple[str, ...]:
        """Those of the shots, then those of the prior; ``Batch.rows`` count in it."""
        return self.shots.captions + (self.prior.captions if self.prior else ())

    def batch(self, *key: int | str) -> Batch:
        """``batch_size`` shots and, with a prior, as many of its pictures; ``key`` (the step) fixes every random draw."""
        rng = generator("adaptation", self.seed, *key)
        x_0, rows, weights = [], [], []
        for shots, first, weight in ((self.shots, 0, 1.0), (self.prior, len(self.shots), self.prior_weight)):
            if shots is None:
                continue
            drawn = torch.randint(len(shots), (self.batch_size,), generator=rng)
            x_0.append(shots.x_0[drawn.to(shots.x_0.device)])
            rows += [first + int(row) for row in drawn]
            weights += [weight / self.batch_size] * self.batch_size
        clean = torch.cat(x_0)
        t = torch.randint(len(self.model.alpha), (len(rows),), generator=rng).to(clean.device)
        eps = torch.randn(clean.shape, generator=rng).to(clean.device)
        return Batch(add_noise(self.model, clean, t, eps), t, eps, tuple(rows), torch.tensor(weights, device=clean.device))

    def loss(self, phi: Phi, batch: Batch) -> Tensor:
        """L(x, c; phi) = sum_b weight_b mean || target_b - prediction_b ||^2; the target is eps, or v for models that predict v.

        Differentiable in phi and, inside `at`, in the weights put there.
        """
        if not self._ask:
            self._ask.append(self.adapter.ask(self.model, self.captions))
        with self.adapter.on(self.model, phi), lean(self.model.denoiser):
            c = self._ask[0](phi, batch.rows)
            predicted = self.model.eps(batch.x_t, batch.t, c)
        return (errors(self.model, predicted, batch) * batch.weight).sum()


def _parted(batch: Batch) -> Batch:
    """This process's rows of a batch, weighted so that the mean over processes is the loss of the whole batch."""
    rank, size = processes()
    if size == 1 or len(batch.rows) % size:
        return batch
    mine = slice(rank, None, size)
    return Batch(batch.x_t[mine], batch.t[mine], batch.eps[mine], batch.rows[mine], batch.weight[mine] * size)


def errors(model: DiffusionModel, predicted: Tensor, batch: Batch) -> Tensor:
    """Mean squared error (B,) of noise predictions (B, C, h, w), in the space the model's weights predict: eps or v."""
    ours, theirs = predicted.float(), batch.eps.float()
    if model.prediction == "v_prediction":
        ours, theirs = (eps_to_v(model, eps, batch.x_t.float(), batch.t) for eps in (ours, theirs))
    return (ours - theirs).square().flatten(1).mean(1)


def unroll(
    loss: Callable[[Phi], Tensor], phi: Phi, *, lr: float, order: int = 1, update: Callable[[str, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """phi' = phi - lr grad loss(phi), one plain gradient step as a function of phi (and of all the loss depends on).

    ``order`` 2 keeps the graph, so that phi' can be differentiated exactly (call inside `twice_differentiable`); 1 takes the
    gradient for a constant, so that d phi' / d phi is the identity. ``update`` (name, gradient) -> direction of the step makes it
    another optimiser's; it must be differentiable for order 2.
    """
    if order not in (1, 2):
        raise ValueError("order must be 1 or 2")
    moving = {name: value if value.requires_grad else value.detach().requires_grad_() for name, value in phi.items()}
    with torch.enable_grad():
        value = loss(moving)
        gradients = torch.autograd.grad(value, list(moving.values()), create_graph=order == 2, allow_unused=True)
    turned = update or (lambda name, gradient: gradient)
    steps = zip(moving.items(), gradients, strict=True)
    return {name: start if gradient is None else start - lr * turned(name, gradient) for (name, start), gradient in steps}


def clip(phi: Mapping[str, nn.Parameter], limit: float) -> Callable[[int], None]:
    """For ``descend``'s ``gradients``: scale all gradients together to a norm of at most ``limit``."""

    def scale(step: int) -> None:
        torch.nn.utils.clip_grad_norm_(list(phi.values()), limit)

    return scale


def _factors(phi: Phi) -> dict[str, Tensor]:
    return {name.removeprefix("lora/"): value for name, value in phi.items() if name.startswith("lora/")}


def _matching(named: Sequence[tuple[str, Any]], wanted: str) -> list[str]:
    import re

    found = [name for name, _ in named if re.fullmatch(wanted, name)]
    if not found:
        raise UserError(f"no weight of this model matches {wanted!r}; name layers as the model does")
    return found


@dataclass(frozen=True)
class Adapted:
    """What an adaptation came to: ``phi`` after so many steps, and the loss of every step."""

    adapter: Adapter
    phi: Phi
    steps: int
    losses: tuple[float, ...]

    def apply(self, model: DiffusionModel) -> DiffusionModel:
        """``model`` with the adapted weights merged in; a learnt token stays outside, see `states`."""
        return model.with_tensors(self.adapter.tensors(model, self.phi))

    @torch.no_grad()
    def states(self, model: DiffusionModel, prompts: Sequence[str]) -> Conditioning:
        """The text states of prompts, which may hold the learnt token, in the adapted model ``model``."""
        fixed = replace(self.adapter, parameters=None, targets=None)
        return fixed.ask(model, prompts)(self.phi, range(len(prompts)))


def fit(
    lesson: Lesson,
    *,
    steps: int,
    lr: float,
    optimizer: str = "adamw",
    weight_decay: float = 1e-2,
    max_norm: float = 1.0,
    checkpoints: Sequence[int] = (),
    workspace: Workspace | None = None,
    facts: Mapping[str, Any] | None = None,
) -> list[Adapted]:
    """Descend on a lesson for ``steps`` steps: what it came to after each number of steps in ``checkpoints``, and at the end.

    The learning rate is constant and gradients are scaled to ``max_norm`` together. Resumed exactly from ``workspace``; ``facts``
    tell runs apart, as for `descend`.
    """
    workspace = workspace or Workspace()
    phi = lesson.adapter.start(lesson.model, lesson.seed)
    described = {"seed": lesson.seed, "captions": list(lesson.captions), **(facts or {})}
    kept: dict[int, dict[str, Tensor]] = {}

    def keep(step: int) -> None:
        kept[step] = {name: value.detach().clone() for name, value in phi.items()}
        workspace.save(f"after-{step}", kept[step], described)

    def loss_at(step: int) -> Tensor:
        if step in checkpoints:
            keep(step)
        return lesson.loss(phi, _parted(lesson.batch(step)))

    losses = descend(
        phi,
        loss_at,
        steps=steps,
        lr=lr,
        optimizer=optimizer,
        weight_decay=weight_decay,
        workspace=workspace,
        description="adapting",
        facts=described,
        gradients=clip(phi, max_norm),
    )
    keep(steps)
    found = []
    for step in sorted({*(step for step in checkpoints if step < steps), steps}):
        # A resumed run passed its first checkpoints in an earlier life.
        stored = kept.get(step) or (workspace.load(f"after-{step}") or ({}, {}))[0]
        moved = {name: value.to(lesson.model.device) for name, value in stored.items()}
        found.append(Adapted(lesson.adapter, moved, step, tuple(losses[:step])))
    return found
