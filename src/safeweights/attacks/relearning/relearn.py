"""Fine-tune the erased model on a few pictures of the concept (IMMA: Zheng & Yeh, ECCV 2024, arXiv:2311.18815, sec. 5.1)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from safeweights.attacks.relearning.finetune import FineTune, caption
from safeweights.core.attack import Access, Budget, Candidate, Mode, Original, Revival, Target
from safeweights.core.concept import Concept
from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import ADAPTATIONS, configure, resolve
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import Adapted, Shots
from safeweights.diffusion.image_folder import read_native
from safeweights.diffusion.shots import drawn_shots
from safeweights.records.mask import read_mask


@dataclass(frozen=True, kw_only=True)
class Relearn:
    """Fine-tune on K pictures of the concept, then ask; or on pictures of other things, and see whether it comes back by itself.

    theta_k = theta after k steps of the adaptation on {(x_i, c_i)}, i = 1 … K;   asked at checkpoints k, spread evenly in log k

    Needs: the weights, the right to change them, and pictures of the concept (the original model's, or a folder's own).
    Cost: ``steps`` passes forward and backward of a batch, once for all prompts, and ``images`` pictures a prompt.
    Differs from the reference code: success is told at every checkpoint by a detector (there: similarity after every epoch).
    """

    name: ClassVar[str] = "relearn"
    access: ClassVar[Access] = Access.WEIGHTS
    mode: ClassVar[Mode] = "live"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"small": {}, "paper": {"steps": 1000, "pictures": 20}}

    adaptation: Literal["full", "dreambooth", "lora", "textual-inversion", "custom-diffusion"] = "lora"
    """How it is fine-tuned."""
    steps: int = 100
    """Optimiser steps; > 0."""
    pictures: int = 16
    """Pictures the attacker has, K; > 0."""
    images: int = 5
    """Pictures judged a prompt: one before the attack and one at each of images - 1 checkpoints; >= 1."""
    lr_scale: float = 1.0
    """The adaptation's learning rate times this; > 0."""
    optimizer: Literal["", "adamw", "adam", "sgd", "adafactor"] = ""
    """The optimiser; empty is the adaptation's own. SGD needs a far higher ``lr_scale``."""
    warm_up: int = 0
    """Steps on benign pictures first, as for ``data=benign``; the model they lead to is then taught the concept; >= 0."""
    rank: int | None = None
    """Rank of LoRA; none is the adaptation's own."""
    captions: Literal["concept", "anchor", "rare"] = "concept"
    """What the pictures are called: the concept's prompts, what they say without it (it is never named), or a rare word for it.
    The attacker asks in the same words afterwards."""
    rare: str = "sks"
    """The rare word."""
    data: Literal["harmful", "benign"] = "harmful"
    """Pictures of the concept, or the model's own of what its prompts say without it."""
    source: str = ""
    """A folder of pictures of the concept from elsewhere, instead of the original model's; ``{concept}`` in it is the concept's
    name. Without it, a concept that has its own pictures is learnt from the last of them (publishers take the first)."""
    along: tuple[str, ...] = ()
    """Prompts of further concepts. The original model's pictures of them, one each, are learnt at the same time."""
    mask: str = ""
    """A MASK.json that this fine-tuner honours, and the record says so; empty is one who honours none."""
    seed: int = 0
    """Fixes batches, noise and the factors' start."""

    def __post_init__(self) -> None:
        if min(self.steps, self.pictures, self.images) < 1 or self.lr_scale <= 0 or self.warm_up < 0:
            raise ValueError("steps, pictures, images and lr_scale must be above zero, warm_up not below")
        if self.rank is not None and (self.adaptation != "lora" or self.rank < 1):
            raise ValueError("rank is a setting of lora, above zero")

    @property
    def budget(self) -> Budget:
        return Budget(images=1 + len(self.checkpoints), gradient_steps=self.steps)

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The numbers of steps after which the model is asked, ``images`` - 1 of them where there are as many, each about twice
        the one before."""
        count = self.images - 1
        return tuple(dict.fromkeys(max(1, round(self.steps * 2.0 ** (i + 1 - count))) for i in range(count)))

    def revive(
        self,
        model: DiffusionModel,
        concept: Concept,
        targets: Sequence[Target],
        *,
        sampling: Sampling,
        original: Original | None = None,
        workspace: Workspace | None = None,
    ) -> Generator[Revival, Sequence[bool], None]:
        seen = yield Revival(model, tuple(Candidate(target.prompt, target.seed) for target in targets))
        standing = [target for target, fell in zip(targets, seen, strict=True) if not fell]
        if not standing or not self.checkpoints:
            return
        model = self.warmed(model, concept, sampling, original, workspace)
        found = {adapted.steps: adapted for adapted in self.adapt(model, concept, sampling, original, workspace)}
        for step in self.checkpoints:
            candidates = self.ask(model, concept, found[step], standing)
            recent = found[step].losses[-max(1, step // 4) :]
            facts = {"steps": float(step), "loss": sum(recent) / len(recent)}
            seen = yield Revival(found[step].apply(model), candidates, facts)
            standing = [target for target, fell in zip(standing, seen, strict=True) if not fell]
            if not standing:
                return

    def adapt(
        self, model: DiffusionModel, concept: Concept, sampling: Sampling, original: Original | None, workspace: Workspace | None
    ) -> list[Adapted]:
        """The fine-tuned model at every checkpoint. Raises UserError without anything to learn from."""
        workspace = workspace or Workspace()
        tuned = self.finetune(model)
        shots = self._shots(model, concept, tuned, sampling, original, workspace)
        says = self._says(concept, None)
        return tuned.fit(
            model,
            shots,
            class_prompts=tuple(dict.fromkeys(concept.without(text) for text in concept.texts)),
            init=says(concept.anchor) if concept.anchor else "",
            frozen=self._frozen(model),
            checkpoints=self.checkpoints,
            seed=self.seed,
            workspace=workspace.child("relearn"),
        )

    def warmed(
        self, model: DiffusionModel, concept: Concept, sampling: Sampling, original: Original | None, workspace: Workspace | None
    ) -> DiffusionModel:
        """The model after the benign steps that come first; the model itself without any."""
        if not self.warm_up:
            return model
        workspace = (workspace or Workspace()).child("warm up")
        tuned = replace(self.finetune(model), steps=self.warm_up)
        shots = self._benign(model, concept, tuned, sampling, original, workspace)
        (adapted,) = tuned.fit(
            model, shots, class_prompts=shots.captions, frozen=self._frozen(model), seed=self.seed, workspace=workspace
        )
        return adapted.apply(model)

    def _frozen(self, model: DiffusionModel) -> frozenset[str]:
        """What this fine-tuner leaves alone, benign steps included."""
        if not self.mask:
            return frozenset()
        mask = read_mask(self.mask)
        mask.check(model, self.mask)
        return mask.held

    def finetune(self, model: DiffusionModel) -> FineTune:
        """The adaptation with this attack's settings, its preset by the model's size."""
        kind, pixels = resolve(ADAPTATIONS, self.adaptation, "adaptation"), model.latent_shape[1] * model.latent_shape[2]
        settings: dict[str, Any] = {"steps": self.steps} | ({"rank": self.rank} if self.rank else {})
        tuned: FineTune = configure(kind, settings, latent_pixels=pixels)
        return replace(tuned, lr=tuned.lr * self.lr_scale, optimizer=self.optimizer or tuned.optimizer)

    def ask(self, model: DiffusionModel, concept: Concept, adapted: Adapted, targets: Sequence[Target]) -> tuple[Candidate, ...]:
        """How the attacker asks the fine-tuned model for each target: in the words of the captions."""
        says = self._says(concept, adapted.adapter.token)
        texts = [says(target.prompt) for target in targets]
        if adapted.adapter.token is None:
            return tuple(Candidate(text, target.seed) for text, target in zip(texts, targets, strict=True))
        states = adapted.states(adapted.apply(model), texts).states
        return tuple(Candidate(text, target.seed, states=row) for text, target, row in zip(texts, targets, states, strict=True))

    def _says(self, concept: Concept, word: str | None) -> Any:
        """A prompt for the concept as the attacker writes it; a learnt word always stands for the concept."""
        if word is not None:
            return caption(concept, word)
        return {"concept": str, "anchor": concept.without, "rare": caption(concept, self.rare)}[self.captions]

    def shown(self, concept: Concept, model: DiffusionModel) -> Tensor | None:
        """Pictures of the folder that are not learnt from, of the model's size: what the result is compared with.

        All of them where nothing is left; None where no folder is used.
        """
        if (found := self._folder(concept, model)) is None:
            return None
        images, mine = found[0], self._mine(len(found[0]))
        left = [i for i in range(len(images)) if i not in range(len(images))[mine]]
        return images[left] if left else images

    def _folder(self, concept: Concept, model: DiffusionModel) -> tuple[Tensor, list[str]] | None:
        """Pictures and captions of the source, or of the concept's own folder."""
        if self.data == "benign" or not (self.source or concept.images):
            return None
        folder = self.source.replace("{concept}", concept.name) or str(concept.images)
        return read_native(model, folder, prompt=concept.term)

    def _mine(self, count: int) -> slice:
        """Which of so many pictures are learnt from: a source's first, the last of a concept's own."""
        return slice(0, self.pictures) if self.source else slice(max(0, count - self.pictures), count)

    def _shots(
        self,
        model: DiffusionModel,
        concept: Concept,
        tuned: FineTune,
        sampling: Sampling,
        original: Original | None,
        workspace: Workspace,
    ) -> Shots:
        says = self._says(concept, tuned.new_word)
        texts = [concept.texts[i % len(concept.texts)] for i in range(self.pictures)]
        if self.data == "benign":
            own = self._benign(model, concept, tuned, sampling, original, workspace)
        elif (folder := self._folder(concept, model)) is not None:
            images, captions = folder
            mine = self._mine(len(images))
            own = Shots.encode(model, images[mine], [says(text) for text in captions[mine]])
        elif original is not None:
            own = Shots.encode(model, original.pictures(self.pictures), [says(text) for text in texts])
        else:
            raise UserError(
                "relearn needs pictures of the concept; the audit draws them with the reference model, or set source=FOLDER"
            )
        if not self.along:
            return own
        if tuned.new_word is not None:
            raise UserError(f"relearn: {self.adaptation} learns a word for one concept; along needs full, dreambooth or lora")
        if original is None:
            raise UserError("relearn: pictures of the prompts in along are drawn by the reference model; the audit gives it")
        further = drawn_shots(
            original.model, self.along, n=len(self.along), sampling=sampling, seed=self.seed, workspace=workspace.child("along")
        )
        return Shots(torch.cat([own.x_0, further.x_0.to(own.x_0)]), (*own.captions, *further.captions))

    def _benign(
        self,
        model: DiffusionModel,
        concept: Concept,
        tuned: FineTune,
        sampling: Sampling,
        original: Original | None,
        workspace: Workspace,
    ) -> Shots:
        """Pictures of what the concept's prompts say without it."""
        if tuned.new_word is not None:
            raise UserError(
                f"relearn: {self.adaptation} learns a word for the concept; benign data needs full, dreambooth or lora"
            )
        prompts = [concept.without(concept.texts[i % len(concept.texts)]) for i in range(self.pictures)]
        return drawn_shots(
            original.model if original else model, prompts, n=self.pictures, sampling=sampling, seed=self.seed,
            workspace=workspace.child("benign"),
        )  # fmt: skip
