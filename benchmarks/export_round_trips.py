"""Export a protected model in every form, open each with plain diffusers, draw the same prompts and seeds, and compare pictures.

    python benchmarks/export_round_trips.py MODEL BASE -o DIR [--n 8]

Prints one Markdown row per form: megabytes, the largest and the mean difference of a picture's values in [0, 1] to MODEL's own
pictures, and for LoRAs the stated relative error, the largest probe difference, the ranks and the number of tensors not carried.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch

from safeweights.cli.main import run
from safeweights.models.quiet import quiet
from safeweights.sandbox.files import model_folder, sandbox_concepts

STEPS, GUIDANCE, FIRST_SEED = 20, 4.0, 500


def export(model: str, form: str, path: Path, *more: str) -> dict[str, Any]:
    """Run the command and return its JSON."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run(["export", model, "--format", form, "-o", str(path), "--overwrite", "--json", *more])
    assert code == 0
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def draw(pipeline: Any, prompts: list[str]) -> torch.Tensor:
    """One picture a prompt, (n, 3, H, W)."""
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(
            prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt",
            generator=torch.Generator().manual_seed(FIRST_SEED + i),
        ).images
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    return torch.cat(images).float()


def main() -> None:
    from diffusers import StableDiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("base")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--concept", default="mosaic")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = sandbox_concepts()
    (concept,) = file.pick([args.concept])
    half = args.n // 2
    prompts = [prompt.text for prompt in concept.test_prompts[:half]] + list(file.retain[: args.n - half])
    base = str(model_folder()) if args.base == "sandbox" else args.base
    model = str(model_folder()) if args.model == "sandbox" else args.model

    def opened(folder: str | Path) -> Any:
        return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)

    def single(path: Path) -> Any:
        return StableDiffusionPipeline.from_single_file(
            str(path), config=model, local_files_only=True, safety_checker=None, feature_extractor=None,
            tokenizer=opened(model).tokenizer,
        )  # fmt: skip

    def with_lora(path: Path) -> Any:
        pipeline = opened(base)
        pipeline.load_lora_weights(str(path))
        return pipeline

    with quiet():
        own, before = draw(opened(model), prompts), draw(opened(base), prompts)
        edit = (own - before).abs()
        print(f"{args.model}: n {len(prompts)}, the edit itself max {edit.max():.3f} mean {edit.mean():.4f}")

        def row(name: str, path: Path, pictures: torch.Tensor, told: dict[str, Any]) -> None:
            size = sum(f.stat().st_size for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file())
            off = (pictures - own).abs()
            lora = told.get("lora", {})
            stated = "– | – | – | –"
            if lora:
                ranks, worst = lora["rank"], lora["probe"]["max"]
                stated = f"{lora['relative_error']:.1e} | {worst:.1e} | {ranks['smallest']}–{ranks['largest']}"
                stated += f" | {len(lora['not_carried'])}"
            print(f"| {name} | {size / 1e6:.2f} | {off.max():.2e} | {off.mean():.2e} | {stated} |", flush=True)

        out = args.output
        told = export(args.model, "diffusers", out / "folder")
        row("diffusers folder", out / "folder", draw(opened(out / "folder"), prompts), told)
        told = export(args.model, "single-file", out / "one.safetensors")
        row("single file", out / "one.safetensors", draw(single(out / "one.safetensors"), prompts), told)
        told = export(args.model, "single-file", out / "half.safetensors", "--dtype", "float16")
        row("single file, float16", out / "half.safetensors", draw(single(out / "half.safetensors"), prompts), told)
        if args.model != args.base:
            for label, more in (
                ("LoRA, energy 0.9999", ()), ("LoRA, energy 0.99", ("--energy", "0.99")), ("LoRA, rank 16", ("--rank", "16")),
                ("LoRA, kohya, energy 0.9999", ("--layout", "kohya")), ("LoRA, energy 1", ("--energy", "1")),
            ):  # fmt: skip
                path = out / f"{label.replace(', ', '-').replace(' ', '-')}.safetensors"
                told = export(args.model, "lora", path, "--base", args.base, *more)
                row(label, path, draw(with_lora(path), prompts), told)


if __name__ == "__main__":
    main()
