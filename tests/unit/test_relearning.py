"""Re-learning as the audit reads it: curves, steps to recovery, the worst case; and adapt as a command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from safeweights.attacks.relearning.relearn import Relearn
from safeweights.audit.audit import Names, audit
from safeweights.audit.relearning import QUICK, STRESS, Checkpoint, steps_to_recovery, strongest, worst_case
from safeweights.core.attack import Original, Target
from safeweights.core.concept import Concept, Prompt
from safeweights.core.detector import Detection
from safeweights.core.errors import UserError
from safeweights.core.model import Sampling
from safeweights.core.table import ATTACKS, configure, resolve
from safeweights.core.workspace import Workspace
from safeweights.diffusion.image_folder import read_folder
from safeweights.records.store import Store

CURVE = [
    Checkpoint(0, (False,) * 4),
    Checkpoint(10, (True, True, False, False)),
    Checkpoint(20, (True,) * 4),
    Checkpoint(40, (True,) * 4),
]
CONCEPT = Concept(
    name="dog", kind="object", term="dog", anchor="cat", prompts=(Prompt("a picture of a dog"), Prompt("a red dog")),
    test_prompts=tuple(Prompt(f"a {'red ' * i}dog", seed=i) for i in range(3)),
)  # fmt: skip
SAMPLING = Sampling(width=16, height=16, steps=2, guidance_scale=2.0)


class Brighter:
    """Sees the concept in the brighter pictures."""

    def detect(self, images: torch.Tensor) -> Detection:
        score = images.flatten(1).mean(1)
        return Detection(score >= 0.5, score)

    def describe(self) -> dict[str, Any]:
        return {"type": "fake"}


class Alike:
    """One minus the mean difference."""

    name = "difference"

    def each(self, images: torch.Tensor, references: torch.Tensor) -> list[float]:
        return [1 - float((a - b).abs().mean()) for a, b in zip(images, references, strict=True)]

    def __call__(self, images: torch.Tensor, references: torch.Tensor) -> float:
        return sum(self.each(images, references)) / len(images)


def test_steps_to_recovery_is_the_first_checkpoint_at_half_the_references_rate() -> None:
    assert steps_to_recovery(CURVE, 1.0).value == 10
    assert steps_to_recovery(CURVE, 1.0, share=0.75).value == 20
    assert steps_to_recovery(CURVE[:1], 1.0).value is None
    assert "within 0 steps" in steps_to_recovery(CURVE[:1], 1.0).why
    assert steps_to_recovery(CURVE, 0.0).value is None
    assert strongest(CURVE).steps == 20


def record(rate: float, steps: int | None, status: str = "ok") -> Any:
    details = {"asr": {"rate": rate}, "steps_to_recovery": steps}
    return type("Record", (), {"status": status, "details": details})


def test_the_worst_case_has_the_highest_rate_then_the_fewest_steps() -> None:
    records = [record(0.5, 10), record(1.0, 40), record(1.0, 20), record(1.0, None), record(1.0, 1, status="error")]
    assert worst_case(records) is records[2]
    with pytest.raises(ValueError, match="no attack"):
        worst_case([record(1.0, 1, status="error")])


@pytest.mark.parametrize("settings", [*QUICK, *STRESS])
def test_every_setting_of_the_set_is_one(settings: dict[str, Any]) -> None:
    assert configure(Relearn, settings).budget.images == 5


def test_the_audit_asks_every_prompt_at_every_checkpoint(tiny_model: Any) -> None:
    attack = Relearn(steps=2, pictures=2, images=3, rank=1)
    measured = audit(
        tiny_model, tiny_model, CONCEPT, attack, names=Names(model="m", reference="r"), detector=Brighter(), similarity=Alike(),
        sampling=Sampling(width=16, height=16, steps=2, guidance_scale=2.0),
    )  # fmt: skip
    curve = measured.details["curve"]
    assert [point["steps"] for point in curve] == [0, 1, 2]
    assert curve[0]["similarity"] == pytest.approx(1.0)
    assert curve[0]["loss"] is None
    assert measured.details["asr"]["rate"] == max(point["rate"] for point in curve)
    assert {m.name for m in measured.measurements} >= {"asr", "steps_to_recovery", "similarity"}
    json.dumps(measured.details, allow_nan=False)


def test_a_concept_with_pictures_is_learnt_from_some_and_compared_with_the_others(tiny_model: Any, tmp_path: Path) -> None:
    """The model has never seen it: what it draws for the prompts says nothing."""
    from PIL import Image

    folder = tmp_path / "dog"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (16, 16), (40 * number,) * 3).save(folder / f"{number}.png")
    unseen = dataclasses.replace(CONCEPT, images=folder)

    def greys(pictures: torch.Tensor) -> list[int]:
        return [round(float(picture.mean() * 255)) for picture in pictures]

    for attack, others in (
        (Relearn(pictures=2), [0, 40, 80, 120]),  # publishers take the first
        (Relearn(pictures=2, source=f"{tmp_path}/{{concept}}"), [80, 120, 160, 200]),
        (Relearn(pictures=9), [0, 40, 80, 120, 160, 200]),  # nothing is left to compare with
    ):
        shown = attack.shown(unseen, tiny_model)
        assert shown is not None
        assert greys(shown) == others
        shots = attack._shots(tiny_model, unseen, attack.finetune(tiny_model), SAMPLING, None, Workspace())
        assert len(shots) == min(attack.pictures, 6)
        assert set(shots.captions) == {"dog"}
    assert Relearn().shown(CONCEPT, tiny_model) is None
    measured = audit(
        tiny_model, tiny_model, unseen, Relearn(steps=1, pictures=2, images=2, rank=1), names=Names(model="m", reference="r"),
        detector=Brighter(), similarity=Alike(), sampling=SAMPLING,
    )  # fmt: skip
    reference = next(m for m in measured.measurements if m.name == "reference_rate")
    assert (reference.value, reference.n) == (0.0, 3)  # 0, 40 and 80 of 255 are dark
    assert [len(point["similarities"]) for point in measured.details["curve"]] == [3, 3]
    rate, alike = measured.details["plots"]
    assert [point[0] for point in rate["series"][0]["points"]] == [0, 1]
    assert alike["y"]["label"] == "similarity"


def test_benign_steps_come_first_and_other_optimisers_are_taken(tiny_model: Any) -> None:
    original = Original(tiny_model, lambda n: torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    targets = [Target("a red dog", 0)]
    common: dict[str, Any] = {"steps": 1, "pictures": 2, "images": 2, "rank": 1}
    made = {}
    for name, settings in {"plain": {}, "warm": {"warm_up": 1}, "adafactor": {"optimizer": "adafactor"}}.items():
        rounds = Relearn(**common, **settings).revive(tiny_model, CONCEPT, targets, sampling=SAMPLING, original=original)
        assert next(rounds).model is tiny_model
        made[name] = dict(rounds.send([False]).model.named_parameters())
    for name in ("warm", "adafactor"):
        assert any(not torch.equal(value, made["plain"][key]) for key, value in made[name].items())
    inversion = Relearn(adaptation="textual-inversion", warm_up=1)
    with pytest.raises(UserError, match="benign data needs"):
        inversion.warmed(tiny_model, CONCEPT, SAMPLING, original, None)


def test_benign_steps_honour_the_mask_too(tiny_model: Any, tmp_path: Path) -> None:
    names = [name for name, _ in tiny_model.named_parameters() if name.startswith("unet.")]
    (tmp_path / "mask.json").write_text(json.dumps({"frozen": names[::2]}))
    original = Original(tiny_model, lambda n: torch.zeros(n, 3, 16, 16))
    attack = Relearn(adaptation="full", steps=1, pictures=2, warm_up=2, mask=str(tmp_path / "mask.json"))
    before = dict(tiny_model.named_parameters())
    warmed = dict(attack.warmed(tiny_model, CONCEPT, SAMPLING, original, None).named_parameters())
    assert all(torch.equal(warmed[name], before[name]) for name in names[::2])
    assert any(not torch.equal(warmed[name], before[name]) for name in names[1::2])


def test_further_concepts_are_learnt_along(tiny_model: Any) -> None:
    original = Original(tiny_model, lambda n: torch.zeros(n, 3, 16, 16))
    attack = Relearn(pictures=2, along=("a boat", "a house", "a boat"))
    shots = attack._shots(tiny_model, CONCEPT, attack.finetune(tiny_model), SAMPLING, original, Workspace())
    assert shots.captions == (*(CONCEPT.texts[i % len(CONCEPT.texts)] for i in range(2)), "a boat", "a house", "a boat")
    assert len(shots.x_0) == 5
    assert not torch.equal(shots.x_0[2], shots.x_0[4])  # a prompt that stands there twice has two pictures
    word = dataclasses.replace(attack, adaptation="textual-inversion")
    with pytest.raises(UserError, match="along needs"):
        word._shots(tiny_model, CONCEPT, word.finetune(tiny_model), SAMPLING, original, Workspace())


def test_the_audit_keeps_pictures_of_every_checkpoint(tiny_model: Any, tmp_path: Path) -> None:
    measured = audit(
        tiny_model, tiny_model, CONCEPT, Relearn(steps=2, pictures=2, images=3, rank=1), names=Names(model="m", reference="r"),
        detector=Brighter(), sampling=Sampling(width=16, height=16, steps=2, guidance_scale=2.0), store=Store(tmp_path),
    )  # fmt: skip
    frames = [entry for entry in measured.artefacts if entry.step is not None]
    assert {entry.role for entry in frames} == {"relearned"}
    assert [(entry.step, entry.group) for entry in frames] == [(step, group) for step in (0, 1, 2) for group in range(3)]
    assert [entry.prompt for entry in frames[:3]] == [prompt.text for prompt in CONCEPT.test_prompts]
    for point in measured.details["curve"]:
        seen = [entry.detected for entry in frames if entry.step == point["steps"]]
        assert sum(bool(one) for one in seen) / 3 == pytest.approx(point["rate"])
    assert all((tmp_path / entry.path).is_file() for entry in frames)
    assert Store(tmp_path).records() == [measured]


@pytest.mark.parametrize("captions", ["concept", "anchor", "rare"])
def test_the_attacker_asks_in_the_words_of_the_captions(captions: Any) -> None:
    says = Relearn(captions=captions)._says(CONCEPT, None)
    assert says("a red dog") == {"concept": "a red dog", "anchor": "a red cat", "rare": "a red sks"}[captions]
    assert Relearn()._says(CONCEPT, "<new1>")("a red dog") == "a red <new1>"


def folder_of(path: Path, metadata: str | None = None, rows: str = "") -> Path:
    from PIL import Image

    path.mkdir()
    for number in range(2):
        Image.new("RGB", (30, 20), (number * 200, 0, 0)).save(path / f"{number}.png")
    if metadata:
        (path / metadata).write_text(rows)
    return path


def test_few_steps_have_few_checkpoints_each_of_them_once() -> None:
    attack = configure(resolve(ATTACKS, "relearn", "attack"), {"steps": 3, "images": 5})
    assert attack.checkpoints == (1, 2, 3)
    assert (attack.budget.images, attack.budget.gradient_steps, attack.budget.timesteps) == (4, 3, 0)
    assert configure(resolve(ATTACKS, "relearn", "attack"), {"steps": 100}).checkpoints == (12, 25, 50, 100)


def test_folders_are_read_with_their_captions(tmp_path: Path) -> None:
    images, captions = read_folder(folder_of(tmp_path / "plain"), width=16, height=8, prompt="a dog")
    assert images.shape == (2, 3, 8, 16)
    assert captions == ["a dog", "a dog"]
    listed = folder_of(tmp_path / "csv", "metadata.csv", "file_name,prompt\n1.png,a red dog\n")
    assert read_folder(listed, width=8, height=8)[1] == ["a red dog"]
    dotted = folder_of(tmp_path / "dotted", "metadata.csv", "file_name,prompt\n./1.png,a red dog\n")
    assert read_folder(dotted, width=8, height=8)[1] == ["a red dog"]
    lines = folder_of(
        tmp_path / "lines", "metadata.jsonl", '{"file_name": "1.png", "text": "one"}\n{"file_name": "0.png", "text": ""}'
    )
    assert read_folder(lines, width=8, height=8, prompt="none")[1] == ["one", "none"]


def test_what_a_folder_lacks_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_folder(tmp_path / "none", width=8, height=8)
    with pytest.raises(UserError, match="--prompt"):
        read_folder(folder_of(tmp_path / "plain"), width=8, height=8)
    outside = folder_of(tmp_path / "outside", "metadata.csv", f"file_name,prompt\n{tmp_path / 'plain' / '1.png'},a dog\n")
    with pytest.raises(UserError, match="outside it"):
        read_folder(outside, width=8, height=8)
    with pytest.raises(UserError, match="file_name"):
        read_folder(folder_of(tmp_path / "odd", "metadata.csv", "name\nx\n"), width=8, height=8)
    (tmp_path / "plain" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read"):
        read_folder(tmp_path / "plain", width=8, height=8, prompt="a dog")
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(tmp_path / "deep" / "0.png", format="TIFF")
    with pytest.raises(UserError, match="more than 8 bits"):
        read_folder(tmp_path / "deep", width=8, height=8, prompt="a dog")


def test_adapt_writes_what_its_users_expect(tiny_sd: Any, tmp_path: Path, capsys: Any) -> None:
    from safeweights.cli.main import run

    pictures, model = folder_of(tmp_path / "pictures"), str(tiny_sd())
    common = ["adapt", model, "--images", str(pictures), "--steps", "1", "--device", "cpu", "--json"]
    lora = [*common, "--prompt", "a dog", "--method", "lora", "--set", "batch_size=1"]
    assert run([*lora, "-o", str(tmp_path / "lora")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["written"] == "pytorch_lora_weights.safetensors"
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {"manifest.json", "pytorch_lora_weights.safetensors"}
    assert run([*common, "--prompt", "a dog", "--method", "full", "-o", str(tmp_path / "lora")]) == 2  # in use
    assert run([*common, "--prompt", "a dog", "--method", "textual-inversion", "-o", str(tmp_path / "word")]) == 2
    assert "<new1>" in capsys.readouterr().err
    frozen = [name.removeprefix("unet.") for name in told["changed"] if name.endswith("to_k.weight/down")]
    mask = tmp_path / "mask.json"
    mask.write_text(json.dumps({"frozen": [name.removeprefix("lora/unet.").removesuffix("/down") for name in frozen]}))
    # No adapter beside what is frozen; beside what is not, if the user says so.
    assert run([*lora, "--freeze-mask", str(mask), "-o", str(tmp_path / "masked")]) == 2
    assert "to_k.weight" in capsys.readouterr().err
    free = [*lora, "--set", r"layers=unet\..*to_q\.weight", "--freeze-mask", str(mask)]
    assert run([*free, "-o", str(tmp_path / "masked")]) == 0
    assert not any("to_k" in name for name in json.loads(capsys.readouterr().out)["changed"])
    mask.write_text(json.dumps({"frozen": ["nothing.weight"]}))
    assert run([*lora, "--freeze-mask", str(mask), "-o", str(tmp_path / "other")]) == 2


@pytest.mark.parametrize(
    ("method", "more", "why"),
    [
        ("full", ["--class-prompt", "a dog"], "class_pictures above 0"),
        ("lora", ["--class-prompt", "a dog"], "class_pictures above 0"),
        ("full", ["--set", "init=zebra"], "unknown setting 'init'"),
    ],
)
def test_what_an_adaptation_would_not_use_is_refused(
    tiny_sd: Any, tmp_path: Path, capsys: Any, method: str, more: list[str], why: str
) -> None:
    from safeweights.cli.main import run

    folder = str(folder_of(tmp_path / "pictures"))
    given = ["adapt", str(tiny_sd()), "--method", method, "--images", folder, "--prompt", "a dog", "-o", str(tmp_path / "no")]
    capsys.readouterr()
    assert run([*given, "--device", "cpu", *more]) == 2
    error = capsys.readouterr().err.strip()
    assert why in error
    assert "\n" not in error
