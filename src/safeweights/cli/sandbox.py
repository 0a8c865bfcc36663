"""``safeweights sandbox``: make, judge and copy the embedded world's model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeweights.cli import options
from safeweights.cli.common import percent, say, speaking
from safeweights.core.errors import UserError
from safeweights.release.output import check_target, output_folder

app = typer.Typer(
    help="The embedded world and its model.", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


@app.command("train")
def train(
    output: options.Output,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes, one thread each.")] = 2,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.01, help="Scale the work to about this long on two cores. [default: 110]")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option("--without", help="A concept the model is never shown, as if unheard of; repeatable.")
    ] = None,
    parts_from: Annotated[
        str | None,
        typer.Option(
            "--from", help="'sandbox' or a sandbox folder: take over its tokenizer, autoencoder and judges.", show_default=False
        ),
    ] = None,
    text_encoder_from: Annotated[
        str | None,
        typer.Option("--text-encoder-from", help="As --from, and take over the text encoder too.", show_default=False),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option("--channels", help="Channels of the UNet's three levels. [default: 48,96,128]", show_default=False),
    ] = None,
    pictures: Annotated[
        int | None, typer.Option("--pictures", min=64, help="Pictures the model learns from.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps of its training.", show_default=False)] = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Train the sandbox model, its detectors, CLIP and embedder from nothing, or a variation of it.

    SAFEWEIGHTS_SANDBOX=DIR makes every other command use the folder that comes out.
    A gold model that never knew a concept: --from sandbox --without emblem. A second UNet of the same world that reads the
    same text: --text-encoder-from sandbox --channels 32,64,96.
    """
    from dataclasses import replace

    from safeweights.sandbox.train import Budget, Variation
    from safeweights.sandbox.train import train as run
    from safeweights.sandbox.world import write_concepts_file

    with speaking(as_json) as show:
        if parts_from and text_encoder_from and parts_from != text_encoder_from:
            raise UserError("--from and --text-encoder-from name two sandboxes; all parts come from one")
        base = _sandbox_folder(text_encoder_from or parts_from)
        variation = Variation(without=_names(without), base=base, keep_text_encoder=text_encoder_from is not None)
        budget = Budget() if minutes is None else Budget().lasting(minutes, generator_only=base is not None)
        if channels is not None:
            budget = replace(budget, unet={"block_out_channels": _channels(channels)})
        budget = replace(budget, pictures=pictures or budget.pictures, generator_steps=steps or budget.generator_steps)
        chosen = {"seed": seed, "workers": workers, "minutes": minutes, "pictures": pictures, "steps": steps, "unet": budget.unet}
        with output_folder(output, overwrite=overwrite, resume=resume, options={**chosen, **variation.facts()}) as out:
            run(out.folder, work=out.work / "training", budget=budget, seed=seed, workers=workers, variation=variation)
            write_concepts_file(out.folder)
        show({"output": str(output)}, f"sandbox: {output} (use it with SAFEWEIGHTS_SANDBOX={output})")


def _sandbox_folder(name: str | None) -> Path | None:
    """The sandbox in use, or another one's folder."""
    from safeweights.sandbox.files import weights_folder

    return None if name is None else weights_folder().resolve() if name == "sandbox" else Path(name).expanduser().resolve()


def _names(concepts: list[str] | None) -> tuple[str, ...]:
    """Concepts as the world calls them, without the concept file's hyphens."""
    return tuple(sorted({name.replace("-", " ") for name in concepts or ()}))


def _channels(text: str) -> list[int]:
    """``32,64,96``. Raises UserError for anything but three multiples of 8."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) % 8 == 0 and int(part) for part in parts):
        raise UserError(f"--channels takes three multiples of 8, such as 32,64,96, not {text!r}")
    return [int(part) for part in parts]


@app.command("evaluate")
def evaluate(
    folder: Annotated[Path | None, typer.Argument(help="A sandbox folder. [default: the one in use]", show_default=False)] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Pictures generated of each concept.")] = 32,
    fresh: Annotated[
        int, typer.Option("--fresh", min=64, help="Freshly drawn pictures that the detectors are tried on.")
    ] = 4_000,
    sheet: Annotated[Path | None, typer.Option("--sheet", help="Write a contact sheet (PNG) here.", show_default=False)] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Write the error rates into the sandbox folder, to ship with it.")] = False,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Processes, one thread each.")] = 2,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Measure the sandbox: its detectors on fresh drawings, its model by the detectors."""
    from safeweights.sandbox.files import model_folder, weights_folder

    with speaking(as_json) as show:
        if folder is None:
            model_folder()  # tells where the model is missing
            folder = weights_folder()
        elif not (folder / "model" / "model_index.json").is_file():
            raise UserError(f"{folder} is no sandbox folder; give one that 'safeweights sandbox train' or 'export' wrote")
        from safeweights.sandbox import evaluate as measure

        found = measure.evaluate(folder, n=n, fresh=fresh, seed=seed, processes=processes, sheet=sheet)
        if keep:
            measure.keep(found, folder)
        rates = {name: entry["rate"] for name, entry in found["generator"]["concepts"].items()}
        show(found, *(f"{name:<24} {percent(rate)} of {n} pictures judged right" for name, rate in rates.items()))


@app.command("export")
def export(output: options.Output, overwrite: options.Overwrite = False, as_json: options.Json = False) -> None:
    """Copy the sandbox to a folder: the plain diffusers model, concept file, detectors, CLIP and embedder."""
    import shutil

    from safeweights.sandbox.files import model_folder, weights_folder

    with speaking(as_json) as show:
        check_target(output, overwrite)
        model_folder()  # tells where the model is missing
        with output_folder(output, overwrite=overwrite) as out:
            say(f"copying {weights_folder()}")
            shutil.copytree(weights_folder(), out.folder, dirs_exist_ok=True)
        model, concepts = output / "model", output / "concepts.yaml"
        show(
            {"output": str(output), "model": str(model), "concepts_file": str(concepts)},
            f"model: {model}",
            f"concept file: {concepts}",
        )


@app.command("draw")
def draw(
    output: options.Output,
    concept: Annotated[
        list[str] | None,
        typer.Option("--concept", help="Draw this concept; repeatable. [default: all that the model has never seen]"),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=2, help="Drawings of each concept in each of the two folders.")] = 32,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Draw concepts without the model: pictures from another source, and styles, objects and people it has never seen.

    Writes pictures/NAME and elsewhere/NAME (other drawings) with captions, and a concept file that knows the unseen ones.
    """
    from safeweights.sandbox.drawings import write_drawings
    from safeweights.sandbox.files import model_folder

    with speaking(as_json) as show:
        check_target(output, overwrite)
        model_folder()  # tells where the model is missing
        with output_folder(output, overwrite=overwrite) as out:
            drawn = write_drawings(out.folder, concept or (), n=n, seed=seed)
        show(
            {"output": str(output), "concepts": drawn, "concepts_file": str(output / "concepts.yaml")},
            f"{2 * n} drawings each of {', '.join(drawn)} in {output}",
            f"concept file: {output / 'concepts.yaml'}",
        )
