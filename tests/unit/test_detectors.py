"""Detectors: the same score for a picture and its PNG, and one line for what cannot be opened."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import folders
from safeweights.core.concept import DetectorSpec
from safeweights.core.errors import UserError
from safeweights.detectors.load import open_detector

LABELS = ["mosaic", "neon", "plain"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.classifier(tmp_path_factory.mktemp("judge"), LABELS)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Callable[..., Path]) -> Path:
    return folders.clip(tmp_path_factory.mktemp("clip"), tiny_sd() / "tokenizer")


def spec(model: Path | str, **changes: object) -> DetectorSpec:
    return DetectorSpec(**{"type": "image-classification", "model": str(model), "label": "mosaic", **changes})  # type: ignore[arg-type]


def pictures(n: int = 5) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_scores_are_the_model_own_probabilities(judge: Path) -> None:
    from transformers import ResNetForImageClassification

    images = (pictures() * 255).round() / 255
    found = open_detector(spec(judge), concept="mosaic").detect(images)
    model = ResNetForImageClassification.from_pretrained(judge).eval()
    with torch.no_grad():
        expected = model(pixel_values=(images - 0.5) / 0.5).logits.softmax(-1)[:, 0]
    torch.testing.assert_close(found.score, expected, atol=1e-5, rtol=1e-4)
    assert found.present.tolist() == (found.score >= 0.5).tolist()
    assert float(found.score.max() - found.score.min()) > 1e-3, "the tiny judge must tell pictures apart"


def test_a_score_equal_to_the_threshold_counts(judge: Path) -> None:
    score = open_detector(spec(judge), concept="mosaic").detect(pictures(1)).score
    at = open_detector(spec(judge, threshold=float(score[0])), concept="mosaic")
    assert at.detect(pictures(1)).present.tolist() == [True]
    above = open_detector(spec(judge, threshold=float(score[0]) + 1e-4), concept="mosaic")
    assert above.detect(pictures(1)).present.tolist() == [False]


def test_batches_and_saved_pictures_give_the_same_scores(judge: Path, tmp_path: Path) -> None:
    detector = open_detector(spec(judge), concept="mosaic")
    images = pictures(70)  # more than one batch
    together = detector.detect(images).score
    alone = torch.cat([detector.detect(images[k : k + 1]).score for k in (0, 63, 64, 69)])
    torch.testing.assert_close(alone, together[[0, 63, 64, 69]], atol=1e-5, rtol=1e-4)
    pixels = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    again = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)[None] / 255
    assert detector.detect(again).score.tolist() == detector.detect(images[:1]).score.tolist()
    assert detector.detect(images[:0]).present.shape == (0,)


def test_it_describes_itself(judge: Path, tmp_path: Path) -> None:
    from hashlib import sha256

    described = open_detector(spec(judge), concept="mosaic").describe()
    assert described["sha256"] == sha256((judge / "model.safetensors").read_bytes()).hexdigest()
    assert "false_positive" not in described
    measured = folders.classifier(tmp_path / "measured", LABELS)
    rates = {"mosaic": {"false_positive": 0.01, "false_negative": 0.02}}
    (measured / "measured.json").write_text(json.dumps(rates))
    described = open_detector(spec(measured), concept="mosaic").describe()
    assert (described["false_positive"], described["false_negative"]) == (0.01, 0.02)


def test_a_multi_label_judge_scores_each_label_alone(tmp_path: Path) -> None:
    folder = folders.classifier(tmp_path / "multi", LABELS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    scores = [open_detector(spec(folder, label=label), concept="x").detect(pictures(1)).score[0] for label in LABELS]
    assert abs(float(sum(scores)) - 1) > 1e-3


def test_clip_scores_the_concept_text_against_the_others(clip: Path) -> None:
    texts = ("a red house", "a boat", "a dog")
    first = open_detector(spec(clip, type="clip", label="", texts=texts), concept="house")
    second = open_detector(spec(clip, type="clip", label="a boat", texts=texts), concept="boat")
    third = open_detector(spec(clip, type="clip", label="a dog", texts=texts), concept="dog")
    total = sum(detector.detect(pictures()).score for detector in (first, second, third))
    torch.testing.assert_close(total, torch.ones(5))
    assert first.describe()["label"] == "a red house"


def test_python_detectors_need_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judge.py").write_text(
        "def red(images):\n    return images[:, 0].mean(dim=(1, 2))\n\ndef wrong(images):\n    return images.sum() + 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = spec("my_judge:red", type="python")
    with pytest.raises(UserError, match="--allow-python-detectors"):
        open_detector(given, concept="red")
    assert "my_judge" not in sys.modules, "code must not run before it is allowed"
    detector = open_detector(given, concept="red", allow_python=True)
    torch.testing.assert_close(detector.detect(pictures()).score, pictures()[:, 0].mean(dim=(1, 2)))
    assert len(detector.describe()["sha256"]) == 64
    with pytest.raises(UserError, match="scores from 0 to 1"):
        open_detector(spec("my_judge:wrong", type="python"), concept="red", allow_python=True).detect(pictures())


def test_what_cannot_be_opened_is_told_in_one_line(judge: Path, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = folders.classifier(tmp_path / "broken", LABELS)
    (broken / "model.safetensors").write_bytes((judge / "model.safetensors").read_bytes()[:1000])
    cases = [
        (None, "detector is missing"),
        (spec(judge, label="cubism"), r"'cubism'.*mosaic, neon, plain"),
        (spec(tmp_path / "none"), "none"),
        (spec(tmp_path / "empty"), "empty"),
        (spec(broken), "broken"),
        (spec("", label="x"), "no model"),
        (spec(clip), "cannot be used|not a complete model"),
        (spec(judge, type="clip", label="", texts=("a", "b")), "not a CLIP"),
        (spec(clip, type="clip", label="", texts=("a",)), "at least one"),
        (spec(clip, type="clip", label="c", texts=("a", "b")), "'c'"),
    ]
    for given, words in cases:
        with pytest.raises(UserError, match=words) as raised:
            open_detector(given, concept="mosaic")
        assert "concept 'mosaic'" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_nudenet_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match=r"safeweights\[nudenet\]"):
        open_detector(DetectorSpec(type="nudenet"), concept="nudity")
