"""``safeweights leakage`` and ``adapt --dp-epsilon`` as users call them, on a tiny model with tiny encoders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_leakage_parts import Colours, random_lora, trust

from safeweights.cli.main import run
from safeweights.core.workspace import Workspace
from safeweights.leakage import keys
from safeweights.leakage.controls import Arm
from safeweights.leakage.factory import Plan
from safeweights.leakage.metrics import retrieval
from safeweights.leakage.train import Encoders, Judged, train
from safeweights.records.store import gather


class Brightness:
    """An embedder that sees the mean colour and how even it is."""

    sha256 = "0" * 64

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean((2, 3)), images.flatten(2).std(2), images[:, :, :4].mean((2, 3))], 1)


@pytest.fixture(scope="module")
def encoders(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    plan = Plan(train=10, val=0, test=4, twins=0, nulls=6, images=(2,), steps=(2,), checkpoints=(1,), rank=2)
    judge: Any = Brightness()
    found, _, judged = train(
        tiny_model,
        Colours(),
        plan,
        judge,
        embedder_name="none",
        generator_steps=2,
        pictures_each=2,
        drawing_steps=2,
        also=("tokens", "vnae"),
        also_steps=2,
        workspace=Workspace(folder / "w"),
    )
    # The generator also learns from people without adapters, and from nobody who judges it.
    taught = Workspace(folder / "w").load("taught")
    assert taught is not None
    spare = taught[1]["spare"]
    assert spare == list(range(14, len(Colours())))
    assert (len(taught[0]["x_0"]), len(taught[0]["features"])) == (2 * (10 + len(spare)), len(spare))
    assert {known.encoder for known in found.trusts} == {"functional", "gram", "spectrum", "tokens", "vnae"}
    assert all(arm.found.rank == 0.5 for arm in judged["functional"].direct_arms if arm.name == "prior mean")
    # Both paths have their controls, and the false alarms are known by kind of null.
    assert {arm.name for arm in judged["functional"].drawn_arms} < {arm.name for arm in judged["functional"].direct_arms}
    matched = "same spectrum, random directions"
    for known in found.trusts:
        assert set(known.controls) == set(known.direct_controls or {})
        assert (matched in known.controls) == (known.encoder != "spectrum")
        assert known.null_kinds is not None
        assert {kind: n for kind, (_, n) in known.null_kinds.items()} == {"null-pixels": 2, "null-samples": 2, "null-stripes": 2}
        assert known.flagged_nulls[1] == 6
    found.save(folder / "out")
    again = Encoders.load(folder / "out")
    item = [random_lora(tiny_model)]
    for name in found.names:
        assert torch.allclose(again.predict(name, tiny_model, item), found.predict(name, tiny_model, item), atol=1e-2), name
    assert again.trusts == found.trusts
    # Encoders trained by descent are kept whole, and read adapters of other ranks and layers.
    layers = list(item[0])
    odd = [{name: (torch.cat([a, a]), torch.cat([b, b], 1) / 2) for name, (a, b) in item[0].items()}]
    fewer = [{layers[0]: item[0][layers[0]]}]
    for name in ("tokens", "vnae"):
        for asked in (item, odd, fewer):
            assert torch.equal(again.predict(name, tiny_model, asked), found.predict(name, tiny_model, asked)), name
        assert not torch.allclose(found.predict(name, tiny_model, fewer), found.predict(name, tiny_model, item))
        arms = {arm.name: arm.found for arm in judged[name].direct_arms}
        assert {"permuted pairs", "nearest training identity", "norms made equal"} <= set(arms)
        assert arms["permuted pairs"].ranks != judged[name].direct.ranks
    return folder / "out"


@pytest.fixture
def lora(tiny_model: Any, tmp_path: Path) -> Path:
    keys.write(random_lora(tiny_model), tmp_path / "mine.safetensors", layout="kohya")
    return tmp_path / "mine.safetensors"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 40, 200)).save(folder / f"{i}.png")
    return folder


def said(capsys: Any, *arguments: Any) -> tuple[int, dict[str, Any]]:
    code = run([str(item) for item in arguments])
    out = capsys.readouterr().out
    return code, json.loads(out) if out.strip() else {}


def test_an_audit_without_encoders_says_what_it_needs(
    tiny_sd: Callable[..., Path], lora: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    code, data = said(
        capsys, "leakage", "audit", lora, "--base", tiny_sd(), "--images", pictures, "--prompt", "a dog", "--pool", 8,
        "--device", "cpu", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert data["verdict"] in ("leaks images", "not shown")
    assert code == (0 if data["verdict"] == "not shown" else 1)
    assert "leakage train" in data["power"]
    names = [entry["name"] for entry in data["measurements"]]
    assert {"rank", "update_norm", "training_images", "membership_auc", "membership_tpr_at_1pct_fpr"} <= set(names)
    assert data["files"][0]["rank"] == 2
    record = gather(tmp_path / "out")[0]
    assert record.kind == "leakage"
    assert {plot["kind"] for plot in record.details["plots"]} == {"line", "bars"}
    assert data["verdict"] in (tmp_path / "out" / "report.html").read_text()


def test_an_audit_with_encoders_asks_them(
    tiny_sd: Callable[..., Path], lora: Path, encoders: Path, tmp_path: Path, capsys: Any
) -> None:
    code, data = said(
        capsys, "leakage", "audit", lora, lora, "--base", tiny_sd(), "--encoders", encoders, "--device", "cpu",
        "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == (0 if data["verdict"] == "not shown" else 1)
    assert {len(values) for values in data["answers"].values()} == {2}
    assert set(data["answers"]) == {"spectrum", "gram", "functional", "tokens", "vnae"}
    assert len(gather(tmp_path / "out")[0].artefacts) == 8


def test_a_header_that_names_people_is_told_and_is_no_verdict(
    tiny_model: Any, tiny_sd: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    told = {"ss_tag_frequency": json.dumps({"10_jane doe": {"jane doe": 12}}), "ss_output_dir": "/home/bob/loras"}
    keys.write(random_lora(tiny_model), tmp_path / "x.safetensors", metadata=told)
    arguments = ["leakage", "audit", tmp_path / "x.safetensors", "--base", tiny_sd(), "--device", "cpu"]
    code, data = said(capsys, *arguments, "-o", tmp_path / "out", "--json")
    assert (code, data["verdict"]) == (0, "not shown")
    assert "jane doe" in data["warnings"][0]
    assert "jane doe" not in data["why"]
    assert "its header does" in data["why"]
    assert next(entry["value"] for entry in data["measurements"] if entry["name"] == "header_entries_that_tell") == 2
    assert run([str(item) for item in (*arguments, "-o", tmp_path / "again")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("not shown")
    assert lines[1].startswith("warning: the header of")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{missing}", "--base", "{base}"], "does not exist"),
        (["{lora}", "--base", "{base}", "--non-members", "{pictures}"], "--images"),
        (["{lora}", "--base", "{base}", "--encoders", "{pictures}"], "holds no encoders"),
        (["{pictures}", "--base", "{base}"], "holds no LoRA"),
        (["{lora}", "--base", "{base}", "--images", "{pictures}", "--non-members", "{pictures}"], "are one folder"),
        (["{lora}", "--base", "{base}", "--images", "{empty}"], "holds no pictures"),
        (["{lora}", "--base", "{base}", "--images", "{broken}"], "2.png cannot be read"),
        (["{huge}", "--base", "{base}", "--images", "{pictures}", "--pool", "8"], "not finite with this LoRA"),
        (["{huge}", "--base", "{base}", "--encoders", "{encoders}"], "not finite with this LoRA"),
        (["{lora}", "--base", "{base}", "--encoders", "{damaged}"], "train them again"),
        (["{pickle}", "--base", "{base}"], "pickle"),
    ],
)
def test_bad_audits_end_with_one_line(
    tiny_sd: Callable[..., Path], tiny_model: Any, lora: Path, pictures: Path, encoders: Path, tmp_path: Path, capsys: Any,
    arguments: list[str], says: str,
) -> None:  # fmt: skip
    words = {name: tmp_path / name for name in ("empty", "broken", "damaged", "huge", "pickle.bin")}
    words |= {"missing": tmp_path / "no.safetensors", "lora": lora, "base": tiny_sd(), "pictures": pictures, "encoders": encoders}
    for name in ("empty", "huge"):
        words[name].mkdir()
    shutil.copytree(pictures, words["broken"])
    (words["broken"] / "2.png").write_bytes((pictures / "2.png").read_bytes()[:40])
    shutil.copytree(encoders, words["damaged"])
    (words["damaged"] / "space.safetensors").write_bytes(b"nothing")
    huge = {name: (a, b * 1e30) for name, (a, b) in random_lora(tiny_model).items()}
    keys.write(huge, words["huge"] / "x.safetensors")
    words["pickle"] = words.pop("pickle.bin")
    words["pickle"].write_bytes(b"PK")
    given = [item.format(**words) for item in arguments]
    assert run(["leakage", "audit", *given, "--device", "cpu", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_lora_written_anew_is_the_same_update_without_its_header(
    tiny_sd: Callable[..., Path], tiny_model: Any, tmp_path: Path, capsys: Any
) -> None:
    factors = random_lora(tiny_model)
    convolution = next(
        name for name, value in tiny_model.named_parameters() if name.startswith("unet.") and name.endswith(".conv1.weight")
    )
    width = dict(tiny_model.named_parameters())[convolution].shape
    factors[convolution] = torch.randn(2, width[1:].numel()), torch.randn(width[0], 2) * 0.1
    shapes = {name: tuple(value.shape) for name, value in tiny_model.named_parameters()}
    for layout, name in (("peft", "pytorch_lora_weights.safetensors"), ("kohya", "lora.safetensors")):
        keys.write(factors, tmp_path / "mine.safetensors", layout=layout, metadata={"ss_comment": "Jane"}, shapes=shapes)
        out = tmp_path / layout
        given = "leakage", "defend", tmp_path / "mine.safetensors", "--base", tiny_sd(), "--json", "-o", out
        code, data = said(capsys, *given)
        assert (code, data["header_entries_dropped"]) == (0, ["ss_comment"])
        assert data["moved"] < 1e-4
        again = keys.read(out / name, tiny_model)
        assert again.metadata == {"format": "pt"}
        for layer, (a, b) in factors.items():
            c, d = again.factors[layer]
            assert torch.allclose(d @ c, b @ a, atol=1e-4)
            assert not torch.allclose(c, a, atol=1e-3)
        # diffusers reads kernels beside convolutions as such.
        kernel = [value for key, value in load_file(out / name).items() if "conv1" in key and "alpha" not in key]
        assert sorted(tuple(value.shape) for value in kernel) == sorted([(2, *width[1:]), (width[0], 2, 1, 1)])
    for extra, low, high in ((("--rank", 1), 0.1, 1.0), (("--bits", 8), 1e-4, 0.05), (("--noise", 0.1), 0.05, 0.5)):
        code, data = said(capsys, *given, "--overwrite", *extra)
        assert code == 0
        assert low < data["moved"] < high, extra
    # Noise that anybody could make again hides nothing.
    noisy = [keys.read(out / "lora.safetensors", tiny_model).factors]
    assert said(capsys, *given, "--overwrite", "--noise", 0.1)[0] == 0
    noisy.append(keys.read(out / "lora.safetensors", tiny_model).factors)
    assert not torch.equal(noisy[0][convolution][0], noisy[1][convolution][0])
    assert run([*map(str, given[:-1]), str(tmp_path / "s"), "--seed", "1"]) == 2
    assert "--seed is that of --noise" in capsys.readouterr().err
    held = (out / "lora.safetensors").read_bytes()
    for value in ("1e39", "inf", "nan", "-1"):
        assert run([*map(str, given), "--overwrite", "--noise", value]) == 2, value
    assert (out / "lora.safetensors").read_bytes() == held


def test_train_for_another_base_says_what_it_needs(tiny_sd: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    assert run(["leakage", "train", "--base", str(tiny_sd()), "-o", str(tmp_path / "out")]) == 2
    assert "--images DIR" in capsys.readouterr().err
    assert run(["leakage", "train", "--base", "sandbox", "--also", "tokens", "--also", "gan", "-o", str(tmp_path / "out")]) == 2
    assert "unknown encoder 'gan'; besides the closed forms there are tokens, vnae" in capsys.readouterr().err
    assert run(["leakage", "train", "--base", "sandbox", "--prompt", "no slot", "-o", str(tmp_path / "out")]) == 2
    assert "{}" in capsys.readouterr().err
    given = ["--images", str(tmp_path), "--embedder", "none"]
    assert run(["leakage", "train", "--base", "sandbox", "--null-images", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "goes with --images" in capsys.readouterr().err
    assert run(["leakage", "train", "--base", "sandbox", *given, "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert run(["leakage", "train", "--base", "sandbox", "--adapters", "3000", "-o", str(tmp_path / "out")]) == 2
    assert "smaller --adapters" in capsys.readouterr().err


def test_the_encoders_hold_the_whole_command(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Every option of `leakage train` that decides its result stands in encoders.json, also where its default was taken."""
    from types import SimpleNamespace

    import safeweights.leakage.train as module

    facts: dict[str, Any] = {}

    found = retrieval(torch.eye(4), range(4), permutations=10)
    arm = Arm("prior mean", found, "chance")
    judged = Judged("functional", found, found, (arm,), (arm,), torch.zeros(0), torch.zeros(0))

    def instead(*_: Any, **__: Any) -> Any:
        trusts = [trust(), trust(encoder="spectrum")]
        return SimpleNamespace(facts=facts, trusts=trusts, save=lambda folder: None), None, {"functional": judged}

    monkeypatch.setattr(module, "train", instead)
    code, data = said(
        capsys, "leakage", "train", "--base", "sandbox", "--tests", 30, "--device", "cpu", "-o", tmp_path / "out", "--json"
    )
    assert code == 0
    assert data["encoders"]["functional"]["passed"]
    assert "norms" in data["encoders"]["spectrum"]["doubt"]
    assert data["controls"]["functional"]["generator"] == {"prior mean": 1.0}
    command = facts["command"]
    assert command[:3] == ["safeweights", "leakage", "train"]
    for name, value in (
        ("--base", "sandbox"), ("--adapters", "300"), ("--tests", "30"), ("--nulls", "100"), ("--steps", "40"),
        ("--generator-steps", "800"), ("--together", "16"), ("--seed", "0"), ("--prompt", "a picture of a {} person"),
    ):  # fmt: skip
        assert command[command.index(name) + 1] == value
    assert not {"--json", "--resume", "--overwrite"} & set(command)
    assert "--embedder" not in command  # the sandbox's own: no path of this machine
    # Given again as it stands, it is the same command.
    assert run([*command[1:], "--overwrite"]) == 0
    assert facts["command"] == command
    assert "not trusted: spectrum" in capsys.readouterr().out


def test_a_private_lora_states_what_it_cost(tiny_sd: Callable[..., Path], pictures: Path, tmp_path: Path, capsys: Any) -> None:
    common = ["--images", pictures, "--prompt", "a dog", "--device", "cpu", "--json"]
    code, data = said(
        capsys, "adapt", tiny_sd(), "--method", "lora", "--steps", 3, "--dp-epsilon", 5, "-o", tmp_path / "dp", *common
    )
    assert code == 0
    assert 4.5 < data["cost"]["dp_epsilon"] <= 5
    from safeweights.leakage.dp import spent

    cost = data["cost"]
    again = spent(sigma=cost["dp_sigma"], rate=cost["dp_rate"], steps=cost["steps"], delta=cost["dp_delta"])
    assert again == pytest.approx(cost["dp_epsilon"])
    assert (tmp_path / "dp" / "pytorch_lora_weights.safetensors").is_file()
    # Nothing that is a function of the pictures and was not accounted for: no loss, no hash of them.
    assert "loss" not in cost
    written = json.loads((tmp_path / "dp" / "manifest.json").read_text())
    assert set(written["inputs"]) == {"model"}
    # One step that nobody may join is a run as well.
    few = ["--steps", 1, "--set", "batch_size=1", "--dp-epsilon", 5]
    assert said(capsys, "adapt", tiny_sd(), "--method", "lora", *few, "-o", tmp_path / "one", *common)[0] == 0
    for method in ("full", "dreambooth", "textual-inversion"):
        assert (
            run([str(x) for x in ("adapt", tiny_sd(), "--method", method, "--dp-epsilon", 5, "-o", tmp_path / "no", *common)])
            == 2
        )
        assert "--method lora" in capsys.readouterr().err
    for wrong, why in (
        (["--dp-epsilon", 0], "above zero"), (["--dp-epsilon", "nan"], "above zero"), (["--dp-epsilon", 1e-9], "larger epsilon"),
        (["--dp-epsilon", 5, "--dp-clip", "inf"], "finite number above zero"),
        (["--dp-epsilon", 5, "--dp-delta", 1], "between 0 and 1"),
        (["--dp-epsilon", 5, "--class-prompt", "a dog"], "leave it out"),
    ):  # fmt: skip
        given = ("adapt", tiny_sd(), "--method", "lora", *wrong, "-o", tmp_path / "no", *common)
        assert run([str(x) for x in given]) == 2
        error = capsys.readouterr().err
        assert why in error
        assert error.count("\n") == 1
    assert not (tmp_path / "no").exists()
