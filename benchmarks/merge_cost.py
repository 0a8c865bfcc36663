"""What the merge costs in a training step of MIMA, and what differentiating the users' step costs beside not doing so.

    python benchmarks/merge_cost.py [--concepts mosaic neon stripes] [--steps 5]

Medians on one thread, in processor seconds. The merge is timed by itself, forward and backward, on the tensors of such a step;
its projectors are fitted once a run. The last line is the merge alone on the keys and values of a UNet of SD 1.x's size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from safeweights.core.table import method
from safeweights.core.workspace import Workspace
from safeweights.diffusion.merging import Merge
from safeweights.immunization.bilevel import Game
from safeweights.models.door import open_model
from safeweights.sandbox.files import sandbox_concepts

SD = [(width, 768) for width, blocks in ((320, 5), (640, 5), (1280, 6)) for _ in range(2 * blocks)]
"""Shapes of the keys and values of cross-attention of SD 1.x."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=["mosaic", "neon", "stripes"])
    parser.add_argument("--adaptation", default="lora", choices=["lora", "full"])
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    file, model = sandbox_concepts(), open_model("sandbox", device="cpu")
    print("| what | seconds | share of the step |\n|---|---|---|")
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for order in (1, 2):
            made = method(
                "mima", order=order, adaptations=(options.adaptation,), pictures=4, retained=4, ddim_steps=4, keep=1.0, benign=0.0
            )
            game = Game(made, model, file.pick(options.concepts), file.retain, 0, Workspace(Path(folder)))
            step = seconds[order] = timed(lambda at, game=game: game.loss_at(at).backward(), options.steps)
            share = timed(lambda at, game=game: merged(game), options.steps)
            print(
                f"| step, order {order} | {step:.3f} | |\n| its merge, forward and backward | {share:.4f} | {share / step:.1%} |"
            )
        began = time.process_time()
        Game(made, model, file.pick(options.concepts), file.retain, 0, Workspace(Path(folder)))
        print(f"| projectors, pictures and all else that is done once | {time.process_time() - began:.3f} | |")
    print(f"| order 2 / order 1 | {seconds[2] / seconds[1]:.2f} | |")
    features = [torch.randn(8, 768) for _ in options.concepts]
    began = time.process_time()
    merge = Merge.fit(features, torch.randn(2000, 768))
    fitted = time.process_time() - began
    weights = [torch.randn(shape, requires_grad=True) for shape in SD]

    def large(at: int) -> None:
        torch.stack([merge(W, [W + 0] * len(features)).sum() for W in weights]).sum().backward()

    print(f"| SD 1.x: fitting the projectors, once | {fitted:.3f} | |")
    print(f"| SD 1.x: the merge of {len(SD)} matrices, forward and backward | {timed(large, 2):.3f} | |")


def merged(game: Game) -> None:
    """The merge of one step alone: every user's tuned weights joined, and the gradient of their sum back to the weights."""
    assert game.merge is not None
    episode = game.episode(0)
    base = dict(game.student.named_parameters())
    names = set(game.tuned(game.start(0, episode), episode))
    parts = [{name: base[name] + 0 for name in names} for _ in game.users]
    out = game.merge.tensors(base, parts, game.keys_and_values)
    torch.stack([value.sum() for value in out.values()]).sum().backward()


def timed(run: Callable[[int], Any], times: int) -> float:
    """The median processor seconds of a run, the first left out."""
    spent = []
    for at in range(times + 1):
        began = time.process_time()
        run(at)
        spent.append(time.process_time() - began)
    return statistics.median(spent[1:])


if __name__ == "__main__":
    main()
