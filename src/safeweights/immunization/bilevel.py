"""What all immunizers share: users are simulated while they adapt the model, and the model moves so that they fail.

Of every step of such a user only what the model itself took is kept; the user's own weights are a look-ahead and never enter it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from safeweights.core.concept import Concept
from safeweights.core.errors import UserError
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.text import whole_words
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import ATTENTION, TOKEN, Adapter, Batch, Lesson, Phi, Shots, at, clip, errors, unroll
from safeweights.diffusion.adaptation import twice_differentiable as doubly
from safeweights.diffusion.drawn_set import retained_prompts
from safeweights.diffusion.merging import Merge, concept_features, text_features
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parameters import pattern, select
from safeweights.diffusion.sampling import embed_all
from safeweights.diffusion.shots import concept_shots, drawn_shots
from safeweights.diffusion.training import descend

Kind = Literal["lora", "full", "textual-inversion", "custom-diffusion"]
Level = Literal["lower", "upper", "keep"]
BETAS = (0.9, 0.999)
STEADY = 0.03
"""Adam's step of an entry is differentiated where its gradients are at least this part of its tensor's."""


@dataclass(frozen=True, kw_only=True)
class Bilevel:
    """The settings and the loop of the two-level problem; a method says who adapts and how the adapted weights are joined."""

    name: ClassVar[str]

    parameters: str = "full"
    """What is immunized, S_u: attention, xattn (attn2 only), full, or another parameter group of the UNet."""
    adaptations: tuple[Kind, ...] = ("lora",)
    """How the simulated users adapt, one way an episode, in turn: lora, full, textual-inversion, custom-diffusion."""
    inner_lrs: tuple[float, ...] = (3e-3,)
    """The users' learning rates: one for each adaptation, or one for all; > 0."""
    lr_scales: tuple[float, ...] = (1.0,)
    """Factors of the users' learning rate, one drawn for each episode; > 0."""
    captions: tuple[Literal["own", "without"], ...] = ("own",)
    """What users call their pictures, drawn for each episode: their own captions, or those without the concept."""
    user_pictures: tuple[int, ...] = ()
    """How many of their pictures users have, drawn for each episode together with which; empty is all of them, each > 0."""
    inner: Literal["adam", "sgd"] = "adam"
    """The users' optimiser. Both of Adam's moments are differentiated with order 2."""
    horizon: int = 50
    """Steps of an episode, after which users start anew; 0: nobody adapts, the loss is raised directly; >= 0."""
    inner_steps: int = 1
    """Steps a user takes for each of the model's; the last one is differentiated; > 0."""
    order: Literal[1, 2] = 1
    """2 differentiates the users' last step exactly; 1 takes its gradient for a constant."""
    rank: int = 4
    """Rank of simulated low-rank adapters; > 0."""
    upper: Literal["ascent", "bounded", "still"] = "bounded"
    """What the model wants after adaptation: a high loss (the papers), one no higher than ``bound``, or to predict as before."""
    bound: float = 1.0
    """Where a bounded loss stops rising, of each noisy picture; noise predicted as zero has a loss of 1; > 0."""
    steps: int = 200
    """Steps of the model; > 0."""
    lr: float = 2e-4
    """AdamW's learning rate for the model; > 0."""
    weight_decay: float = 0.0
    """AdamW's weight decay; >= 0."""
    clip: float = 1.0
    """Largest norm of the model's gradient; > 0."""
    keep: float = 25.0
    """Weight of predicting as before on pictures of what is retained; >= 0. Far above 1, since predictions differ by little."""
    benign: float = 0.0
    """Weight of a user who adapts to half of the retained pictures and should succeed on the other half; >= 0."""
    self_destruct: float = 0.0
    """Weight of the cosine between the gradients for the concept and for what is retained; >= 0. Costs second derivatives."""
    batch_size: int = 4
    """Noisy pictures a step and level, for each concept; > 0."""
    pictures: int = 32
    """Pictures of each concept, half for each level; > 1."""
    retained: int = 64
    """Pictures of what is retained, of the prompts in turn, drawn once where a weight needs them; fewer than there are prompts
    leave the last ones out; > 1."""
    ddim_steps: int = 20
    """DDIM steps of a drawn picture; > 0."""
    guidance: float = 4.0
    """Guidance of drawn pictures."""

    def __post_init__(self) -> None:
        counts = (self.steps, self.inner_steps, self.rank, self.batch_size, self.ddim_steps)
        positive = (self.lr, self.bound, self.clip, *self.inner_lrs, *self.lr_scales)
        if min(counts) < 1 or min(positive) <= 0:
            raise ValueError("steps, inner_steps, rank, batch_size, ddim_steps, bound, clip and every rate must be above zero")
        if min(self.horizon, self.weight_decay, self.keep, self.benign, self.self_destruct) < 0:
            raise ValueError("horizon, weight_decay, keep, benign and self_destruct must not be negative")
        if min(self.user_pictures, default=1) < 1:
            raise ValueError("user_pictures must be above zero")
        if min(self.pictures, self.retained) < 2:
            raise ValueError("pictures and retained must be at least two, one for each level")
        if not self.adaptations or not self.captions or len(self.inner_lrs) not in (1, len(self.adaptations)):
            raise ValueError(
                "give at least one adaptation and caption, and one inner learning rate for each adaptation or for all"
            )

    def groups(self, concepts: Sequence[Concept]) -> list[list[int]]:
        """The concepts (by place) that each simulated user learns."""
        raise NotImplementedError

    def fuse(self, features: Sequence[Tensor], regular: Tensor) -> Merge:
        """The merge of several users' weights, from token features of their concepts and of ordinary text."""
        raise NotImplementedError

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
        seed, calls = rng.initial_seed(), model.calls.eps
        pattern(self.parameters)  # a wrong name is told before anything is drawn
        if any(name.startswith("text_encoder.") for name in select(model.named_parameters(), self.parameters)):
            raise UserError(f"{self.name}: parameters must be a group of the UNet; the users' captions are encoded once")
        game = Game(self, model, concepts, retain, seed, workspace)
        losses = descend(
            game.student.trainable(),
            game.loss_at,
            steps=self.steps,
            lr=self.lr,
            weight_decay=self.weight_decay,
            optimizer="adamw",
            workspace=workspace,
            description=f"immunizing ({self.name})",
            facts={
                "seed": seed, "concepts": [concept.name for concept in concepts], "texts": [c.texts for c in concepts],
                "method": self.name, "retain": list(retain), "settings": describe(self),
            },
            gradients=clip(game.student.trainable(), self.clip),
            state=game.state,
        )  # fmt: skip
        return Protection(
            method=self.name,
            concepts=tuple(concept.name for concept in concepts),
            tensors=game.student.edited(),
            settings=describe(self),
            cost={"steps": self.steps, "eps_calls": model.calls.eps - calls, "loss": losses[-1]},
        )


@dataclass(frozen=True, kw_only=True)
class Merging(Bilevel):
    """What methods that merge share: how the closed form is steadied."""

    ridge: float = 1e-2
    """Steadies the merge where concepts share tokens, in parts of the mean diagonal; 0 meets every constraint exactly; >= 0."""
    prior: float = 1e-1
    """The same for the directions that ordinary text hardly uses, which the merge would else blow up; > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ridge < 0 or self.prior <= 0:
            raise ValueError("ridge must not be negative and prior must be above zero")

    def fuse(self, features: Sequence[Tensor], regular: Tensor) -> Merge:
        return Merge.fit(features, regular, ridge=self.ridge, prior=self.prior)


@dataclass(frozen=True)
class Episode:
    """How users adapt until they start anew."""

    number: int
    kind: Kind
    lr: float
    captions: str
    pictures: int | None = None
    """Of each concept; None is all there are."""


class Game:
    """One run: the student, the users' lessons, and how far each of them is (``state``, carried from step to step)."""

    def __init__(
        self,
        method: Bilevel,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        retain: Sequence[str],
        seed: int,
        workspace: Workspace,
    ) -> None:
        self.method, self.base, self.concepts, self.seed = method, model, list(concepts), seed
        self.student = model.fork(method.parameters)
        sampling = Sampling(steps=method.ddim_steps, guidance_scale=method.guidance)
        lower: list[Shots] = []
        upper: list[Shots] = []
        for concept in concepts:
            rng = generator("immunization pictures", seed, concept.name)
            folder = workspace.child(concept.name)
            shots = concept_shots(model, concept, n=method.pictures, sampling=sampling, seed=rng.initial_seed(), workspace=folder)
            for half, part in zip((lower, upper), halves(shots, rng), strict=True):
                half.append(part)
        self.lower, self.upper = lower, upper
        self.users = method.groups(concepts)
        self.merge: Merge | None = None
        if len(self.users) > 1:
            features = [concept_features(model, concept) for concept in concepts]
            self.merge = method.fuse(features, text_features(model, retained_prompts(concepts, retain)))
        self.keys_and_values = select(model.named_parameters(), "xattn_kv")
        self.retained: dict[Level, Shots] = {}
        if max(method.keep, method.benign, method.self_destruct) > 0:
            rng = generator("immunization retained", seed)
            kept = drawn_shots(
                model, retained_prompts(concepts, retain), n=method.retained, sampling=sampling, seed=rng.initial_seed(),
                workspace=workspace.child("retained"),
            )  # fmt: skip
            self.retained["keep"] = kept  # all of them, also where a user learns a half: a half leaves prompts out
            if method.benign > 0:
                self.retained["lower"], self.retained["upper"] = halves(kept, rng)
        self.lessons: dict[tuple[Any, ...], Lesson] = {}
        self.asks: dict[tuple[int, bool], tuple[Any, Any]] = {}
        self.names: dict[tuple[int, str], list[str]] = {}
        self.state = self._state()

    # who adapts

    def episode(self, step: int) -> Episode:
        """The episode of a step: its way of adapting is the next in turn, its rate and captions are drawn."""
        method, number = self.method, step // max(self.method.horizon, 1)
        which = number % len(method.adaptations)
        rng = generator("immunization episode", self.seed, number)
        scale = method.lr_scales[int(torch.randint(len(method.lr_scales), (), generator=rng))]
        captions = method.captions[int(torch.randint(len(method.captions), (), generator=rng))]
        lr = method.inner_lrs[which % len(method.inner_lrs)] * scale
        if not method.user_pictures:
            return Episode(number, method.adaptations[which], lr, captions)
        count = method.user_pictures[int(torch.randint(len(method.user_pictures), (), generator=rng))]
        return Episode(number, method.adaptations[which], lr, captions, count)

    def adapter(self, kind: Kind, concept: Concept | None) -> Adapter:
        """One user's way of adapting. A token takes the place of the concept's term in the captions."""
        if kind == "lora":
            return Adapter(targets=ATTENTION, rank=self.method.rank)
        if kind == "full":
            return Adapter(parameters="full")
        weights = "xattn_kv" if kind == "custom-diffusion" else None
        if concept is None:
            return Adapter(parameters=weights)
        return Adapter(parameters=weights, token=concept.term, init=_word(concept))

    def lesson(self, level: Level, n: int | None, episode: Episode) -> Lesson:
        """What a concept (None: what is retained) asks of a user, of the model after the user's step, or of the model itself."""
        key: tuple[Any, ...] = (level, n, episode.kind, episode.captions)
        if few := level == "lower" and n is not None and episode.pictures is not None:
            key = (*key, episode.number)
        if key not in self.lessons:
            concept = None if n is None else self.concepts[n]
            if n is None:
                shots = self.retained[level]
            else:
                shots = (self.lower if level == "lower" else self.upper)[n]
                if few:
                    order = torch.randperm(len(shots), generator=generator("immunization user", self.seed, episode.number, n))
                    mine = order[: episode.pictures].tolist()
                    shots = Shots(shots.x_0[mine], tuple(shots.captions[i] for i in mine))
            if concept is not None and episode.captions == "without" and episode.kind not in TOKENS:
                shots = replace(shots, captions=tuple(concept.without(caption) for caption in shots.captions))
            if concept is not None and episode.kind in TOKENS:
                shots = replace(shots, captions=tuple(named_once(text, concept.term) for text in shots.captions))
            adapter = self.adapter(episode.kind, concept)
            if level != "lower":
                # The weights are joined and put in place before; only the learnt word is still the user's own.
                adapter = Adapter(token=adapter.token, init=adapter.init)
            self.lessons[key] = Lesson(
                model=self.student, adapter=adapter, shots=shots, batch_size=self.method.batch_size, seed=self.seed
            )
        return self.lessons[key]

    def start(self, user: int, episode: Episode) -> dict[str, Tensor]:
        """phi before the first step, weights as offsets from the model's: nothing is adapted."""
        phi: dict[str, Tensor] = {}
        for n in self._members(user):
            adapter = self.adapter(episode.kind, None if n is None else self.concepts[n])
            for name, value in adapter.start(self.student, seed=self.seed + episode.number).items():
                if name == TOKEN:
                    phi[f"{TOKEN}/{n}"] = value.detach()
                else:
                    phi[name] = value.detach() if name.startswith("lora/") else torch.zeros_like(value)
        return phi

    def _members(self, user: int) -> list[int | None]:
        """The concepts a user learns; the last user of all is the benign one."""
        return [*self.users[user]] if user < len(self.users) else [None]

    def _state(self) -> dict[str, Tensor]:
        """Room for all that is carried: every user's phi and Adam's two moments, for every way of adapting."""
        state: dict[str, Tensor] = {}
        for user in range(len(self.users) + (self.method.benign > 0)):
            for kind in self.method.adaptations:
                phi = self.start(user, Episode(0, kind, 0.0, "own"))
                self.names[user, kind] = list(phi)
                for name, value in phi.items():
                    state |= {f"{user}/{what}/{name}": torch.zeros_like(value) for what in self._carried()}
        return state

    def _carried(self) -> tuple[str, ...]:
        return ("phi", "m", "v") if self.method.inner == "adam" else ("phi",)

    # the two levels

    def look_ahead(self, user: int, step: int, episode: Episode) -> dict[str, Tensor]:
        """Where a user's phi is after this step's own steps; what is carried on is detached from it."""
        method = self.method
        done = step % max(method.horizon, 1) * method.inner_steps
        if done == 0:
            fresh = self.start(user, episode)
            kept = {"phi": fresh, **{what: {k: torch.zeros_like(x) for k, x in fresh.items()} for what in self._carried()[1:]}}
        else:
            names = self.names[user, episode.kind]
            kept = {what: {name: self.state[f"{user}/{what}/{name}"] for name in names} for what in self._carried()}
        phi: dict[str, Tensor] = kept["phi"]
        if method.horizon == 0 or not phi:
            return phi
        for k in range(method.inner_steps):
            last, count = k == method.inner_steps - 1, done + k + 1

            def turned(name: str, g: Tensor, count: int = count) -> Tensor:
                if method.inner == "sgd":
                    return g
                # Where an entry's gradient is next to nothing, its step jumps with its sign and has no derivative worth having.
                past = BETAS[1] * kept["v"][name]
                told = (past + (1 - BETAS[1]) * g.detach().square()).sqrt()
                g = torch.where(told > STEADY * told.square().mean().sqrt(), g, g.detach())
                m = BETAS[0] * kept["m"][name] + (1 - BETAS[0]) * g
                # v is no constant: Adam's first step is the sign of the gradient, whose derivative is zero and not 1 / |g|.
                v = past + (1 - BETAS[1]) * g.square()
                kept["m"][name], kept["v"][name] = m.detach(), v.detach()
                # The root has no derivative at zero; the floor is far below Adam's eps.
                size = (v / (1 - BETAS[1] ** count)).clamp(min=1e-24).sqrt()
                return (m / (1 - BETAS[0] ** count)) / (size + 1e-8)

            def loss(moving: Phi, k: int = k) -> Tensor:
                return self.learning(user, moving, (step, k), episode)

            phi = unroll(loss, phi, lr=episode.lr, order=method.order if last else 1, update=turned)
            if not last or method.order == 1:
                phi = {name: value.detach() for name, value in phi.items()}
        kept["phi"] = {name: value.detach() for name, value in phi.items()}
        for what, values in kept.items():
            self.state.update({f"{user}/{what}/{name}": value for name, value in values.items()})
        return phi

    def learning(self, user: int, phi: Phi, when: Sequence[int], episode: Episode) -> Tensor:
        """The lower loss: the mean over what this user learns of L(x_l, c; theta, phi)."""
        weights = dict(self.student.named_parameters())
        moved = {name: weights[name] + value for name, value in phi.items() if name in weights}
        factors = {name: value for name, value in phi.items() if name.startswith("lora/")}
        losses = []
        for n in self._members(user):
            lesson = self.lesson("lower", n, episode)
            token = {TOKEN: phi[f"{TOKEN}/{n}"]} if f"{TOKEN}/{n}" in phi else {}
            losses.append(lesson.loss({**moved, **factors, **token}, lesson.batch("lower", _name(n), *when)))
        return torch.stack(losses).mean()

    def tuned(self, phi: Phi, episode: Episode) -> dict[str, Tensor]:
        """theta' of one user: the model's weights with the offsets and the products of the factors added, differentiable."""
        weights = dict(self.student.named_parameters())
        moved = {name: weights[name] + value for name, value in phi.items() if name in weights}
        scale = self.adapter(episode.kind, None).scale
        for key in (key for key in phi if key.startswith("lora/") and key.endswith("/up")):
            name = key.removeprefix("lora/").removesuffix("/up")
            down = phi[f"lora/{name}/down"]
            moved[name] = weights[name] + scale * (phi[key] @ down.flatten(1)).view(weights[name].shape)
        return moved

    def joined(self, tuned: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The weights all harmful users end with together."""
        if self.merge is None:
            return dict(tuned[0])
        return self.merge.tensors(dict(self.student.named_parameters()), tuned, self.keys_and_values)

    def resisting(self, weights: Mapping[str, Tensor], tokens: Phi, step: int, episode: Episode) -> Tensor:
        """The upper loss, to be lowered: the mean over concepts of what those weights still can."""
        method, losses = self.method, []
        for n in range(len(self.concepts)):
            lesson = self.lesson("upper", n, episode)
            batch = lesson.batch("upper", _name(n), step)
            error, still = self._errors(lesson, weights, tokens.get(f"{TOKEN}/{n}"), batch, still=method.upper == "still")
            if method.upper == "still":
                losses.append(still.mean())
            else:
                losses.append(-(error.clamp(max=method.bound) if method.upper == "bounded" else error).mean())
        return torch.stack(losses).mean()

    def _errors(
        self, lesson: Lesson, weights: Mapping[str, Tensor], token: Tensor | None, batch: Batch, *, still: bool
    ) -> tuple[Tensor, Tensor]:
        """Per noisy picture: the error of the noise predicted with these weights, and its distance from the base's prediction."""
        if (key := (id(lesson), still)) not in self.asks:
            before = embed_all(self.base, lesson.captions) if still else None
            self.asks[key] = (lesson.adapter.ask(self.student, lesson.captions), before)
        ask, before = self.asks[key]
        c = ask({} if token is None else {TOKEN: token}, batch.rows)
        with at(self.student, weights):
            predicted = self.student.eps(batch.x_t, batch.t, c)
        away = torch.zeros(len(batch.t), device=batch.t.device)
        if still:
            with torch.no_grad():
                unmoved = self.base.eps(batch.x_t, batch.t, before[list(batch.rows)])
            away = (predicted.float() - unmoved.float()).square().flatten(1).mean(1)
        return errors(self.student, predicted, batch), away

    def loss_at(self, step: int) -> Tensor:
        """The whole upper loss of a step."""
        method, episode = self.method, self.episode(step)
        with ExitStack() as stack:
            stack.enter_context(doubly() if method.order == 2 or method.self_destruct > 0 else nullcontext())
            phis = [self.look_ahead(user, step, episode) for user in range(len(self.users))]
            tokens = {name: value for phi in phis for name, value in phi.items() if name.startswith(f"{TOKEN}/")}
            weights = self.joined([self.tuned(phi, episode) for phi in phis])
            loss = self.resisting(weights, tokens, step, episode)
            return loss + sum(self._terms(step, episode), torch.zeros((), device=loss.device))

    def _terms(self, step: int, episode: Episode) -> Iterator[Tensor]:
        """What is asked besides: hold what is retained, let benign users learn, make learning the concept hurt."""
        method = self.method
        plain = Episode(episode.number, "full", episode.lr, "own")
        if method.keep > 0:
            lesson = self.lesson("keep", None, plain)
            batch = lesson.batch("keep", step)
            yield method.keep * self._errors(lesson, {}, None, batch, still=True)[1].mean()
        if method.benign > 0 and episode.kind != "textual-inversion":
            benign = self.look_ahead(len(self.users), step, episode)
            lesson = self.lesson("upper", None, episode)
            error, _ = self._errors(lesson, self.tuned(benign, episode), None, lesson.batch("benign", step), still=False)
            yield method.benign * error.mean()
        if method.self_destruct > 0:
            moving = list(self.student.trainable().values())
            harm = torch.stack(
                [lesson.loss({}, lesson.batch("harm", n, step)) for n in range(len(self.concepts)) if (lesson := self._bare(n))]
            ).mean()
            held = self.lesson("keep", None, plain)
            g_harm, g_held = (
                torch.cat([g.flatten() for g in torch.autograd.grad(value, moving, create_graph=True)])
                for value in (harm, held.loss({}, held.batch("held", step)))
            )
            yield method.self_destruct * torch.nn.functional.cosine_similarity(g_harm, g_held, dim=0)

    def _bare(self, n: int) -> Lesson:
        """The concept's own lesson with nothing of a user's in it."""
        return self.lesson("upper", n, Episode(0, "full", 0.0, "own"))


TOKENS = ("textual-inversion", "custom-diffusion")


def halves(shots: Shots, rng: torch.Generator) -> tuple[Shots, Shots]:
    """Two disjoint halves in random order. Raises UserError for fewer than two pictures."""
    if len(shots) < 2:
        raise UserError("immunizing needs at least two pictures of each concept, one for each level; give more")
    order = torch.randperm(len(shots), generator=rng).tolist()
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    a, b = (Shots(shots.x_0[rows], tuple(shots.captions[row] for row in rows)) for rows in (first, second))
    return a, b


def _word(concept: Concept) -> str:
    """What a learnt word starts from: the last word of the anchor, its noun, or the concept's kind."""
    return concept.anchor.split()[-1] if concept.anchor.strip() else concept.kind


def _name(n: int | None) -> int | str:
    return "retained" if n is None else n


def named_once(caption: str, term: str) -> str:
    """A caption with the term in it exactly once, for a learnt word to take its place: at its first mention, or at the end."""
    pattern = whole_words(term)
    first = pattern.search(caption)
    if first is None:
        return f"{caption} {term}".strip()
    head, tail = caption[: first.start()], pattern.sub("", caption[first.end() :])
    return " ".join(f"{head}{term}{tail}".split())
