"""On a model whose every prompt is a known Gaussian, the shared mathematics and the erasers have known answers."""

from __future__ import annotations

import pytest
import torch

from safeweights.core.concept import Concept, Prompt
from safeweights.core.model import Sampling
from safeweights.core.table import method
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import ddim_timesteps, sample_latents, trajectory
from safeweights.models.gaussian import GaussianModel


@pytest.fixture
def model() -> GaussianModel:
    return GaussianModel(["mosaic", "red", "house"], size=2, deviation=0.3)


def noise(model: GaussianModel, n: int) -> torch.Tensor:
    return torch.randn((n, *model.latent_shape), generator=torch.Generator().manual_seed(0))


def start(model: GaussianModel, prompt: str, steps: int) -> torch.Tensor:
    """x_T as the prompt's own forward process leaves it: SD's levels stop short of pure noise."""
    t = int(ddim_timesteps(model, steps)[0])
    spread = (model.alpha[t] ** 2 * 0.09 + model.sigma[t] ** 2).sqrt()
    return model.alpha[t] * model.mean(prompt) + spread * noise(model, 4000)


def test_eps_is_the_conditional_expectation(model: GaussianModel) -> None:
    """E[eps | x_t] by linear regression over many draws equals the formula."""
    t = torch.tensor([300])
    x_0 = model.mean("red house") + 0.3 * noise(model, 200_000)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    x_t = model.alpha[300] * x_0 + model.sigma[300] * eps
    x, y = x_t[:, 0, 0, 0], eps[:, 0, 0, 0]
    slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var()
    at = model.mean("red house")[None] * model.alpha[300]
    assert torch.allclose(model.eps(at, t, model.embed(["red house"])), torch.zeros_like(at), atol=1e-5)
    step = model.eps(at + 1, t, model.embed(["red house"]))[0, 0, 0, 0]
    assert float(step) == pytest.approx(float(slope), abs=0.01)


def test_ddim_draws_the_prompts_gaussian(model: GaussianModel) -> None:
    sampling = Sampling(steps=500, guidance_scale=1.0)
    x_0 = sample_latents(model, model.embed(["red house"]), start(model, "red house", 500), sampling)
    assert torch.allclose(x_0.mean(0), model.mean("red house"), atol=0.02)
    assert torch.allclose(x_0.std(0), torch.full_like(x_0[0], 0.3), atol=0.02)


def test_guidance_moves_the_mean(model: GaussianModel) -> None:
    """All prompts share one variance, so guidance s samples the Gaussian at s mu_c."""
    x_0 = sample_latents(model, model.embed(["house"]), noise(model, 4000), Sampling(steps=200, guidance_scale=3.0))
    assert torch.allclose(x_0.mean(0), 3 * model.mean("house"), atol=0.05)


def test_trajectories_have_the_variance_of_their_timestep(model: GaussianModel) -> None:
    x_T = start(model, "house", 200)
    run = trajectory(model, model.embed(["house"]), x_T, Sampling(steps=200, guidance_scale=1.0))
    for n in (0, 50, 100, 199):
        t = int(run.t[n])
        expected = (model.alpha[t] ** 2 * 0.09 + model.sigma[t] ** 2).sqrt()
        assert run.x[n].std(0).mean() == pytest.approx(float(expected), rel=0.03)


def test_the_empty_prompt_has_mean_zero(model: GaussianModel) -> None:
    assert model.mean("").abs().max() == 0
    assert (model.mean("mosaic house") - model.mean("mosaic") - model.mean("house")).abs().max() < 1e-6


def concept() -> Concept:
    return Concept(name="mosaic", kind="style", prompts=(Prompt("mosaic"),), term="mosaic")


def test_esd_reaches_its_target(model: GaussianModel) -> None:
    """eps_none - eta (eps_c - eps_none) with eta = 1 is the prediction of the Gaussian at -mu_c: the closed form of eq. 7."""
    assert model.mean("mosaic").norm() > 0.5  # the concept was there
    eraser = method("esd", steps=400, lr=0.02, batch_size=16, trajectories=16, ddim_steps=10, parameters="xattn", eta=1.0)
    protected = eraser.protect(model, [concept()], rng=generator(0)).apply(model)
    assert torch.allclose(protected.mean("mosaic"), -model.mean("mosaic"), atol=0.03)


def test_uce_sends_the_concept_to_its_anchor(model: GaussianModel) -> None:
    """With a one-hot encoder the edit of to_v moves one column, at lam -> 0 to the anchor's: an empty anchor has mean zero."""
    eraser = method("uce", lam=1e-6, tokens="last")
    protection = eraser.protect(model, [concept()], retain=["red house"], rng=generator(0))
    protected = protection.apply(model)
    assert torch.allclose(protected.mean("mosaic"), torch.zeros(model.latent_shape), atol=1e-3)
    assert torch.allclose(protected.mean("red house"), model.mean("red house"), atol=1e-3)
