"""The sandbox's training: every stage runs, continues after a kill to the same tensors, and leaves folders that open."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from safeweights.core.errors import UserError
from safeweights.sandbox import tokenizer, train, vae, workers, world
from safeweights.sandbox.files import weights_folder

SMALL = train.Budget(
    pictures=48,
    judge_pictures=48,
    autoencoder_steps=2,
    generator_steps=2,
    decoder_steps=2,
    judge_steps=2,
    clip_steps=2,
    embedder_steps=2,
    batch=8,
    autoencoder={"block_out_channels": (8, 8, 8)},
    unet={"block_out_channels": (8, 16, 16)},
    text={"num_hidden_layers": 1},
)


def test_the_defaults_are_what_the_shipped_weights_were_trained_with() -> None:
    shipped = train.load_json(weights_folder() / "training.json")["settings"]
    assert {"seed": 0, "workers": 2, **asdict(train.Budget())} == shipped
    assert train.Budget().lasting(110) == train.Budget()
    half, least = train.Budget().lasting(55), train.Budget().lasting(0.01)
    assert (half.pictures, half.generator_steps, half.decoder_steps) == (15_000, 2_400, 225)
    assert (least.pictures, least.judge_pictures, least.generator_steps) == (train.LEAST, train.LEAST, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sandbox")
    train.train(folder / "weights", work=folder / "work", budget=SMALL, workers=1)
    return folder


class Line:
    """The smallest task: fit a matrix and a bias to a line."""

    def __init__(self) -> None:
        self.model = nn.Linear(3, 4)

    def loss(self, step: int, rank: int, workers: int) -> torch.Tensor:
        rng = np.random.default_rng([step, rank])
        x = torch.from_numpy(rng.standard_normal((5, 3), np.float32))
        loss: torch.Tensor = ((self.model(x) - x.sum(1, keepdim=True)) ** 2).mean()
        return loss


class KilledError(Exception):
    pass


def _weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_fit_continues_to_the_same_tensors(tmp_path: Path, count: int) -> None:
    fitting = workers.Fitting(steps=8, seed=3, ema=0.9)

    def kill(step: int, loss: float) -> None:
        if step == 5:  # the checkpoint of step 4 is there, that of step 5 is not
            raise KilledError

    whole = workers.fit(Line, tmp_path / "whole.safetensors", fitting, workers=count, checkpoint_seconds=0)
    with pytest.raises(KilledError):
        workers.fit(Line, tmp_path / "cut.safetensors", fitting, workers=count, checkpoint_seconds=0, report=kill)
    assert workers.load(tmp_path / "cut.safetensors")[1] == 4
    again = workers.fit(Line, tmp_path / "cut.safetensors", fitting, workers=count)
    assert torch.equal(_weights(whole), _weights(again))


def test_fitting_fits(tmp_path: Path) -> None:
    losses: list[float] = []
    fitting = workers.Fitting(steps=300, seed=0, muon_lr=0.2, adam_lr=0.02, ema=0)
    workers.fit(Line, tmp_path / "a.safetensors", fitting, workers=1, report=lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.02 * losses[0]


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_newton_schulz_levels_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(workers.orthogonal(matrix))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    captions = world.dataset(200, 1, held_back=True, processes=1)[1]
    captions += [f"a {s} picture of a {o}" for s in world.STYLES for o in world.OBJECTS]
    captions += [p.name for p in world.IDENTITIES]
    tokenizer.save(captions, tmp_path)
    reader = CLIPTokenizer.from_pretrained(str(tmp_path))
    assert {"vocab.json", "merges.txt"} <= {f.name for f in tmp_path.iterdir()}
    for text in captions[:20]:
        back = reader.decode(reader(text)["input_ids"], skip_special_tokens=True)
        assert back.replace(" ,", ",") == text
    assert len(reader.tokenize("mosaic")) == 1
    assert len(reader.tokenize("watercolour")) == 2  # a concept word of two tokens, as rare words are
    assert len(reader.tokenize("juno adeyemi")) == 3


def test_batches_cover_every_picture_once_an_epoch() -> None:
    rows = np.concatenate([vae.shuffled(10, 4, step, seed=5) for step in range(5)])
    assert sorted(rows[:10]) == list(range(10)) == sorted(rows[10:])
    assert list(rows[:10]) != list(rows[10:])


def test_the_trained_folder_opens_without_words_and_samples(trained: Path) -> None:
    from safeweights.sandbox.evaluate import Detectors, open_pipeline, sample

    pipeline = open_pipeline(trained / "weights" / "model")
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    scheduler = pipeline.scheduler.config
    assert (scheduler.steps_offset, scheduler.clip_sample, scheduler.set_alpha_to_one) == (1, False, False)
    pictures = sample(trained / "weights" / "model", ["a house", "a boat"], [1, 2])
    assert pictures.shape == (2, 64, 64, 3)
    labels = Detectors(trained / "weights").label("object", pictures)
    assert set(labels) <= {*world.OBJECTS, *world.HELD_BACK_OBJECTS, "none"}


def test_judges_open_as_plain_transformers_folders(trained: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, CLIPModel

    for kind in ("style", "object", "identity", "content"):
        folder = str(trained / "weights" / "detectors" / kind)
        model: Any = AutoModelForImageClassification.from_pretrained(folder)
        assert next(model.parameters()).dtype == torch.float32
        pixels = AutoImageProcessor.from_pretrained(folder)(world.draw(world.sample_scene(np.random.default_rng(0))))
        assert np.asarray(pixels["pixel_values"][0]).shape == (3, 64, 64)
    CLIPModel.from_pretrained(str(trained / "weights" / "clip"))
    features = AutoModel.from_pretrained(str(trained / "weights" / "embedder"))(torch.zeros(1, 3, 64, 64)).pooler_output
    assert features.flatten(1).shape == (1, 128)


def test_finished_stages_are_skipped_and_other_settings_refused(trained: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in (trained / "work").glob("*.safetensors")}
    train.train(None, work=trained / "work", budget=SMALL, workers=1)
    assert before == {f: f.stat().st_mtime_ns for f in (trained / "work").glob("*.safetensors")}
    with pytest.raises(UserError, match="other settings"):
        train.train(None, work=trained / "work", budget=SMALL, workers=1, seed=1)


def test_export_replaces_an_older_folder(trained: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert train.export(trained / "work", tmp_path / "model", budget=SMALL) == SMALL.generator_steps
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
