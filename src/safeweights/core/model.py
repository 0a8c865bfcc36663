"""What every diffusion model looks like from outside ``models/``: noise prediction, text in, pictures out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SCHEDULERS = ("ddim", "lms", "dpm", "euler", "pndm")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn from a model. Written into every record: a forgotten guidance looks like perfect erasure."""

    width: int = 512
    height: int = 512
    steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str = "ddim"


@dataclass(frozen=True)
class Grid:
    """Where a model's DDIM sampler steps; the names and meanings are those of diffusers' scheduler configs."""

    spacing: str = "leading"
    """"leading", "trailing" or "linspace"."""
    offset: int = 1
    """Added to every timestep of a leading grid."""
    final_alpha: float = 1.0
    """alpha of the level below timestep 0, where the last step lands."""


@dataclass
class Calls:
    """Work done by a model and all copies of it, counted in samples."""

    eps: int = 0


@dataclass(frozen=True)
class Conditioning:
    """Text as the denoiser sees it: ``states`` (B, L, D), last hidden states of the text encoder."""

    states: Tensor

    def __len__(self) -> int:
        return int(self.states.shape[0])

    def __getitem__(self, index: Any) -> Conditioning:
        """Rows of the batch: a slice, an index tensor or a list of ints (always keeps the batch axis)."""
        return Conditioning(self.states[[index] if isinstance(index, int) else index])

    def repeat(self, n: int) -> Conditioning:
        """Each row n times in a row: (B * n, L, D)."""
        return Conditioning(self.states.repeat_interleave(n, dim=0))

    def detach(self) -> Conditioning:
        return Conditioning(self.states.detach())

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Batches one after the other."""
        import torch

        return Conditioning(torch.cat([part.states for part in parts]))


class DiffusionModel(Protocol):
    """A latent diffusion model in noise-prediction form, x_t = alpha_t x_0 + sigma_t eps.

    ``alpha`` and ``sigma`` have shape (T,), T training timesteps, alpha^2 + sigma^2 = 1.
    ``latent_shape`` is (C, h, w) at the model's native picture size; ``latent_stride`` is the pixels per latent, each way.
    ``prediction`` is what its weights were trained to predict, "epsilon" or "v_prediction"; `eps` speaks noise either way.
    ``calls`` counts the samples sent through `eps`; forks and copies share it.
    """

    name: str
    prediction: str
    alpha: Tensor
    sigma: Tensor
    latent_shape: tuple[int, int, int]
    latent_stride: int
    grid: Grid
    calls: Calls
    denoiser: nn.Module
    text_encoder: nn.Module

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    # text
    @property
    def max_tokens(self) -> int:
        """Positions L of a prompt, BOS and EOS included (77 for CLIP)."""
        ...

    @property
    def vocabulary(self) -> Tensor:
        """Token-embedding matrix (V, D_token), detached."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Token ids that are no text: BOS, EOS, padding."""
        ...

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, L), BOS first, padded to L. Raises UserError for a prompt that does not fit."""
        ...

    def text_of(self, ids: Tensor) -> str:
        """The text of a 1-D tensor of token ids, special ids left out."""
        ...

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Text through tokenizer and text encoder. Differentiable in the text encoder's trainable parameters."""
        ...

    def embed_tokens(self, token_embeddings: Tensor, ids: Tensor) -> Conditioning:
        """Token embeddings (B, L, D_token), before positions are added, through the text encoder; differentiable.

        ``ids`` (B, L) are the tokens they stand for (any id may stand for a free embedding; the EOS must be right).
        """
        ...

    # pictures
    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] to x_0 (B, C, h, w): posterior mean times the scaling factor."""
        ...

    def decode(self, x_0: Tensor) -> Tensor:
        """Latents to pictures in [0, 1], (B, 3, H, W), clamped."""
        ...

    # noise
    def eps(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """Noise prediction (B, C, h, w) for x_t at timesteps t (B,) under c (B or 1 rows); t may be fractional for samplers."""
        ...

    def sampler(self, name: str) -> Any:
        """A fresh diffusers scheduler of a name in `SCHEDULERS` for this model's noise levels, taking noise predictions."""
        ...

    # weights
    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """All parameters a method may edit: ``unet.<name>`` and ``text_encoder.<name>``."""
        ...

    def fork(self, parameters: str | Sequence[str]) -> Self:
        """A copy with the named group of parameters trainable (in fp32); everything else is shared and frozen.

        ``parameters`` is a group of ``diffusion.parameters`` or an explicit list of names.
        """
        ...

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters of a fork by name."""
        ...

    def edited(self) -> dict[str, Tensor]:
        """Detached copies of the trainable parameters by name, in the dtype of the base."""
        ...

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """A copy whose named parameters have these values; the rest is shared. Raises UserError for an unknown name or shape."""
        ...

    def save(self, folder: Any) -> None:
        """Write a plain diffusers folder."""
        ...
