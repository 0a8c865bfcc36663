"""How exact the merge is: the largest errors over random problems, in float64.

    python benchmarks/merge_errors.py [--problems 200]

The problems and the slow solution (the whole Karush-Kuhn-Tucker system) are those of tests/theorems/test_merging.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "theorems"))
from test_merging import exact, problem, slow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst: dict[str, float] = {}
    for seed in range(options.problems):
        for name, error in errors(seed, 1 + seed % 4).items():
            worst[name] = max(worst.get(name, 0.0), error)
    print("| what | largest error |\n|---|---|")
    for name, error in worst.items():
        print(f"| {name} | {error:.1e} |")


def errors(seed: int, concepts: int) -> dict[str, float]:
    """Of one problem: constraint, slow solution, projector identities, gradients."""
    targets, regular, W_0, tuned = problem(seed, concepts)
    merge = exact(targets, regular)
    P, one = merge.projectors, torch.eye(W_0.shape[1], dtype=W_0.dtype)
    merged = merge(W_0, tuned)
    parts = [one - P.sum(0), *P]
    rng = torch.Generator().manual_seed(seed)
    G, way = (torch.randn(W_0.shape, generator=rng, dtype=W_0.dtype) for _ in range(2))
    ours, theirs = gradients(merge, W_0, tuned, G), gradients(lambda W, Ws: slow(W, Ws, targets, regular), W_0, tuned, G)
    h = 1e-4
    moved = [(merge(W_0, [W + s * h * way for W in tuned]) * G).sum() for s in (1, -1)]
    return {
        "constraint, W C_n^T = W_n C_n^T": largest([C @ (merged - W).T for C, W in zip(targets, tuned, strict=True)]),
        "against the slow KKT solve": largest([merged - slow(W_0, tuned, targets, regular)]),
        "projectors, P_n P_m = delta_nm P_n": largest(
            [A @ B - (n == m) * A for n, A in enumerate(parts) for m, B in enumerate(parts)]
        ),
        "gradient against autograd through the slow solve": largest([a - b for a, b in zip(ours, theirs, strict=True)]),
        "vector-Jacobian product against G P_n^T": largest([a - G @ P_n.T for a, P_n in zip(ours[1:], P, strict=True)]),
        "directional derivative against central differences": abs(
            float((moved[0] - moved[1]) / (2 * h) - torch.stack([(g * way).sum() for g in ours[1:]]).sum())
        ),
    }


def gradients(function: Callable[..., Tensor], W_0: Tensor, tuned: Sequence[Tensor], G: Tensor) -> list[Tensor]:
    """The gradients of <function, G> in the old map and in every fine-tune."""
    leaves = [tensor.clone().requires_grad_(True) for tensor in (W_0, *tuned)]
    return list(torch.autograd.grad((function(leaves[0], leaves[1:]) * G).sum(), leaves))


def largest(values: Sequence[Tensor]) -> float:
    """The largest absolute entry."""
    return max(float(value.abs().max()) for value in values)


if __name__ == "__main__":
    main()
