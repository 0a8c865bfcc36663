"""SGR and its kin: exact on numbers made up for it, and similarities of known features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from safeweights.metrics.gap_ratio import Gap, gap_ratio, mrsgr, msgr, msgr_difference, msgr_interval, rsgr, sgr
from safeweights.metrics.similarity_gap import CosineSimilarity, PerceptualSimilarity, as_shown

OURS = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
THEIRS = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Pixels:
    """An embedder whose features are the pixels, and whose one layer is the picture."""

    name = "some/pixels"

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)

    def pixels(self, images: torch.Tensor) -> Any:
        yield images

    def model(self, pixel_values: torch.Tensor, output_hidden_states: bool) -> Any:
        return type("Output", (), {"hidden_states": [pixel_values, pixel_values.flatten(2).transpose(1, 2)]})


def test_sgr_is_the_mean_of_the_checkpoints_ratios() -> None:
    assert gap_ratio(0.8, 0.6) == pytest.approx(0.25)
    # Not the ratio of the means, which would be 1 - 1.0 / 1.2.
    assert sgr([0.8, 0.4], [0.6, 0.4]) == pytest.approx((0.25 + 0.0) / 2)
    assert sgr([0.5, 0.7], [0.5, 0.7]) == 0.0
    assert sgr([0.5], [0.6]) == pytest.approx(-0.2)


def test_relative_and_multi_concept_forms() -> None:
    assert rsgr(0.3, 0.1) == pytest.approx(0.2)
    assert msgr({"a": 0.2, "b": 0.4}) == pytest.approx(0.3)
    assert mrsgr([0.2, 0.4], {"c": 0.1}) == pytest.approx(0.2)


def test_what_cannot_be_measured_is_refused() -> None:
    for wrong in (lambda: sgr([], []), lambda: sgr([0.5], [0.5, 0.4]), lambda: gap_ratio(0.0, 0.1), lambda: msgr([])):
        with pytest.raises(ValueError, match="need"):
            wrong()
    with pytest.raises(ValueError, match="above zero"):
        gap_ratio(float("nan"), 0.1)


def test_the_interval_is_over_prompts_and_pairs_them() -> None:
    """A protection that halves every prompt's similarity has no spread, however far apart the prompts are."""
    without = [[0.2, 0.9, 0.5, 0.4], [0.4, 0.8, 0.6, 0.2]]
    halved = Gap.of(without, [[value / 2 for value in row] for row in without])
    value, (low, high) = msgr_interval([halved, halved])
    assert (value, low, high) == pytest.approx((0.5, 0.5, 0.5))
    uneven = Gap.of(without, [[0.1, 0.9, 0.25, 0.4], [0.2, 0.8, 0.3, 0.2]])
    assert uneven.sgr() == pytest.approx((1 - 1.65 / 2.0 + 1 - 1.5 / 2.0) / 2)
    value, (low, high) = msgr_interval([uneven])
    assert value == pytest.approx(uneven.sgr())
    assert low < value < high
    assert msgr_interval([uneven]) == (value, (low, high))
    relative, (low, high) = msgr_interval([halved], [uneven])
    assert relative == pytest.approx(0.5 - uneven.sgr())
    assert low < relative < high
    with pytest.raises(ValueError, match="same checkpoints"):
        Gap.of(without, without[:1])


def test_cosines_are_averaged_over_all_pairs() -> None:
    pairs = [float(normalize(a.flatten(), dim=0) @ normalize(b.flatten(), dim=0)) for a in OURS for b in THEIRS]
    measure: Any = CosineSimilarity(Pixels())  # type: ignore[arg-type]
    assert measure(OURS, THEIRS) == pytest.approx(sum(pairs) / 12, abs=1e-6)
    assert measure(OURS[:1], OURS[:1]) == pytest.approx(1.0, abs=1e-6)
    assert measure.each(OURS, THEIRS) == pytest.approx([sum(pairs[4 * i : 4 * i + 4]) / 4 for i in range(3)], abs=1e-6)


def test_perceptual_distances_are_averaged_over_all_pairs() -> None:
    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((normalize(a, dim=0) - normalize(b, dim=0)).square().sum(0).mean())

    pairs = [distance(a, b) for a in OURS for b in THEIRS]
    measure: Any = PerceptualSimilarity(Pixels())  # type: ignore[arg-type]
    assert measure(OURS, THEIRS) == pytest.approx(1 - sum(pairs) / 12, abs=1e-6)
    assert measure(OURS[:1], OURS[:1]) == pytest.approx(1.0, abs=1e-6)


def test_paper_mode_shows_pictures_as_the_published_scripts_do() -> None:
    shown = as_shown(torch.rand(1, 3, 200, 200), "paper")
    assert shown.shape[-2:] == (64, 64)
    assert 0.5 <= float(shown.min()) <= float(shown.max()) <= 1.0
    assert torch.equal(as_shown(OURS, "clean"), OURS)


def test_two_protections_compare_prompt_by_prompt() -> None:
    """Prompts differ by far more than the protections do: only the pairing tells these apart."""
    without = np.array([[0.2, 0.4, 0.6, 0.8] * 3, [0.3, 0.5, 0.7, 0.9] * 3])
    ours, theirs = Gap(without, without * 0.7), Gap(without, without * 0.8)
    value, (low, high) = msgr_difference([ours, ours], [theirs, theirs])
    assert value == pytest.approx(0.1)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)
    assert msgr_difference([theirs], [ours])[0] == pytest.approx(-0.1)
    with pytest.raises(ValueError, match="same concepts"):
        msgr_difference([ours], [theirs, theirs])


def test_a_resample_without_likeness_does_not_end_the_interval() -> None:
    """One prompt below zero: together they have a ratio, twice that prompt alone has none."""
    gap = Gap.of([[0.5, -0.2]], [[0.25, -0.1]])
    value, (low, high) = msgr_interval([gap], resamples=200)
    assert value == pytest.approx(0.5)
    assert low <= value <= high
    assert msgr_difference([gap], [gap], resamples=200) == (0.0, (0.0, 0.0))
