"""What fine-tuning under a mask costs, against fine-tuning everything: memory and seconds as functions of both ratios.

    python benchmarks/freeze_cost.py --model sandbox [--steps 6] [--batch 8]
    python benchmarks/freeze_cost.py --model sd15 --latent 16 --steps 2      the SD 1.5 UNet with random weights

Time and memory do not depend on values, so masks are made by kind: random tensors, random parameters, the largest tensors, and
the front of the network (behind which nothing need be differentiated). Every line is a process of its own, with its own peak.
"Kept" are the bytes autograd saves for the backward pass of one step; "state" is weights, gradients and optimiser state together.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from safeweights.diffusion.lean import lean
from safeweights.freezing.guard import Budget, shares
from safeweights.records.machine import peak_memory_gb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sandbox", "sd15"), default="sandbox")
    parser.add_argument("--latent", type=int, default=16, help="side of the latents")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="steps; the first is not timed")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.3, 0.5, 0.7, 0.85])
    parser.add_argument("--kinds", nargs="+", default=["tensors", "parameters", "largest", "front"])
    parser.add_argument("--mask", help="a MASK.json to measure beside them")
    parser.add_argument("--one", help="measure this one (JSON) and print it; used by the program itself")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, **json.loads(options.one))))
        return
    wanted: list[dict[str, Any]] = [{"kind": "none", "ratio": 0.0}]
    wanted += [{"kind": kind, "ratio": ratio} for kind in options.kinds for ratio in options.ratios]
    wanted += [{"kind": "mask", "ratio": 0.0}] if options.mask else []
    columns = (
        "mask",
        "tensors frozen",
        "parameters frozen",
        "s a step",
        "saved",
        "kept, GB",
        "state, GB",
        "both saved",
        "peak, GB",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    base: dict[str, Any] = {}
    for item in wanted:
        again = [sys.executable, *sys.argv, "--one", json.dumps(item)]
        out = subprocess.run(again, capture_output=True, text=True, check=True)
        found = json.loads(out.stdout.splitlines()[-1])
        base = base or found
        memory = found["kept"] + found["state"]
        told = (
            f"{item['kind']} {item['ratio'] or ''}", f"{found['tensors']:.3f}", f"{found['parameters']:.3f}",
            f"{found['seconds']:.2f}", f"{1 - found['seconds'] / base['seconds']:.0%}", f"{found['kept']:.3f}",
            f"{found['state']:.3f}", f"{1 - memory / (base['kept'] + base['state']):.0%}", f"{found['peak']:.2f}",
        )  # fmt: skip
        print(f"| {' | '.join(told)} |", flush=True)


def unet_of(name: str, latent: int) -> tuple[nn.Module, int, int]:
    """(UNet, width of the text states, their length)."""
    if name == "sandbox":
        from safeweights.models.door import open_model

        return open_model("sandbox", device="cpu").denoiser, 128, 77
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(cross_attention_dim=768, sample_size=latent), 768, 77


def mask_of(unet: nn.Module, kind: str, ratio: float, file: str | None) -> frozenset[str]:
    """Names to freeze, as the UNet calls them."""
    shapes = {name: tuple(value.shape) for name, value in unet.named_parameters()}
    if kind == "none":
        return frozenset()
    if kind == "mask":
        from safeweights.records.mask import read_mask

        return frozenset(name.removeprefix("unet.") for name in read_mask(str(file)).frozen)
    order = torch.rand(len(shapes), generator=torch.Generator().manual_seed(0))
    if kind == "largest":
        order = torch.tensor([float(value.numel()) for value in unet.parameters()])
    if kind == "front":
        # In the order of the forward pass: time embedding and input, down, mid, up, output.
        rank = {"time_embedding": 0, "conv_in": 0, "down_blocks": 1, "mid_block": 2, "up_blocks": 3}
        order = -torch.tensor([rank.get(name.partition(".")[0], 4) * 1000.0 + i for i, name in enumerate(shapes)])
    return Budget.of(shapes, ratio, "parameters" if kind == "parameters" else "tensors").hard(order)


def measure(options: Any, kind: str, ratio: float) -> dict[str, float]:
    """One fine-tune of a few AdamW steps under a mask."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet, width, length = unet_of(options.model, options.latent)
    frozen = mask_of(unet, kind, ratio, options.mask)
    shapes = {name: tuple(value.shape) for name, value in unet.named_parameters()}
    unet.train(False)
    for name, value in unet.named_parameters():
        value.requires_grad_(name not in frozen)
    moving = [value for value in unet.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=1e-5)
    x = torch.randn(options.batch, 4, options.latent, options.latent)
    t, states = torch.randint(1000, (options.batch,)), torch.randn(options.batch, length, width)
    kept: dict[int, int] = {}
    weights = {value.untyped_storage().data_ptr() for value in unet.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        # What several layers keep is one piece of memory; weights are there anyway.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    seconds = []
    for step in range(options.steps):
        began = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        # Looked at once: hooks themselves take time.
        looking = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor) if step == 0 else nullcontext()
        with lean(unet), looking:
            loss = (unet(x, t, encoder_hidden_states=states).sample - x).square().mean()
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
    state = sum(value.numel() * value.element_size() for value in unet.parameters())
    state += sum(3 * value.numel() * value.element_size() for value in moving)  # gradient and two moments
    timed = sorted(seconds[1:] or seconds)
    return {
        **shares(frozen, shapes), "seconds": timed[len(timed) // 2], "kept": sum(kept.values()) / 1e9, "state": state / 1e9,
        "peak": peak_memory_gb() or 0.0,
    }  # fmt: skip


if __name__ == "__main__":
    main()
