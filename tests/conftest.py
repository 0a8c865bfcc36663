"""Tiny models with the architecture of Stable Diffusion, built from nothing."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

WORDS = [
    "a",
    "an",
    "the",
    "of",
    "in",
    "and",
    "picture",
    "photo",
    "by",
    "dog",
    "cat",
    "house",
    "boat",
    "red",
    "blue",
    "vincent",
    "van",
    "gogh",
    "truck",
    "garbage",
    "church",
]
MERGED = ("nu", "di", "ty</w>", "ten", "ch</w>", "mo", "sa", "ic</w>")


def bpe(words: list[str], pieces: tuple[str, ...]) -> tuple[dict[str, int], list[str]]:
    """A byte-level BPE that knows ``words`` whole and ``pieces`` as sub-words, with every byte as a fallback."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[str] = []
    for word in [*(word + "</w>" for word in words), *pieces]:
        end = word.endswith("</w>")
        parts = list(word.removesuffix("</w>"))
        if end:
            parts[-1] += "</w>"
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            if merge not in merges:
                merges.append(merge)
            parts[:2] = [parts[0] + parts[1]]
            if parts[0] not in vocabulary:
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(vocabulary)}, merges


def tiny_tokenizer(length: int = 16, pad: str = "<|endoftext|>") -> Any:
    from transformers import CLIPTokenizer

    vocabulary, merges = bpe(WORDS, MERGED)
    return CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges], pad_token=pad, model_max_length=length
    )


def build_tiny_sd(folder: Path, *, version: str = "1.5", prediction: str = "epsilon", layers: int = 3, seed: int = 0) -> Path:
    """A diffusers folder with the structure of SD 1.5 or 2.1 at a hundredth of the width."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    two = version.startswith("2")
    tokenizer = tiny_tokenizer(pad="!" if two else "<|endoftext|>")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
                max_position_embeddings=16, hidden_act="gelu" if two else "quick_gelu", bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32, attention_head_dim=(2, 4) if two else 8, use_linear_projection=two,
        )  # fmt: skip
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
        )  # fmt: skip
        # Fresh weights hardly react to text; wider embeddings and cross-attention make every part matter in a comparison.
        with torch.no_grad():
            text_encoder.get_input_embeddings().weight.mul_(20)
            for name, parameter in unet.named_parameters():
                if "attn2.to_" in name:
                    parameter.mul_(3)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_sd(version="1.5", prediction="epsilon", layers=3)`` gives the path of such a folder; do not write into it."""
    built: dict[str, Path] = {}

    def folder(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in built:
            built[key] = build_tiny_sd(tmp_path_factory.mktemp("tiny-sd"), **options)
        return built[key]

    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_sd: Callable[..., Path]) -> Any:
    """The tiny SD 1.5, opened. Frozen: tests may fork it, never edit it."""
    from safeweights.models.door import open_model

    return open_model(str(tiny_sd()), device="cpu")
