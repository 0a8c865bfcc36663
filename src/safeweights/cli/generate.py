"""``safeweights generate``: pictures from prompts, each with its own seed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safeweights.cli import options
from safeweights.cli.common import (
    check_sampling,
    concept_file,
    hash_of,
    is_sandbox,
    sampling_of,
    say,
    speaking,
    workspace_in,
)  # fmt: skip
from safeweights.core.concept import Prompt, read_prompts_csv
from safeweights.core.errors import UserError
from safeweights.release.output import check_target, output_folder

if TYPE_CHECKING:
    from safeweights.core.model import DiffusionModel, Sampling

BATCH = 32


@dataclass(frozen=True)
class Row:
    """One picture to draw."""

    number: int
    prompt: str
    seed: int
    guidance: float

    @property
    def file_name(self) -> str:
        return f"{self.number:05d}.png"


@options.sampling
def command(
    model: options.Model,
    output: options.Output,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What to draw; repeat for several.", show_default=False)
    ] = None,
    prompts_csv: Annotated[
        Path | None,
        typer.Option("--prompts-csv", help="Prompts with their seeds and guidance; published column names are known."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Pictures of each prompt, with seeds counting up.")] = 1,
    concepts_file: Annotated[Path | None, typer.Option("--concepts-file", help="Sample as this concept file says.")] = None,
    given: options.Given = options.NOTHING,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Draw pictures and list them in prompts.csv.

    A prompt without a seed of its own takes --seed, the next picture the number after it.
    """
    from safeweights.models.door import open_model

    with speaking(as_json) as show:
        check_target(output, overwrite)
        check_sampling(given)
        prompts = [Prompt(text.strip()) for text in prompt or ()]
        if any(not item.text for item in prompts):
            raise UserError("--prompt is empty; write what to draw")
        if prompts_csv is not None:
            prompts.extend(read_prompts_csv(prompts_csv))
        if not prompts:
            raise UserError("nothing to draw; give --prompt TEXT or --prompts-csv FILE")
        known = concepts_file is not None or is_sandbox(model)
        generation = concept_file(concepts_file, model).generation if known else {}
        opened = open_model(model, device=device, dtype=dtype)
        sampling = sampling_of(opened, generation, given)
        rows = _rows(prompts, n, seed, sampling.guidance_scale)
        chosen = {
            "model": model, "inputs": {"model": hash_of(model, opened)}, "sampling": asdict(sampling),
            "rows": [[row.prompt, row.seed, row.guidance] for row in rows],
        }  # fmt: skip
        with output_folder(output, overwrite=overwrite, resume=resume, options=chosen) as out:
            say(f"drawing {len(rows)} pictures with {model}")
            drawn = out.work / "pictures"
            drawn.mkdir(exist_ok=True)
            _draw(opened, rows, sampling, drawn)
            for row in rows:
                (drawn / row.file_name).rename(out.folder / row.file_name)
            _write_csv(out.folder / "prompts.csv", rows)
        show(
            {"output": str(output), "n": len(rows), "images": [row.file_name for row in rows], "sampling": asdict(sampling)},
            f"{len(rows)} pictures and prompts.csv: {output}",
        )


def _rows(prompts: Sequence[Prompt], n: int, seed: int, guidance: float) -> list[Row]:
    rows: list[Row] = []
    for prompt in prompts:
        for k in range(n):
            first = seed + len(rows) if prompt.seed is None else prompt.seed + k
            scale = guidance if prompt.guidance is None else prompt.guidance
            rows.append(Row(len(rows), prompt.text, first, scale))
    return rows


def _draw(model: DiffusionModel, rows: Sequence[Row], sampling: Sampling, folder: Path) -> None:
    """Draw what is not in the folder yet, rows of one guidance together."""
    from PIL import Image

    from safeweights.core.attack import Candidate
    from safeweights.diffusion.sampling import at_guidance, by_guidance, finite, generate

    missing = [row for row in rows if not (folder / row.file_name).is_file()]
    batches = by_guidance([row.guidance for row in missing], BATCH)
    for index in workspace_in(folder).track(range(len(batches)), "drawing"):
        batch = [missing[i] for i in batches[index]]
        candidates = [Candidate(row.prompt, row.seed) for row in batch]
        images = finite(model, generate(model, candidates, at_guidance(sampling, batch[0].guidance), batch_size=BATCH))
        for row, image in zip(batch, images, strict=True):
            pixels = image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
            partial = folder / f".{row.file_name}"
            Image.fromarray(pixels).save(partial, format="PNG")
            partial.rename(folder / row.file_name)


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case_number", "prompt", "evaluation_seed", "evaluation_guidance", "file_name"])
        for row in rows:
            writer.writerow([row.number, row.prompt, row.seed, row.guidance, row.file_name])
