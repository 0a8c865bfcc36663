"""Masks on disk, who respected them, and the commands around them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from safeweights.cli.main import run
from safeweights.core.errors import UserError
from safeweights.freezing.enforce import beside_frozen, compare, is_adapter
from safeweights.models.door import open_model
from safeweights.records.mask import Mask, read_mask
from safeweights.release.output import output_file

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
OTHER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    names = ("dog", "truck", "boat")
    entries = "".join(
        f"  {name}:\n    kind: object\n    term: {name}\n    anchor: house\n    prompts: [a red {name}]\n    images: {pictures}\n"
        for name in names
    )
    path = tmp_path_factory.mktemp("file") / "concepts.yaml"
    path.write_text(f"version: 1\nconcepts:\n{entries}", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tiny_sd: Callable[..., Path]) -> str:
    return str(tiny_sd())


def mask_of(path: Path, *layers: str, **more: Any) -> Path:
    path.write_text(json.dumps({"version": 1, "frozen": [f"{layer}.weight" for layer in layers], **more}))
    return path


def learn(base: str, concepts: Path, out: Path, *more: str) -> list[str]:
    fast = ("pictures=2", "tune_steps=2", "batch_size=1", "rounds=2", "user_steps=1")
    given = [word for pair in fast for word in ("--set", pair)]
    return [
        "freeze", "learn", base, "--illegal", "dog", "--illegal", "truck", "--legal", "boat", "--concepts-file", str(concepts),
        "--device", "cpu", "-o", str(out), *given, *more,
    ]  # fmt: skip


def test_learn_writes_the_mask_the_contract_names(base: str, concepts: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new" / "MASK.json"
    assert run([*learn(base, concepts, out, "--ratio", "0.25", "--json")]) == 0
    told, written = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["MASK.json"]
    assert written["version"] == 1
    assert (written["ratio"], written["budget"]) == (0.25, "tensors")
    assert (written["illegal"], written["legal"]) == (["dog", "truck"], ["boat"])
    assert written["settings"]["rounds"] == 2
    names = {name for name, _ in open_model(base, device="cpu").denoiser.named_parameters()}
    assert set(written["frozen"]) <= names
    assert len(written["frozen"]) == round(0.25 * len(names))
    assert written["achieved"]["tensors"] == pytest.approx(len(written["frozen"]) / len(names))
    assert 0 < written["achieved"]["parameters"] < 1
    assert told["frozen"] == written["frozen"]
    assert len(written["base_sha256"]) == 64
    assert read_mask(out).frozen == {f"unet.{name}" for name in written["frozen"]}
    made = written["made"]["inputs"]
    assert len(made["images of dog"]) == len(made["images of boat"]) == 64
    # There already; then replaced; the same seed gives the same mask.
    assert run([*learn(base, concepts, out, "--ratio", "0.25")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run([*learn(base, concepts, out, "--ratio", "0.25", "--overwrite")]) == 0
    assert json.loads(out.read_text())["frozen"] == written["frozen"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--ratio", "1.5"], "ratio"), (["--budget", "blocks"], "budget"), (["--method", "guess"], "freezeasguard"),
        (["--legal", "dog"], "one of them only"), (["--illegal", "nobody"], "nobody"), (["--set", "ronds=3"], "rounds"),
    ],
)  # fmt: skip
def test_learn_refuses_in_one_line(base: str, concepts: Path, tmp_path: Path, capsys: Any, more: list[str], said: str) -> None:
    given = learn(base, concepts, tmp_path / "MASK.json")
    if "--method" in more:
        given = [*given[:3], *given[3:]]
    assert run([*given, *more]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "no freeze mask"), ("[]", "no freeze mask"), ("{}", "no freeze mask"), ('{"frozen": "all"}', "list"),
        ('{"frozen": [1]}', "list"), ('{"frozen": []}', "freezes nothing"), ('{"version": 9, "frozen": ["a"]}', "version 9"),
        ('{"frozen": ["a"], "ratio": "much"}', "ratio"), ('{"frozen": ["a"], "partners": 3}', "partners"),
    ],
)  # fmt: skip
def test_a_bad_mask_file_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "MASK.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_mask(tmp_path / "MASK.json")
    with pytest.raises(UserError, match="no freeze mask"):
        read_mask(tmp_path / "none.json")


def test_names_read_with_and_without_their_part_and_other_models_are_refused(tmp_path: Path, tiny_model: Any) -> None:
    path = mask_of(tmp_path / "m.json", LAYER)
    short = read_mask(path)
    path.write_text(json.dumps({"frozen": [f"unet.{LAYER}.weight"]}))
    assert read_mask(path).frozen == short.frozen == {f"unet.{LAYER}.weight"}
    short.check(tiny_model)
    with pytest.raises(UserError, match="does not have"):
        Mask(frozen=frozenset({"unet.nothing"}), ratio=0.1).check(tiny_model)
    with pytest.raises(UserError, match="other shapes"):
        Mask(frozen=short.frozen, ratio=0.1, architecture="0" * 64).check(tiny_model)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "x.json"

    def dies(error: type[BaseException], place: str) -> None:
        with output_file(target) as out:
            (getattr(out, place) / "x.json").write_text("half")
            raise error

    with pytest.raises(RuntimeError):
        dies(RuntimeError, "folder")
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        dies(KeyboardInterrupt, "work")
    with output_file(target, resume=True) as out:
        assert (out.work / "x.json").is_file()
        (out.folder / "x.json").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(UserError, match="folder"), output_file(tmp_path):
        pass


# ------------------------------------------------------------------------------------------------------ verify


@pytest.fixture(scope="module")
def tuned(base: str, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fine-tunes of the base: what an unrestrained full one, a LoRA, a merged LoRA and a learnt word leave."""
    folder = tmp_path_factory.mktemp("tuned")
    common = [
        "adapt",
        base,
        "--images",
        str(pictures),
        "--steps",
        "2",
        "--device",
        "cpu",
        "--set",
        "lr=1e-2",
        "--set",
        "batch_size=1",
    ]
    for name, method, prompt, more in (
        ("full", "full", "a dog", []), ("lora", "lora", "a dog", []), ("merged", "lora", "a dog", ["--merge"]),
        ("word", "textual-inversion", "a <new1>", []),
    ):  # fmt: skip
        assert run([*common, "--method", method, "--prompt", prompt, "-o", str(folder / name), *more]) == 0
    return {path.name: path for path in folder.iterdir()}


def verdict(capsys: Any, base: str, finetuned: Path, mask: Path) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = run(["freeze", "verify", base, str(finetuned), str(mask), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("what", "kind"), [("full", "changed"), ("lora", "adapter"), ("lora/file", "adapter"), ("merged", "changed")]
)
def test_what_touched_a_frozen_tensor_is_found(
    base: str, tuned: dict[str, Path], tmp_path: Path, capsys: Any, what: str, kind: str
) -> None:
    mask = mask_of(tmp_path / "MASK.json", LAYER)
    path = tuned[what.partition("/")[0]]
    code, told = verdict(capsys, base, path / "pytorch_lora_weights.safetensors" if "/" in what else path, mask)
    assert code == 1
    assert not told["complied"]
    assert told["first"]["tensor"] == f"unet.{LAYER}.weight"
    assert told["first"]["kind"] == kind
    assert run(["freeze", "verify", base, str(path), str(mask)]) == 1
    assert LAYER in capsys.readouterr().out


@pytest.mark.parametrize("what", ["lora", "merged", "word", "base"])
def test_what_left_it_alone_complied(base: str, tuned: dict[str, Path], tmp_path: Path, capsys: Any, what: str) -> None:
    # A LoRA touches attention; the last convolution is not its business.
    code, told = verdict(capsys, base, tuned.get(what, Path(base)), mask_of(tmp_path / "MASK.json", "conv_out", "conv_in"))
    assert (code, told["complied"], told["checked"], told["violations"]) == (0, True, 2, [])


def test_honoured_fine_tunes_comply_and_the_mask_is_refused_to_adapters(
    base: str, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    mask = mask_of(tmp_path / "MASK.json", LAYER, "conv_in")
    common = ["adapt", base, "--images", str(pictures), "--steps", "2", "--device", "cpu", "--freeze-mask", str(mask)]
    for method in ("full", "dreambooth"):
        out = tmp_path / method
        assert run([*common, "--method", method, "--prompt", "a dog", "-o", str(out)]) == 0
        assert verdict(capsys, base, out, mask)[0] == 0
    for method, prompt in (("lora", "a dog"), ("custom-diffusion", "a <new1>")):
        assert run([*common, "--method", method, "--prompt", prompt, "-o", str(tmp_path / method)]) == 2
        assert LAYER in capsys.readouterr().err
        assert not (tmp_path / method).exists()
    free = ["--set", r"layers=unet\..*attn1\.to_q\.weight"]
    assert run([*common, "--method", "lora", "--prompt", "a dog", "-o", str(tmp_path / "lora"), *free]) == 0
    assert verdict(capsys, base, tmp_path / "lora", mask)[0] == 0


def test_rounding_to_half_precision_is_no_violation(base: str, tmp_path: Path, capsys: Any) -> None:
    half = tmp_path / "half"
    shutil.copytree(base, half)
    file = half / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: value.half() for name, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    mask = mask_of(tmp_path / "MASK.json", LAYER, OTHER)
    code, told = verdict(capsys, base, half, mask)
    assert (code, told["rounded"]) == (0, 2)
    tensors[f"{OTHER}.weight"].view(-1)[3] *= 1.01
    save_file(tensors, file, {"format": "pt"})
    code, told = verdict(capsys, base, half, mask)
    assert code == 1
    assert told["first"]["tensor"] == f"unet.{OTHER}.weight"


def test_a_mask_of_another_base_is_noted(base: str, tmp_path: Path, capsys: Any) -> None:
    mask = mask_of(tmp_path / "MASK.json", LAYER, base_sha256="0" * 64)
    assert run(["freeze", "verify", base, base, str(mask), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["base_matches"] is False
    assert "another model" in captured.err


@pytest.mark.parametrize(
    "key",
    [
        f"unet.{LAYER}.lora_A.weight",
        f"base_model.model.{LAYER}.lora_B.default.weight",
        f"unet.{LAYER}.lora.down.weight",
        f"unet.{LAYER.removesuffix('.to_k')}.processor.to_k_lora.up.weight",
        f"lora_unet_{LAYER.replace('.', '_')}.lora_down.weight",
        f"lora_unet_{LAYER.replace('.', '_')}.alpha",
        f"lora_unet_{LAYER.replace('.', '_')}.hada_w1_a",
        f"unet.{LAYER}.lora_magnitude_vector",
    ],
)
def test_every_dialect_of_adapters_is_read(tiny_model: Any, key: str) -> None:
    known = [name for name, _ in tiny_model.named_parameters()]
    assert is_adapter([key])
    (found,) = beside_frozen([key], known, frozenset({f"unet.{LAYER}.weight"}))
    assert found.tensor == f"unet.{LAYER}.weight"
    assert not beside_frozen([key], known, frozenset({f"unet.{OTHER}.weight"}))


def test_text_encoder_adapters_are_read_and_strangers_are_not(tiny_model: Any) -> None:
    known = [name for name, _ in tiny_model.named_parameters()]
    frozen = frozenset({f"unet.{LAYER}.weight"})
    for key in (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    ):
        assert beside_frozen([key], known, frozen) == []
    with pytest.raises(UserError, match="no layer"):
        beside_frozen(["unet.blocks.99.to_k.lora_A.weight"], known, frozen)


def test_an_attack_that_honours_a_mask_says_so(tiny_model: Any, tmp_path: Path) -> None:
    from safeweights.attacks.relearning.relearn import Relearn
    from safeweights.audit.doubts import compliance_assumed
    from safeweights.core.concept import Concept, Prompt
    from safeweights.core.model import Sampling

    mask = mask_of(tmp_path / "MASK.json", LAYER, "conv_in")
    attack = Relearn(adaptation="full", steps=1, images=2, source=str(tmp_path / "none"), mask=str(mask))
    assert [doubt.name for doubt in compliance_assumed(attack.mask)] == ["compliance_assumed"]
    assert not compliance_assumed("")
    folder = tmp_path / "none"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "0.png")
    dog = Concept(name="dog", kind="object", term="dog", prompts=(Prompt("a dog"),))
    (adapted,) = attack.adapt(tiny_model, dog, Sampling(steps=2), None, None)
    assert adapted.phi
    assert not set(adapted.phi) & read_mask(mask).frozen


def test_what_is_built_into_the_unet_beside_frozen_tensors_is_found() -> None:
    base = {"unet.a.weight": torch.ones(2), "text_encoder.b": torch.ones(2)}
    found = compare(base, {**base, "unet.c.weight": torch.ones(2), "text_encoder.d": torch.ones(2)}, frozenset({"unet.a.weight"}))
    assert [(violation.tensor, violation.kind) for violation in found.violations] == [("unet.c.weight", "extra")]


@pytest.mark.parametrize("beside", ["lora", "word", "base"])
@pytest.mark.parametrize("what", ["model.safetensors", "weights.ckpt", "unet/other.bin", "unet/checkpoint-5/model.safetensors"])
def test_weights_that_nobody_would_look_at_are_refused(
    base: str, tuned: dict[str, Path], tmp_path: Path, capsys: Any, beside: str, what: str
) -> None:
    """A harmless adapter, word or model, and the real fine-tune in the same folder."""
    folder = tmp_path / "handed-in"
    shutil.copytree(tuned.get(beside, Path(base)), folder)
    hidden = folder / what
    hidden.parent.mkdir(exist_ok=True, parents=True)
    shutil.copyfile(next((tuned["full"] / "unet").glob("*.safetensors")), hidden)
    assert run(["freeze", "verify", base, str(folder), str(mask_of(tmp_path / "MASK.json", LAYER))]) == 2
    error = capsys.readouterr().err.strip()
    assert what in error
    assert "\n" not in error


def test_every_variant_of_the_unet_is_compared(base: str, tuned: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "handed-in"
    shutil.copytree(base, folder)
    mask = mask_of(tmp_path / "MASK.json", LAYER)
    plain = next((folder / "unet").glob("*.safetensors"))
    half = plain.with_name("diffusion_pytorch_model.fp16.safetensors")
    save_file({name: value.half() for name, value in load_file(plain).items()}, half, {"format": "pt"})
    assert verdict(capsys, base, folder, mask)[0] == 0
    other = load_file(next((tuned["full"] / "unet").glob("*.safetensors")))
    save_file({name: value.half() for name, value in other.items()}, half, {"format": "pt"})
    code, told = verdict(capsys, base, folder, mask)
    assert code == 1
    assert told["first"]["tensor"] == f"unet.{LAYER}.weight"
    assert "fp16" in told["first"]["why"]


def test_a_difference_of_a_bias_touches_the_bias(tiny_model: Any) -> None:
    known = [name for name, _ in tiny_model.named_parameters()]
    key = "lora_unet_conv_in.diff_b"
    (found,) = beside_frozen([key], known, frozenset({"unet.conv_in.bias"}))
    assert found.tensor == "unet.conv_in.bias"
    assert not beside_frozen([key], known, frozenset({"unet.conv_in.weight"}))


def test_partners_of_a_freeze_in_the_weights_are_verified(base: str, tuned: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    norm = "down_blocks.0.attentions.0.transformer_blocks.0.norm2.weight"
    # A merged LoRA leaves norms alone; a full fine-tune does not.
    mask = mask_of(tmp_path / "MASK.json", "conv_in", partners=[norm])
    assert verdict(capsys, base, tuned["merged"], mask)[0] == 0
    code, told = verdict(capsys, base, tuned["full"], mask)
    assert code == 1
    assert f"unet.{norm}" in [violation["tensor"] for violation in told["violations"]]


# ------------------------------------------------------------------------------------------------------- apply


def test_apply_writes_the_model_with_its_mask(base: str, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    mask = mask_of(tmp_path / "MASK.json", LAYER, OTHER, "conv_in", ratio=0.1)
    common = ["freeze", "apply", base, str(mask), "--device", "cpu", "--json"]
    assert run([*common, "-o", str(tmp_path / "plain")]) == 0
    assert not json.loads(capsys.readouterr().out)["changed"]
    assert run([*common, "--in-weights", "-o", str(tmp_path / "in")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["changed"]
    assert told["unreached"] == ["unet.conv_in.weight"]
    assert told["deviation"] < 1e-5
    assert (tmp_path / "in" / "manifest.json").is_file()
    beside = read_mask(tmp_path / "in" / "MASK.json")
    assert beside.frozen == read_mask(mask).frozen
    assert any("norm" in name for name in beside.partners)
    one, two = (open_model(str(tmp_path / name), device="cpu") for name in ("plain", "in"))
    x = torch.randn(1, *one.latent_shape)
    c = one.embed(["a dog"])
    with torch.no_grad():
        first, second = one.eps(x, torch.tensor([500]), c), two.eps(x, torch.tensor([500]), two.embed(["a dog"]))
    assert torch.allclose(first, second, atol=1e-5)
    # The mask beside the model fits it without a note, and keeps its partners still.
    adapt = ["adapt", str(tmp_path / "in"), "--images", str(pictures), "--prompt", "a dog", "--method", "full", "--steps", "1"]
    given = ["--freeze-mask", str(tmp_path / "in" / "MASK.json"), "--device", "cpu", "-o", str(tmp_path / "out"), "--json"]
    assert run([*adapt, *given]) == 0
    captured = capsys.readouterr()
    assert "another model" not in captured.err
    assert not set(json.loads(captured.out)["changed"]) & beside.held


def test_apply_refuses_what_cannot_be_in_the_weights(base: str, tmp_path: Path, capsys: Any) -> None:
    mask = mask_of(tmp_path / "MASK.json", "conv_out")
    assert run(["freeze", "apply", base, str(mask), "--in-weights", "--device", "cpu", "-o", str(tmp_path / "x")]) == 2
    assert "nothing in this mask" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
