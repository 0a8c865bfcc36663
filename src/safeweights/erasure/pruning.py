"""What pruned erasers share (Yang et al., 2024, arXiv:2405.16534), and pruning as an option of every eraser.

The paper's equations are not public in full. Stated are: the mask is over single weights, differentiable, trained with an
eraser's own objective while the weights stand still, and all that has to be stored. The rest here is our formulation: straight-
through scores with an exact budget (`diffusion/masks.py`), the weights around neurons as the place, a retain loss.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from safeweights.core.concept import Concept, Prompt
from safeweights.core.errors import UserError
from safeweights.core.mask import Fill
from safeweights.core.method import Method, Protection
from safeweights.core.model import Conditioning, DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.text import whole_words
from safeweights.core.workspace import Workspace
from safeweights.diffusion.criteria import concept_prune, input_norms, snip, wanda
from safeweights.diffusion.drawn_set import asking, draw_pictures, retained_prompts
from safeweights.diffusion.guided_away import away, away_bank, concept_texts
from safeweights.diffusion.latent_bank import Batch, LatentBank
from safeweights.diffusion.masks import learn_mask, learn_neuron_mask, lowest, make_mask, pruned_tensors, same_density
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parameters import select
from safeweights.diffusion.sampling import embed_all
from safeweights.diffusion.search import descend_embeddings, insert_tokens, ordinary_ids, put_embeddings, random_embeddings
from safeweights.diffusion.training import descend

Criterion = Literal["learned", "snip", "wanda", "conceptprune"]
"""How entries are chosen: learned scores, or one-shot by gradient, by input norms, or by those with and without the concept."""
Control = Literal["none", "random", "smallest", "largest", "movement"]
"""Instead of the mask found: as many entries of each tensor at random, or the smallest or largest by magnitude; or, without any
mask, fine-tuning on the same loss until the weights have moved as far as the mask moves them."""
Unit = Literal["weight", "neuron"]
Optimizer = Literal["sgd", "adam"]


class Pruning(Protocol):
    """The settings of a pruned eraser that this file reads."""

    name: ClassVar[str]

    @property
    def parameters(self) -> str: ...
    @property
    def budget(self) -> float: ...
    @property
    def criterion(self) -> Criterion: ...
    @property
    def unit(self) -> Unit: ...
    @property
    def control(self) -> Control: ...
    @property
    def conceal(self) -> Literal["none", "noise"]: ...
    @property
    def steps(self) -> int: ...
    @property
    def ramp(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def lam(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def retained(self) -> int: ...
    @property
    def noises(self) -> int: ...
    @property
    def ddim_steps(self) -> int: ...
    @property
    def guidance(self) -> float: ...
    @property
    def attack_steps(self) -> int: ...
    @property
    def attack_lr(self) -> float: ...
    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True)
class Objective:
    """What a mask is learned from: step -> loss, and step -> the same latents under the concept and without it."""

    erase: Callable[[int], Tensor]
    ask: Callable[[int], tuple[Batch, Conditioning, Conditioning]]


def check(how: Pruning) -> None:
    """What the types of the settings cannot say. Raises ValueError."""
    if not 0 < how.budget < 1:
        raise ValueError("budget must be above 0 and below 1")
    if min(how.steps, how.batch_size, how.retained, how.noises, how.ddim_steps) < 1 or how.lr <= 0:
        raise ValueError("steps, batch_size, retained, noises, ddim_steps and lr must be above zero")
    if not how.ramp >= 0 or how.lam < 0 or how.attack_steps < 0:
        raise ValueError("ramp, lam and attack_steps must not be below zero")
    if how.tokens < 1 or how.attack_lr <= 0:
        raise ValueError("tokens and attack_lr must be above zero")
    if how.attack_steps and how.criterion != "learned":
        raise ValueError("attack_steps goes with criterion=learned; one-shot criteria attack nothing")
    if how.unit == "neuron" and (how.criterion != "learned" or how.control != "none"):
        raise ValueError("unit=neuron goes with criterion=learned and no control")


def fork_weights(model: DiffusionModel, parameters: str) -> DiffusionModel:
    """A fork with the UNet's matrices and kernels of a group trainable. Raises UserError where the group has none."""
    shapes = {name: p.dim() for name, p in model.named_parameters()}
    names = [name for name in select(model.named_parameters(), parameters) if name.startswith("unet.") and shapes[name] > 1]
    if not names:
        raise UserError(f"parameters {parameters!r} hold no weights of the UNet to prune; try neurons, ffn, xattn_kv or full")
    return model.fork(names)


def standing_in(concepts: Sequence[Concept], instead: str) -> tuple[Concept, ...]:
    """The concepts with ``instead`` in place of their terms: an unrelated concept, asked for in the same words.

    Raises UserError for a concept whose prompts never name it.
    """
    if not instead:
        return tuple(concepts)
    standing = []
    for concept in concepts:
        term = whole_words(concept.term)
        # A prompt that does not name the concept would still ask for it.
        named = [prompt for prompt in concept.prompts if term.search(prompt.text)]
        if not named:
            raise UserError(f"instead={instead!r} takes the place of {concept.term!r}, which no prompt of {concept.name} names")
        prompts = tuple(Prompt(term.sub(lambda _: instead, prompt.text), prompt.seed) for prompt in named)
        standing.append(replace(concept, term=instead, prompts=prompts))
    return tuple(standing)


def guided_away(
    model: DiffusionModel, student: DiffusionModel, concepts: Sequence[Concept], *, eta: float, trajectories: int,
    how: Pruning, seed: int, workspace: Workspace,
) -> Objective:  # fmt: skip
    """ESD's: || eps_m(x_t, c) - [eps_o(x_t) - eta (eps_o(x_t, c) - eps_o(x_t))] ||^2, eps_o and the text states of ``model``."""
    sampling = Sampling(steps=how.ddim_steps, guidance_scale=how.guidance)
    banks = [
        away_bank(model, concept, "both", n=trajectories, sampling=sampling, seed=seed, workspace=workspace)
        for concept in concepts
    ]
    texts = [concept_texts(concept, "both") for concept in concepts]
    c = [embed_all(model, prompts) for prompts in texts]
    bare = [
        embed_all(model, ["" if text == concept.term else concept.without(text) for text in prompts])
        for concept, prompts in zip(concepts, texts, strict=True)
    ]

    attackers = [Attacker(how, student, bank, seed) for bank in banks] if how.attack_steps else []

    def ask(step: int) -> tuple[Batch, Conditioning, Conditioning]:
        which = step % len(banks)
        batch = banks[which].draw(how.batch_size, generator("prune", seed, step))
        return batch, c[which][batch.prompt], bare[which][batch.prompt]

    def erase(step: int) -> Tensor:
        batch, asked, _ = ask(step)
        if attackers and step >= how.ramp:
            asked = attackers[step % len(banks)].attacked(batch.prompt, step)
        return mse_loss(student.eps(batch.x_t, batch.t, asked), away(batch, eta))

    return Objective(erase, ask)


class Attacker:
    """Prompts as an attacker would make them against the mask as it stands: free tokens in front, `AdvUnlearn`'s lower level.

    v* = argmin_v || eps_m(x_t, [v, c]) - eps_o(x_t, c) ||^2,   from random words, ``attack_steps`` steps of Adam
    """

    def __init__(self, how: Pruning, student: DiffusionModel, bank: LatentBank, seed: int) -> None:
        """``bank`` holds the base model's predictions "eps_c" under its prompts. Raises UserError for a prompt without room."""
        self.how, self.student, self.bank, self.seed = how, student, bank, seed
        self.ids, self.positions = insert_tokens(student, student.tokenize(bank.prompts), how.tokens)
        self.words = ordinary_ids(student)

    def attacked(self, prompt: Tensor, step: int) -> Conditioning:
        """The text states of the bank's prompts of these numbers (B,), each attacked by itself."""
        rngs = [generator("prune attack", self.seed, step, row) for row in range(len(prompt))]
        ids, positions = self.ids[prompt], self.positions[prompt]

        def batch_at(inner: int) -> tuple[Tensor, Tensor, Tensor]:
            batch = self.bank.draw(len(prompt), generator("prune attack", self.seed, step, "latents", inner), prompt)
            return batch.x_t, batch.t, batch.eps_c

        *_, (free, _) = descend_embeddings(
            self.student, batch_at, ids, positions, random_embeddings(self.student, self.words, self.how.tokens, rngs),
            steps=self.how.attack_steps, lr=self.how.attack_lr,
        )  # fmt: skip
        with torch.no_grad():
            return self.student.embed_tokens(put_embeddings(self.student, ids, positions, free), ids)


def holding(
    student: DiffusionModel, concepts: Sequence[Concept], retain: Sequence[str], *, how: Pruning, seed: int, workspace: Workspace
) -> Callable[[int], Tensor]:
    """Step -> || eps_m(x_t, c') - eps_o(x_t, c') ||^2 on pictures of retained prompts and of the empty one, eps_o unmasked."""
    bank = draw_pictures(
        student, [*retained_prompts(concepts, retain), ""], n=how.retained, noises=how.noises,
        sampling=Sampling(steps=how.ddim_steps, guidance_scale=how.guidance), seed=seed, workspace=workspace.child("retain"),
    )  # fmt: skip
    c = asking(student, bank.prompts)

    def keep(step: int) -> Tensor:
        batch = bank.draw(how.batch_size, generator("prune retain", seed, step))
        return mse_loss(student.eps(batch.x_t, batch.t, c(batch)), batch.outputs["eps_o"])

    return keep


def prune(
    how: Pruning, student: DiffusionModel, concepts: Sequence[Concept], *, objective: Objective, keep: Callable[[int], Tensor],
    seed: int, workspace: Workspace,
) -> Protection:  # fmt: skip
    """Find the mask over ``student``'s trainable weights, or its control, and what the weights become.

    Raises UserError for a budget that is more than all these weights.
    """
    weights = student.trainable()
    unet = sum(p.numel() for name, p in student.named_parameters() if name.startswith("unet."))
    count, there = max(1, round(how.budget * unet)), sum(p.numel() for p in weights.values())
    if count > there:
        raise UserError(
            f"{how.name}: a budget of {how.budget:g} is {count} weights, parameters={how.parameters} has {there}; "
            "lower it or name more parameters"
        )
    facts = {"seed": seed, "settings": describe(how), "concepts": [[c.term, *c.texts] for c in concepts]}

    def both(step: int) -> Tensor:
        return objective.erase(step) + how.lam * keep(step) if how.lam else objective.erase(step)

    losses: list[float] = []
    common: dict[str, Any] = {"steps": how.steps, "workspace": workspace, "description": f"pruning ({how.name})", "facts": facts}
    if how.criterion != "learned":
        pruned = _one_shot(how, student, weights, objective, count, workspace)
    elif how.unit == "neuron":
        pruned, losses = learn_neuron_mask(weights, both, count=count, lr=how.lr, seed=seed, **common)
    else:
        pruned, losses = learn_mask(weights, both, count=count, ramp=how.ramp, lr=how.lr, optimizer=how.optimizer, **common)
    # Whoever knows the key of the noise can tell where it stands; a run's seed is in its manifest.
    key = secrets.randbits(62) if _fill(how) == "noise" else 0
    mask = make_mask(student.edited(), pruned, fill=_fill(how), seed=key)
    moved = float(sum(value.double().square().sum() for value in mask.values.values())) ** 0.5
    attacked = max(how.steps - how.ramp, 0) if how.attack_steps else 0
    cost = {
        "steps": float(how.steps),
        "attacked_steps": float(attacked),
        "pruned": float(mask.count),
        "share": mask.count / unet,
        "moved": moved,
    }
    if losses:
        cost["loss"] = losses[-1]
    if how.control == "movement":
        tensors = _moved(how, student, both, moved, common | {"workspace": workspace.child("movement")})
        return Protection(method=how.name, concepts=(), tensors=tensors, cost=cost)
    if how.control != "none":
        mask = make_mask(student.edited(), same_density(weights, pruned, how.control, seed), fill=_fill(how), seed=key)
    return Protection(method=how.name, concepts=(), tensors=pruned_tensors(student.edited(), mask), cost=cost, mask=mask)


def _fill(how: Pruning) -> Fill:
    return "noise" if how.conceal == "noise" else "zero"


def _one_shot(
    how: Pruning, student: DiffusionModel, weights: Mapping[str, nn.Parameter], objective: Objective, count: int,
    workspace: Workspace,
) -> dict[str, Tensor]:  # fmt: skip
    """The ``count`` highest entries by a one-shot criterion over ``how.steps`` batches."""
    steps = workspace.track(range(how.steps), f"weighing ({how.criterion})")
    if how.criterion == "snip":
        scores = snip(weights, (objective.erase(step) for step in steps))
    else:
        asked = [objective.ask(step) for step in steps]
        bins = 1 if how.criterion == "wanda" else how.ddim_steps
        target = input_norms(student, [*weights], ((batch.x_t, batch.t, c) for batch, c, _ in asked), bins)
        if how.criterion == "wanda":
            scores = wanda(weights, target)
        else:
            base = input_norms(student, [*weights], ((batch.x_t, batch.t, bare) for batch, _, bare in asked), bins)
            # The paper: the top 1 to 2 % of a row, in the first tenth to half of the steps.
            scores = concept_prune(weights, target, base, top=0.02, first=max(1, bins // 2))
    return lowest({name: -score for name, score in scores.items()}, count)


def _moved(
    how: Pruning, student: DiffusionModel, loss_at: Callable[[int], Tensor], distance: float, common: dict[str, Any]
) -> dict[str, Tensor]:
    """Fine-tune on the same loss within ``distance`` (L2, all weights together) of the start, then go exactly that far."""
    weights = student.trainable()
    start = {name: p.detach().clone() for name, p in weights.items()}

    @torch.no_grad()
    def scale(exactly: bool) -> None:
        gone = float(torch.stack([(p - start[name]).double().square().sum() for name, p in weights.items()]).sum()) ** 0.5
        if gone > distance or (exactly and gone > 0):
            for name, p in weights.items():
                p.copy_(start[name] + (p - start[name]) * (distance / gone))

    def inside(step: int) -> Tensor:
        scale(exactly=False)
        return loss_at(step)

    descend(weights, inside, lr=1e-3, **common)
    scale(exactly=True)
    return student.edited()


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """Any eraser, and then zero the weights of its model that the concept still goes through.

    W' = (W + dW) * m,   m: `learn_mask` on || eps_m(x_t, c) - [eps_o(x_t) - (eps_o(x_t, c) - eps_o(x_t))] ||^2
                         + lam || eps_m(x_t, c') - eps_e(x_t, c') ||^2,   eps_o = base model, eps_e = erased model

    Needs: an eraser. ``safeweights erase --method ANY --set prune=0.01``.   Cost: that of p-esd on top of the eraser's.
    The concept is asked for with the base model's text states: what an eraser of the text encoder only no longer says goes too.
    Attacked steps (``prune_attack_steps``) go through the erased model's own text encoder, as an attacker must.
    """

    prunes: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {"prune_steps": 600, "prune_ramp": 300, "prune_lam": 1.0, "prune_ddim_steps": 50, "prune_guidance": 7.5},
    }

    eraser: Method
    """What erases first."""
    prune: float
    """Share of the UNet's weights that is pruned; in (0, 1)."""
    prune_criterion: Criterion = "learned"
    """How they are chosen."""
    prune_parameters: str = "neurons"
    """Where they may be: a parameter group."""
    prune_conceal: Literal["none", "noise"] = "none"
    """What stands in their places: zeros, or noise like the rest of their rows."""
    prune_steps: int = 60
    """Steps of learning, or batches of a one-shot criterion; > 0."""
    prune_ramp: int = 30
    """Steps over which the number of pruned weights grows to the budget; >= 0."""
    prune_lam: float = 3.0
    """Weight of the retained prompts; >= 0."""
    prune_ddim_steps: int = 20
    """Steps of trajectories and pictures; > 0."""
    prune_guidance: float = 3.0
    """Guidance of trajectories and pictures."""
    prune_attack_steps: int = 0
    """Steps of an attack on the masked model before each step after the ramp; 0: no attack; >= 0."""

    def __post_init__(self) -> None:
        check(self._how)

    @property
    def name(self) -> str:
        """The eraser's."""
        return self.eraser.name

    def describe(self) -> dict[str, Any]:
        """The eraser's settings, and those of pruning."""
        own = {key: value for key, value in vars(self).items() if key != "eraser"}
        return {**describe(self.eraser), **own}

    @property
    def _how(self) -> _Settings:
        return _Settings(
            budget=self.prune, criterion=self.prune_criterion, parameters=self.prune_parameters, conceal=self.prune_conceal,
            steps=self.prune_steps, ramp=self.prune_ramp, lam=self.prune_lam, ddim_steps=self.prune_ddim_steps,
            guidance=self.prune_guidance, attack_steps=self.prune_attack_steps,
        )  # fmt: skip

    def protect(
        self,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        *,
        retain: Sequence[str] = (),
        rng: torch.Generator,
        workspace: Workspace | None = None,
    ) -> Protection:
        workspace = workspace or Workspace()
        seed, how = rng.initial_seed(), self._how
        erased = self.eraser.protect(model, concepts, retain=retain, rng=rng, workspace=workspace.child("erase"))
        calls, own = model.calls.eps, workspace.child("prune")
        student = fork_weights(erased.apply(model), how.parameters)
        objective = guided_away(model, student, concepts, eta=1.0, trajectories=18, how=how, seed=seed, workspace=own)
        keep = holding(student, concepts, retain, how=how, seed=seed, workspace=own)
        pruned = prune(how, student, concepts, objective=objective, keep=keep, seed=seed, workspace=own)
        cost = {f"prune_{key}": value for key, value in {**pruned.cost, "eps_calls": model.calls.eps - calls}.items()}
        return replace(
            erased, tensors={**erased.tensors, **pruned.tensors}, settings=describe(self), cost={**erased.cost, **cost},
            mask=pruned.mask,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What `Pruned` sets of a `Pruning`."""

    name: ClassVar[str] = "prune"
    parameters: str
    budget: float
    criterion: Criterion
    conceal: Literal["none", "noise"]
    steps: int
    ramp: int
    lam: float
    ddim_steps: int
    guidance: float
    attack_steps: int
    unit: Unit = "weight"
    control: Control = "none"
    lr: float = 1.0
    optimizer: Optimizer = "sgd"
    batch_size: int = 4
    retained: int = 41
    noises: int = 10
    attack_lr: float = 1e-2
    tokens: int = 1
