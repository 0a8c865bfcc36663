"""Banks hold exact pairs, draw evenly and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights.core.model import Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.latent_bank import Batch, LatentBank, fingerprint
from safeweights.diffusion.noise import add_noise, generator

SAMPLING = Sampling(steps=5, guidance_scale=3.0)
PROMPTS = ["a dog", "a red house"]


def draw(model: Any, **options: Any) -> LatentBank:
    return LatentBank.sample(model, PROMPTS, n=4, sampling=SAMPLING, rng=generator(0), **options)


def same(one: LatentBank, other: LatentBank) -> bool:
    return torch.equal(one.x, other.x) and torch.equal(one.t, other.t) and torch.equal(one.prompt, other.prompt)


def test_pairs_are_exact(tiny_model: Any) -> None:
    """The stored predictions are those the model gives for the stored (x_t, t) under the stored prompt."""
    bank = draw(tiny_model, batch_size=3)
    assert len(bank) == 4 * 5
    batch = bank.draw(12, generator(1))
    assert set(batch.t.tolist()) <= {801, 601, 401, 201, 1}
    with torch.no_grad():
        eps_c = tiny_model.eps(batch.x_t, batch.t, tiny_model.embed(PROMPTS)[batch.prompt])
        eps_none = tiny_model.eps(batch.x_t, batch.t, tiny_model.embed([""]))
    assert torch.allclose(batch.eps_c, eps_c, atol=1e-5)
    assert torch.allclose(batch.eps_none, eps_none, atol=1e-5)


def test_draws_are_even_and_repeatable(tiny_model: Any) -> None:
    bank = draw(tiny_model)
    many = bank.draw(6000, generator(2))
    assert torch.bincount(many.prompt).float().div(6000).sub(0.5).abs().max() < 0.03
    assert torch.stack([(many.t == t).float().mean() for t in bank.t.unique()]).sub(0.2).abs().max() < 0.03
    assert torch.equal(bank.draw(5, generator(3)).rows, bank.draw(5, generator(3)).rows)
    assert set(bank.draw(20, generator(4), prompt_index=1).prompt.tolist()) == {1}
    with pytest.raises(IndexError, match="no latents of prompt 7"):
        bank.draw(1, generator(4), prompt_index=7)


def test_resumes_from_what_was_drawn(tiny_model: Any, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first = draw(tiny_model, workspace=workspace, batch_size=2)
    before = tiny_model.calls.eps
    assert same(draw(tiny_model, workspace=workspace, batch_size=2), first)
    assert tiny_model.calls.eps == before
    (tmp_path / "bank-2.safetensors").unlink()
    assert same(draw(tiny_model, workspace=workspace, batch_size=2), first)
    assert tiny_model.calls.eps == before + 2 * 2 * 5
    assert same(draw(tiny_model, batch_size=2), first)


def test_another_model_or_seed_does_not_find_the_old_bank(tiny_model: Any, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first = draw(tiny_model, workspace=workspace)
    name = "unet.conv_in.weight"
    other = tiny_model.with_tensors({name: dict(tiny_model.named_parameters())[name] * 1.1})
    assert fingerprint(other) != fingerprint(tiny_model)
    assert not same(draw(other, workspace=workspace), first)
    again = LatentBank.sample(tiny_model, PROMPTS, n=4, sampling=SAMPLING, rng=generator(1), workspace=workspace)
    assert not same(again, first)


def test_runs_per_prompt(tiny_model: Any) -> None:
    bank = LatentBank.draw_from(tiny_model, PROMPTS, n=1, sampling=SAMPLING, rng=generator(0))
    assert torch.bincount(bank.prompt).tolist() == [5, 5]


def test_outputs_are_kept_row_by_row(tiny_model: Any) -> None:
    bank = draw(tiny_model)

    def teacher(batch: Batch) -> torch.Tensor:
        return batch.x_t * batch.t.view(-1, 1, 1, 1)

    bank.precompute("teacher", teacher, batch_size=7)
    batch = bank.draw(9, generator(5))
    assert torch.equal(batch.outputs["teacher"], teacher(batch))


def test_noised_pictures(tiny_model: Any) -> None:
    images = torch.rand(3, 3, 16, 16)
    bank = LatentBank.from_images(tiny_model, images, ["a dog", "a cat", "a dog"], n=10, rng=generator(0))
    assert bank.prompts == ("a dog", "a cat")
    assert len(bank) == 30
    # One timestep in every tenth of the range, for every picture.
    assert sorted((bank.t[:10] // 100).tolist()) == list(range(10))
    x_0 = tiny_model.encode(images).repeat_interleave(10, dim=0)
    assert torch.allclose(add_noise(tiny_model, x_0, bank.t, bank.outputs["eps"]), bank.x, atol=1e-5)
