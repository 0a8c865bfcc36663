"""``safeweights demo``: the recommended recipe on the sandbox: protect, attack, judge, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeweights.cli import options
from safeweights.cli.audit import exit_code, lines
from safeweights.cli.common import speaking
from safeweights.cli.run import Kitchen
from safeweights.release.output import check_target

RECIPE = Path(__file__).parent.parent / "recipes" / "sandbox.yaml"


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = Path("safeweights-demo"),
    n: Annotated[
        int | None,
        typer.Option(
            "--n", min=1, help="Pictures of a protected concept; half as many prompts are attacked. [default: the recipe's]"
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> int:
    """Protect the sandbox by the recommended recipe, attack the result, hold it against a policy and write OUTPUT/report.html.

    Exit 1 where the policy says no. Its thresholds go with the recipe's own numbers of pictures: with --n what the policy says is
    told, but does not decide, since fewer pictures cannot show what it asks for.
    """
    from safeweights.release.recipe import load_recipe
    from safeweights.sandbox.files import model_folder

    with speaking(as_json) as show:
        check_target(output, overwrite)
        model_folder()
        plan = load_recipe(RECIPE, seed=seed, n=n, prompts=None if n is None else max(1, n // 2))
        result, verdict = Kitchen(plan, device).cook(output, overwrite=overwrite, resume=resume)
        show(
            {"report": str(output / "report.html"), **result},
            *lines(result, verdict),
            f"done in {result['seconds']:.0f} s; open {output / 'report.html'}",
        )
        return exit_code({**result, "policy": None} if n is not None else result)
