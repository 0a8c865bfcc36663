"""Defensive Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models
(Zhang et al., NeurIPS 2024, arXiv:2405.15234)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import mse_loss

from safeweights.core.concept import Concept
from safeweights.core.errors import UserError
from safeweights.core.method import Protection
from safeweights.core.model import Conditioning, DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.latent_bank import Batch, LatentBank
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parameters import select
from safeweights.diffusion.retain_set import filter_retain, object_prompts
from safeweights.diffusion.sampling import embed_all, predictions
from safeweights.diffusion.search import (
    Where,
    descend_embeddings,
    insert_tokens,
    ordinary_ids,
    put_embeddings,
    random_embeddings,
    term_ids,
    text_length,
)
from safeweights.diffusion.training import descend


@dataclass(frozen=True, kw_only=True)
class AdvUnlearn:
    """Erase the concept also from prompts that an attacker made, and hold everything else in place.

    min_theta  || eps_theta(x_t, c*) - [eps_o(x_t) - eta (eps_o(x_t, c) - eps_o(x_t))] ||^2
               + gamma || eps_theta(x'_t, c') - eps_o(x'_t, c') ||^2,   c' a retained prompt          (upper level)
    c* = argmin  || eps_theta(x_t, c*) - eps_o(x_t, c) ||^2,   c* = c with k free token embeddings     (lower level)

    Needs: a text encoder that takes token embeddings.   Cost: a student pass forward and backward on batch_size + retain_batch
    latents a step, and after the warm-up attack_steps more on batch_size latents. Latents and the base model's predictions do
    not depend on theta and are drawn once; `cost` counts the calls beside those of the released schedule, which draws anew.
    Differs from the reference code: x_t and t match exactly, prompts count BPE tokens, the attack clears its gradients and
    keeps its last step (``reference_compat`` goes back on all four); a fast step is one signed step as long as the others
    together (there up to 30 signed Adam steps); trajectories always come from the base model (there from the current one
    when the UNet is trained); retained prompts are drawn with replacement, the empty one always among them (there never,
    ``retain_empty``); with whole prompts, eps_o(x_t) is the prediction for
    the prompt without the concept, for the term alone that of the empty prompt.
    With ``retain=none`` this is AT-ESD; trained on the text encoder without attack it is ESD of the text encoder. Beyond the
    paper, ``tokens=4`` with more attack steps trains against soft prompts, ``latent_weight`` against attacks without text.
    """

    name: ClassVar[str] = "advunlearn"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "lr": 1e-5, "steps": 1000, "warm_up": 200, "batch_size": 1, "retain_batch": 5, "attack_steps": 30, "attack_lr": 1e-3,
            "gamma": 0.3, "prompts": "term", "trajectories": 64, "retain_trajectories": 256, "ddim_steps": 50,
        },
    }  # fmt: skip

    parameters: str = "text_encoder"
    """What is trained: text_encoder, text_encoder:N (its first N layers), or a group of the UNet (xattn, noxattn, full …)."""
    steps: int = 120
    """Optimiser steps; > 0."""
    lr: float = 1e-4
    """Adam's learning rate; > 0."""
    batch_size: int = 4
    """Noisy latents of the concept a step, each with an attack of its own; > 0."""
    warm_up: int = 20
    """First steps, without attack; >= 0."""
    attack_steps: int = 10
    """Steps of the lower level, 0: no attack, so ESD with retained prompts; >= 0."""
    attack_lr: float = 1e-2
    """Adam's step on the free token embeddings; > 0."""
    fast_at: bool = False
    """One signed step of length attack_steps * attack_lr in place of attack_steps Adam steps."""
    where: Where = "prefix"
    """Where the free tokens go: before the prompt, after it, before the term, or in its place."""
    tokens: int = 1
    """Free tokens, k; > 0."""
    init: Literal["random", "last"] = "random"
    """Free tokens start from random words each time, or from where the prompt's last attack ended."""
    eta: float = 1.0
    """Strength of the negative guidance; unitless, > 0."""
    gamma: float = 1.0
    """Weight of the retained prompts; unitless, >= 0."""
    retain: Literal["none", "unfiltered", "filtered"] = "filtered"
    """Retained prompts: none, all of the concept file, or those that neither name the concept nor are related to it. A file
    without any is given everyday objects."""
    retain_related: float = 0.7
    """How related to the concept a retained prompt may be, 0 not at all, 1 like the concept itself."""
    retain_drop: tuple[str, ...] = ()
    """Words whose prompts are left out as well."""
    keep: Callable[[str, Concept], bool] | None = None
    """From Python only: says of a prompt and a concept whether the prompt may stay, instead of how related they are."""
    retain_empty: bool = True
    """Hold the empty prompt too, unless ``retain=none``: guided sampling asks it at every step."""
    retain_batch: int = 8
    """Retained latents a step; > 0."""
    prompts: Literal["term", "prompts", "both"] = "both"
    """What stands for the concept: its term alone (the paper), its prompts, or both in turn."""
    trajectories: int = 27
    """DDIM trajectories drawn once for each concept, its prompts in turn; > 0."""
    retain_trajectories: int = 80
    """DDIM trajectories drawn once for the retained prompts in turn; > 0."""
    ddim_steps: int = 20
    """Steps of a trajectory; > 0."""
    guidance: float = 3.0
    """Guidance of the trajectories (only of those; the regression is unguided)."""
    latent_weight: float = 0.0
    """Weight of the text-free side: latents of the concept under the empty prompt, moved towards it, are denoised away from the
    concept too. It acts on the UNet (parameters=full, noxattn …): a text encoder has one answer to the empty prompt; >= 0."""
    latent_steps: int = 5
    """Steps that move those latents before each optimiser step, 0: they stay; >= 0."""
    latent_lr: float = 0.02
    """Size of a signed step on a latent, whose noise has deviation 1; > 0."""
    latent_radius: float = 0.1
    """Farthest that a latent's coordinate may go; > 0."""
    reference_compat: bool = False
    """Do as the released code: cut attacked prompts to as many tokens as they have words, let the attack's gradient gather over
    its steps, discard its last step, and ask at timesteps later than the latents'. To measure the difference only."""

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size, self.tokens, self.retain_batch, self.trajectories, self.retain_trajectories)
        if min(*counts, self.ddim_steps) < 1 or min(self.lr, self.attack_lr, self.eta) <= 0:
            raise ValueError(
                "steps, batch_size, tokens, retain_batch, trajectories, retain_trajectories, ddim_steps, lr, attack_lr and eta "
                "must be above zero"
            )
        if min(self.warm_up, self.attack_steps, self.gamma, self.latent_weight, self.latent_steps) < 0:
            raise ValueError("warm_up, attack_steps, gamma, latent_weight and latent_steps must not be negative")
        if min(self.latent_lr, self.latent_radius) <= 0:
            raise ValueError("latent_lr and latent_radius must be above zero")

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
        select(model.named_parameters(), self.parameters)  # a wrong name is told before anything is drawn
        for concept in concepts:
            if self.attack_steps:  # and so is a prompt without room for what the attack adds
                insert_tokens(model, model.tokenize(self.texts(concept)), self.tokens, self.where, term_ids(model, concept.term))
        kept = self.retained(model, concepts, retain)
        aims = [_Aim(self, model, concept, seed, workspace) for concept in concepts]
        held = self._held(model, kept, seed, workspace)
        drawn = model.calls.eps - calls
        student = model.fork(self.parameters)
        state = {aim.concept.name: aim.start for aim in aims}

        def loss_at(step: int) -> torch.Tensor:
            aim = aims[step % len(aims)]
            batch = aim.bank.draw(self.batch_size, generator("advunlearn", seed, step))
            if step < self.warm_up or self.attack_steps == 0:
                c = student.embed([aim.texts[i] for i in batch.prompt.tolist()])
            else:
                c, state[aim.concept.name] = aim.attacked(student, batch.prompt, state[aim.concept.name], step)
            eps_0 = batch.outputs["eps_without"]
            x_t, t, target = [batch.x_t], [batch.t], [eps_0 - self.eta * (batch.eps_c - eps_0)]
            if self.gamma > 0 and (still := self._still(held, aim.bank, kept, generator("advunlearn retain", seed, step))):
                other, texts, teacher = still
                c = Conditioning.cat([c, student.embed(texts)])
                x_t, t, target = [*x_t, other.x_t], [*t, other.t], [*target, teacher]
            predicted = student.eps(torch.cat(x_t), torch.cat(t), c).tensor_split([len(batch.x_t)])
            losses = [mse_loss(eps.float(), wanted.float()) for eps, wanted in zip(predicted, target, strict=False)]
            loss = losses[0] + self.gamma * sum(losses[1:])
            return loss + self.latent_weight * aim.text_free(model, student, batch, step) if self.latent_weight else loss

        losses = descend(
            student.trainable(),
            loss_at,
            steps=self.steps,
            lr=self.lr,
            workspace=workspace,
            description="erasing (advunlearn)",
            facts={"seed": seed, "texts": [aim.texts for aim in aims], "retain": kept, "settings": describe(self)},
            state=state,
        )
        total = model.calls.eps - calls
        return Protection(
            method=self.name,
            concepts=tuple(concept.name for concept in concepts),
            tensors=student.edited(),
            settings=describe(self),
            cost={
                "steps": self.steps, "attacked_steps": max(self.steps - self.warm_up, 0) if self.attack_steps else 0,
                "eps_calls": total, "bank_calls": drawn, "loss": losses[-1], "retained_prompts": len(kept),
                "calls_per_step": (total - drawn) / self.steps, "calls_per_step_with_banks": total / self.steps,
                "naive_calls_per_step": self.naive_calls_per_step(len(kept)),
            },
        )  # fmt: skip

    def retained(self, model: DiffusionModel, concepts: Sequence[Concept], prompts: Sequence[str]) -> list[str]:
        """The prompts that are held as they were, of those given. Raises UserError where the filter leaves none."""
        if self.retain == "none":
            return []
        prompts = list(dict.fromkeys(prompts)) or list(object_prompts())
        if self.retain == "unfiltered":
            return prompts
        kept = filter_retain(model, prompts, concepts, threshold=self.retain_related, drop=self.retain_drop, keep=self.keep)
        if not kept:
            raise UserError(
                "advunlearn: every retained prompt is about the concept; add others under 'retain:' in the concept file, raise "
                "retain_related, or set retain=none"
            )
        return kept

    def naive_calls_per_step(self, retained_prompts: int) -> float:
        """Denoiser samples a step of the released schedule with these settings, counted forward, averaged over the run.

        There every draw of a noisy latent runs DDIM with guidance (two samples a step) from noise to a uniformly chosen step k of
        S: S - k steps, S - 1 for k < 2, thus (S - 1)(S + 2) / 2S on average. An attack step and the erasing step then ask the
        base model with and without the prompt and the student once, a retained latent asks both once.
        """
        S = self.ddim_steps
        draw = 2 * (S - 1) * (S + 2) / (2 * S)
        attacks = self.attack_steps * max(self.steps - self.warm_up, 0) / self.steps
        held = self.retain_batch * (draw + 2) if retained_prompts and self.gamma > 0 else 0.0
        return self.batch_size * (1 + attacks) * (draw + 3) + held

    def texts(self, concept: Concept) -> list[str]:
        """What stands for the concept."""
        return {"term": [concept.term], "prompts": [*concept.texts], "both": [concept.term, *concept.texts]}[self.prompts]

    def sampling(self) -> Sampling:
        """How the banks' trajectories are drawn."""
        return Sampling(steps=self.ddim_steps, guidance_scale=self.guidance)

    def _held(self, model: DiffusionModel, kept: Sequence[str], seed: int, workspace: Workspace) -> LatentBank | None:
        """Noisy latents of the retained prompts with the base model's predictions."""
        if not kept or self.gamma == 0:
            return None
        # Each prompt needs a trajectory of its own.
        n = max(self.retain_trajectories, len(kept))
        rng = generator("advunlearn retain bank", seed)
        return LatentBank.sample(
            model, kept, n=n, sampling=self.sampling(), rng=rng, workspace=workspace.child("retain"), name="retained"
        )

    def _still(
        self, held: LatentBank | None, erased: LatentBank, kept: Sequence[str], rng: torch.Generator
    ) -> tuple[Batch, list[str], torch.Tensor] | None:
        """Latents with the prompts under which they must be denoised as before and those predictions, or None."""
        bank = held or erased
        asked = self.retain_batch if held else 0
        empty = self.retain_empty and self.retain != "none"
        if asked + empty == 0:
            return None
        batch = bank.draw(asked + empty, rng)
        texts = [kept[i] for i in batch.prompt[:asked].tolist()] + [""] * empty
        return batch, texts, torch.cat([batch.eps_c[:asked], batch.eps_none[asked:]])


class _Aim:
    """One concept under erasure: its texts, its latents with the base model's predictions, and room for free tokens."""

    def __init__(self, eraser: AdvUnlearn, model: DiffusionModel, concept: Concept, seed: int, workspace: Workspace) -> None:
        self.eraser, self.concept, self.seed = eraser, concept, seed
        self.texts = eraser.texts(concept)
        self.bank = self._bank(model, workspace)
        self.words = ordinary_ids(model)
        self.ids, self.positions = torch.empty(0), torch.empty(0)
        self.start = torch.empty(0)
        if eraser.attack_steps:
            ids = model.tokenize(self.texts)
            if eraser.reference_compat:
                ids = word_sliced(model, ids, self.texts)
            term = term_ids(model, concept.term)
            self.ids, self.positions = insert_tokens(model, ids, eraser.tokens, eraser.where, term)
            self.start = self.random_words(model, len(self.texts), "start")

    def _bank(self, model: DiffusionModel, workspace: Workspace) -> LatentBank:
        eraser = self.eraser
        bank = LatentBank.sample(
            model,
            self.texts,
            n=max(eraser.trajectories, len(self.texts)),
            sampling=eraser.sampling(),
            rng=generator("advunlearn bank", self.seed, self.concept.name),
            workspace=workspace.child(self.concept.name),
        )
        if eraser.reference_compat:
            bank = later(model, bank, eraser.ddim_steps, generator("advunlearn later", self.seed, self.concept.name))
        if eraser.prompts == "term":
            bank.outputs["eps_without"] = bank.outputs["eps_none"]
        else:
            base = ["" if text == self.concept.term else self.concept.without(text) for text in self.texts]
            without = embed_all(model, base)
            bank.precompute("eps_without", lambda batch: model.eps(batch.x_t, batch.t, without[batch.prompt]))
        return bank

    def random_words(self, model: DiffusionModel, rows: int, *when: int | str) -> torch.Tensor:
        """Embeddings (rows, k, D) of random words."""
        rngs = [generator("advunlearn init", self.seed, self.concept.name, *when, row) for row in range(rows)]
        return random_embeddings(model, self.words, self.eraser.tokens, rngs)

    def attacked(
        self, student: DiffusionModel, prompt: torch.Tensor, last: torch.Tensor, step: int
    ) -> tuple[Conditioning, torch.Tensor]:
        """The rows' prompts (B,) after an attack on the student, and where each prompt's free tokens (P, k, D) stand now."""
        *_, (free, _) = self.attack(student, prompt, last, step)
        ids, positions = self.ids[prompt], self.positions[prompt]
        last = last.clone()
        last[prompt] = free
        return student.embed_tokens(put_embeddings(student, ids, positions, free), ids), last

    def attack(
        self, student: DiffusionModel, prompt: torch.Tensor, last: torch.Tensor, step: int
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """The lower level on the student as it is: free tokens (B, k, D) and their loss, step by step."""
        eraser = self.eraser
        start = last[prompt] if eraser.init == "last" else self.random_words(student, len(prompt), step)

        def batch_at(inner: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            rng = generator("advunlearn attack", self.seed, step, inner)
            batch = self.bank.draw(len(prompt), rng, prompt)
            return batch.x_t, batch.t, batch.eps_c

        # The prompts may not be trained through: only the free tokens' gradient is taken.
        path = descend_embeddings(
            student, batch_at, self.ids[prompt], self.positions[prompt], start,
            steps=1 if eraser.fast_at and not eraser.reference_compat else eraser.attack_steps,
            lr=eraser.attack_lr * (eraser.attack_steps if eraser.fast_at and not eraser.reference_compat else 1),
            signed=eraser.fast_at, accumulate=eraser.reference_compat,
        )  # fmt: skip
        if not eraser.reference_compat:
            yield from path
            return
        # The released code hands out the embeddings as they were put together before the last step.
        yield from [*path][:-1]

    def text_free(self, model: DiffusionModel, student: DiffusionModel, batch: Batch, step: int) -> torch.Tensor:
        """Loss of latents under the empty prompt, each moved by signed steps to where the student draws the concept from it.

        min_theta || eps_theta(x_t + d, t) - [eps_o(x_t + d) - eta (eps_o(x_t + d, c) - eps_o(x_t + d))] ||^2
        d = argmin_{|d| <= radius} || eps_theta(x_t + d, t) - eps_o(x_t, c) ||^2
        """
        eraser, x_t, t = self.eraser, batch.x_t, batch.t
        none = student.embed([""])
        d = torch.zeros_like(x_t)
        for _ in range(eraser.latent_steps if step >= eraser.warm_up else 0):
            d.requires_grad_()
            loss = mse_loss(student.eps(x_t + d, t, none.detach()).float(), batch.eps_c.float())
            (gradient,) = torch.autograd.grad(loss, d)
            d = (d.detach() - eraser.latent_lr * gradient.sign()).clamp(-eraser.latent_radius, eraser.latent_radius)
        x = (x_t + d).detach()
        with torch.no_grad():
            eps_0, eps_c = predictions(model, x, t, embed_all(model, self.texts)[batch.prompt], model.embed([""]))
        return mse_loss(student.eps(x, t, none).float(), (eps_0 - eraser.eta * (eps_c - eps_0)).float())


def word_sliced(model: DiffusionModel, ids: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
    """ids (B, L) cut to as many tokens as the text has words: what is left of a word of several tokens is its beginning."""
    end, padding = (int(i) for i in model.tokenize([""])[0, [1, -1]])
    lengths = torch.minimum(text_length(model, ids), torch.tensor([len(text.split()) for text in texts], device=ids.device))
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    cut = torch.where(places <= lengths[:, None], ids, padding)
    return torch.where(places == lengths[:, None] + 1, end, cut)


def later(model: DiffusionModel, bank: LatentBank, ddim_steps: int, rng: torch.Generator) -> LatentBank:
    """The bank as the released sampler would ask about it: each state at a timestep drawn from two to three DDIM steps later.

    There the loop stops two steps late, so that x at level d (k - 2) + 1 is asked about at t ~ U[d k, d k + d), d = T / S. Rows
    whose timestep would lie beyond T are left out, and so is the finished picture, which that loop may also hand out.
    """
    d = len(model.alpha) // ddim_steps
    t = bank.t - model.grid.offset + 2 * d + torch.randint(d, (len(bank),), generator=rng)
    fits = t < len(model.alpha)
    moved = replace(bank, x=bank.x[fits], t=t[fits], prompt=bank.prompt[fits], outputs={})
    c, none = embed_all(model, bank.prompts), embed_all(model, [""])
    moved.precompute("eps_c", lambda batch: model.eps(batch.x_t, batch.t, c[batch.prompt]))
    moved.precompute("eps_none", lambda batch: model.eps(batch.x_t, batch.t, none))
    return moved
