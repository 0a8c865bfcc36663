"""The original layout against its definition: the names and shapes that the published implementation's constructors give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safeweights.core.errors import UserError
from safeweights.models.single_file import TEXT_1, TEXT_2, UNET, original_layout, unet_layout, write_config
from safeweights.sandbox.files import model_folder

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def weighted(name: str, *shape: int, bias: bool = True) -> Shapes:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def resnet(name: str, before: int, after: int, time: int) -> Shapes:
    yield from weighted(f"{name}.in_layers.0", before)
    yield from weighted(f"{name}.in_layers.2", after, before, 3, 3)
    yield from weighted(f"{name}.emb_layers.1", after, time)
    yield from weighted(f"{name}.out_layers.0", after)
    yield from weighted(f"{name}.out_layers.3", after, after, 3, 3)
    if before != after:
        yield from weighted(f"{name}.skip_connection", after, before, 1, 1)


def transformer(name: str, width: int, text: int, linear: bool) -> Shapes:
    square = (width, width) if linear else (width, width, 1, 1)
    yield from weighted(f"{name}.norm", width)
    yield from weighted(f"{name}.proj_in", *square)
    block = f"{name}.transformer_blocks.0"
    for attention, context in (("attn1", width), ("attn2", text)):
        yield from weighted(f"{block}.{attention}.to_q", width, width, bias=False)
        yield from weighted(f"{block}.{attention}.to_k", width, context, bias=False)
        yield from weighted(f"{block}.{attention}.to_v", width, context, bias=False)
        yield from weighted(f"{block}.{attention}.to_out.0", width, width)
    yield from weighted(f"{block}.ff.net.0.proj", 8 * width, width)
    yield from weighted(f"{block}.ff.net.2", width, 4 * width)
    for number in (1, 2, 3):
        yield from weighted(f"{block}.norm{number}", width)
    yield from weighted(f"{name}.proj_out", *square)


def ldm_unet(widths: list[int], blocks: int, attended: set[int], text: int, linear: bool) -> Shapes:
    """A UNet as its constructor counts: one number for every module it appends, whatever level that is."""
    first, time = widths[0], 4 * widths[0]
    yield from weighted("time_embed.0", time, first)
    yield from weighted("time_embed.2", time, time)
    yield from weighted("input_blocks.0.0", first, 4, 3, 3)
    skips, width, number = [first], first, 1
    for level, after in enumerate(widths):
        for _ in range(blocks):
            yield from resnet(f"input_blocks.{number}.0", width, after, time)
            width = after
            if level in attended:
                yield from transformer(f"input_blocks.{number}.1", width, text, linear)
            skips.append(width)
            number += 1
        if level != len(widths) - 1:
            yield from weighted(f"input_blocks.{number}.0.op", width, width, 3, 3)
            skips.append(width)
            number += 1
    yield from resnet("middle_block.0", width, width, time)
    yield from transformer("middle_block.1", width, text, linear)
    yield from resnet("middle_block.2", width, width, time)
    number = 0
    for level, after in reversed(list(enumerate(widths))):
        for i in range(blocks + 1):
            yield from resnet(f"output_blocks.{number}.0", width + skips.pop(), after, time)
            width, place = after, 1
            if level in attended:
                yield from transformer(f"output_blocks.{number}.1", width, text, linear)
                place = 2
            if level and i == blocks:
                yield from weighted(f"output_blocks.{number}.{place}.conv", width, width, 3, 3)
            number += 1
    yield from weighted("out.0", width)
    yield from weighted("out.2", 4, width, 3, 3)


def vae_resnet(name: str, before: int, after: int) -> Shapes:
    yield from weighted(f"{name}.norm1", before)
    yield from weighted(f"{name}.conv1", after, before, 3, 3)
    yield from weighted(f"{name}.norm2", after)
    yield from weighted(f"{name}.conv2", after, after, 3, 3)
    if before != after:
        yield from weighted(f"{name}.nin_shortcut", after, before, 1, 1)


def vae_middle(name: str, width: int, attention: bool) -> Shapes:
    yield from vae_resnet(f"{name}.block_1", width, width)
    if attention:
        yield from weighted(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            yield from weighted(f"{name}.attn_1.{part}", width, width, 1, 1)
    yield from vae_resnet(f"{name}.block_2", width, width)


def ldm_vae(widths: list[int], blocks: int, attention: bool) -> Shapes:
    yield from weighted("encoder.conv_in", widths[0], 3, 3, 3)
    width = widths[0]
    for level, after in enumerate(widths):
        for i in range(blocks):
            yield from vae_resnet(f"encoder.down.{level}.block.{i}", width, after)
            width = after
        if level != len(widths) - 1:
            yield from weighted(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    yield from vae_middle("encoder.mid", width, attention)
    yield from weighted("encoder.norm_out", width)
    yield from weighted("encoder.conv_out", 8, width, 3, 3)
    yield from weighted("decoder.conv_in", width, 4, 3, 3)
    yield from vae_middle("decoder.mid", width, attention)
    for level, after in reversed(list(enumerate(widths))):
        for i in range(blocks + 1):
            yield from vae_resnet(f"decoder.up.{level}.block.{i}", width, after)
            width = after
        if level:
            yield from weighted(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    yield from weighted("decoder.norm_out", width)
    yield from weighted("decoder.conv_out", 3, width, 3, 3)
    yield from weighted("quant_conv", 8, 8, 1, 1)
    yield from weighted("post_quant_conv", 4, 4, 1, 1)


def clip(width: int, inner: int, layers: int, words: int) -> Shapes:
    yield "embeddings.token_embedding.weight", (words, width)
    yield "embeddings.position_embedding.weight", (77, width)
    for layer in range(layers):
        name = f"encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from weighted(f"{name}.self_attn.{part}", width, width)
        yield from weighted(f"{name}.layer_norm1", width)
        yield from weighted(f"{name}.layer_norm2", width)
        yield from weighted(f"{name}.mlp.fc1", inner, width)
        yield from weighted(f"{name}.mlp.fc2", width, inner)
    yield from weighted("final_layer_norm", width)


def open_clip(width: int, layers: int, words: int) -> Shapes:
    yield "token_embedding.weight", (words, width)
    yield "positional_embedding", (77, width)
    for layer in range(layers):
        name = f"transformer.resblocks.{layer}"
        yield f"{name}.attn.in_proj_weight", (3 * width, width)
        yield f"{name}.attn.in_proj_bias", (3 * width,)
        yield from weighted(f"{name}.attn.out_proj", width, width)
        yield from weighted(f"{name}.ln_1", width)
        yield from weighted(f"{name}.ln_2", width)
        yield from weighted(f"{name}.mlp.c_fc", 4 * width, width)
        yield from weighted(f"{name}.mlp.c_proj", width, 4 * width)
    yield from weighted("ln_final", width)


def empty(folder: Path) -> Any:
    """The parts a folder's configs describe, without memory for their weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = {part: json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae", "text_encoder")}
    with torch.device("meta"):
        return SimpleNamespace(
            denoiser=UNet2DConditionModel.from_config(configs["unet"]),
            vae=AutoencoderKL.from_config(configs["vae"]),
            text_encoder=CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        )


EXPECTED = {
    "SD 1.5": {
        UNET: lambda: ldm_unet([320, 640, 1280, 1280], 2, {0, 1, 2}, 768, False),
        "first_stage_model.": lambda: ldm_vae([128, 256, 512, 512], 2, True),
        TEXT_1 + "text_model.": lambda: clip(768, 3072, 12, 49408),
    },
    "SD 2.1": {
        UNET: lambda: ldm_unet([320, 640, 1280, 1280], 2, {0, 1, 2}, 1024, True),
        "first_stage_model.": lambda: ldm_vae([128, 256, 512, 512], 2, True),
        TEXT_2: lambda: open_clip(1024, 23, 49408),
    },
    "sandbox": {
        UNET: lambda: ldm_unet([48, 96, 128], 1, {1, 2}, 128, False),
        "first_stage_model.": lambda: ldm_vae([24, 48, 64], 1, False),
        TEXT_1 + "text_model.": lambda: clip(128, 384, 4, 1000),
    },
}


@pytest.fixture(params=EXPECTED)
def named(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any]:
    if request.param == "sandbox":
        return request.param, empty(model_folder())
    version = 2 if request.param == "SD 2.1" else 1
    linear = {UNET + "input_blocks.1.1.proj_in.weight": [320, 320]} if version == 2 else {}
    return request.param, empty(write_config(tmp_path, version, linear, "epsilon"))


def test_names_and_shapes_are_those_of_the_published_implementation(named: tuple[str, Any]) -> None:
    name, model = named
    written = {key: tuple(value.shape) for key, value in original_layout(model).items()}
    wanted = {prefix + key: shape for prefix, shapes in EXPECTED[name].items() for key, shape in shapes()}
    assert written == wanted
    if name == "SD 1.5":
        # The published file has 686 tensors of the UNet, 248 of the VAE and 196 of the text encoder.
        counts = [sum(key.startswith(prefix) for key in written) for prefix in (UNET, "first_stage_model.", TEXT_1)]
        assert counts == [686, 248, 196]


def test_diffusers_converts_every_name_back(named: tuple[str, Any]) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    _, model = named
    layout = original_layout(model)
    for part, convert in ((model.denoiser, convert_ldm_unet_checkpoint), (model.vae, convert_ldm_vae_checkpoint)):
        back = convert(dict(layout), part.config)
        wanted = {key: tuple(value.shape) for key, value in part.state_dict().items()}
        found = {key: tuple(value.shape) for key, value in back.items() if key in wanted}
        if part is model.vae:
            # Its attention weights may come back as 1x1 convolutions; loading takes the ones off.
            found = {key: shape[:2] if ".attentions." in key else shape for key, shape in found.items()}
        assert found == wanted


def test_a_unet_of_another_kind_is_refused() -> None:
    strange = SimpleNamespace(
        config=SimpleNamespace(layers_per_block=2, up_block_types=["UpBlock2D"]),
        state_dict=lambda: {"add_embedding.linear_1.weight": torch.zeros(1)},
    )
    with pytest.raises(UserError, match=r"no place for the UNet's add_embedding\.linear_1"):
        unet_layout(strange)
    strange.config.layers_per_block = [1, 2]
    with pytest.raises(UserError, match="--format diffusers"):
        unet_layout(strange)
