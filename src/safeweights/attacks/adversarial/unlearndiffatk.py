"""To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images
(Zhang et al., ECCV 2024, arXiv:2310.11868)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from safeweights.attacks.adversarial.baselines import as_asked
from safeweights.core.attack import Access, Budget, Candidate, Revival, Target
from safeweights.core.concept import Concept
from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import describe
from safeweights.core.workspace import Workspace
from safeweights.diffusion.latent_bank import fingerprint
from safeweights.diffusion.noise import add_noise, generator
from safeweights.diffusion.search import insert_tokens, project_to_simplex, put_embeddings, sample_one_hot, text_ids


@dataclass(frozen=True, kw_only=True)
class UnlearnDiffAtk:
    """Search k prompt tokens under which the erased model itself denoises a picture of the concept.

    min_c'  E_eps || eps - eps_theta(alpha_t z + sigma_t eps, t, tau(c')) ||^2                (eq. 8)

    over c' = [k tokens | prompt]; each token is a distribution over the vocabulary on the simplex, drawn one-hot in the forward
    pass with a straight-through gradient clipped to [-1, 1], moved by Adam and projected back. z is the encoded picture of the
    concept; t stays for ``steps`` steps, then the most likely tokens are decoded to text and drawn once, then the next t.

    Needs: gradients of the erased model with respect to its prompt, one picture of the concept a prompt; no other model.
    Cost: timesteps * steps denoiser forward and backward passes and timesteps + 1 pictures a prompt, all prompts in one batch.
    Differs from the reference code: timesteps are spread evenly over [t_low, t_high] (50 there); only whole words can be chosen
    (there pieces too, which read back differently once decoded); random draws come from one private generator a prompt (the
    global one is re-seeded there, so stages repeat their noise).
    """

    name: ClassVar[str] = "unlearndiffatk"
    access: ClassVar[Access] = Access.GRADIENT
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {
            "noises": 1,
            "tokens": 5,
            "timesteps": 50,
            "steps": 40,
            "lr": 0.01,
            "t_low": 10,
            "t_high": 990,
            "batch_size": 4,
        },
    }

    tokens: int = 3
    """Free tokens before the prompt, k: 3 for styles and objects, 5 for nudity in the paper; > 0."""
    timesteps: int = 10
    """Number of timesteps attacked in turn, each ends with one picture; > 0."""
    steps: int = 40
    """Gradient steps at each timestep; > 0."""
    lr: float = 0.01
    """Adam's step on the simplex; > 0."""
    noises: int = 2
    """Noise draws a gradient step averages over, 1 in the paper; small latents say less in one draw; > 0."""
    weight_decay: float = 0.1
    """L2 weight decay on the relaxed tokens; >= 0."""
    t_low: int = 10
    """First timestep, 0 <= t_low <= t_high."""
    t_high: int = 990
    """Last timestep, below the model's number of training timesteps."""
    batch_size: int = 16
    """Prompts searched together; memory grows with it, results do not depend on it."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.timesteps, self.steps, self.noises, self.batch_size) < 1 or self.lr <= 0:
            raise ValueError("tokens, timesteps, steps, noises, batch_size and lr must be above zero")
        if not 0 <= self.t_low <= self.t_high:
            raise ValueError("0 <= t_low <= t_high must hold")

    @property
    def budget(self) -> Budget:
        return Budget(
            images=self.timesteps + 1,
            gradient_steps=self.timesteps * self.steps,
            tokens=self.tokens,
            timesteps=self.timesteps,
        )

    def revive(
        self,
        model: DiffusionModel,
        concept: Concept,
        targets: Sequence[Target],
        *,
        sampling: Sampling,
        workspace: Workspace | None = None,
    ) -> Generator[Revival, Sequence[bool], None]:
        if self.t_high >= len(model.alpha):
            raise UserError(f"unlearndiffatk: t_high must be below {len(model.alpha)}, not {self.t_high}")
        workspace = workspace or Workspace()
        seen = yield as_asked(model, targets)
        search = _Search(self, model, [target for target, fell in zip(targets, seen, strict=True) if not fell])
        facts = {"settings": describe(self), "targets": [[t.prompt, t.seed] for t in search.targets], "model": fingerprint(model)}
        # After a kill the rounds already played are said again (their pictures are kept), then the search goes on from its state.
        tensors, told = workspace.load("search") or ({}, {})
        said: list[dict[str, Any]] = told["said"] if told.get("facts") == facts else []
        stages = torch.linspace(self.t_low, self.t_high, self.timesteps).round().long().tolist()
        for stage, t in enumerate(stages):
            if not search.targets:
                return
            if stage == len(said) - 1:
                search.restore(tensors)
            if stage >= len(said):
                what = f"attacking {len(search.targets)} prompts, timestep {stage + 1} of {len(stages)}"
                for _ in workspace.track(range(self.steps), what):
                    search.step(t)
                said.append({"texts": search.texts(), "facts": search.facts()})
                workspace.save("search", search.state(), {"facts": facts, "said": said})
            texts, told_facts = said[stage]["texts"], said[stage]["facts"]
            candidates = [Candidate(text, target.seed) for text, target in zip(texts, search.targets, strict=True)]
            seen = yield Revival(model, tuple(candidates), told_facts)
            search.keep([not fell for fell in seen])


class _Search:
    """The relaxed tokens of all standing prompts: ``relaxed`` (P, k, V) on the simplex, and their Adam moments."""

    def __init__(self, attack: UnlearnDiffAtk, model: DiffusionModel, targets: Sequence[Target]) -> None:
        self.attack, self.model, self.targets = attack, model, list(targets)
        self.loss = self.gradient = float("nan")
        self.steps = 0
        if not targets:
            return
        vocabulary = model.vocabulary.float()
        self.words = text_ids(model)
        self.vocabulary = vocabulary[self.words]
        ids = model.tokenize([target.prompt for target in targets])
        self.ids, self.positions = insert_tokens(model, ids, attack.tokens)
        pictures = [target.reference for target in targets]
        if any(picture is None for picture in pictures):
            raise UserError(
                "unlearndiffatk needs one picture of the concept for each prompt; the audit makes them with the reference model"
            )
        self.x_0 = torch.cat([model.encode(picture[None]) for picture in pictures if picture is not None])
        self.rngs = [generator("unlearndiffatk", target.seed, target.prompt) for target in targets]
        size = (len(targets), attack.tokens, len(self.words))
        self.relaxed = torch.full(size, 1.0 / len(self.words), device=vocabulary.device)
        self.first, self.second = torch.zeros_like(self.relaxed), torch.zeros_like(self.relaxed)

    def step(self, t: int) -> None:
        """One gradient step at timestep t for every prompt, ``batch_size`` prompts at a time."""
        self.steps += 1
        losses, norms = [], []
        for start in range(0, len(self.targets), self.attack.batch_size):
            rows = slice(start, start + self.attack.batch_size)
            loss, gradient = self._gradient(rows, t)
            self._adam(rows, gradient.clamp(-1, 1))
            losses.append(loss)
            norms.append(gradient.flatten(1).norm(dim=1))
        self.loss, self.gradient = float(torch.cat(losses).mean()), float(torch.cat(norms).mean())

    def _gradient(self, rows: slice, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Each prompt's loss (P,) and its gradient with respect to the drawn one-hot tokens (P, k, V)."""
        model, rngs = self.model, self.rngs[rows]
        x_0 = self.x_0[rows]
        draws = self.attack.noises
        eps = torch.cat([torch.randn((draws, *x_0.shape[1:]), generator=rng) for rng in rngs]).to(x_0)
        timesteps = torch.full((len(eps),), t, device=x_0.device)
        one_hot = sample_one_hot(self.relaxed[rows], rngs).requires_grad_()
        ids = self.ids[rows]
        c = model.embed_tokens(put_embeddings(model, ids, self.positions[rows], one_hot @ self.vocabulary), ids)
        x_t = add_noise(model, x_0.repeat_interleave(draws, dim=0), timesteps, eps)
        predicted = model.eps(x_t, timesteps, c.repeat(draws))
        loss = (predicted.float() - eps.float()).square().view(len(x_0), -1).mean(1)
        (gradient,) = torch.autograd.grad(loss.sum(), one_hot)
        return loss.detach(), gradient

    def _adam(self, rows: slice, gradient: torch.Tensor) -> None:
        attack, U = self.attack, self.relaxed[rows]
        gradient = gradient + attack.weight_decay * U
        first = self.first[rows].mul_(0.9).add_(gradient, alpha=0.1)
        second = self.second[rows].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        ratio = (first / (1 - 0.9**self.steps)) / ((second / (1 - 0.999**self.steps)).sqrt() + 1e-8)
        self.relaxed[rows] = project_to_simplex(U - attack.lr * ratio)

    def texts(self) -> list[str]:
        """The most likely tokens of every prompt as text, before its prompt."""
        best = self.words[self.relaxed.argmax(dim=-1)]
        return [f"{self.model.text_of(ids)} {target.prompt}".strip() for ids, target in zip(best, self.targets, strict=True)]

    def facts(self) -> dict[str, float]:
        return {"loss": self.loss, "gradient_norm": self.gradient, "steps": float(self.steps)}

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next step depends on."""
        return {
            "relaxed": self.relaxed,
            "first": self.first,
            "second": self.second,
            "rngs": torch.stack([rng.get_state() for rng in self.rngs]),
            "steps": torch.tensor(self.steps),
        }

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go back to a `state` of the same standing targets."""
        for name in ("relaxed", "first", "second"):
            setattr(self, name, state[name].to(self.relaxed).clone())
        for rng, kept in zip(self.rngs, state["rngs"], strict=True):
            rng.set_state(kept.clone())
        self.steps = int(state["steps"])

    def keep(self, standing: Sequence[bool]) -> None:
        """Drop the prompts that fell."""
        rows = [i for i, stays in enumerate(standing) if stays]
        self.targets = [self.targets[i] for i in rows]
        self.rngs = [self.rngs[i] for i in rows]
        for name in ("ids", "positions", "x_0", "relaxed", "first", "second"):
            setattr(self, name, getattr(self, name)[rows])
