"""An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion (Gal et al., ICLR 2023,
arXiv:2208.01618)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safeweights.attacks.relearning.finetune import FineTune
from safeweights.diffusion.adaptation import Adapter


@dataclass(frozen=True, kw_only=True)
class TextualInversion(FineTune):
    """Learn the embedding of one new word; no weight of the model moves.

    v*  =  argmin_v  E || eps - eps_theta(x_t, t, c(v)) ||^2                                                        (eq. 2)

    Needs: pictures whose captions hold the new word.   Cost: one pass forward and backward a step; memory of one model.
    Differs from the reference code: the learning rate is not multiplied by the batch size; no other row can move, so none is put
    back; captions are the user's, not drawn from a list of templates.
    """

    name: ClassVar[str] = "textual-inversion"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "paper": {"steps": 3000, "lr": 5e-4, "batch_size": 1},
    }

    steps: int = 100
    """Optimiser steps; > 0."""
    lr: float = 0.05
    """Constant learning rate; > 0."""
    weight_decay: float = 0.0
    """Of AdamW; >= 0."""
    token: str = "<new1>"
    """The new word, once in every caption."""
    vectors: int = 1
    """Embeddings the word stands for; > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.token.strip() or self.vectors < 1:
            raise ValueError("token must be a word and vectors above zero")

    @property
    def new_word(self) -> str | None:
        return self.token

    def adapter(self, *, init: str = "", frozen: frozenset[str] = frozenset()) -> Adapter:
        return Adapter(token=self.token, init=init, vectors=self.vectors, frozen=frozen)
