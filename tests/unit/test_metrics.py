"""Intervals against published values; metrics against their definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import folders
from safeweights.audit.statistics import bootstrap_mean, difference, wilson
from safeweights.metrics.clip_score import clip_score
from safeweights.metrics.frechet import frechet_distance
from safeweights.metrics.similarity import similarity
from safeweights.models.vision import CLIP, Embedder


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998 (Stat. Med. 17:857), table I, score intervals
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
        # the interface contract's own example
        (3, 40, 0.026, 0.199), (9, 40, 0.123, 0.375),
        (20, 20, 0.8389, 1.0),
    ],
)  # fmt: skip
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=6e-4)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Newcombe 1998 (Stat. Med. 17:873), table II, method 10
        ((56, 70, 48, 80), 0.0524, 0.3339), ((9, 10, 3, 10), 0.1705, 0.8090), ((6, 7, 2, 7), 0.0582, 0.8062),
        ((5, 56, 0, 29), -0.0381, 0.1926), ((0, 10, 0, 20), -0.1611, 0.2775), ((10, 10, 0, 10), 0.6075, 1.0),
    ],
)  # fmt: skip
def test_newcombe(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    assert difference(*counts) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_its_rate_and_mirrors(counts: tuple[int, int]) -> None:
    k, n = counts
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("counts", [(0, 0), (3, 2), (-1, 5)])
def test_impossible_counts(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(*counts)


def test_bootstrap() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=400).tolist()
    low, high = bootstrap_mean(values, seed=1)
    half = 1.96 * float(np.std(values, ddof=1)) / 20
    assert low == pytest.approx(np.mean(values) - half, abs=0.03)
    assert high == pytest.approx(np.mean(values) + half, abs=0.03)
    assert bootstrap_mean(values, seed=1) == (low, high)
    assert bootstrap_mean(values, seed=2) != (low, high)
    assert bootstrap_mean([5.0], seed=0) == (5.0, 5.0)
    for wrong in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="bootstrap"):
            bootstrap_mean(wrong)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Callable[..., Path]) -> CLIP:
    return CLIP(str(folders.clip(tmp_path_factory.mktemp("clip"), tiny_sd() / "tokenizer")))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return Embedder(str(folders.classifier(tmp_path_factory.mktemp("embedder"), ["a", "b"])))


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_clip_score_is_the_cosine_of_clip_itself(clip: CLIP) -> None:
    images, prompts = (pictures(4) * 255).round() / 255, ["a red house", "a dog", "a red house", "a boat"]
    tokens = clip.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        output = clip.model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=(images - 0.5) / 0.5
        )
    expected = (output.image_embeds * output.text_embeds).sum(-1).mean()
    found = clip_score(images, prompts, clip)
    assert found.value == pytest.approx(float(expected), abs=1e-5)
    assert found.unit == "cosine"
    assert found.interval is not None
    assert found.interval[0] <= found.value <= found.interval[1]


def test_frechet_distance_is_its_formula(embedder: Embedder) -> None:
    from scipy.linalg import sqrtm

    ours, theirs = pictures(80), pictures(90, seed=1) ** 2
    found = frechet_distance(ours, theirs, embedder)
    a, b = embedder.features(ours).double().numpy(), embedder.features(theirs).double().numpy()
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d - 2 * np.real(sqrtm(c @ d)))
    assert found.value == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    assert found.n == 80
    assert found.why == ""
    same = frechet_distance(ours, ours, embedder)
    assert same.value == pytest.approx(0, abs=1e-4)
    assert same.value < found.value
    few = frechet_distance(pictures(32), theirs, embedder)
    assert "biased" in few.why


def test_similarity(embedder: Embedder) -> None:
    images = pictures(8)
    assert similarity(images, images, embedder).value == pytest.approx(1, abs=1e-5)
    other = similarity(images, pictures(8, seed=2) ** 3, embedder)
    assert other.value is not None
    assert other.value < 0.9999
    assert similarity(images, pictures(3), embedder, paired=False).n == 8
    with pytest.raises(ValueError, match="references"):
        similarity(images, pictures(3), embedder)


def test_what_cannot_be_measured_is_none_with_its_reason(embedder: Embedder, clip: CLIP) -> None:
    found = [
        clip_score(pictures(2), ["a", "b"], None),
        clip_score(pictures(0), [], clip),
        frechet_distance(pictures(64), pictures(64), None),
        frechet_distance(pictures(8), pictures(64), embedder),
        similarity(pictures(2), pictures(2), None),
        similarity(pictures(0), pictures(0), embedder),
    ]
    for measurement in found:
        assert measurement.value is None
        assert measurement.interval is None
        assert measurement.why


def test_an_embedder_never_uses_a_random_pooler(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=2,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    preprocessing = {**folders.PREPROCESSING, "image_processor_type": "ViTImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    first, second = Embedder(str(tmp_path)).features(pictures(2)), Embedder(str(tmp_path)).features(pictures(2))
    torch.testing.assert_close(first, second)
    assert first.shape == (2, 16)
