"""What erasers that learn from pictures learn from: pictures the base model draws, noised once, with what it says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from safeweights.core.concept import Concept
from safeweights.core.model import Conditioning, DiffusionModel, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.image_folder import read_native
from safeweights.diffusion.latent_bank import Batch, LatentBank, fingerprint
from safeweights.diffusion.noise import add_noise, generator
from safeweights.diffusion.retain_set import names
from safeweights.diffusion.sampling import embed_all, sample_latents

Target = Literal["noise", "base"]


@torch.no_grad()
def draw_pictures(
    model: DiffusionModel,
    prompts: Sequence[str],
    *,
    n: int,
    noises: int,
    sampling: Sampling,
    seed: int,
    workspace: Workspace | None = None,
    batch_size: int = 32,
) -> LatentBank:
    """Draw n pictures, the prompts in turn, and noise each ``noises`` times at timesteps spread evenly over [0, T).

    Pictures stay latents of the model's native size. A bank of n * noises rows with outputs "eps", the noise, and "eps_o", the
    model's prediction under the row's prompt. Costs 2 * sampling.steps model calls a picture and one a row. Drawn in batches that
    ``workspace`` keeps; a second run with the same model, prompts, settings and seed loads them.
    """
    workspace = workspace or Workspace()
    facts: dict[str, Any] = {
        "prompts": list(prompts), "n": n, "noises": noises, "seed": seed, "steps": sampling.steps,
        "guidance": sampling.guidance_scale, "batch": batch_size, "model": fingerprint(model),
    }  # fmt: skip
    c = embed_all(model, prompts)
    width = len(model.alpha) / noises
    parts = []
    for start in workspace.track(range(0, n, batch_size), "drawing pictures"):
        stored = workspace.load(f"pictures-{start}")
        if stored is None or stored[1] != facts:
            runs = range(start, min(start + batch_size, n))
            which = torch.tensor([run % len(prompts) for run in runs])
            x_T = torch.stack([torch.randn(model.latent_shape, generator=generator(seed, "x_T", run)) for run in runs])
            x_0 = sample_latents(model, c[which.to(model.device)], x_T.to(model.device), sampling)
            rng = generator(seed, "noise", start)
            # One timestep in each of ``noises`` strata, for every picture.
            t = ((torch.arange(noises) + torch.rand((len(runs), noises), generator=rng)) * width).long().flatten()
            t = t.clamp(max=len(model.alpha) - 1).to(model.device)
            eps = torch.randn((len(t), *model.latent_shape), generator=rng).to(model.device)
            x_t, rows = add_noise(model, x_0.repeat_interleave(noises, 0), t, eps), which.repeat_interleave(noises)
            told = torch.cat(
                [
                    model.eps(x_t[i : i + batch_size], t[i : i + batch_size], c[rows[i : i + batch_size].to(model.device)])
                    for i in range(0, len(t), batch_size)
                ]
            )
            tensors = {"x": x_t, "t": t, "prompt": rows, "eps": eps, "eps_o": told}
            stored = {key: value.cpu() for key, value in tensors.items()}, facts
            workspace.save(f"pictures-{start}", *stored)
        parts.append(stored[0])
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    outputs = {key: whole[key] for key in ("eps", "eps_o")}
    return LatentBank(tuple(prompts), whole["x"], whole["t"], whole["prompt"], outputs, model.device)


def _given(model: DiffusionModel, concept: Concept, *, n: int, noises: int, seed: int) -> LatentBank:
    """A bank as of `draw_pictures`, of the first n pictures of the concept's own folder under their captions."""
    assert concept.images is not None
    images, captions = read_native(model, concept.images, prompt=concept.term)
    bank = LatentBank.from_images(model, images[:n], captions[:n], n=noises, rng=generator("forget", seed, concept.name))
    c = embed_all(model, bank.prompts)
    bank.precompute("eps_o", lambda batch: model.eps(batch.x_t, batch.t, c[batch.prompt]))
    return bank


@dataclass(frozen=True)
class DrawnSets:
    """Pictures to forget and pictures to retain, as data-driven erasers train on them.

    ``forget``: pictures of the concepts; besides the outputs of `draw_pictures` it holds "eps_pseudo", the base model's
    prediction for the same x_t under the prompt without the concept. ``retain``: pictures of what must stay.
    """

    forget: LatentBank
    retain: LatentBank

    @classmethod
    def draw(
        cls,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        retain: Sequence[str],
        *,
        pictures: int,
        retained: int,
        noises: int,
        sampling: Sampling,
        seed: int,
        workspace: Workspace | None = None,
    ) -> DrawnSets:
        """``pictures`` for each concept, the first of its folder or drawn from its term and prompts in turn, and ``retained``."""
        workspace = workspace or Workspace()
        kept = retained_prompts(concepts, retain)
        keep = draw_pictures(
            model,
            kept,
            n=retained,
            noises=noises,
            sampling=sampling,
            seed=_seed(seed, "retain"),
            workspace=workspace.child("retain"),
        )
        banks: list[LatentBank] = []
        guides: list[str] = []
        if unseen := [concept for concept in concepts if concept.images is None]:
            pseudo = pseudo_prompts(unseen)
            banks.append(
                draw_pictures(
                    model, [*pseudo], n=pictures * len(unseen), noises=noises, sampling=sampling, seed=_seed(seed, "forget"),
                    workspace=workspace.child("forget"),
                )
            )  # fmt: skip
            guides += pseudo.values()
        for concept in concepts:
            if concept.images is not None:
                banks.append(_given(model, concept, n=pictures, noises=noises, seed=seed))
                guides += [concept.without(text) for text in banks[-1].prompts]
        forget = LatentBank.join(banks)
        base = embed_all(model, guides)
        forget.precompute("eps_pseudo", lambda batch: model.eps(batch.x_t, batch.t, base[batch.prompt]), workspace=workspace)
        return cls(forget, keep)

    def forgetting(self, student: DiffusionModel, batch_size: int, *seeds: int | str) -> Callable[[int], Tensor]:
        """Step -> L_f = MSE(eps_theta(x_f, c_f), eps_o(x_f, c_pseudo)) of that step's batch."""
        return _regression(student, self.forget, "eps_pseudo", batch_size, *seeds, "forget")

    def denoising(self, student: DiffusionModel, batch_size: int, *seeds: int | str) -> Callable[[int], Tensor]:
        """Step -> MSE(eps_theta(x_f, c_f), eps), the plain diffusion loss on what shall be forgotten."""
        return _regression(student, self.forget, "eps", batch_size, *seeds, "forget")

    def retaining(self, student: DiffusionModel, batch_size: int, target: Target, *seeds: int | str) -> Callable[[int], Tensor]:
        """Step -> L_r = MSE(eps_theta(x_r, c_r), target): the noise, as in training, or the base model's prediction."""
        return _regression(student, self.retain, {"noise": "eps", "base": "eps_o"}[target], batch_size, *seeds, "retain")


def pseudo_prompts(concepts: Sequence[Concept]) -> dict[str, str]:
    """The terms and prompts that ask for the concepts, each with what it says without the concept."""
    pairs: dict[str, str] = {}
    for concept in concepts:
        for text in (concept.term, *concept.texts):
            pairs.setdefault(text, concept.without(text))
    return pairs


def retained_prompts(concepts: Sequence[Concept], retain: Sequence[str]) -> list[str]:
    """The retained prompts that name none of the concepts; without any, the concepts' own prompts without the concepts."""
    for prompts in (retain, pseudo_prompts(concepts).values()):
        kept = [text for text in dict.fromkeys(prompts) if not any(names(text, concept.term) for concept in concepts)]
        if kept:
            return kept
    return [""]


def asking(student: DiffusionModel, prompts: Sequence[str]) -> Callable[[Batch], Conditioning]:
    """Batch -> text states of its prompts: encoded once, or every time where the text encoder is being trained."""
    if any(name.startswith("text_encoder.") for name in student.trainable()):
        return lambda batch: student.embed([prompts[i] for i in batch.prompt.tolist()])
    c = embed_all(student, prompts)
    return lambda batch: c[batch.prompt]


def _regression(
    student: DiffusionModel, bank: LatentBank, output: str, batch_size: int, *seeds: int | str
) -> Callable[[int], Tensor]:
    ask = asking(student, bank.prompts)

    def loss_at(step: int) -> Tensor:
        batch = bank.draw(batch_size, generator(*seeds, step))
        return mse_loss(student.eps(batch.x_t, batch.t, ask(batch)), batch.outputs[output])

    return loss_at


def _seed(seed: int, name: str) -> int:
    """A seed of its own for every set of a run."""
    return generator("drawn set", seed, name).initial_seed()
