"""The sandbox's text-to-image model: a CLIP text encoder and a UNet trained together on cached latents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safeweights.sandbox.vae import shuffled

UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (48, 96, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "projection_dim": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def build_unet(**changes: Any) -> nn.Module:
    """A fresh UNet of the sandbox's shape; `changes` override its configuration."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    model: nn.Module = UNet2DConditionModel(**{**UNET, **changes})
    return model


def build_text_encoder(vocabulary: int, **changes: Any) -> nn.Module:
    """A fresh text encoder for that many tokens; `changes` override its configuration."""
    from transformers import CLIPTextConfig, CLIPTextModel

    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    model: nn.Module = CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, **{**TEXT, **ends, **changes}))
    return model


def open_text_encoder(folder: Path) -> nn.Module:
    """A trained text encoder in single precision, frozen."""
    from transformers import CLIPTextModel

    model: nn.Module = CLIPTextModel.from_pretrained(str(folder)).float().eval().requires_grad_(False)
    return model


def alphas_bar() -> Tensor:
    """The scaled-linear schedule, (1000,): the share of signal variance at each timestep."""
    betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


@dataclass
class Denoising:
    """Predict the noise in a noised latent from its caption."""

    folder: Path
    """Holds latents.npy (scaled, half precision), tokens.npy (n, 77) and empty.npy (77,)."""
    batch: int
    seed: int
    vocabulary: int
    unet: dict[str, Any]
    text: dict[str, Any]
    text_encoder: Path | None = None
    """A trained text encoder's folder: it stays as it is, and only the UNet learns."""

    def __post_init__(self) -> None:
        unet = build_unet(**self.unet)
        if self.text_encoder is None:
            self.encoder = build_text_encoder(self.vocabulary, **self.text)
            self.model = nn.ModuleDict({"text": self.encoder, "unet": unet})
        else:
            self.encoder = open_text_encoder(self.text_encoder)
            self.model = nn.ModuleDict({"unet": unet})
        self._latents = np.load(self.folder / "latents.npy", mmap_mode="r")
        self._tokens = np.load(self.folder / "tokens.npy")
        self._empty = np.load(self.folder / "empty.npy")
        self._bar = alphas_bar()
        # Most steps read as many positions as the longest caption needs; every eighth all 77, as pipelines do.
        self._short = int((self._tokens != self._empty[-1]).sum(1).max()) + 2

    def loss(self, step: int, rank: int, workers: int) -> Tensor:
        rows = shuffled(len(self._latents), self.batch, step, self.seed)[rank::workers]
        n = len(rows)
        rng = np.random.default_rng([self.seed, step, rank])
        tokens = self._tokens[rows].copy()
        tokens[rng.random(n) < 0.1] = self._empty
        if step % 8:
            tokens = tokens[:, : self._short]
        x_0 = torch.from_numpy(np.asarray(self._latents[rows], np.float32))
        eps = torch.from_numpy(rng.standard_normal(x_0.shape, np.float32))
        # One timestep from each of n equal parts of the schedule: less noise in the gradient than drawing them freely.
        t = torch.from_numpy(((np.arange(n) + rng.random(n)) * (1000 / n)).astype(np.int64).clip(0, 999))
        bar = self._bar[t].view(-1, 1, 1, 1)
        c = self.encoder(torch.from_numpy(tokens)).last_hidden_state
        guess = self.model["unet"](bar.sqrt() * x_0 + (1 - bar).sqrt() * eps, t, c).sample
        ratio = self._bar[t] / (1 - self._bar[t])
        weight = ratio.clamp(max=5.0) / ratio  # min-SNR-5
        loss: Tensor = (weight * ((guess - eps) ** 2).mean((1, 2, 3))).mean()
        return loss


def save_half(model: nn.Module, folder: Path) -> None:
    """Store a model's weights in half precision: half the bytes, and loaded back as single precision."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(str(folder))  # type: ignore[operator]
    for path in folder.glob("*.safetensors"):
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_file(str(path)).items()}
        save_file(tensors, str(path), metadata={"format": "pt"})


def save_pipeline(vae: nn.Module, unet: nn.Module, text_encoder: nn.Module, tokenizer: Path, folder: Path) -> None:
    """Write a Stable Diffusion folder that `StableDiffusionPipeline.from_pretrained` opens without further words.

    All weights are stored in half precision; the text encoder's configuration asks for single precision, which is
    what diffusers loads the others as.
    """
    import diffusers
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    save_half(vae, folder / "vae")
    save_half(unet, folder / "unet")
    save_half(text_encoder, folder / "text_encoder")
    DDIMScheduler(**SCHEDULE).save_pretrained(str(folder / "scheduler"))
    CLIPTokenizer.from_pretrained(str(tokenizer)).save_pretrained(str(folder / "tokenizer"))
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_bytes((tokenizer / name).read_bytes())
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
