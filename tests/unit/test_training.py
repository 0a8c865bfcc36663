"""The descent loop: equal to Adam written out, resumed exactly, honest about divergence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from safeweights.core.errors import UserError
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import generator
from safeweights.diffusion.training import descend


def fresh() -> dict[str, nn.Parameter]:
    return {"a/b": nn.Parameter(torch.ones(3)), "c": nn.Parameter(torch.full((2, 2), 2.0))}


def loss_of(parameters: dict[str, nn.Parameter], stop_at: int = -1) -> object:
    def loss_at(step: int) -> Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        noise = torch.randn(3, generator=generator(0, step))
        return (parameters["a/b"] - noise).square().sum() + parameters["c"].square().sum()

    return loss_at


def test_adam_by_hand() -> None:
    parameters = {"x": nn.Parameter(torch.tensor([1.0]))}
    descend(parameters, lambda step: parameters["x"].square().sum(), steps=3, lr=0.1)
    x, first, second = 1.0, 0.0, 0.0
    for step in range(1, 4):
        g = 2 * x
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        x -= 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)) ** 0.5 + 1e-8)
    assert parameters["x"].item() == pytest.approx(x, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("killed_at", [4, 7])
def test_resuming_ends_with_the_same_tensors(tmp_path: Path, optimizer: str, killed_at: int) -> None:
    undisturbed = fresh()
    options = {"steps": 10, "lr": 0.05, "weight_decay": 0.01, "optimizer": optimizer}
    losses = descend(undisturbed, loss_of(undisturbed), **options)
    workspace = Workspace(tmp_path, every=3)
    broken = fresh()
    with pytest.raises(KeyboardInterrupt):
        descend(broken, loss_of(broken, stop_at=killed_at), workspace=workspace, **options)
    resumed = fresh()
    seen: list[int] = []

    def counted(step: int) -> Tensor:
        seen.append(step)
        return loss_of(resumed)(step)

    assert descend(resumed, counted, workspace=workspace, **options) == losses
    assert seen == list(range(killed_at, 10))
    for name in undisturbed:
        assert torch.equal(resumed[name], undisturbed[name])
    # A finished run is not repeated, another one does not start from it.
    seen.clear()
    finished = fresh()
    assert descend(finished, counted, workspace=workspace, **options) == losses
    assert seen == []
    assert torch.equal(finished["c"], undisturbed["c"])
    other = fresh()
    assert descend(other, loss_of(other), workspace=workspace, **{**options, "lr": 0.01}) != losses


def test_other_facts_start_afresh(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for concept in ("dog", "cat"):
        parameters, seen = fresh(), []

        def counted(step: int, parameters: dict[str, nn.Parameter] = parameters, seen: list[int] = seen) -> Tensor:
            seen.append(step)
            return loss_of(parameters)(step)

        descend(parameters, counted, steps=2, lr=0.1, workspace=workspace, facts={"concept": concept})
        assert seen == [0, 1]


def test_diverging_names_the_step_and_the_rate() -> None:
    parameters = fresh()

    def loss_at(step: int) -> Tensor:
        return parameters["c"].sum() * (float("inf") if step == 2 else 1.0)

    with pytest.raises(UserError, match=r"erasing: the loss is inf at step 2; set a lower lr \(it is 0.1\)"):
        descend(parameters, loss_at, steps=5, lr=0.1, description="erasing")


def test_a_gradient_that_is_not_finite_is_told() -> None:
    parameters = {"x": nn.Parameter(torch.zeros(1))}
    with pytest.raises(UserError, match="gradient is not finite at step 0"):
        descend(parameters, lambda step: parameters["x"].sqrt().sum(), steps=1, lr=0.1)


def test_gradients_may_be_masked() -> None:
    parameters = fresh()

    def mask(step: int) -> None:
        parameters["c"].grad[0] = 0

    descend(parameters, loss_of(parameters), steps=3, lr=0.1, gradients=mask)
    assert torch.equal(parameters["c"][0], torch.full((2,), 2.0))
    assert not torch.equal(parameters["c"][1], torch.full((2,), 2.0))


def test_a_damaged_checkpoint_is_told_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, resumed = fresh(), fresh()
    descend(whole, loss_of(whole), steps=4, lr=0.1)
    descend(resumed, loss_of(resumed), steps=4, lr=0.1, workspace=Workspace(tmp_path))
    (found,) = tmp_path.glob("*.safetensors")
    found.write_bytes(found.read_bytes()[:40])
    again = fresh()
    descend(again, loss_of(again), steps=4, lr=0.1, workspace=Workspace(tmp_path))
    assert "cannot be read" in capsys.readouterr().err
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
