"""The sandbox's autoencoder: 64 x 64 pictures to latents of 4 x 16 x 16 and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from safeweights.sandbox.workers import averaged

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (24, 48, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
    "mid_block_add_attention": False,
}


def build(**changes: Any) -> Any:
    """A fresh autoencoder of the sandbox's shape; `changes` override its configuration."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(**{**CONFIG, **changes})


def open_autoencoder(folder: Path) -> Any:
    """A trained autoencoder in single precision."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL.from_pretrained(str(folder)).float().eval()


def shuffled(rows: int, batch: int, step: int, seed: int) -> NDArray[np.int64]:
    """The rows of batch `step`: every epoch is a new permutation, and nothing has to be remembered."""
    at = np.arange(step * batch, (step + 1) * batch)
    epochs = at // rows
    orders = {int(e): np.random.default_rng([seed, int(e)]).permutation(rows) for e in np.unique(epochs)}
    return np.array([orders[int(e)][i % rows] for e, i in zip(epochs, at, strict=True)], np.int64)


def to_model(pictures: NDArray[np.uint8]) -> Tensor:
    """(n, 64, 64, 3) bytes to (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, across and down: what the loss weighs extra to keep lines sharp."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def _distance(x: Tensor, y: Tensor) -> Tensor:
    edge = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y), strict=True))
    distance: Tensor = (x - y).abs().mean() + ((x - y) ** 2).mean() + 0.5 * edge
    return distance


@dataclass
class Autoencoding:
    """Reconstruct pictures: L1 + MSE + edges, and a small pull of the latents towards a normal distribution."""

    pictures: Path
    batch: int
    seed: int
    changes: dict[str, Any]
    kl: float = 2e-6

    def __post_init__(self) -> None:
        self.model = build(**self.changes)
        self._pictures = np.load(self.pictures, mmap_mode="r")

    def draw(self, step: int, rank: int, workers: int) -> tuple[Tensor, Tensor]:
        """This worker's pictures of a step, every other one mirrored, and noise for their latents."""
        rows = shuffled(len(self._pictures), self.batch, step, self.seed)[rank::workers]
        rng = np.random.default_rng([self.seed, step, rank])
        flip = rng.random(len(rows)) < 0.5
        chosen = self._pictures[rows]
        chosen[flip] = chosen[flip, :, ::-1]
        return to_model(chosen), torch.from_numpy(rng.standard_normal((len(rows), 4, 16, 16), np.float32))

    def loss(self, step: int, rank: int, workers: int) -> Tensor:
        x, noise = self.draw(step, rank, workers)
        with torch.autocast("cpu", torch.bfloat16):  # a third faster, and as good
            latents = self.model.encode(x).latent_dist
            mean, spread = latents.mean.float(), latents.std.float()
            y = self.model.decode(mean + spread * noise).sample
        divergence = (mean**2 + spread**2 - 1 - 2 * spread.log()).sum((1, 2, 3)).mean()
        loss: Tensor = _distance(x, y.float()) + self.kl * divergence
        return loss


@dataclass
class Decoding:
    """Go on with the decoder alone: sharper pictures from latents that stay as they are."""

    pictures: Path
    autoencoder: Path
    batch: int
    seed: int
    changes: dict[str, Any]

    def __post_init__(self) -> None:
        self._draws = Autoencoding(self.pictures, self.batch, self.seed, self.changes)
        whole = self._draws.model
        averaged(whole, self.autoencoder)
        self._whole = whole.eval()
        self.model = decoder_of(whole)

    def loss(self, step: int, rank: int, workers: int) -> Tensor:
        x, noise = self._draws.draw(step, rank, workers)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = self._whole.encode(x).latent_dist
                z = latents.mean.float() + latents.std.float() * noise
            y = self._whole.decode(z).sample
        return _distance(x, y.float())


def decoder_of(autoencoder: Any) -> nn.ModuleDict:
    """The parts that `decode` uses, sharing their parameters with the whole."""
    return nn.ModuleDict({"decoder": autoencoder.decoder, "last": autoencoder.post_quant_conv})


@torch.no_grad()
def encode(model: Any, pictures: NDArray[np.uint8], batch: int = 64) -> Tensor:
    """Unscaled latent means, (n, 4, 16, 16)."""
    parts = [model.encode(to_model(pictures[i : i + batch])).latent_dist.mean for i in range(0, len(pictures), batch)]
    return torch.cat(parts)


@torch.no_grad()
def decode(model: Any, latents: Tensor, batch: int = 64) -> NDArray[np.uint8]:
    """Unscaled latents back to bytes, (n, 64, 64, 3)."""
    parts = []
    for i in range(0, len(latents), batch):
        y = model.decode(latents[i : i + batch]).sample
        parts.append(((y.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def decibels(pictures: NDArray[np.uint8], again: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio over all pixels, in dB."""
    error = np.mean((pictures.astype(np.float64) - again.astype(np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / error))
