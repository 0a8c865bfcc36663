"""The leakage audit's parts: files in every layout, the factory, encoders that learn, verdicts, and what bad input gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from safeweights.core.errors import UserError
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import ATTENTION, Adapter
from safeweights.leakage import controls, keys
from safeweights.leakage.canonical import factors_of, norm
from safeweights.leakage.defences import random_directions, refactor
from safeweights.leakage.encoders.functional import Functional, Probe
from safeweights.leakage.encoders.spectrum import Spectrum
from safeweights.leakage.encoders.tokens import Tokens
from safeweights.leakage.encoders.vnae import VNAE
from safeweights.leakage.factory import Plan, adapted_of, make, shots_of
from safeweights.leakage.generator import Taught, reconstruct, slot_of, teach
from safeweights.leakage.membership import Losses, copied, judge, losses
from safeweights.leakage.metrics import cosines, retrieval
from safeweights.leakage.sources import Drawn, Folders
from safeweights.leakage.train import Encoders, Space, threshold_of
from safeweights.leakage.verdict import Trust, decide
from safeweights.release.adapted import save_lora


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_lora(model: Any, seed: int = 1, rank: int = 2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    start = Adapter(targets=ATTENTION, rank=rank).start(model, seed)
    draw = rng(seed)
    return factors_of({name: torch.randn(value.shape, generator=draw) * 0.2 for name, value in start.items()})


class Colours:
    """Pictures of one colour each: an identity is its colour, and small changes from picture to picture."""

    name, template, nulls = "colours", "a {} picture", MappingProxyType({"stripes": "a {} thing"})

    def __len__(self) -> int:
        return 40

    def pictures(self, identity: int, first: int, n: int) -> torch.Tensor:
        colour = torch.rand(3, generator=rng(identity))[None, :, None, None]
        noise = torch.randn(n + first, 3, 16, 16, generator=rng(1000 + identity))[first:] * 0.05
        return (colour + noise).clamp(0, 1)

    def null_pictures(self, kind: str, seed: int, n: int) -> torch.Tensor:
        assert kind == "stripes"
        return (torch.arange(16) // (1 + seed % 4) % 2).float().expand(n, 3, 16, 16)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("layout", ["peft", "diffusers", "kohya"])
def test_every_layout_comes_back(tiny_model: Any, tmp_path: Path, layout: Any) -> None:
    factors = random_lora(tiny_model)
    keys.write(factors, tmp_path / "x.safetensors", layout=layout)
    read = keys.read(tmp_path / "x.safetensors", tiny_model)
    assert (read.layout, read.rank, set(read.factors)) == (layout, 2, set(factors))
    for name, (a, b) in factors.items():
        assert torch.allclose(read.factors[name][0], a)
        assert torch.allclose(read.factors[name][1], b)


@pytest.mark.parametrize("layout", ["peft", "diffusers", "kohya"])
def test_diffusers_reads_what_is_written(tiny_sd: Any, tiny_model: Any, tmp_path: Path, layout: Any) -> None:
    """Opened by diffusers alone, the file does to the model what its factors say."""
    from diffusers import StableDiffusionPipeline

    from safeweights.leakage.canonical import phi_of
    from safeweights.leakage.lora_bank import bank_on, stack_of

    factors = random_lora(tiny_model)
    keys.write(factors, tmp_path / "x.safetensors", layout=layout)
    pipeline = StableDiffusionPipeline.from_pretrained(str(tiny_sd()))
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    x, t = torch.randn(1, *tiny_model.latent_shape, generator=rng()), torch.tensor([400])
    c = tiny_model.embed(["a dog"])
    with torch.no_grad(), bank_on(tiny_model, stack_of([phi_of(factors)]), torch.zeros(1, dtype=torch.long)):
        ours = tiny_model.eps(x, t, c)
    with torch.no_grad():
        theirs = pipeline.unet(x, t, encoder_hidden_states=c.states).sample
        assert not torch.allclose(ours, tiny_model.eps(x, t, c), atol=1e-2)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_what_peft_and_diffusers_save_is_read_with_its_alpha(tiny_sd: Any, tiny_model: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(tiny_sd(), subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    told = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "new", unet_lora_layers=layers, **told)
    read = keys.read(tmp_path / "new", tiny_model)
    name, (a, b) = next(iter(read.factors.items()))
    layer = unet.get_submodule(name.removeprefix("unet.").removesuffix(".weight"))
    assert torch.allclose(b @ a, layer.get_delta_weight("default"), atol=1e-5)
    # peft's own folder: names without "unet.", the alpha in its config.
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(
        {f"base_model.model.{k}": v.contiguous() for k, v in get_peft_model_state_dict(unet).items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    again = keys.read(folder, tiny_model)
    assert torch.allclose(again.factors[name][1] @ again.factors[name][0], b @ a, atol=1e-5)


def test_the_first_diffusers_names_are_read(tiny_model: Any, tmp_path: Path) -> None:
    factors = random_lora(tiny_model)
    tensors = {}
    for name, (a, b) in factors.items():
        layer = name.removesuffix(".weight").replace(".to_out.0", ".to_out")
        block, _, leaf = layer.rpartition(".")
        tensors |= {f"{block}.processor.{leaf}_lora.down.weight": a, f"{block}.processor.{leaf}_lora.up.weight": b}
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "old.safetensors")
    assert set(keys.read(tmp_path / "old.safetensors", tiny_model).factors) == set(factors)


def test_kohya_alpha_scales(tiny_model: Any, tmp_path: Path) -> None:
    a, b = torch.ones(4, 32), torch.ones(32, 4)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(1.0)}, tmp_path / "k.safetensors"
    )
    read = keys.read(tmp_path / "k.safetensors", tiny_model)
    assert torch.allclose(next(iter(read.factors.values()))[1], b / 4)


def test_headers_that_talk() -> None:
    told = keys.telling(
        {
            "format": "pt", "ss_tag_frequency": '{"10_jane doe": {"jane doe smiling": 12}}', "ss_num_train_images": "12",
            "ss_dataset_dirs": '{"10_jane doe": {"n_repeats": 10, "img_count": 12}}', "ss_training_comment": "for Jane's wedding",
            "ss_learning_rate": "0.0001", "ss_training_started_at": "1690000000.0", "source": "/home/bob/photos/jane",
            "ss_sd_model_name": "model.safetensors", "contact": "jane@example.org",
        }
    )  # fmt: skip
    kinds = {item.key: item.kind for item in told}
    assert kinds == {
        "ss_tag_frequency": "captions", "ss_dataset_dirs": "names", "ss_training_comment": "comment", "source": "paths",
        "contact": "paths", "ss_num_train_images": "count", "ss_training_started_at": "time",
    }  # fmt: skip
    assert keys.image_count({"ss_num_train_images": "12"}) == 12
    assert keys.image_count({"ss_dataset_dirs": '{"a": {"img_count": 3}, "b": {"img_count": 4}}'}) == 7
    assert keys.image_count({"ss_dataset_dirs": "nonsense"}) is None


def test_bad_files_get_one_clear_line(tiny_model: Any, tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(UserError) as error:
            keys.read(path, tiny_model)
        return str(error.value)

    name = next(iter(random_lora(tiny_model)))
    a, b = random_lora(tiny_model)[name]
    layer = name.removesuffix(".weight")

    def file(**tensors: torch.Tensor) -> Path:
        save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "bad.safetensors")
        return tmp_path / "bad.safetensors"

    assert "does not exist" in said(tmp_path / "no.safetensors")
    (tmp_path / "x.bin").write_bytes(b"\x80\x04")
    assert "pickle" in said(tmp_path / "x.bin")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_lora_weights.bin").write_bytes(b"\x80\x04")
    assert "pickle" in said(tmp_path / "pickled")
    (tmp_path / "empty").mkdir()
    assert "no LoRA" in said(tmp_path / "empty")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    assert "damaged" in said(tmp_path / "cut.safetensors")
    assert "no LoRA factors" in said(file(weight=a))
    assert "one factor only" in said(file(**{f"{layer}.lora_A.weight": a}))
    assert "another base model" in said(file(**{f"{layer}.lora_A.weight": a[:, :3].contiguous(), f"{layer}.lora_B.weight": b}))
    assert "another base model" in said(file(**{"unet.x.to_q.lora_A.weight": a, "unet.x.to_q.lora_B.weight": b}))
    assert "NaN" in said(file(**{f"{layer}.lora_A.weight": a * float("nan"), f"{layer}.lora_B.weight": b}))
    assert "LoHa" in said(file(**{"lora_unet_x.hada_w1_a": a}))

    many = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    assert "more than one adapter" in said(file(**many, **{f"{layer}.lora_A.x.weight": a, f"{layer}.lora_B.x.weight": b}))
    assert "more than one adapter" in said(file(**many, **{f"base_model.model.{key}": value for key, value in many.items()}))
    assert "no matrix" in said(file(**{**many, f"{layer}.lora_A.weight": a[0].contiguous()}))
    assert "no matrix" in said(file(**{**many, f"{layer}.lora_A.weight": a[:0], f"{layer}.lora_B.weight": b[:, :0].contiguous()}))
    assert "no single finite number" in said(file(**many, **{f"{layer}.alpha": torch.ones(2)}))
    assert "no single finite number" in said(file(**many, **{f"{layer}.alpha": torch.tensor(float("nan"))}))
    assert "NaN" in said(file(**{**many, f"{layer}.lora_B.weight": b * 100}, **{f"{layer}.alpha": torch.tensor(3e38)}))
    assert "DoRA" in said(file(**many, **{f"{layer}.lora_magnitude_vector.weight": a}))
    assert "a whole model" in said(file(**{"model.diffusion_model.out.weight": a}))
    (tmp_path / "X.PT").write_bytes(b"PK")
    assert "pickle" in said(tmp_path / "X.PT")
    # A name that would write lines and colours of its own.
    evil = said(file(**{"unet.\x1b[31mx\nverdict: fine.lora_A.weight": a, "unet.\x1b[31mx\nverdict: fine.lora_B.weight": b}))
    assert evil.isprintable()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("[]", "cannot be read"), ("{", "cannot be read"), ('{"lora_alpha": "much"}', "is no number"),
        ('{"alpha_pattern": 3}', "is no number"), ('{"lora_alpha": 1e999}', "is no number"),
    ],
)  # fmt: skip
def test_bad_settings_of_a_lora_get_one_clear_line(tiny_model: Any, tmp_path: Path, config: str, says: str) -> None:
    keys.write(random_lora(tiny_model), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match=says):
        keys.read(tmp_path, tiny_model)
    (tmp_path / "adapter_config.json").unlink()
    keys.write(random_lora(tiny_model), tmp_path / "own.safetensors", metadata={"lora_adapter_metadata": "[1]"})
    with pytest.raises(UserError, match="in its header"):
        keys.read(tmp_path / "own.safetensors", tiny_model)


def test_peft_scales_by_the_root_of_the_rank_where_it_says_so(tiny_model: Any, tmp_path: Path) -> None:
    factors = random_lora(tiny_model)
    keys.write(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "use_rslora": True}))
    name = next(iter(factors))
    assert torch.allclose(keys.read(tmp_path, tiny_model).factors[name][1], factors[name][1] * 4 / 2**0.5)


def test_other_tensors_beside_the_factors_are_named(tiny_model: Any, tmp_path: Path) -> None:
    keys.write(random_lora(tiny_model), tmp_path / "x.safetensors")
    from safetensors.torch import load_file

    save_file({**load_file(tmp_path / "x.safetensors"), "bundle_emb.jane": torch.ones(2, 4)}, tmp_path / "y.safetensors")
    assert keys.read(tmp_path / "y.safetensors", tiny_model).ignored == ("bundle_emb.jane",)


def test_a_hostile_header_is_read_quickly_and_told_on_one_line(tiny_model: Any, tmp_path: Path) -> None:
    """10 MB without an @ for a slow pattern, counts that are no numbers, escapes, deep JSON, thousands of entries."""
    import time

    metadata = {
        "ss_training_comment": "a" * 10_000_000, "ss_output_name": "jane\x1b[2J\nnot shown: all is well\u202e",
        "ss_num_train_images": "²", "num_images": "9" * 5000, "ss_dataset_dirs": "[" * 100_000,
        "ss_caption_dropout_rate": "0.0", "modelspec.thumbnail": "data:image/jpeg;base64,AAAA",
        **{f"contact{i}": f"someone{i}@example.org" for i in range(3000)},
    }  # fmt: skip
    keys.write(random_lora(tiny_model), tmp_path / "x.safetensors", metadata=metadata)
    started = time.perf_counter()
    read = keys.read(tmp_path / "x.safetensors", tiny_model)
    told = keys.telling(read.metadata)
    assert keys.image_count(read.metadata) is None
    assert time.perf_counter() - started < 5
    assert len(told) == keys.TOLD + 1
    assert told[-1].kind == "size"
    assert all((entry.key + entry.value).isprintable() and len(entry.value) <= 200 for entry in told)
    few = keys.telling({key: value for key, value in metadata.items() if not key.startswith("contact")})
    kinds = {entry.key: entry.kind for entry in few}
    assert kinds["modelspec.thumbnail"] == "picture"
    assert "ss_caption_dropout_rate" not in kinds
    assert keys.image_count({"ss_dataset_dirs": '{"a": {"img_count": 1e999}}'}) is None
    assert keys.image_count({"ss_dataset_dirs": "[" * 100_000}) is None


# ----------------------------------------------------------------------------------------------------------- factory


def test_the_plan_keeps_people_and_seeds_apart() -> None:
    entries = Plan(train=30, val=4, test=10, twins=5, nulls=6).entries("a {} person", 44)
    of = {split: [item for item in entries if item.split == split] for split in ("train", "val", "test", "twin")}
    people = {split: {item.identity for item in items} for split, items in of.items()}
    assert len(people["train"]) == 30
    assert not people["train"] & people["test"]
    assert not people["val"] & (people["train"] | people["test"])
    assert people["twin"] <= people["test"]
    assert len({item.seed for item in entries}) == len(entries)
    assert {item.identity for item in entries if item.split.startswith("null")} == {-1}
    assert len({item.steps for item in of["train"]}) > 1
    for twin in of["twin"]:
        same = next(item for item in of["test"] if item.identity == twin.identity)
        assert replace(twin, split="test", seed=same.seed) == same
    with pytest.raises(UserError, match="needs 44 people"):
        Plan(train=30, val=4, test=10).entries("a {} person", 43)


def test_nulls_are_of_every_kind_that_there_is(tiny_model: Any) -> None:
    source = Colours()
    plan = Plan(train=2, val=0, test=2, twins=0, nulls=6, images=(2,))
    assert Plan().nulls == 100
    nulls = [item for item in plan.entries(source.template, len(source), source.nulls) if item.identity < 0]
    assert [item.split for item in nulls] == ["null-pixels", "null-samples", "null-stripes"] * 2
    assert nulls[2].caption.endswith(" thing")
    shots = shots_of(tiny_model, source, nulls[2])
    pictures = source.null_pictures("stripes", nulls[2].seed, 2)
    assert torch.allclose(shots.x_0, tiny_model.encode(pictures), atol=1e-5)
    drawn = Drawn(limit=2)
    assert set(drawn.nulls) == {"styles", "objects"}
    for kind in drawn.nulls:
        assert drawn.null_pictures(kind, 5, 2).shape == (2, 3, 64, 64)
        assert torch.equal(drawn.null_pictures(kind, 5, 2), drawn.null_pictures(kind, 5, 2))
        assert not torch.equal(drawn.null_pictures(kind, 5, 1), drawn.null_pictures(kind, 6, 1))
    # The nulls come last, so that a plan with more of them trains nobody again.
    few, many = (Plan(train=4, test=2, nulls=n).entries("{}", 40)[:-n] for n in (4, 20))
    assert few == many


def test_the_factory_resumes(tiny_model: Any, tmp_path: Path) -> None:
    plan = Plan(train=3, val=0, test=2, twins=1, nulls=2, images=(2,), steps=(3, 2), checkpoints=(1,), rank=2)
    workspace = Workspace(tmp_path)
    made = {item.entry.seed: item for item in make(tiny_model, Colours(), plan, workspace=workspace, together=3)}
    assert len(made) == 8
    assert all(sorted(item.after) == [1, item.entry.steps] for item in made.values())
    calls = tiny_model.calls.eps
    again = {item.entry.seed: item for item in make(tiny_model, Colours(), plan, workspace=workspace, together=3)}
    assert tiny_model.calls.eps == calls  # nothing was trained again
    for seed, item in made.items():
        assert all(torch.equal(again[seed].phi[name], value) for name, value in item.phi.items())


def test_every_factory_adapter_is_a_peft_file(tiny_model: Any, tmp_path: Path) -> None:
    plan = Plan(train=2, val=0, test=1, twins=0, nulls=1, images=(2,), steps=(3, 2), checkpoints=(1,), rank=2)
    made = list(make(tiny_model, Colours(), plan, workspace=Workspace(tmp_path / "work"), together=4))
    assert len(made) == 4
    for place, item in enumerate(made):
        save_lora(adapted_of(plan, item), tmp_path / f"{place}.safetensors")
        read = keys.read(tmp_path / f"{place}.safetensors", tiny_model)
        wanted = factors_of(item.phi, plan.adapter().scale)
        assert (read.layout, set(read.factors)) == ("peft", set(wanted))
        for name, (a, b) in wanted.items():
            assert (b @ a).any()
            assert torch.allclose(read.factors[name][1] @ read.factors[name][0], b @ a, atol=1e-6)


def test_drawn_people_look_different_and_folders_are_checked(tmp_path: Path) -> None:
    people = Drawn(limit=12)
    assert len(set(people._seeds)) == 12
    assert torch.equal(people.pictures(3, 2, 1), people.pictures(3, 0, 3)[2:])
    assert not torch.equal(people.pictures(3, 0, 1), people.pictures(4, 0, 1))
    with pytest.raises(UserError, match="no folder"):
        Folders(tmp_path / "nobody", 16, 16)
    with pytest.raises(UserError, match="one folder for each person"):
        Folders(tmp_path, 16, 16)
    from PIL import Image

    (tmp_path / "jane").mkdir()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "jane" / "1.png")
    folders = Folders(tmp_path, 16, 16)
    assert len(folders) == 1
    assert folders.pictures(0, 0, 1).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="holds 1 pictures"):
        folders.pictures(0, 0, 2)
    folders.check(1, 1, 1)
    with pytest.raises(UserError, match="2 are needed of every person"):
        folders.check(1, 2, 1)
    things = Folders(tmp_path, 16, 16, things=tmp_path)
    assert set(things.nulls) == {"things"}
    assert things.null_pictures("things", 7, 1).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="of every thing"):
        things.check(1, 1, 2)


# ---------------------------------------------------------------------------------------------------------- encoders


def told_apart(model: Any, n: int = 24) -> tuple[list[dict[str, tuple[torch.Tensor, torch.Tensor]]], torch.Tensor]:
    """Adapters whose updates hold a hidden vector in a hidden place, and those vectors."""
    # Positive, since a singular direction is known up to its sign.
    hidden = torch.randn(n, 3, generator=rng(5)).abs()
    found = []
    for row in range(n):
        item = random_lora(model, seed=50 + row)
        place = torch.Generator().manual_seed(7)
        for name, (a, b) in item.items():
            left, right = torch.randn(3, b.shape[0], generator=place), torch.randn(1, a.shape[1], generator=place)
            item[name] = torch.cat([right, a[:1] * 0.1]), torch.cat([(hidden[row] @ left)[:, None], b[:, :1] * 0.1], 1)
        found.append(item)
    return found, hidden


def test_encoders_learn_what_is_there(tiny_model: Any) -> None:
    items, hidden = told_apart(tiny_model)
    train, test = items[:18], items[18:]
    probe = Probe("a dog", levels=(0.5,), inputs=2)
    answers = probe.ask(tiny_model, test[:2])
    assert answers.shape == (2, 1, *tiny_model.latent_shape)
    assert not torch.allclose(answers[0], answers[1])
    for steps in (None, [40] * 18):
        found = Tokens.fit(train, hidden[:18], fine_tuning_steps=steps, steps=60, batch_size=18, lr=2e-3)
        said = found.predict(train, steps)
        assert retrieval(cosines(said, hidden[:18], hidden[:18].mean(0)), range(18), permutations=50).rank > 0.7
        tried = None if steps is None else [40] * 6
        turned = [{name: (-a, -b) for name, (a, b) in refactor(item).items()} for item in test]
        assert torch.allclose(found.predict(test, tried), found.predict(turned, tried), atol=1e-3)
        # Who else is asked makes no difference.
        large = {name: (a, b * 50) for name, (a, b) in test[1].items()}
        together = found.predict([test[0], large], None if steps is None else [40] * 2)
        assert torch.allclose(together[:1], found.predict(test[:1], None if steps is None else [40]), atol=1e-4)
    blind = Spectrum.fit(train, torch.tensor([[float(i)] for i in range(18)]))
    assert blind.predict(test).shape == (6, 1)


def test_the_guessed_prompt_is_the_one_that_moves_most(tiny_model: Any) -> None:
    """Of three texts the one under which the adapter's predictions lie farthest from the base's, asked one at a time."""
    texts = ["a dog", "a red cat", "a boat"]
    items = [random_lora(tiny_model, seed=seed) for seed in (1, 2)]
    guesses = controls.guessed_prompts(tiny_model, items, texts, levels=(0.5,), inputs=1)
    for item, guess in zip(items, guesses, strict=True):
        moved = [float(Probe(text, levels=(0.5,), inputs=1).ask(tiny_model, [item]).norm()) for text in texts]
        assert guess == texts[moved.index(max(moved))]


@pytest.mark.parametrize(("victim", "timestep"), [(False, True), (True, False)])
def test_the_network_autoencoder_trains_every_term(tiny_model: Any, victim: bool, timestep: bool) -> None:
    items, hidden = told_apart(tiny_model, 6)
    x_0 = torch.randn(6, *tiny_model.latent_shape, generator=rng(2))
    settings = VNAE(steps=6, batch_size=4, lr=1e-2, victim=victim, timestep=timestep, beta=1.0)
    by_step = [{1: {k: (a, b * 0.5) for k, (a, b) in item.items()}, 2: item} for item in items]
    before = {name: value.clone() for name, value in tiny_model.named_parameters()}
    found = settings.fit(tiny_model, by_step, hidden, lambda i, _: x_0[i])
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.named_parameters())
    assert found.predict(items, [2] * 6).shape == (6, 3)
    assert found.read(items, [2] * 6).shape == (6, 8, 32)
    # KL at work: with a large weight the posterior widens from where it starts, e^-1.
    assert float(found.net.logvar.bias.detach().mean()) > -2.0
    with pytest.raises(ValueError, match="above zero"):
        VNAE(steps=0)


def test_checkpoints_of_other_adapters_are_not_taken(tiny_model: Any, tmp_path: Path) -> None:
    """A work folder that has seen other people must not hand their network to this population, which may hold them as a test."""
    items, hidden = told_apart(tiny_model, 8)
    x_0 = torch.randn(8, *tiny_model.latent_shape, generator=rng(2))

    def both(rows: slice, place: Workspace | None) -> list[torch.Tensor]:
        tokens = Tokens.fit(items[rows], hidden[rows], steps=3, workspace=place and place.child("t"))
        by_step = [{2: item} for item in items[rows]]
        network = VNAE(steps=3, batch_size=2).fit(
            tiny_model, by_step, hidden[rows], lambda i, _: x_0[i], workspace=place and place.child("v")
        )
        return [tokens.predict(items), network.predict(items)]

    place = Workspace(tmp_path / "w")
    first = both(slice(0, 4), place)
    for kept, fresh in zip(both(slice(4, 8), place), both(slice(4, 8), None), strict=True):
        assert torch.equal(kept, fresh)
    assert not torch.equal(first[0], both(slice(4, 8), None)[0])


def test_the_generator_hears_its_slot(tiny_model: Any, tmp_path: Path) -> None:
    z = torch.randn(4, 5, generator=rng(1))
    taught = Taught(
        torch.randn(8, *tiny_model.latent_shape, generator=rng(2)), torch.arange(4).repeat(2), z, torch.full((5,), 0.1)
    )
    slot = teach(tiny_model, taught, steps=3, batch_size=2, workspace=Workspace(tmp_path))
    assert not next(iter(slot.parameters())).requires_grad
    states = slot(torch.cat([z, torch.full((1, 5), float("nan"))]))
    assert torch.allclose(states[-1], slot.empty)
    pictures = reconstruct(tiny_model, slot, z, n=2, steps=2)
    assert pictures.shape == (4, 2, 3, 16, 16)
    again = slot_of({name: value.half() for name, value in slot.state_dict().items()})
    assert torch.allclose(again(z), slot(z), atol=1e-2)


def test_controls_are_at_chance_and_crossing_tells_sources_apart() -> None:
    gallery = torch.randn(30, 6, generator=rng(1))
    arms = {arm.name: arm.found for arm in controls.simple(gallery, gallery, range(30), centre=torch.zeros(6), nearest=gallery)}
    assert arms["prior mean"].rank == 0.5
    assert abs(arms["shuffled adapters"].rank - 0.5) < 0.2
    assert arms["nearest training identity"].rank == 1.0
    kernel = torch.randn(40, 8, generator=rng(2))
    targets = kernel[:, :6]
    arm = controls.permuted_pairs(kernel @ kernel.T, (gallery @ torch.eye(6, 8)) @ kernel.T, targets, gallery, range(30), times=5)
    assert abs(arm.found.rank - 0.5) < 0.25
    # A generator that ignores the encoder: all of the lift is the generator's.
    lifts = controls.crossing(lambda i, j: gallery[list(j)], lambda x: x, gallery, range(30), centre=torch.zeros(6))
    assert lifts["generator"] > 0.8
    assert abs(lifts["encoder"]) < 0.2
    facts = {"lr": [float(i % 2) for i in range(30)]}
    mixed = gallery + 5 * torch.tensor(facts["lr"])[:, None]
    assert controls.explained(mixed, facts["lr"]) > 0.5
    assert controls.explained(controls.residual(mixed, facts), facts["lr"]) < 0.1


def test_the_probe_reads_directions_and_no_norms(tiny_model: Any) -> None:
    """The norm-match control: same spectra in random directions bring the probe's encoder to chance, equal norms do not."""
    items, hidden = told_apart(tiny_model, 48)
    # Small, as adapters are, so that predictions change in proportion.
    items = [{name: (a, b * 0.02) for name, (a, b) in item.items()} for item in items]
    train, test = items[:32], items[32:]
    probe = Probe("a dog", levels=(0.5, 0.25), inputs=1)
    fitted = Functional.fit(probe.ask(tiny_model, train), hidden[:32])
    centre = hidden[:32].mean(0)

    def rank(adapters: Any) -> float:
        said = fitted.predict(probe.ask(tiny_model, adapters))
        return retrieval(cosines(said, hidden[32:], centre), range(16), permutations=20).rank

    equal = controls.norm_equalised(test)
    for name in test[0]:
        lengths = [norm(*item[name]) for item in equal]
        assert max(lengths) == pytest.approx(min(lengths), rel=1e-4)
    assert rank(test) > 0.75
    assert rank(equal) > 0.7
    # What is unlike every training adapter is not read as strongly as what is like them.
    alike, unlike = probe.ask(tiny_model, test), torch.randn(16, 2, *tiny_model.latent_shape, generator=rng(9))
    assert float(fitted.likeness(alike).median()) > float(fitted.likeness(unlike).max())
    assert torch.allclose(fitted.likeness(probe.ask(tiny_model, train)), torch.ones(32), atol=1e-5)
    again = Functional.from_tensors(fitted.tensors())
    assert torch.allclose(again.likeness(alike), fitted.likeness(alike), atol=1e-5)
    old = Functional.from_tensors({key: fitted.tensors()[key] for key in ("weight", "offset")})
    assert torch.equal(old.likeness(alike), torch.ones(16))
    blind = [random_directions(item, seed=row) for row, item in enumerate(test)]
    for a, b in zip(test, blind, strict=True):
        for name in a:
            assert norm(*b[name]) == pytest.approx(norm(*a[name]), rel=1e-3)
    assert abs(rank(blind) - 0.5) < 0.2


# ------------------------------------------------------------------------------------------------ membership, verdict


def test_an_overfitted_picture_is_a_member(tiny_model: Any) -> None:
    from safeweights.diffusion.adaptation import Lesson, Shots, fit

    pattern = torch.randn(1, *tiny_model.latent_shape, generator=rng(3))
    x_0 = torch.cat([pattern.expand(2, -1, -1, -1), -pattern.expand(8, -1, -1, -1)])
    x_0 = x_0 + 0.3 * torch.randn(x_0.shape, generator=rng(4))
    shots = Shots(x_0[:2], ("a dog",) * 2)
    adapter = Adapter(targets=ATTENTION, rank=4)
    trained = fit(Lesson(model=tiny_model, adapter=adapter, shots=shots, batch_size=2), steps=30, lr=1e-2)[-1]
    found = losses(tiny_model, factors_of(trained.phi), x_0, tiny_model.embed(["a dog"]), levels=4)
    inside, outside = (Losses(found.base[rows], found.adapted[rows]) for rows in (slice(0, 2), slice(2, 10)))
    assert float(inside.scores.mean()) > float(outside.scores.mean())
    test = judge([inside], [outside], resamples=50)
    assert test.auc > 0.8
    assert next(entry.name for entry in test.measurements()) == "membership_auc"


def test_several_files_count_every_picture_once_and_read_with_their_own_words(tiny_model: Any) -> None:
    x_0, c = torch.randn(3, *tiny_model.latent_shape, generator=rng(3)), tiny_model.embed(["a dog"])
    one, two = random_lora(tiny_model, seed=1), random_lora(tiny_model, seed=2)
    alone = [losses(tiny_model, item, x_0, c, levels=2) for item in (one, two)]
    both = losses(tiny_model, [one, two], x_0, c, levels=2)
    assert torch.allclose(both.adapted, (alone[0].adapted + alone[1].adapted) / 2, atol=1e-5)
    assert torch.allclose(both.base, alone[0].base)
    assert [len(part.base) for part in both.split([1, 2])] == [1, 2]
    # Factors beside the text encoder change what the prompt says.
    layer = next(
        name for name in dict(tiny_model.named_parameters()) if name.startswith("text_") and name.endswith("q_proj.weight")
    )
    width = dict(tiny_model.named_parameters())[layer].shape[0]
    worded = {**one, layer: (torch.randn(2, width, generator=rng(4)), torch.randn(width, 2, generator=rng(5)))}
    assert torch.allclose(losses(tiny_model, worded, x_0, c, levels=2).adapted, alone[0].adapted)
    assert not torch.allclose(losses(tiny_model, worded, x_0, c, prompt="a dog", levels=2).adapted, alone[0].adapted)


def trust(**values: Any) -> Trust:
    given: dict[str, Any] = {
        "encoder": "functional", "rank": 0.7, "interval": (0.66, 0.76), "n": 100, "gallery": 100, "controls": {"nearest": 0.6},
        "threshold": 1.0, "flagged_nulls": (0, 100), "flagged": (80, 100), "direct_rank": 0.99, "direct_interval": (0.98, 1.0),
        "direct_controls": {"nearest": 0.9}, "null_kinds": {"null-styles": (0, 50), "null-objects": (0, 50)},
    }  # fmt: skip
    return Trust(**{**given, **values})


def test_the_verdict_follows_its_rule() -> None:
    assert decide([trust()], {"functional": [1.5]}).verdict == "leaks identity"
    assert decide([trust()], {"functional": [0.9]}).verdict == "not shown"
    assert "80 of 100" in decide([trust()], {"functional": [0.9]}).power
    # An encoder that is not above every control, or that sees people in noise, may not judge, and it is said why.
    for untrusted, why in (
        (trust(interval=(0.5, 0.9)), "control 'nearest' reaches 0.600"),
        (trust(interval=(0.45, 0.9), controls={}), "control 'chance' reaches 0.500"),
        (trust(controls={"x": 0.66}), "control 'x' reaches 0.660"),
        (trust(direct_controls={"y": 0.98}), "own estimate"),
        (trust(flagged_nulls=(6, 100)), "flags 6 of 100"),
        (trust(flagged_nulls=(0, 0)), "never asked"),
    ):
        found = decide([untrusted], {"functional": [9.0]})
        assert found.verdict == "not shown"
        assert why in found.power
        assert "100 adapters among 100 people" in found.power
    assert Trust.from_json(json.loads(json.dumps(trust().__dict__))) == trust()


def test_like_is_compared_with_like() -> None:
    """Pictures are judged by pictures: a control that estimates well does not count against them, nor the other way round."""
    assert trust().passed
    assert trust().interval[0] < max((trust().direct_controls or {}).values())
    assert not trust(controls={"nearest": 0.7}).passed
    assert not trust(direct_interval=(0.89, 1.0)).passed


def test_encoders_of_an_older_version_may_not_judge() -> None:
    old = {
        "encoder": "gram", "rank": 0.99, "interval": [0.98, 1.0], "n": 100, "gallery": 100, "controls": {"nearest": 0.5},
        "threshold": 1.0, "flagged_nulls": [0, 20], "flagged": [80, 100],
    }  # fmt: skip
    read = Trust.from_json(old)
    assert not read.passed
    found = decide([read], {"gram": [9.0]})
    assert found.verdict == "not shown"
    assert "train the encoders again" in found.power


def test_spectra_never_say_who_it_is_and_one_encoder_judges() -> None:
    assert not trust(encoder="spectrum").passed
    assert decide([trust(encoder="spectrum")], {"spectrum": [9.0]}).verdict == "not shown"
    # The better one, as the test people have it, judges alone: the other's false alarms are not added to its own.
    both = [trust(encoder="gram", interval=(0.62, 0.7)), trust()]
    assert decide(both, {"gram": [9.0], "functional": [0.5]}).verdict == "not shown"
    assert decide(both, {"gram": [0.5], "functional": [9.0]}).verdict == "leaks identity"
    assert "10%" in decide(both, {"gram": [0.5] * 2, "functional": [0.5] * 2}).power


def test_images_leak_where_hits_are_no_accident() -> None:
    scores = torch.linspace(0, 1, 200)
    fair = judge([Losses(scores[::20] + 3, scores[::20])], [Losses(scores, scores)], resamples=20)
    fair = replace(fair, base_interval=(0.4, 0.6))
    assert decide([], {}, membership=fair).verdict == "leaks images"
    unfair = decide([], {}, membership=replace(fair, base_interval=(0.9, 1.0)))
    assert unfair.verdict == "not shown"
    assert "says nothing" in unfair.power
    # Few non-members resolve no small rate: 2 of 16 above the highest of 8 is what chance gives.
    few = replace(fair, members=16, others=8, hits=2)
    assert few.p == pytest.approx(16 / 24 * 15 / 23)
    assert few.floor == 1 / 9
    assert decide([], {}, membership=few).verdict == "not shown"
    # A few pictures learnt by heart are a leak, whatever the AUC over all of them.
    heart = replace(fair, members=100, others=200, hits=12, auc=0.52, auc_interval=(0.45, 0.6))
    assert decide([], {}, membership=heart).verdict == "leaks images"


def test_copies_are_told_from_likeness() -> None:
    trained, held = torch.randn(4, 8, generator=rng(1)), torch.randn(4, 8, generator=rng(2))
    near = copied(trained + 0.1 * torch.randn(4, 8, generator=rng(3)), trained, held)
    assert (near.members, near.others) == (4, 4)
    assert near.p == pytest.approx(1 / 70)
    assert copied(trained + held, trained, held).p > 0.05
    # All drawn alike and near to one training picture: one accident, not four.
    assert copied(trained[:1].expand(4, -1), trained, held).p == pytest.approx(0.5)
    assert copied(torch.randn(2, 8, generator=rng(4)), torch.cat([trained, trained]), torch.cat([held, held])).p > 0.025
    member = judge([Losses(torch.ones(4), torch.ones(4))], [Losses(torch.ones(4), torch.ones(4))], resamples=5)
    assert decide([], {}, membership=member, copies=near).verdict == "leaks images"
    assert decide([], {}, membership=replace(member, base_interval=(0.9, 1.0)), copies=near).verdict == "not shown"


def test_thresholds_leave_a_margin_for_few_nulls() -> None:
    assert threshold_of(torch.arange(20.0)) == 19.0
    assert threshold_of(torch.arange(50.0)) == 49.0
    # The 6th highest of 200: P(Binomial(200, 0.05) < 6) is 0.06, and 0.12 for the 7th.
    assert threshold_of(torch.arange(200.0)) == 194.0


def test_encoders_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leakage train"):
        Encoders.load(tmp_path)
    (tmp_path / "encoders.json").write_text("{}")
    with pytest.raises(UserError, match="train them again"):
        Encoders.load(tmp_path)
    space = Space.fit(torch.randn(10, 6, generator=rng()))
    assert torch.allclose(space.basis.T @ space.basis, torch.eye(6), atol=1e-5)
