"""``safeweights sandbox``: make, judge and copy the embedded world's model."""

from __future__ import annotations

from typing import Annotated

import typer

from safeweights.cli import options
from safeweights.cli.common import say, speaking
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
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Train the sandbox model, its detectors, CLIP and embedder from nothing.

    SAFEWEIGHTS_SANDBOX=DIR makes every other command use the folder that comes out.
    """
    from safeweights.sandbox.train import Budget
    from safeweights.sandbox.train import train as run
    from safeweights.sandbox.world import write_concepts_file

    with speaking(as_json) as show:
        budget = Budget() if minutes is None else Budget().lasting(minutes)
        chosen = {"seed": seed, "workers": workers, "minutes": minutes}
        with output_folder(output, overwrite=overwrite, resume=resume, options=chosen) as out:
            run(out.folder, work=out.work / "training", budget=budget, seed=seed, workers=workers)
            write_concepts_file(out.folder)
        show({"output": str(output)}, f"sandbox: {output} (use it with SAFEWEIGHTS_SANDBOX={output})")


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
