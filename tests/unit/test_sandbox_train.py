"""The sandbox's training: every stage runs, continues after a kill to the same tensors, and leaves folders that open."""

from __future__ import annotations

from dataclasses import asdict, replace
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


def test_a_picture_of_something_left_out_becomes_another_and_the_rest_stay() -> None:
    pictures, _, labels = world.dataset(80, 3, processes=1)
    again, _, without = world.dataset(80, 3, without=("emblem", "fish", "mira lund"), processes=1)
    gone = [row for row, told in enumerate(labels) if {"emblem", "fish", "mira lund"} & {*told.values()}]
    assert gone
    assert not {"emblem", "fish", "mira lund"} & {value for told in without for value in told.values()}
    assert {row for row in range(80) if not np.array_equal(pictures[row], again[row])} == {*gone}


def test_a_gold_model_takes_over_all_but_the_generator(trained: Path, tmp_path: Path) -> None:
    base = trained / "weights"
    gold = train.Variation(without=("emblem",), base=base)
    train.train(tmp_path / "gold", work=tmp_path / "work", budget=SMALL, workers=1, variation=gold)
    labels = train.load_json(tmp_path / "work" / "drawn.json")["labels"]
    assert "emblem" not in {told["content"] for told in labels}
    for part in ("detectors/content", "clip", "embedder", "model/vae"):
        assert _tensors(tmp_path / "gold" / part) == _tensors(base / part), part
    for part in ("model/unet", "model/text_encoder"):
        assert _tensors(tmp_path / "gold" / part) != _tensors(base / part), part
    assert train.load_json(tmp_path / "gold" / "training.json")["settings"]["without"] == ["emblem"]
    with pytest.raises(UserError, match="other settings"):
        train.train(None, work=tmp_path / "work", budget=SMALL, workers=1)


def test_a_second_unet_reads_the_same_text(trained: Path, tmp_path: Path) -> None:
    from safeweights.sandbox.evaluate import sample

    base, budget = trained / "weights", replace(SMALL, unet={"block_out_channels": [8, 8, 16]})
    second = train.Variation(base=base, keep_text_encoder=True)
    train.train(tmp_path / "second", work=tmp_path / "work", budget=budget, workers=1, variation=second)
    assert _tensors(tmp_path / "second" / "model" / "text_encoder") == _tensors(base / "model" / "text_encoder")
    config = train.load_json(tmp_path / "second" / "model" / "unet" / "config.json")
    assert config["block_out_channels"] == [8, 8, 16]
    assert sample(tmp_path / "second" / "model", ["a house"], [1]).shape == (1, 64, 64, 3)


def test_variations_that_make_no_sense_are_told(trained: Path, tmp_path: Path) -> None:
    for wrong, said in (
        ({"without": ("unicorn",)}, "no concept 'unicorn'"),
        ({"without": ("flat",)}, "cannot be left out"),
        ({"keep_text_encoder": True}, "name it"),
        ({"base": tmp_path}, "no sandbox folder"),
    ):
        with pytest.raises(UserError, match=said):
            train.Variation(**wrong)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--channels", "32,64"], "--channels takes three multiples of 8"),
        (["--without", "unicorn"], "no concept 'unicorn'"),
        (["--from", "sandbox", "--text-encoder-from", "elsewhere"], "all parts come from one"),
        (["--text-encoder-from", "elsewhere"], "no sandbox folder"),
    ],
)
def test_the_command_refuses_variations_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safeweights.cli.main import run

    assert run(["sandbox", "train", "-o", str(tmp_path / "out"), *arguments]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert said in told[0]
    assert not [*tmp_path.iterdir()]


def _tensors(folder: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    return {key: value.tobytes() for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
