"""Parameter groups, on real Stable Diffusion architectures without their weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights.core.errors import UserError
from safeweights.diffusion.parameters import ALIASES, GROUPS, select
from safeweights.models.single_file import write_config


@pytest.fixture(scope="module", params=[1, 2])
def named(request: pytest.FixtureRequest) -> list[tuple[str, Any]]:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    linear = {"model.diffusion_model.input_blocks.1.1.proj_in.weight": [320, 320]} if request.param == 2 else {}
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        write_config(Path(folder), request.param, linear, "epsilon")
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(Path(folder) / "unet"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(Path(folder) / "text_encoder"))
    pairs = [(f"unet.{name}", p) for name, p in unet.named_parameters()]
    return pairs + [(f"text_encoder.{name}", p) for name, p in text.named_parameters()]


def parameters(named: list[tuple[str, Any]], names: list[str]) -> int:
    sizes = dict(named)
    return sum(sizes[name].numel() for name in names)


def test_counts_of_the_published_architectures(named: list[tuple[str, Any]]) -> None:
    two = any(".layers.22." in name for name, _ in named)
    counts = {group: len(select(named, group)) for group in GROUPS}
    assert counts["full"] == 686
    assert counts["xattn"] == 80  # 16 blocks: q, k, v, out weight, out bias
    assert counts["selfattn"] == 80
    assert counts["xattn_kv"] == 32
    assert counts["noxattn"] == 686 - 80 - 4 - 4  # minus time embedding, output norm and convolution
    assert counts["text_encoder"] == (23 if two else 12) * 16 + 2
    assert round(parameters(named, select(named, "full")) / 1e6, 1) == (865.9 if two else 859.5)
    assert round(parameters(named, select(named, "xattn_kv")) / 1e6, 1) == (25.6 if two else 19.2)
    assert round(parameters(named, select(named, "selfattn")) / 1e6, 1) == 49.6


def test_groups_do_not_overlap_where_they_should_not(named: list[tuple[str, Any]]) -> None:
    xattn, noxattn = set(select(named, "xattn")), set(select(named, "noxattn"))
    assert not xattn & noxattn
    assert not any("time_embedding" in name or "conv_out" in name or "conv_norm_out" in name for name in noxattn)
    assert any("time_emb_proj" in name for name in noxattn)
    assert set(select(named, "xattn_kv")) < xattn
    assert not any("embedding" in name for name in select(named, "text_encoder"))


def test_first_layers_are_counted_right(named: list[tuple[str, Any]]) -> None:
    for layers in (1, 2, 11, 12):
        assert len(select(named, f"text_encoder:{layers}")) == 16 * layers
    assert not any(".layers.1" in name for name in select(named, "text_encoder:1"))
    with pytest.raises(UserError, match="only"):
        select(named, "text_encoder:99")


def test_aliases(named: list[tuple[str, Any]]) -> None:
    for alias, group in ALIASES.items():
        assert select(named, alias) == select(named, group)


@pytest.mark.parametrize("group", ["esd-y", "text_encoder:0", "text_encoder:x", ""])
def test_unknown_group_lists_the_valid_ones(group: str) -> None:
    with pytest.raises(UserError, match="xattn, xattn_kv, noxattn"):
        select([("unet.a", 0)], group)


def test_a_group_that_selects_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="select nothing"):
        select([("text_encoder.encoder.layers.0.mlp.fc1.weight", 0)], "xattn")


def test_explicit_names_are_checked() -> None:
    assert select([("unet.a", 0), ("unet.b", 0)], ["unet.b"]) == ["unet.b"]
    with pytest.raises(UserError, match=r"no parameter 'unet\.c'"):
        select([("unet.a", 0)], ["unet.c"])


def test_text_encoders_of_older_transformers_wrap_their_layers() -> None:
    names = [f"text_encoder.text_model.encoder.layers.{i}.mlp.fc1.weight" for i in (0, 1, 10)]
    assert select([(name, 0) for name in names], "text_encoder:2") == names[:2]
