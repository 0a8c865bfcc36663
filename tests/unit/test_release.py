"""What leaves the house: one file, a LoRA, a card, a signature; and what hostile input makes of them."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safeweights.cli.common import unprotected
from safeweights.cli.main import run
from safeweights.core.errors import UserError
from safeweights.core.text import markdown, plain, slug
from safeweights.models.door import open_model
from safeweights.models.embedded import CONFIG, TOKENIZER, unpack
from safeweights.release.lora import Edit, find_edit, lora_tensors
from safeweights.release.manifest import hash_input, hash_model, lineage, read_manifest, read_protection, write_manifest
from safeweights.release.model_card import evaluations, records_about, steps_of, write_card
from safeweights.release.modelspec import architecture
from safeweights.release.verify import verify

EVIL = "<script>alert(1)</script> [x](http://evil) | ../../etc/passwd\n---\nlicense: mit\n\x1b[31m\u202e `code` *b*"


def siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def protect(folder: Path, source: Path, *parts: str, scale: float = 0.05, **manifest: Any) -> Path:
    """A model with every parameter whose name holds one of ``parts`` changed, as ``erase`` leaves it."""
    model = open_model(str(source), device="cpu")
    rng = torch.Generator().manual_seed(3)
    tensors = {
        name: p + scale * torch.randn(p.shape, generator=rng)
        for name, p in model.named_parameters()
        if any(x in name for x in parts)
    }
    assert tensors
    model.with_tensors(tensors).save(folder)
    facts: dict[str, Any] = {
        "command": ["safeweights", "erase"], "method": "uce", "concepts": ["mosaic"], "seed": 1, "cost": {"eps_calls": 5},
        "options": {"model": str(source), "settings": {"lam": 0.5}}, "inputs": {"model": hash_input(source)}, "seconds": 7.0,
    }  # fmt: skip
    write_manifest(folder, tensors=tensors, **{**facts, **manifest})
    return folder


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def draw(pipeline: Any, steps: int = 2) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a picture of a red house", num_inference_steps=steps, guidance_scale=4.0, height=16, width=16, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    found: torch.Tensor = images.images
    return found


def pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


# ------------------------------------------------------------------------------------------------------------ one file


@pytest.mark.parametrize(("version", "prediction"), [("1.5", "epsilon"), ("2.1", "v_prediction")])
def test_one_file_draws_the_same_pictures(tiny_sd: Callable[..., Path], tmp_path: Path, version: str, prediction: str) -> None:
    from diffusers import StableDiffusionPipeline

    source = tiny_sd(version=version, prediction=prediction)
    file = tmp_path / "one.safetensors"
    assert run(["export", str(source), "--format", "single-file", "-o", str(file)]) == 0
    assert siblings(tmp_path) == ["one.safetensors"]
    again: Any = open_model(file, device="cpu")  # no folder, no tokenizer of the Hub: all of it is in the file
    model: Any = open_model(source, device="cpu")
    assert (again.prediction, again.latent_shape, again.grid) == (prediction, model.latent_shape, model.grid)
    old, new = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(old[name], new[name]) for name in {*old, *new})
    assert all(torch.equal(a, b) for a, b in zip(model.vae.parameters(), again.vae.parameters(), strict=True))
    assert torch.equal(model.tokenize(["a dog by vincent"]), again.tokenize(["a dog by vincent"]))
    plain_diffusers = StableDiffusionPipeline.from_single_file(
        str(file), config=str(source), local_files_only=True, safety_checker=None, feature_extractor=None,
        tokenizer=pipeline(source).tokenizer,
    )  # fmt: skip
    assert torch.equal(draw(plain_diffusers), draw(pipeline(source)))


def test_the_sandbox_itself_is_one_file(tmp_path: Path) -> None:
    """Attention in the first up block, none in the last; no attention in the VAE; a vocabulary of its own."""
    assert run(["export", "sandbox", "--format", "single-file", "--dtype", "float16", "-o", str(tmp_path / "s.safetensors")]) == 0
    model, again = (open_model(name, device="cpu", dtype="float16") for name in ("sandbox", tmp_path / "s.safetensors"))
    old, new = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(old[name], new[name]) for name in {*old, *new})
    assert model.embed(["a mosaic boat"]).states.equal(again.embed(["a mosaic boat"]).states)
    spec = metadata(tmp_path / "s.safetensors")
    assert spec["modelspec.architecture"] == "stable-diffusion-v1-custom"
    assert spec["modelspec.resolution"] == "64x64"


def test_the_header_says_what_the_file_is(tiny_sd: Callable[..., Path], tmp_path: Path) -> None:
    source = protect(tmp_path / "p", tiny_sd(version="2.1", prediction="v_prediction"), "attn2.to_k")
    file = tmp_path / "one.safetensors"
    more = ["--license", "openrail", "--title", EVIL + "x" * 10**6, "--description", "one\x00\ntwo", "--author", "me"]
    assert run(["export", str(source), "--format", "single-file", "-o", str(file), *more]) == 0
    spec = {key.removeprefix("modelspec."): value for key, value in metadata(file).items() if key.startswith("modelspec.")}
    assert spec["sai_model_spec"] == "1.0.1"
    assert (spec["prediction_type"], spec["license"], spec["author"]) == ("v", "openrail", "me")
    assert spec["description"] == "one� two"
    assert len(spec["title"]) == 200
    assert not {"\n", "\x1b", "\u202e"} & set(spec["title"])
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert spec["hash_sha256"] == "0x" + hashlib.sha256(data[8 + size :]).hexdigest()
    manifest = read_manifest(file)
    assert (manifest["method"], manifest["options"]["settings"]) == ("uce", {"lam": 0.5})
    assert manifest["changed"] == read_manifest(source)["changed"]
    assert run(["verify", str(file)]) == 0


def test_architecture_is_told_from_sizes() -> None:
    from types import SimpleNamespace as Some

    def model(act: str, width: int, widths: tuple[int, ...], prediction: str = "epsilon") -> Any:
        config = Some(block_out_channels=widths, layers_per_block=2, cross_attention_dim=width)
        return Some(text_encoder=Some(config=Some(hidden_act=act)), denoiser=Some(config=config), prediction=prediction)

    published = (320, 640, 1280, 1280)
    assert architecture(model("quick_gelu", 768, published)) == "stable-diffusion-v1"
    assert architecture(model("gelu", 1024, published)) == "stable-diffusion-v2-512"
    assert architecture(model("gelu", 1024, published, "v_prediction")) == "stable-diffusion-v2-768-v"
    assert architecture(model("quick_gelu", 768, (32, 64))) == "stable-diffusion-v1-custom"


def test_a_file_appears_whole_or_not_at_all(
    tiny_sd: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safeweights.release import checkpoint

    target = tmp_path / "new" / "a.safetensors"
    arguments = ["export", str(tiny_sd()), "--format", "single-file", "-o", str(target)]
    assert run(arguments) == 0
    assert (target.stat().st_mode & 0o777) == (tmp_path / "new").stat().st_mode & 0o666, "as any file of the user's"
    before = target.read_bytes()
    assert run(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err

    def killed(file: Path) -> str:
        assert file.stat().st_size > 1000
        assert target.read_bytes() == before
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "fill_hash", killed)
        assert run([*arguments, "--overwrite"]) == 130
    assert target.read_bytes() == before
    assert siblings(target.parent) == ["a.safetensors"]
    assert run([*arguments, "--overwrite", "--title", "another"]) == 0
    assert target.read_bytes() != before
    (tmp_path / "folder.safetensors").mkdir()
    assert run([*arguments[:-1], str(tmp_path / "folder.safetensors"), "--overwrite"]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_places_that_do_not_fit_the_format(tiny_sd: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    model = str(tiny_sd())
    assert run(["export", model, "--format", "single-file", "-o", str(tmp_path / "folder")]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err
    assert run(["export", model, "--format", "diffusers", "-o", str(tmp_path / "a.safetensors")]) == 2
    assert "writes a folder" in capsys.readouterr().err
    assert run(["export", model, "--format", "lora", "--layout", "a1111", "-o", str(tmp_path / "a")]) == 2
    assert "known are peft, kohya" in capsys.readouterr().err
    assert siblings(tmp_path) == []


def test_a_hostile_header_is_refused_and_writes_nothing_outside(
    tiny_model: Any, tiny_sd: Callable[..., Path], tmp_path: Path
) -> None:
    from safeweights.models.embedded import pack

    good = pack(tiny_model)
    configs = json.loads(good[CONFIG])
    room = tmp_path / "room"

    def tokenizer(files: Any) -> str:
        return base64.b64encode(zlib.compress(json.dumps(files).encode())).decode()

    bad = {
        "not JSON": {**good, CONFIG: "{"},
        "not an object": {**good, CONFIG: "[]"},
        "deep": {**good, CONFIG: "[" * 100_000},
        "no base64": {**good, TOKENIZER: "é!"},
        "a bomb": {**good, TOKENIZER: base64.b64encode(zlib.compress(b"0" * (40 * 2**20))).decode()},
        "code": {**good, CONFIG: json.dumps({**configs, "scheduler": {"_class_name": "StableDiffusionPipeline"}})},
        "a path": {**good, CONFIG: json.dumps({**configs, "scheduler": {"_class_name": "os.systemScheduler"}})},
    }
    for name, entries in bad.items():
        with pytest.raises(UserError, match="cannot be read"):
            unpack(Path("x"), entries, room / name)
    assert not room.exists()
    written = unpack(Path("x"), {**good, TOKENIZER: tokenizer({"../../evil": "x", "vocab.json": "{}"})}, room)
    assert written == room
    assert siblings(tmp_path) == ["room"]
    assert siblings(room / "tokenizer") == ["vocab.json"]
    assert unpack(Path("x"), {"format": "pt"}, room) is None
    # A file whose architecture is not that of its tensors.
    file = tmp_path / "one.safetensors"
    assert run(["export", str(tiny_sd()), "--format", "single-file", "-o", str(file)]) == 0
    wider = {**configs, "unet": {**configs["unet"], "block_out_channels": [64, 128]}}
    save_file(load_file(file), file, {**metadata(file), CONFIG: json.dumps(wider)})
    with pytest.raises(UserError, match="does not fit"):
        open_model(file, device="cpu")


# ---------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_a_lora_loads_in_plain_diffusers_and_draws_the_same(
    tiny_sd: Callable[..., Path], tmp_path: Path, capsys: Any, layout: str
) -> None:
    """UNet linear and convolution layers of many ranks, and the text encoder."""
    source = tiny_sd()
    protected = protect(tmp_path / "p", source, "attn2.to_", "resnets.0.conv1.weight", "self_attn.q_proj.weight", "fc1.weight")
    out = tmp_path / "lora"
    arguments = ["export", str(protected), "--format", "lora", "--energy", "1.0", "--layout", layout, "-o", str(out), "--json"]
    assert run(arguments) == 0
    told = json.loads(capsys.readouterr().out)["lora"]
    assert told["relative_error"] == pytest.approx(sum(share**2 for share in told["not_carried"].values()) ** 0.5, rel=1e-3)
    assert len({layer["rank"] for layer in told["layers"].values()}) > 1
    assert told["not_carried"].keys() == {n for n in read_manifest(protected)["changed"] if n.endswith("to_out.0.bias")}
    plain_diffusers = pipeline(source)
    before = draw(plain_diffusers)
    plain_diffusers.load_lora_weights(out)
    after, wanted = draw(plain_diffusers), draw(pipeline(protected))
    assert (before - wanted).abs().max() > 0.01, "the edit shows"
    assert (after - wanted).abs().max() < 0.1 * (before - wanted).abs().max()
    assert run(["verify", str(out)]) == 0


def test_the_stated_error_is_that_of_diffusers(tiny_sd: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    """Cut at rank 2, the noise predictions of base plus LoRA miss the model's by what was printed."""
    source = tiny_sd()
    protected = protect(tmp_path / "p", source, "attn1.to_q", "attn2.to_k")
    file = tmp_path / "edit.safetensors"
    assert run(["export", str(protected), "--format", "lora", "--rank", "2", "-o", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["lora"]
    model, base = open_model(protected, device="cpu"), open_model(source, device="cpu")
    off = whole = 0.0
    for name, p in model.named_parameters():
        change = (p - dict(base.named_parameters())[name]).detach().double().flatten(1) if p.ndim > 1 else None
        if change is not None and change.norm() > 0:
            s = torch.linalg.svdvals(change)
            off, whole = off + float(s[2:].square().sum()), whole + float(s.square().sum())
    assert told["relative_error"] == pytest.approx((off / whole) ** 0.5, rel=1e-3)
    assert told["rank"] == {"smallest": 2, "largest": 2}

    from safeweights.diffusion.noise import generator

    plain_diffusers = pipeline(source)
    plain_diffusers.load_lora_weights(str(file))
    worst = 0.0
    prompts = ["a picture of mosaic", "a picture", ""]
    with torch.no_grad():
        for index, prompt in enumerate(prompts):
            t = torch.tensor([int((index + 0.5) / len(prompts) * 1000)])
            x_t = torch.randn((1, 4, 8, 8), generator=generator("lora probe", 8000, index))
            states = model.embed([prompt]).states
            difference = plain_diffusers.unet(x_t, t, states).sample - model.eps(x_t, t, model.embed([prompt]))
            worst = max(worst, float(difference.abs().max()))
    assert worst == pytest.approx(told["probe"]["max"], rel=1e-3)
    spec = metadata(file)
    assert spec["modelspec.architecture"].endswith("/lora")
    assert (spec["ss_network_dim"], spec["ss_base_model_version"]) == ("2", "sd_v1")


def test_names_are_those_of_both_worlds() -> None:
    from safeweights.diffusion.low_rank import factor

    names = ("unet.down_blocks.0.attentions.0.proj_in.weight", "text_encoder.encoder.layers.0.mlp.fc1.weight")
    edit = Edit({names[0]: factor(torch.randn(4, 4, 1, 1), rank=2), names[1]: factor(torch.randn(4, 3), rank=3)})
    assert set(lora_tensors(edit, "peft")) == {
        f"{name}.lora_{end}.weight"
        for name in ("unet.down_blocks.0.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1")
        for end in "AB"
    }
    kohya = lora_tensors(edit, "kohya")
    for name in ("lora_unet_down_blocks_0_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"):
        down, up, alpha = (kohya[f"{name}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        weight = next(w for key, w in edit.factors.items() if down.shape == w.down.shape)
        delta = float(alpha) / len(down) * (up.flatten(1) @ down.flatten(1)).view_as(weight.delta)
        assert torch.allclose(delta, weight.delta, atol=1e-6)


def test_the_base_is_found_and_checked(tiny_sd: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    base = Path(shutil.copytree(tiny_sd(), tmp_path / "base"))
    first = protect(tmp_path / "first", base, "attn2.to_k")
    second = protect(tmp_path / "second", first, "attn2.to_v")
    assert [Path(name).name for name, _ in lineage(str(second))] == ["second", "first", "base"]
    out = str(tmp_path / "lora")
    assert run(["export", str(second), "--format", "lora", "-o", out, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["lora"]["layers"]
    assert {name.split(".")[-2] for name in layers} == {"to_k", "to_v"}, "both protections since the base"
    assert run(["export", str(second), "--format", "lora", "--base", str(first), "-o", out, "--overwrite", "--json"]) == 0
    assert {name.split(".")[-2] for name in json.loads(capsys.readouterr().out)["lora"]["layers"]} == {"to_v"}
    assert run(["export", str(base), "--format", "lora", "-o", out, "--overwrite"]) == 2
    assert "give the model before protection with --base" in capsys.readouterr().err
    assert run(["export", str(base), "--format", "lora", "--base", str(base), "-o", out, "--overwrite"]) == 2
    assert "nothing differs" in capsys.readouterr().err
    assert run(["export", str(base), "--format", "lora", "--base", str(tiny_sd(layers=2)), "-o", out, "--overwrite"]) == 2
    assert "no counterpart" in capsys.readouterr().err
    protect(tmp_path / "other", base, "attn1.to_q")
    shutil.copytree(tmp_path / "other", base, dirs_exist_ok=True)
    assert run(["export", str(second), "--format", "lora", "-o", str(tmp_path / "x")]) == 2
    assert "its files have changed" in capsys.readouterr().err
    only_norms = open_model(first, device="cpu")
    norm = {name: p + 1 for name, p in only_norms.named_parameters() if name.endswith("norm1.weight")}
    with pytest.raises(UserError, match="only tensors differ that a LoRA cannot carry"):
        find_edit(only_norms.with_tensors(norm), only_norms)


# ---------------------------------------------------------------------------------------------------------------- card


def hostile_record(digest: str | None, **values: Any) -> Any:
    import factories

    return factories.base(
        concept=EVIL, concept_kind="style", measurements=(factories.rate("asr", 3, 10, reference=0.9),),
        provenance={"inputs": {"model": digest}, "time": {"date": "2030-01-02T03:04:05Z"}}, **values,
    )  # fmt: skip


def test_the_card_shows_hostile_text_as_text() -> None:
    import markdown as library

    (step,) = steps_of(
        {
            "method": EVIL, "concepts": [EVIL, "y" * 10**7], "options": {"settings": {"note": "```\n<b>" + EVIL}}, "changed": {},
            "cost": {EVIL: EVIL}, "seconds": 1.0,
        }
    )  # fmt: skip
    record = hostile_record("d")
    text = write_card(
        title=EVIL, base=EVIL, steps=[step], records=[record], facts={"exported from": EVIL}, license_=EVIL, description=EVIL
    )
    assert len(text) < 30_000
    assert not {"\x1b", "\u202e"} & set(text)
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    front = yaml.safe_load(head)
    assert front["license"] == "other", "what is no licence's id is a name"
    assert set(front) == {
        "license", "license_name", "library_name", "pipeline_tag", "tags", "model-index",
    }  # fmt: skip
    html = library.markdown(body, extensions=["tables", "fenced_code"])
    assert "<script" not in html
    assert "<b>" not in html.replace("&lt;b&gt;", "")
    assert "http://evil" in html
    assert "<a " not in html
    assert "<em>b" not in html
    assert html.count("<table>") == 1
    assert html.count("<td>") == 9, "a pipe in a name makes no cell"
    entry = yaml.safe_load(str(evaluations([record])))[0]
    assert entry["value"] == 0.3
    assert entry["date"] == "2030-01-02T03:04:05Z"
    assert entry["dataset"]["task_id"] == slug(entry["dataset"]["task_id"], 100)


def test_text_is_plain_and_short() -> None:
    assert plain("a\nb\tc\x00\u202e") == "a b c��"
    assert len(plain("x" * 10**7)) == 200
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("…") == "unnamed"
    assert markdown("|<a>") == "\\|&lt;a&gt;"


def test_evidence_is_that_of_this_model(tiny_sd: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    from safeweights.records.store import Store

    protected = protect(tmp_path / "p", tiny_sd(), "attn2.to_k")
    store = Store(tmp_path / "audit")
    store.add(hostile_record("of another model"))
    arguments = ["export", str(protected), "--format", "diffusers", "--records", str(tmp_path / "audit"), "-o"]
    assert run([*arguments, str(tmp_path / "no")]) == 2
    assert "none of its 1 records is about this model" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    store.add(hostile_record(hash_input(protected), attack="p4d"))
    assert [record.attack for record in records_about(tmp_path / "audit", hash_input(protected))] == ["p4d"]
    # What holds the model in memory knows it by its tensors.
    store.add(hostile_record(hash_model(open_model(protected, device="cpu")), attack="random"))
    with pytest.raises(UserError, match="none of its 3 records"):
        records_about(tmp_path / "audit", None)
    assert run([*arguments, str(tmp_path / "out"), "--license", "apache-2.0"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert front["license"] == "apache-2.0"
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.3
    assert "**uce** on mosaic" in card
    assert card.count("| 0.3 | 0.1078 – 0.6032 | 0.9 | 10 |") == 2
    assert yaml.safe_load((tmp_path / "out" / ".eval_results" / "safeweights.yaml").read_text())[0]["value"] == 0.3
    assert torch.equal(draw(pipeline(tmp_path / "out")), draw(pipeline(protected)))
    assert run(["verify", str(tmp_path / "out")]) == 0


def test_a_hostile_manifest_is_trimmed(tiny_sd: Callable[..., Path], tmp_path: Path) -> None:
    folder = protect(tmp_path / "p", tiny_sd(), "attn2.to_k", concepts=[EVIL, "z" * 10**7])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"seed": "x", "cost": 3, "seconds": [], "changed": {"../a": 1}, "options": {"settings": "no", "model": 7}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    kept = read_protection(folder)
    assert kept.keys() & {"seed", "cost", "seconds"} == set()
    assert kept["options"]["settings"] == {}
    assert len(json.dumps(kept)) < 40_000
    for form, name in (("diffusers", "out"), ("single-file", "one.safetensors"), ("lora", "lora")):
        base = ["--base", str(tiny_sd())] if form == "lora" else []
        assert run(["export", str(folder), "--format", form, *base, "-o", str(tmp_path / name)]) == 0
    assert siblings(tmp_path) == ["lora", "one.safetensors", "out", "p"]
    for junk in ("[]", "{", '{"method": ""}', "[" * 10**5, '{"options": []}'):
        (folder / "manifest.json").write_text(junk)
        assert read_protection(folder) == {}
        assert len(lineage(str(folder))) == 1


# ----------------------------------------------------------------------------------------------------------- signature


def test_a_recipe_is_told_step_by_step() -> None:
    chain = [
        {"verb": "erase", "method": "esd", "concepts": ["fish"], "settings": {"lr": 1}, "changed": {"a": "b"}, "cost": {},
         "seconds": 2},
        {"verb": "freeze", "method": "freezeasguard", "concepts": ["fish"], "settings": {}, "changed": {}, "frozen": ["x", "y"]},
        {"verb": "freeze", "method": "random", "concepts": ["fish"], "settings": {}, "changed": {}, "frozen": 98},
        {"method": 3},
    ]  # fmt: skip
    steps = steps_of({"method": "esd+freezeasguard", "chain": chain, "changed": {}})
    assert [(step["method"], step["changed"], step["frozen"]) for step in steps] == [
        ("esd", 1, 0), ("freezeasguard", 0, 2), ("random", 0, 98)
    ]  # fmt: skip
    card = write_card(title="t", base="b", steps=steps, records=[], facts={})
    assert "1. **esd** on fish" in card
    assert "2. **freezeasguard** on fish" in card
    assert steps_of({}) == []


def test_every_form_fits_into_a_folder(tiny_sd: Callable[..., Path], tmp_path: Path) -> None:
    """As a recipe writes them: each into a folder of its own, opened models in hand."""
    from safeweights.release.export import FORMATS, export

    folder = protect(tmp_path / "p", tiny_sd(), "attn2.to_k", "q_proj.weight")
    model, base = open_model(folder, device="cpu"), open_model(tiny_sd(), device="cpu")
    for form in FORMATS:
        (tmp_path / form).mkdir()
        export(model, tmp_path / form, form, command=["run"], options={}, inputs={}, protected=read_protection(folder), base=base)
        assert verify(tmp_path / form).ok
        assert read_manifest(tmp_path / form)["method"] == "uce"
    assert siblings(tmp_path / "single-file") == ["manifest.json", "model.safetensors"]
    assert siblings(tmp_path / "lora") == ["manifest.json", "pytorch_lora_weights.safetensors"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    for name in ("own", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        (folder / f"{name}.pem").write_bytes(private)
        public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


@pytest.fixture
def signed(keys: Path, tiny_sd: Callable[..., Path], tmp_path: Path) -> Path:
    source = protect(tmp_path / "p", tiny_sd(), "attn2.to_k")
    out = tmp_path / "out"
    assert run(["export", str(source), "--format", "diffusers", "--sign-key", str(keys / "own.pem"), "-o", str(out)]) == 0
    return out


def test_a_signature_holds_wherever_the_folder_goes(signed: Path, keys: Path, tmp_path: Path, capsys: Any) -> None:
    elsewhere = signed.rename(tmp_path / "elsewhere")
    assert run(["verify", str(elsewhere), "--key", str(keys / "own.pub"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["signature"]) == (True, "valid")
    assert told["files_checked"] >= 10
    assert told["tensors_checked"] == len(read_manifest(elsewhere)["changed"])
    assert run(["verify", str(elsewhere)]) == 0
    assert "--key PUBLIC.pem checks it" in capsys.readouterr().out
    assert run(["verify", str(elsewhere), "--key", str(keys / "other.pub")]) == 1
    assert "not made with this key" in capsys.readouterr().out


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (lambda d: flip(d / "vae" / "diffusion_pytorch_model.safetensors"), "vae/diffusion_pytorch_model.safetensors"),
        (lambda d: flip(d / "model.sig"), "signature"),
        (lambda d: (d / "unet" / "evil.py").write_text("1"), "unet/evil.py"),
        (lambda d: (d / "tokenizer" / "tokenizer_config.json").unlink(), "tokenizer/tokenizer_config.json"),
        (lambda d: (d / "manifest.json").write_text("{}"), "manifest.json"),
        (lambda d: (d / "model.sig").unlink(), "model.sig is missing"),
    ],
)
def test_tampering_is_found_and_named(signed: Path, keys: Path, capsys: Any, tamper: Callable[[Path], None], told: str) -> None:
    tamper(signed)
    assert run(["verify", str(signed), "--key", str(keys / "own.pub")]) == 1
    out = capsys.readouterr().out
    assert told in out
    assert "NOT VERIFIED" in out


def test_nothing_checked_is_not_verified(signed: Path, capsys: Any) -> None:
    (signed / "manifest.json").unlink()
    assert run(["verify", str(signed)]) == 1
    assert "nothing here could be checked" in capsys.readouterr().out


def test_the_manifest_alone_finds_changed_tensors(tiny_sd: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    """What ``erase`` leaves has no signature and no list of files; the weights' hashes are there."""
    folder = protect(tmp_path / "p", tiny_sd(), "attn2.to_k", "self_attn.q_proj.weight")
    assert run(["verify", str(folder)]) == 0
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    assert run(["verify", str(folder)]) == 1
    assert f"tensor changed: text_encoder.{name.removeprefix('text_model.')}" in capsys.readouterr().out
    assert run(["verify", str(tiny_sd())]) == 2
    assert "nothing to verify" in capsys.readouterr().err
    assert run(["verify", str(tmp_path / "nowhere")]) == 2


def test_half_precision_hashes_fit_their_float32_text_encoder(tiny_sd: Callable[..., Path], tmp_path: Path) -> None:
    folder = protect(tmp_path / "p", tiny_sd(), "self_attn.q_proj.weight", "attn2.to_k")
    for form, name in (("diffusers", "half"), ("single-file", "half.safetensors"), ("text-encoder", "encoder")):
        arguments = ["export", str(folder), "--format", form, "--dtype", "float16", "-o", str(tmp_path / name)]
        assert run(arguments) == 0
        assert run(["verify", str(tmp_path / name)]) == 0


def test_a_single_file_is_signed_beside_itself(tiny_sd: Callable[..., Path], keys: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "one.safetensors"
    arguments = ["export", str(tiny_sd()), "--format", "single-file", "--sign-key", str(keys / "own.pem"), "-o", str(file)]
    assert run(arguments) == 0
    assert siblings(tmp_path) == ["one.safetensors", "one.safetensors.sig"]
    assert run(["verify", str(file), "--key", str(keys / "own.pub")]) == 0
    flip(file)
    assert run(["verify", str(file), "--key", str(keys / "own.pub")]) == 1
    assert run(["verify", str(file)]) == 1
    assert "modelspec.hash_sha256" in capsys.readouterr().out


def test_keys_and_libraries_that_are_not_there(
    signed: Path, keys: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["sign", str(signed), "--key", str(tmp_path / "no.pem")]) == 2
    assert "openssl ecparam" in capsys.readouterr().err
    (tmp_path / "no.pem").write_text("nothing")
    assert run(["sign", str(signed), "--key", str(tmp_path / "no.pem")]) == 2
    assert run(["verify", str(signed), "--key", str(tmp_path / "no.pem")]) == 2
    assert "cannot be used" in capsys.readouterr().err
    assert run(["verify", str(signed), "--key", str(keys / "own.pub")]) == 0, "a failed signing left the old signature"
    monkeypatch.setitem(__import__("sys").modules, "model_signing", None)
    monkeypatch.setitem(__import__("sys").modules, "model_signing.signing", None)
    assert run(["sign", str(signed), "--key", str(keys / "own.pem")]) == 2
    assert "safeweights[sign]" in capsys.readouterr().err


def test_a_protected_model_goes_back_to_before_its_first_protection(tmp_path: Path) -> None:
    """A fine-tune that came before belongs to the model; a protection after a protection does not."""
    chain = [("tuned", "lora", "base"), ("erased", "uce", "tuned"), ("immune", "mima", "erased")]
    for name, method, before in chain:
        (tmp_path / name).mkdir()
        told = {"method": method, "options": {"model": str(tmp_path / before)}}
        (tmp_path / name / "manifest.json").write_text(json.dumps(told))
    assert unprotected(str(tmp_path / "immune")) == str(tmp_path / "tuned")
    assert unprotected(str(tmp_path / "tuned")) == str(tmp_path / "tuned")
    assert unprotected("sandbox") == "sandbox"
