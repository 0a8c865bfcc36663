"""Masks as files and commands, pruning as a setting of every eraser, the revival of pruned weights, waking neurons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from safeweights.core.concept import Concept, Prompt
from safeweights.core.errors import UserError
from safeweights.core.mask import Mask
from safeweights.core.model import Sampling
from safeweights.core.table import ATTACKS, ERASERS, configure, describe, resolve
from safeweights.core.workspace import Workspace
from safeweights.diffusion.masks import make_mask, pruned_tensors
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parameters import select
from safeweights.erasure.pruning import standing_in
from safeweights.models.door import open_model
from safeweights.models.gaussian import GaussianModel
from safeweights.release.mask_files import apply, read_mask, read_owner, write_mask, write_owner

SMALL = {"steps": 2, "ramp": 1, "ddim_steps": 2, "trajectories": 2, "retained": 2, "noises": 2, "batch_size": 2}
PRUNE = {"prune": 0.01, "prune_steps": 2, "prune_ramp": 1, "prune_ddim_steps": 2}
CONCEPT = Concept(
    name="mosaic", kind="style", term="mosaic", anchor="a picture",
    prompts=(Prompt("a mosaic picture"), Prompt("mosaic house")),
    test_prompts=(Prompt("a mosaic boat"), Prompt("mosaic red cat")),
)  # fmt: skip
RETAIN = ["a picture of a boat"]


def protect(model: Any, name: str, workspace: Workspace | None = None, **settings: Any) -> Any:
    method = configure(resolve(ERASERS, name, "method"), settings)
    return method.protect(model, [CONCEPT], retain=RETAIN, rng=generator(0), workspace=workspace)


def run(*arguments: str) -> int:
    from safeweights.cli.main import run as cli

    return cli(arguments)


# budgets and settings


@pytest.mark.parametrize("name", ["p-esd", "p-ac"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"criterion": "snip"},
        {"criterion": "wanda"},
        {"criterion": "conceptprune"},
        {"control": "random"},
        {"optimizer": "adam"},
    ],
)
def test_exactly_the_budget_is_zero(tiny_model: Any, name: str, settings: dict[str, Any]) -> None:
    small = {key: value for key, value in SMALL.items() if name == "p-esd" or key != "trajectories"}
    protection = protect(tiny_model, name, **small, budget=0.004, **settings)
    before = dict(tiny_model.named_parameters())
    unet = sum(p.numel() for key, p in before.items() if key.startswith("unet."))
    assert protection.mask.count == round(0.004 * unet) == protection.cost["pruned"]
    changed = sum(int((protection.tensors[key] != before[key]).sum()) for key in protection.tensors)
    assert changed == protection.mask.count
    assert all((protection.tensors[key].flatten()[where] == 0).all() for key, where in protection.mask.indices.items())


def test_controls_have_the_same_density_and_move_as_far(tiny_model: Any) -> None:
    learned = protect(tiny_model, "p-esd", **SMALL)
    random = protect(tiny_model, "p-esd", **SMALL, control="random")
    assert {k: len(v) for k, v in random.mask.indices.items()} == {k: len(v) for k, v in learned.mask.indices.items()}
    assert any(not torch.equal(random.mask.indices[k], v) for k, v in learned.mask.indices.items())
    moved = protect(tiny_model, "p-esd", **SMALL, control="movement")
    before = dict(tiny_model.named_parameters())
    distance = sum(float((value - before[key]).double().square().sum()) for key, value in moved.tensors.items()) ** 0.5
    assert moved.mask is None
    assert distance == pytest.approx(learned.cost["moved"], rel=1e-4)
    other = protect(tiny_model, "p-esd", **SMALL, instead="dog")
    assert any(not torch.equal(other.mask.indices.get(k, v[:0]), v) for k, v in learned.mask.indices.items())


def test_impossible_settings_are_told(tiny_model: Any) -> None:
    cls = resolve(ERASERS, "p-esd", "method")
    for settings in ({"budget": 0.0}, {"budget": 1.0}, {"unit": "neuron", "criterion": "wanda"}, {"criterion": "magic"}):
        with pytest.raises(UserError):
            configure(cls, settings)
    with pytest.raises(UserError, match="lower it"):
        protect(tiny_model, "p-esd", **SMALL, budget=0.9)
    with pytest.raises(UserError, match="no weights of the UNet"):
        protect(tiny_model, "p-esd", **SMALL, parameters="text_encoder")
    with pytest.raises(UserError, match="linear layer"):
        protect(tiny_model, "p-esd", **SMALL, parameters="full", criterion="wanda")


# prune= on every eraser


PRUNERS = ("p-ac", "p-esd")


@pytest.mark.parametrize("name", [name for name in ERASERS if name not in PRUNERS])
def test_every_eraser_takes_prune(name: str) -> None:
    method = configure(resolve(ERASERS, name, "method"), PRUNE)
    settings = describe(method)
    assert method.name == name
    assert settings["prune"] == 0.01
    assert settings == {
        **describe(configure(resolve(ERASERS, name, "method"), {})),
        **{k: settings[k] for k in settings if "prune" in k},
    }
    json.dumps(settings)
    with pytest.raises(UserError, match=r"valid are .*prune"):
        configure(resolve(ERASERS, name, "method"), {"prun": 0.1})
    for bad in ({"prune": 1.5}, {"prune": "much"}, {"prune": 0.1, "prune_stpes": 3}):
        with pytest.raises(UserError):
            configure(resolve(ERASERS, name, "method"), bad)


@pytest.mark.parametrize("name", PRUNERS)
def test_a_pruner_is_not_pruned_twice(name: str) -> None:
    """Undoing would need both masks."""
    with pytest.raises(UserError, match="prunes by itself"):
        configure(resolve(ERASERS, name, "method"), PRUNE)


def test_no_attack_takes_prune() -> None:
    with pytest.raises(UserError, match="unknown setting"):
        configure(resolve(ATTACKS, "random", "attack"), {"prune": 0.1})


@pytest.mark.parametrize("name", ["uce", "esd"])
def test_pruning_an_eraser_zeroes_weights_of_what_it_made(tiny_model: Any, name: str) -> None:
    own = {"steps": 2, "ddim_steps": 2, "trajectories": 2} if name == "esd" else {}
    erased, pruned = protect(tiny_model, name, **own), protect(tiny_model, name, **own, **PRUNE)
    unet = sum(p.numel() for key, p in tiny_model.named_parameters() if key.startswith("unet."))
    assert pruned.mask.count == round(0.01 * unet) == pruned.cost["prune_pruned"]
    before = dict(erased.apply(tiny_model).named_parameters())
    for key, value in pruned.apply(tiny_model).named_parameters():
        where = torch.zeros(value.numel(), dtype=torch.bool)
        where[pruned.mask.indices.get(key, torch.zeros(0, dtype=torch.long))] = True
        assert not value.flatten()[where].any()
        assert torch.equal(value.flatten()[~where], before[key].flatten()[~where]), key


def test_a_pruned_eraser_goes_on_where_it_was_killed(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"steps": 3, "ddim_steps": 2, "trajectories": 2, **PRUNE, "prune_steps": 4}
    whole = protect(tiny_model, "esd", **settings)
    real, count = torch.Tensor.backward, 0

    def backward(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 6:
            raise MemoryError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(MemoryError):
        protect(tiny_model, "esd", Workspace(tmp_path, every=2), **settings)
    resumed = protect(tiny_model, "esd", Workspace(tmp_path, every=2), **settings)
    assert count == 6 + 2  # pruning's two steps after its checkpoint; erasing was done
    for key, value in whole.tensors.items():
        assert torch.equal(value, resumed.tensors[key])


# files


@pytest.fixture
def written(tiny_model: Any, tmp_path: Path) -> tuple[Path, Path, Mask]:
    names = [name for name, p in tiny_model.named_parameters() if "attn2.to_k" in name or "ff.net.2.weight" in name]
    weights = {name: p.detach() for name, p in tiny_model.named_parameters() if name in names}
    pruned = {name: torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.05 for name, w in weights.items()}
    mask = make_mask(weights, pruned)
    write_mask(tmp_path / "mask.safetensors", mask, weights, {"method": "p-esd", "concepts": ["mosaic"], "settings": {}})
    write_owner(tmp_path / "owner.safetensors", mask, weights)
    return tmp_path / "mask.safetensors", tmp_path / "owner.safetensors", mask


def test_files_hold_the_mask_and_only_the_owners_the_values(tiny_model: Any, written: Any) -> None:
    path, owner, mask = written
    file = read_mask(path)
    assert file.mask.values == {}
    assert set(file.mask.indices) == set(mask.indices)
    assert all(torch.equal(where, mask.indices[name]) for name, where in file.mask.indices.items())
    with safe_open(path, framework="pt") as raw:
        assert {raw.get_tensor(key).dtype for key in raw.keys()} <= {torch.uint8, torch.uint16}  # noqa: SIM118
    values = read_owner(owner, file).mask.values
    assert all(torch.equal(values[name], value) for name, value in mask.values.items())


def test_apply_undo_and_conceal_from_the_command_line(
    tiny_sd: Callable[..., Path], tiny_model: Any, written: Any, tmp_path: Path, capsys: Any
) -> None:
    mask, owner, _ = map(str, written)
    base, pruned, hidden, back = str(tiny_sd()), str(tmp_path / "on"), str(tmp_path / "hidden"), str(tmp_path / "off")
    before = dict(tiny_model.named_parameters())
    assert run("prune", "apply", base, mask, "-o", pruned, "--json") == 0
    assert json.loads(capsys.readouterr().out)["pruned"] == written[2].count
    on = dict(open_model(pruned, device="cpu").named_parameters())
    wanted = pruned_tensors(before, written[2])
    assert all(torch.equal(on[name], wanted.get(name, p)) for name, p in before.items())
    assert (tmp_path / "on" / "mask.safetensors").read_bytes() == Path(mask).read_bytes()
    assert run("prune", "conceal", pruned, mask, "-o", hidden, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["score"] for row in told["recovery"]} == {"small", "residual", "repeated", "rounded"}
    concealed = dict(open_model(hidden, device="cpu").named_parameters())
    for name, where in written[2].indices.items():
        assert (concealed[name].flatten()[where] != 0).all()
    assert not (tmp_path / "hidden" / "mask.safetensors").exists()
    for model in (pruned, hidden):
        assert run("prune", "undo", model, mask, owner, "-o", back, "--overwrite") == 0
        off = dict(open_model(back, device="cpu").named_parameters())
        assert all(torch.equal(off[name], p) for name, p in before.items())
    assert run("prune", "inspect", mask, "--model", pruned, "--json") == 0
    told = json.loads(capsys.readouterr().out.split("restored model")[-1].split("\n", 1)[-1])
    assert told["state"] == "pruned"
    assert told["recovery"][0]["auc"] == 1.0
    assert told["bytes"] == Path(mask).stat().st_size


def test_a_mask_of_another_model_is_refused(tiny_sd: Callable[..., Path], written: Any, tmp_path: Path, capsys: Any) -> None:
    mask, owner, out = str(written[0]), str(written[1]), str(tmp_path / "out")
    other = str(tiny_sd(seed=1))
    assert run("prune", "apply", other, mask, "-o", out) == 2
    assert "another model" in capsys.readouterr().err
    with pytest.raises(UserError, match="not there in this shape"):
        apply(GaussianModel(["dog"]), read_mask(mask))
    assert run("prune", "undo", other, mask, owner, "-o", out) == 2
    assert "cannot be restored" in capsys.readouterr().err
    assert run("prune", "conceal", str(tiny_sd()), mask, "-o", out) == 2
    assert "not pruned" in capsys.readouterr().err
    assert run("prune", "apply", str(tiny_sd()), mask, "-o", str(tmp_path / "on")) == 0
    assert run("prune", "apply", str(tmp_path / "on"), mask, "-o", out) == 2
    assert "already" in capsys.readouterr().err
    assert not Path(out).exists()


def test_noise_is_laid_only_where_the_mask_lies(tiny_sd: Callable[..., Path], written: Any, tmp_path: Path, capsys: Any) -> None:
    """On a model with other weights in these places it would overwrite what works."""
    assert run("prune", "conceal", str(tiny_sd(seed=1)), str(written[0]), "-o", str(tmp_path / "out")) == 2
    assert "not pruned by this mask" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_noise_has_a_key_that_no_released_file_tells(tiny_sd: Callable[..., Path], written: Any, tmp_path: Path) -> None:
    """Whoever could draw the same noise would know its places: two runs of one command and seed fill other values."""
    (tmp_path / "concepts.yaml").write_text(CONCEPTS)
    settings = [arg for key, value in {**SMALL, "conceal": "noise"}.items() for arg in ("--set", f"{key}={value}")]
    common = ["--concepts-file", str(tmp_path / "concepts.yaml"), "--concept", "mosaic", "--method", "p-esd", *settings]
    for name in ("a", "b"):
        assert run("erase", str(tiny_sd()), *common, "-o", str(tmp_path / name), "--owner", str(tmp_path / f"own-{name}")) == 0
    first, second = (dict(open_model(str(tmp_path / name), device="cpu").named_parameters()) for name in ("a", "b"))
    masks = [read_mask(tmp_path / f"own-{name}" / "mask.safetensors") for name in ("a", "b")]
    for name, where in masks[0].mask.indices.items():
        assert torch.equal(where, masks[1].mask.indices[name])
        assert not torch.equal(first[name].flatten()[where], second[name].flatten()[where])
    for name in ("a", "b"):
        key = str(read_mask(tmp_path / f"own-{name}" / "mask.safetensors").mask.seed)
        assert all(key not in path.read_text() for path in (tmp_path / name).rglob("*.json"))


def test_a_mask_says_in_which_precision_it_was_made(
    tiny_sd: Callable[..., Path], tiny_model: Any, written: Any, tmp_path: Path, capsys: Any
) -> None:
    mask, owner, _ = map(str, written)
    assert run("prune", "apply", str(tiny_sd()), mask, "-o", str(tmp_path / "on")) == 0
    capsys.readouterr()
    assert run("prune", "undo", str(tmp_path / "on"), mask, owner, "-o", str(tmp_path / "off"), "--dtype", "bfloat16") == 2
    assert "add --dtype float32" in capsys.readouterr().err


def test_a_budget_that_holds_no_neuron_is_refused(tiny_model: Any) -> None:
    with pytest.raises(UserError, match="no whole neuron"):
        protect(tiny_model, "p-esd", **SMALL, unit="neuron", budget=1e-6)


def test_another_word_stands_for_whole_words_only(tiny_model: Any) -> None:
    concept = Concept(name="art", kind="style", term="art", anchor="", prompts=(Prompt("Art of a party"), Prompt("a party")))
    (standing,) = standing_in([concept], "umbrella")
    assert standing.texts == ("umbrella of a party",)
    with pytest.raises(UserError, match="no prompt"):
        standing_in([Concept(name="art", kind="style", term="art", anchor="", prompts=(Prompt("a party"),))], "umbrella")


def test_broken_files_are_refused_in_one_line(written: Any, tmp_path: Path) -> None:
    path, owner, mask = written
    with safe_open(path, framework="pt") as raw:
        tensors, metadata = {key: raw.get_tensor(key) for key in raw.keys()}, raw.metadata()  # noqa: SIM118
    name = next(iter(tensors))
    header = json.loads(metadata["mask"])
    broken = tmp_path / "broken.safetensors"

    def save(tensors: dict[str, Any], **changes: Any) -> None:
        save_file(tensors, broken, {**metadata, "mask": json.dumps({**header, **changes})})

    for what in (
        lambda: broken.write_bytes(path.read_bytes()[:-20]),
        lambda: broken.write_bytes(b"no safetensors"),
        lambda: save_file(tensors, broken),
        lambda: save_file(tensors, broken, {**metadata, "mask": "{"}),
        lambda: save(tensors, shapes=[1]),
        lambda: save(tensors, fill="stars"),
        lambda: save({**tensors, name: torch.tensor([10**7])}),
        lambda: save({**tensors, name: torch.tensor([-1])}),
        lambda: save({**tensors, name: torch.tensor([3, 3])}),
        lambda: save({**tensors, name: torch.tensor([0.5])}),
        lambda: save({key: value for key, value in tensors.items() if key != name}),
        lambda: broken.unlink(),
    ):
        what()
        with pytest.raises(UserError):
            read_mask(broken)
    with pytest.raises(UserError, match="no mask"):
        read_mask(tmp_path / "owner.safetensors")
    file = read_mask(path)
    with pytest.raises(UserError, match="no owner"):
        read_owner(path, file)
    save_file({key: value[:-1].contiguous() for key, value in mask.values.items()}, broken, {**_metadata(owner)})
    with pytest.raises(UserError, match="does not belong"):
        read_owner(broken, file)


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as raw:
        return dict(raw.metadata())


CONCEPTS = """
version: 1
concepts:
  mosaic: {kind: style, term: mosaic, anchor: a picture, prompts: [a mosaic picture, mosaic house]}
retain: {prompts: [a picture of a boat]}
"""


@pytest.mark.parametrize("conceal", ["none", "noise"])
def test_erasing_leaves_the_mask_and_for_the_owner_what_undoes_it(
    tiny_sd: Callable[..., Path], tiny_model: Any, tmp_path: Path, conceal: str
) -> None:
    (tmp_path / "concepts.yaml").write_text(CONCEPTS)
    base, out, owner = str(tiny_sd()), tmp_path / "out", tmp_path / "owner"
    settings = [arg for key, value in {**SMALL, "conceal": conceal}.items() for arg in ("--set", f"{key}={value}")]
    common = ["--concepts-file", str(tmp_path / "concepts.yaml"), "--concept", "mosaic"]
    assert run("erase", base, *common, "--method", "p-esd", *settings, "-o", str(out), "--owner", str(owner)) == 0
    # Where noise hides the places, a mask in the released folder would show them.
    assert (out / "mask.safetensors").exists() == (conceal == "none")
    assert (
        run(
            "prune",
            "undo",
            str(out),
            str(owner / "mask.safetensors"),
            str(owner / "owner.safetensors"),
            "-o",
            str(tmp_path / "b"),
        )
        == 0
    )
    back = dict(open_model(str(tmp_path / "b"), device="cpu").named_parameters())
    assert all(torch.equal(back[name], p) for name, p in tiny_model.named_parameters())
    assert run("prune", "apply", base, str(owner / "mask.safetensors"), "-o", str(tmp_path / "c")) == 0
    again, first = (dict(open_model(str(path), device="cpu").named_parameters()) for path in (tmp_path / "c", out))
    assert all(torch.equal(again[name], p) for name, p in first.items())


def test_the_owners_files_are_never_lost(tiny_sd: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "concepts.yaml").write_text(CONCEPTS)
    settings = [arg for key, value in SMALL.items() for arg in ("--set", f"{key}={value}")]
    common = ["--concepts-file", str(tmp_path / "concepts.yaml"), "--concept", "mosaic", "--method", "p-esd", *settings]
    out, kept = tmp_path / "out", tmp_path / "kept"
    for owner in (out, out / "owner", tmp_path):
        assert run("erase", str(tiny_sd()), *common, "-o", str(out), "--owner", str(owner)) == 2
        assert "lie in one another" in capsys.readouterr().err
    kept.mkdir()
    (kept / "owner.safetensors").write_text("another model's")
    assert run("erase", str(tiny_sd()), *common, "-o", str(out), "--owner", str(kept), "--resume") == 2
    assert "not empty" in capsys.readouterr().err
    assert (kept / "owner.safetensors").read_text() == "another model's"
    assert not out.exists()


def test_a_run_killed_after_it_wrote_the_owners_files_goes_on(
    tiny_sd: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "concepts.yaml").write_text(CONCEPTS)
    settings = [arg for key, value in SMALL.items() for arg in ("--set", f"{key}={value}")]
    common = ["--concepts-file", str(tmp_path / "concepts.yaml"), "--concept", "mosaic", "--method", "p-esd", *settings]
    command = ["erase", str(tiny_sd()), *common, "-o", str(tmp_path / "out"), "--owner", str(tmp_path / "kept")]

    def killed(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("safeweights.cli.protect.write_manifest", killed)
        assert run(*command) != 0
    before = (tmp_path / "kept" / "owner.safetensors").read_bytes()
    assert run(*command) == 2  # without --resume it is somebody's folder
    assert run(*command, "--resume") == 0
    assert (tmp_path / "kept" / "owner.safetensors").read_bytes() == before


def test_owner_needs_a_method_that_prunes(tiny_sd: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "concepts.yaml").write_text(CONCEPTS)
    arguments = ["--concepts-file", str(tmp_path / "concepts.yaml"), "--concept", "mosaic", "-o", str(tmp_path / "out")]
    assert run("erase", str(tiny_sd()), *arguments, "--method", "uce", "--owner", str(tmp_path / "owner")) == 2
    assert "prune=" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "owner").exists()


# revival


def test_revival_fills_zeros_and_nothing_else(tiny_model: Any, written: Any) -> None:
    attack = configure(resolve(ATTACKS, "mask-revival", "attack"), {"iterations": 3})
    tensors = pruned_tensors(dict(tiny_model.named_parameters()), written[2])
    model = tiny_model.with_tensors(tensors)
    guesses = attack.guess(model)
    assert set(guesses) == set(tensors)
    for strength in (0.0, 0.5):
        for name, value in attack.fill(model, guesses, strength).items():
            where = torch.zeros(value.numel(), dtype=torch.bool)
            where[written[2].indices[name]] = True
            assert torch.equal(value.flatten()[~where], tensors[name].flatten()[~where])
            filled = (value.flatten()[where] != 0).double().mean()
            assert filled > 0.95 if strength == 0 else filled == pytest.approx(0.6, abs=0.1)
            largest = tensors[name].abs().amax(1, keepdim=True).expand(value.shape).flatten()[where]
            if strength:
                hit = value.flatten()[where] != 0
                assert torch.allclose(value.flatten()[where][hit].abs(), strength * largest[hit])


@pytest.mark.parametrize("naturally", [0, 1])
def test_revival_without_zeros_guesses_the_places(tiny_model: Any, naturally: int) -> None:
    """A weight that happens to be zero does not say where a filled model was pruned."""
    attack = configure(resolve(ATTACKS, "mask-revival", "attack"), {"iterations": 2, "suspected": 0.02})
    weight = next(iter(select(tiny_model.named_parameters(), "xattn_kv")))
    value = dict(tiny_model.named_parameters())[weight].detach().clone()
    value.view(-1)[:naturally] = 0
    for missing, _ in attack.guess(tiny_model.with_tensors({weight: value})).values():
        assert int(missing.sum()) == max(1, round(0.02 * missing.numel()))


# neurons


def test_an_attack_that_chooses_noise_wakes_no_neurons(tiny_model: Any) -> None:
    from safeweights.audit.sensitivity import under_attack
    from safeweights.core.attack import Original, Target

    attack = configure(resolve(ATTACKS, "seed-search", "attack"), {"images": 2})
    targets = [Target("a mosaic boat", 0)]
    with pytest.raises(UserError, match="chooses noise"):
        under_attack(
            attack, tiny_model, CONCEPT, targets, sampling=Sampling(width=16, height=16, steps=2),
            original=Original(tiny_model, lambda n: torch.zeros(n, 3, 16, 16)),
        )  # fmt: skip


def test_sensitivity_of_the_reference_itself_is_one_and_of_a_deaf_model_zero(tiny_model: Any) -> None:
    """Asked plainly, the unprotected model does all it did; a model with zero value matrices does nothing with the text."""
    from safeweights.audit.audit import Names
    from safeweights.audit.sensitivity import locate_neurons, sensitivity

    sampling = Sampling(width=16, height=16, steps=2, guidance_scale=2.0)
    located = locate_neurons(tiny_model, CONCEPT, sampling=sampling, n=6, q=0.3)
    assert located.concept
    attack = configure(resolve(ATTACKS, "soft-prompt", "attack"), {"images": 2, "steps": 2, "tokens": 1, "noises": 1})
    silent = {
        name: torch.zeros_like(p) for name, p in tiny_model.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name
    }
    rho = {}
    for name, model in (("same", tiny_model), ("deaf", tiny_model.with_tensors(silent))):
        record = sensitivity(
            model, tiny_model, CONCEPT, attack, located, names=Names(model=name, reference="tiny"), sampling=sampling, n=3
        )
        json.dumps(record.to_json())
        rows = record.details["reactivation"]
        assert [(row["condition"], row["neurons"]) for row in rows] == [
            (condition, kind) for condition in ("plain", "paraphrased", "soft-prompt") for kind in ("concept", "control")
        ]
        rho[name] = {row["condition"]: row["rho"] for row in rows if row["neurons"] == "concept"}
        slopes = [row for row in record.details["slope"] if row["neurons"] == "concept"]
        assert [row["condition"] for row in slopes] == ["plain", "paraphrased", "soft-prompt"]
        assert all(row["kappa"] == (pytest.approx(row["reference"]) if name == "same" else 0.0) for row in slopes)
        assert {plot["kind"] for plot in record.details["plots"]} == {"heatmap", "bars"}
    assert rho["same"]["plain"] == pytest.approx(1, abs=0.05)
    assert all(value == pytest.approx(0, abs=1e-6) for value in rho["deaf"].values())
