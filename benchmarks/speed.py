"""What the algorithms cost beside the bare model calls they need, measured in one run.

    python benchmarks/speed.py [--only esd|unlearndiffatk] [--model sandbox] [--device cpu] [--repeats 3] …

Prints JSON: the time of an ESD step over the time of its one student pass (forward, loss, backward) on the same batch,
and the time of an UnlearnDiffAtk gradient step on P prompts in one batch against one prompt after the other. Medians over
interleaved repeats. A search counts ``--attack-steps`` gradient steps at one timestep, as many as a stage of the attack has;
what it needs once (listing the words, encoding the pictures) is counted apart. Measure on an idle machine: with more threads
than free cores the small operations of one prompt wait for each other, which flatters the batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from safeweights.attacks.adversarial.unlearndiffatk import UnlearnDiffAtk, _Search
from safeweights.core.attack import Target
from safeweights.core.table import ERASERS, configure, resolve
from safeweights.diffusion.noise import generator
from safeweights.models.door import open_model
from safeweights.sandbox.files import sandbox_concepts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sandbox")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=["esd", "unlearndiffatk"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="ESD steps")
    parser.add_argument("--attack-steps", type=int, default=40, help="gradient steps of a search")
    parser.add_argument("--prompts", type=int, default=16, help="prompts searched in one batch")
    parser.add_argument("--noises", type=int, default=UnlearnDiffAtk.noises, help="noise draws a gradient step averages over")
    options = parser.parse_args()
    model = open_model(options.model, device=options.device)
    (concept,) = sandbox_concepts().pick(["mosaic"])
    parts = {"esd": esd, "unlearndiffatk": attack}
    result = {name: part(model, concept, options) for name, part in parts.items() if options.only in (None, name)}
    print(json.dumps({**result, "threads": torch.get_num_threads(), "device": str(model.device)}, indent=1))


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def esd(model, concept, options) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Seconds of ``steps`` ESD steps (bank drawn beforehand) against as many bare student passes."""
    cls = resolve(ERASERS, "esd", "method")
    bank = configure(cls, {"steps": 1}, latent_pixels=256)._bank(model, concept, 0, _no_workspace())
    student = model.fork("xattn")
    batch = bank.draw(8, generator(0))
    c = model.embed(["a mosaic picture"]).repeat(8).detach()

    def bare() -> None:
        for _ in range(options.steps):
            for parameter in student.trainable().values():
                parameter.grad = None
            student.eps(batch.x_t, batch.t, c).square().mean().backward()

    class Prepared(cls):  # type: ignore[misc,valid-type]
        """The method with its bank at hand, so that only the steps are timed."""

        def _bank(self, *args: object) -> object:
            return bank

    method = Prepared(steps=options.steps, batch_size=8)

    def whole() -> None:
        method.protect(model, [concept], rng=generator(0))

    bare(), whole()
    pairs = [(timed(bare), timed(whole)) for _ in range(options.repeats)]
    return {
        "bare_ms_per_step": 1e3 * statistics.median(b for b, _ in pairs) / options.steps,
        "step_ms": 1e3 * statistics.median(w for _, w in pairs) / options.steps,
        "ratio": statistics.median(w / b for b, w in pairs),
    }


def attack(model, concept, options) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Seconds of gradient steps on P prompts in one batch against one prompt after the other, and of setting the searches up."""
    rng = torch.Generator().manual_seed(0)
    side = model.latent_shape[1] * model.latent_stride
    chosen = concept.test_prompts[: options.prompts]
    targets = [Target(p.text, i, torch.rand(3, side, side, generator=rng)) for i, p in enumerate(chosen)]
    settings = UnlearnDiffAtk(batch_size=len(targets), noises=options.noises)

    def run(groups: list[list[Target]], steps: int) -> tuple[float, float]:
        """Seconds of setting up and of stepping one search for each group of targets."""
        setup = stepping = 0.0
        for group in groups:
            started = time.perf_counter()
            search = _Search(settings, model, group)
            ready = time.perf_counter()
            for _ in range(steps):
                search.step(1)
            setup, stepping = setup + ready - started, stepping + time.perf_counter() - ready
        return setup, stepping

    together, alone = [targets], [[target] for target in targets]
    run(together, 2), run(alone, 2)
    pairs = [(run(together, options.attack_steps), run(alone, options.attack_steps)) for _ in range(options.repeats)]
    share = 1e3 / len(targets)
    return {
        "prompts": len(targets),
        "noises": options.noises,
        "steps": options.attack_steps,
        "batch_ms_per_prompt_step": share * statistics.median(t for (_, t), _ in pairs) / options.attack_steps,
        "alone_ms_per_prompt_step": share * statistics.median(a for _, (_, a) in pairs) / options.attack_steps,
        "times_faster": statistics.median(a / t for (_, t), (_, a) in pairs),
        "batch_setup_ms_per_prompt": share * statistics.median(t for (t, _), _ in pairs),
        "alone_setup_ms_per_prompt": share * statistics.median(a for _, (a, _) in pairs),
    }


def _no_workspace() -> object:
    from safeweights.core.workspace import Workspace

    return Workspace()


if __name__ == "__main__":
    main()
