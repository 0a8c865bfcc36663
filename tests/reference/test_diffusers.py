"""Our formulas against diffusers and transformers, step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights.core.errors import UserError
from safeweights.core.model import Sampling
from safeweights.diffusion.noise import add_noise, eps_to_v, generator, initial_noise, predict_x0, v_to_eps
from safeweights.diffusion.sampling import (
    candidates_of,
    ddim_step,
    ddim_timesteps,
    generate,
    guided,
    sample,
    sample_latents,
    trajectory,
)
from safeweights.models.door import open_model

SMALL = Sampling(width=16, height=16, steps=8, guidance_scale=3.0)


def some(model: Any, batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((batch, *model.latent_shape), generator=torch.Generator().manual_seed(seed))


def test_noising(tiny_model: Any) -> None:
    x_0, eps, t = some(tiny_model, 4), some(tiny_model, 4, 1), torch.tensor([0, 1, 500, 999])
    expected = tiny_model.scheduler.add_noise(x_0, eps, t)
    assert torch.allclose(add_noise(tiny_model, x_0, t, eps), expected, atol=1e-6)
    assert torch.allclose(predict_x0(tiny_model, expected, t, eps)[:3], x_0[:3], atol=1e-4)


def test_v_conversion(tiny_model: Any) -> None:
    x_0, eps, t = some(tiny_model, 3), some(tiny_model, 3, 1), torch.tensor([5, 500, 900])
    x_t = add_noise(tiny_model, x_0, t, eps)
    v = tiny_model.scheduler.get_velocity(x_0, eps, t)
    assert torch.allclose(v_to_eps(tiny_model, v, x_t, t), eps, atol=1e-5)
    assert torch.allclose(eps_to_v(tiny_model, eps, x_t, t), v, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 50, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_timesteps(tiny_model: Any, steps: int, spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMScheduler

    from safeweights.core.model import Grid

    if spacing == "linspace" and steps == 1:
        pytest.skip("one point is no line")
    scheduler = DDIMScheduler.from_config(tiny_model.scheduler.config, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    monkeypatch.setattr(tiny_model, "grid", Grid(spacing, 1, tiny_model.grid.final_alpha))
    assert ddim_timesteps(tiny_model, steps).tolist() == scheduler.timesteps.tolist()


def test_steps_out_of_range(tiny_model: Any) -> None:
    for steps in (0, 1001):
        with pytest.raises(UserError, match="from 1 to 1000"):
            ddim_timesteps(tiny_model, steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_step_by_step(tiny_sd: Callable[..., Path], prediction: str) -> None:
    """Diffusers is fed the raw network output, we our noise prediction: the states must agree for both kinds of model."""
    from diffusers import DDIMScheduler

    model: Any = open_model(tiny_sd(version="2.1", prediction=prediction), device="cpu")
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(10)
    c, x = model.embed(["a red house", "a dog"]), some(model, 2)
    timesteps = ddim_timesteps(model, 10).tolist()
    theirs = x
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        rows = torch.full((2,), t)
        with torch.no_grad():
            raw = model.denoiser(theirs, rows, encoder_hidden_states=c.states).sample
            theirs = scheduler.step(raw, t, theirs).prev_sample
            x = ddim_step(model, x, t, t_next, model.eps(x, rows, c))
        assert torch.allclose(x, theirs, atol=2e-5), t


def test_trajectory_is_exact(tiny_model: Any) -> None:
    """x[n] at t[n]: asking the model there gives the stored predictions, and stepping on gives x[n + 1]."""
    c, x_T = tiny_model.embed(["a red house", "a dog"]), some(tiny_model, 2)
    run = trajectory(tiny_model, c, x_T, SMALL)
    assert torch.equal(run.x[0], x_T)
    assert run.t.tolist() == ddim_timesteps(tiny_model, 8).tolist()
    none = tiny_model.embed([""])
    for n in range(7):
        with torch.no_grad():
            rows = run.t[n].expand(2)
            assert torch.allclose(tiny_model.eps(run.x[n], rows, none), run.eps_none[n], atol=1e-5)
            assert torch.allclose(tiny_model.eps(run.x[n], rows, c), run.eps_c[n], atol=1e-5)
            eps = guided(tiny_model, run.x[n], rows, c, none, 3.0)
        following = ddim_step(tiny_model, run.x[n], int(run.t[n]), int(run.t[n + 1]), eps)
        assert torch.allclose(following, run.x[n + 1], atol=1e-5)


def test_guidance(tiny_model: Any) -> None:
    c, none, x = tiny_model.embed(["a red house"]), tiny_model.embed([""]), some(tiny_model, 2)
    t = torch.tensor([500, 20])
    with torch.no_grad():
        eps_0, eps_c = tiny_model.eps(x, t, none), tiny_model.eps(x, t, c)
        assert torch.allclose(guided(tiny_model, x, t, c, none, 7.5), eps_0 + 7.5 * (eps_c - eps_0), atol=1e-4)
        before = tiny_model.calls.eps
        assert torch.equal(guided(tiny_model, x, t, c, None, 1.0), eps_c)
        assert tiny_model.calls.eps - before == 2


def test_initial_noise_is_the_seed_of_a_pipeline(tiny_model: Any) -> None:
    torch.manual_seed(7)
    assert torch.equal(initial_noise(tiny_model, 7, SMALL), torch.randn(1, 4, 8, 8))
    assert initial_noise(tiny_model, 7, Sampling(width=32, height=16)).shape == (1, 4, 8, 16)
    with pytest.raises(UserError, match="multiples of 2"):
        initial_noise(tiny_model, 7, Sampling(width=17, height=16))


def test_generator_depends_on_every_seed() -> None:
    draws = {torch.rand((), generator=generator(*seeds)).item() for seeds in [(0,), (0, 1), ("0", 1), (1, 0), (0, "esd", 1)]}
    assert len(draws) == 5
    assert torch.equal(torch.rand(3, generator=generator(4, "a")), torch.rand(3, generator=generator(4, "a")))


@pytest.mark.parametrize("version", ["1.5", "2.1"])
def test_embed_tokens_equals_the_stock_forward(tiny_sd: Callable[..., Path], version: str) -> None:
    model: Any = open_model(tiny_sd(version=version), device="cpu")
    ids = model.tokenize(["a photo of nudity", ""])
    free = model.vocabulary[ids].clone().requires_grad_()
    stock = model.text_encoder(ids).last_hidden_state
    c = model.embed_tokens(free, ids)
    assert torch.equal(c.states, stock)
    assert torch.equal(c.states, model.embed(["a photo of nudity", ""]).states)
    # Causal: what stands at position 3 moves positions 3 and later only.
    (gradient,) = torch.autograd.grad(c.states[0, 3].square().sum(), free)
    assert gradient[0, :4].abs().sum(-1).min() > 0
    assert gradient[0, 4:].abs().max() == 0
    assert gradient[1].abs().max() == 0
    # The hook is gone: token ids count again.
    assert torch.equal(model.embed(["a dog"]).states, model.text_encoder(model.tokenize(["a dog"])).last_hidden_state)


def pipeline_picture(folder: Path, scheduler: str | None, guidance: float, prompt: str, seed: int) -> torch.Tensor:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    out = pipeline(
        prompt, width=16, height=16, num_inference_steps=8, guidance_scale=guidance, output_type="np",
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return torch.tensor(out.images[0]).permute(2, 0, 1)


@pytest.mark.parametrize(("version", "prediction"), [("1.5", "epsilon"), ("2.1", "v_prediction")])
def test_a_saved_model_draws_the_same_picture_in_a_plain_pipeline(
    tiny_sd: Callable[..., Path], tmp_path: Path, version: str, prediction: str
) -> None:
    model: Any = open_model(tiny_sd(version=version, prediction=prediction), device="cpu")
    student = model.fork("xattn")
    with torch.no_grad():
        for parameter in student.trainable().values():
            parameter.mul_(1.2)
    edited = model.with_tensors(student.edited())
    edited.save(tmp_path / "edited")
    mine = generate(edited, candidates_of(["a red house"], [5]), SMALL)[0]
    theirs = pipeline_picture(tmp_path / "edited", None, 3.0, "a red house", 5)
    assert torch.allclose(mine, theirs, atol=2e-5)
    assert not torch.allclose(mine, generate(model, candidates_of(["a red house"], [5]), SMALL)[0], atol=1e-2)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("lms", "LMSDiscreteScheduler"),
        ("dpm", "DPMSolverMultistepScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("pndm", "PNDMScheduler"),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_other_schedulers_draw_the_pictures_of_a_pipeline(
    tiny_sd: Callable[..., Path], name: str, scheduler: str, prediction: str
) -> None:
    if name == "lms":
        pytest.importorskip("scipy")
    if (name, prediction) == ("pndm", "v_prediction"):
        pytest.skip("PNDM extrapolates past noise predictions (Liu et al., eq. 12), diffusers past v: two methods")
    folder = tiny_sd(version="2.1", prediction=prediction)
    model: Any = open_model(folder, device="cpu")
    sampling = Sampling(width=16, height=16, steps=8, guidance_scale=3.0, scheduler=name)
    mine = generate(model, candidates_of(["a blue boat"], [3]), sampling)[0]
    # A pipeline turns the v of both passes into guidance, we the eps of both: the same thing, rounded differently.
    assert torch.allclose(mine, pipeline_picture(folder, scheduler, 3.0, "a blue boat", 3), atol=2e-4)


def test_fractional_timesteps_of_v_models(tiny_sd: Callable[..., Path]) -> None:
    """Samplers on a linspace grid ask between two training timesteps."""
    import diffusers

    folder = tiny_sd(version="2.1", prediction="v_prediction")
    model: Any = open_model(folder, device="cpu")
    x_T, c = initial_noise(model, 3), model.embed(["a blue boat"])
    theirs = diffusers.EulerDiscreteScheduler.from_config(model.scheduler.config, timestep_spacing="linspace")
    model.scheduler = diffusers.DDIMScheduler.from_config(model.scheduler.config, timestep_spacing="linspace")
    mine = sample_latents(model, c, x_T, Sampling(steps=7, guidance_scale=1.0, scheduler="euler"))
    theirs.set_timesteps(7)
    assert any(float(t) % 1 for t in theirs.timesteps)
    x = x_T * theirs.init_noise_sigma
    for t in theirs.timesteps:
        with torch.no_grad():
            v = model.denoiser(theirs.scale_model_input(x, t), t, encoder_hidden_states=c.states).sample
        x = theirs.step(v, t, x).prev_sample
    assert torch.allclose(mine, x, atol=1e-3)


def test_generate_takes_states_and_latents_and_embeds_once(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    plain = candidates_of(["a dog", "a dog", "a red house"], [1, 2, 1])
    asked: list[str] = []
    embed = type(tiny_model).embed

    def counting(self: Any, prompts: Any) -> Any:
        asked.extend(prompts)
        return embed(self, prompts)

    monkeypatch.setattr(type(tiny_model), "embed", counting)
    pictures = generate(tiny_model, plain, SMALL)
    assert sorted(asked) == ["", "a dog", "a red house"]
    assert pictures.shape == (3, 3, 16, 16)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    free = [
        replace(plain[0], prompt="ignored", states=tiny_model.embed(["a red house"]).states[0]),
        replace(plain[1], latents=initial_noise(tiny_model, 1)[0]),
    ]
    again = generate(tiny_model, free, SMALL)
    assert torch.allclose(again[0], pictures[2], atol=1e-5)
    assert torch.allclose(again[1], pictures[0], atol=1e-5)


def test_batches_of_any_size_draw_the_same(tiny_model: Any) -> None:
    c = tiny_model.embed(["a dog", "a red house", "a boat"])
    whole = sample(tiny_model, c, [1, 2, 3], SMALL)
    assert torch.allclose(sample(tiny_model, c, [1, 2, 3], SMALL, batch_size=2), whole, atol=1e-5)


def test_pictures_to_latents_and_back(tiny_model: Any) -> None:
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        x_0 = tiny_model.encode(images)
        expected = tiny_model.vae.encode(images * 2 - 1).latent_dist.mode() * tiny_model.vae.config.scaling_factor
    assert torch.equal(x_0, expected)
    assert x_0.shape == (2, 4, 8, 8)
    assert tiny_model.decode(x_0).shape == images.shape
