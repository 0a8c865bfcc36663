"""Every option the commands share, defined once. No torch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Argument(help="'sandbox', a diffusers folder, a .safetensors checkpoint or a Hub id.", show_default=False)
]
Reference = Annotated[
    str, typer.Option("--reference", help="The model before protection; every number is read against it.", show_default=False)
]
Concepts = Annotated[
    list[str], typer.Option("--concept", help="A concept of the concept file; repeat for several.", show_default=False)
]
OneConcept = Annotated[list[str], typer.Option("--concept", help="A concept of the concept file, one only.", show_default=False)]
SomeConcepts = Annotated[
    list[str] | None,
    typer.Option("--concept", help="A concept of the concept file; repeat for several. [default: all that have a detector]"),
]
ConceptsFile = Annotated[
    Path | None,
    typer.Option("--concepts-file", help="The concept file (YAML). [default: the sandbox's own, for the sandbox model]"),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must be empty or new.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
ClipModel = Annotated[
    str | None,
    typer.Option("--clip-model", help="A CLIP folder or Hub id for the CLIP score. [default: clip/ beside the concept file]"),
]
FeatureModel = Annotated[
    str | None,
    typer.Option(
        "--feature-model",
        help="A vision model's folder or Hub id, for the Frechet distance and for how alike re-learnt pictures are. [default: "
        "embedder/ beside the concept file]",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Makes a run repeatable on the same machine.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16. [default: float32]")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method; repeat for several. An unknown one lists all."),
]
AllowPython = Annotated[
    bool, typer.Option("--allow-python-detectors", help="Run detectors that are code named in the concept file.")
]
Given = Mapping[str, Any]
"""How to draw, as asked for: an entry for each option of ``SAMPLING``, None where it was left out."""
NOTHING: Given = MappingProxyType({})
SAMPLING: dict[str, Any] = {
    "steps": Annotated[int | None, typer.Option("--steps", min=1, help="Sampling steps. [default: the concept file's, or 50]")],
    "guidance_scale": Annotated[
        float | None, typer.Option("--guidance-scale", help="Classifier-free guidance. [default: the concept file's, or 7.5]")
    ],
    "scheduler": Annotated[
        str | None, typer.Option("--scheduler", help="ddim, lms, dpm, euler or pndm. [default: the concept file's, or ddim]")
    ],
    "width": Annotated[
        int | None, typer.Option("--width", min=8, help="Pixels. [default: the concept file's, or the model's own]")
    ],
    "height": Annotated[
        int | None, typer.Option("--height", min=8, help="Pixels. [default: the concept file's, or the model's own]")
    ],
}


def sampling(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Put the options of ``SAMPLING`` where ``command`` takes ``given``, and hand them to it together."""
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name == "given":
            parameters += [parameter.replace(name=name, annotation=kind, default=None) for name, kind in SAMPLING.items()]
        else:
            parameters.append(parameter)

    @functools.wraps(command)
    def with_sampling(**values: Any) -> int | None:
        return command(given={name: values.pop(name) for name in SAMPLING}, **values)

    with_sampling.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_sampling
