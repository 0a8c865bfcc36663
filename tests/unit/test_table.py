"""Registries and settings: late, typed, and plain about what is valid."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any, ClassVar, Literal

import pytest

from safeweights.core import table
from safeweights.core.errors import UserError
from safeweights.core.table import configure, describe, parse_settings, resolve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    name: ClassVar[str] = "sample"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"small": {"lr": 1e-2}, "paper": {"lr": 1e-5, "steps": 1000}}

    lr: float = 1e-3
    steps: int = 10
    mode: Literal["fast", "exact"] = "exact"
    clip: bool = True
    limit: float | None = 1.0
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps must be at least 1")


def test_text_becomes_the_type_of_the_field() -> None:
    given = parse_settings(["lr=1e-4", "steps=3", "mode=fast", "clip=no", "limit=none", "names=a,b", "sizes=2,3"])
    made = configure(Sample, given)
    assert made == Sample(lr=1e-4, steps=3, mode="fast", clip=False, limit=None, names=("a", "b"), sizes=(2, 3))
    assert describe(made)["names"] == ["a", "b"]


def test_a_setting_may_hold_an_equals_sign() -> None:
    assert parse_settings(["names=a=b"]) == {"names": "a=b"}


@pytest.mark.parametrize("pair", ["lr", "=3", ""])
def test_pairs_need_a_key_and_an_equals_sign(pair: str) -> None:
    with pytest.raises(UserError, match="key=value"):
        parse_settings([pair])


def test_presets_follow_the_size_of_the_model() -> None:
    assert configure(Sample, {}, latent_pixels=16 * 16).lr == 1e-2
    assert configure(Sample, {}, latent_pixels=64 * 64).steps == 1000
    assert configure(Sample, {"preset": "paper"}, latent_pixels=16 * 16).lr == 1e-5
    assert configure(Sample, {"preset": "paper", "lr": "0.5"}).lr == 0.5
    assert configure(Sample, {}).lr == 1e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stepz": "3"}, ["stepz", "steps", "mode", "preset"]), ({"steps": "three"}, ["steps", "int", "three"]),
        ({"steps": "1.5"}, ["steps", "int"]), ({"steps": 1.5}, ["steps"]), ({"steps": True}, ["steps"]), ({"lr": "nan"}, ["lr"]),
        ({"lr": "inf"}, ["lr"]),
        ({"mode": "slow"}, ["mode", "fast", "exact"]), ({"clip": "maybe"}, ["clip"]), ({"sizes": "1,x"}, ["sizes"]),
        ({"preset": "huge"}, ["huge", "small", "paper"]), ({"steps": "0"}, ["at least 1"]), ({"limit": "wide"}, ["limit"]),
    ],
)  # fmt: skip
def test_wrong_settings_are_told_in_one_line(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        configure(Sample, settings)
    for word in ["sample", *words]:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"unknown method 'esdd'; known are .*esd"):
        resolve(table.ERASERS, "esdd", "method")


@pytest.mark.parametrize("registry", [table.ERASERS, table.ATTACKS, table.DETECTORS])
def test_every_registered_name_can_be_opened(registry: dict[str, str]) -> None:
    for name in registry:
        cls = resolve(registry, name, "entry")
        if registry is not table.DETECTORS:
            assert cls.name == name
            configure(cls, {})


def test_listing_names_imports_no_torch() -> None:
    code = "import sys, safeweights.core.table as t; assert t.ERASERS; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
