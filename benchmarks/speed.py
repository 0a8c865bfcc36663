"""What the algorithms cost beside the bare model calls they need, measured in one run.

    python benchmarks/speed.py [--model sandbox] [--repeats 5]

Prints JSON: the time of an ESD step over the time of its one student pass (forward, loss, backward) on the same batch,
and the time of an UnlearnDiffAtk search on P prompts in one batch against one prompt at a time. Medians over interleaved repeats.
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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=16)
    options = parser.parse_args()
    model = open_model(options.model, device="cpu")
    (concept,) = sandbox_concepts().pick(["mosaic"])
    print(
        json.dumps(
            {
                "esd": esd(model, concept, options),
                "unlearndiffatk": attack(model, concept, options),
                "threads": torch.get_num_threads(),
            },
            indent=1,
        )
    )


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
    """Seconds of gradient steps on P prompts in one batch against one prompt after the other."""
    rng = torch.Generator().manual_seed(0)
    targets = [
        Target(p.text, i, torch.rand(3, 64, 64, generator=rng)) for i, p in enumerate(concept.test_prompts[: options.prompts])
    ]
    settings = UnlearnDiffAtk(batch_size=options.prompts)
    steps = max(2, options.steps // 5)

    def together() -> None:
        search = _Search(settings, model, targets)
        for _ in range(steps):
            search.step(500)

    def alone() -> None:
        for target in targets:
            search = _Search(settings, model, [target])
            for _ in range(steps):
                search.step(500)

    together(), alone()
    pairs = [(timed(together), timed(alone)) for _ in range(options.repeats)]
    return {
        "prompts": options.prompts,
        "batch_ms_per_prompt_step": 1e3 * statistics.median(t for t, _ in pairs) / steps / options.prompts,
        "alone_ms_per_prompt_step": 1e3 * statistics.median(a for _, a in pairs) / steps / options.prompts,
        "times_faster": statistics.median(a / t for t, a in pairs),
    }


def _no_workspace() -> object:
    from safeweights.core.workspace import Workspace

    return Workspace()


if __name__ == "__main__":
    main()
