"""``safeweights export``: a model, its edit or its text encoder in the form somebody else needs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeweights.cli import options
from safeweights.cli.common import SANDBOX, hash_of, is_sandbox, model_path, speaking
from safeweights.core.errors import UserError
from safeweights.core.text import plain
from safeweights.release.export import FORMATS, IN_FILES, export, export_lora
from safeweights.release.lora import ENERGY
from safeweights.release.manifest import hash_input, hash_model, lineage, read_protection
from safeweights.release.output import check_file_target, check_target, output_file, output_folder

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from safeweights.core.model import DiffusionModel

SUFFIX = ".safetensors"
HALF = 0.5
Path_ = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="The folder to write, or the .safetensors file (single-file; lora takes either).",
        show_default=False,
    ),
]


def command(
    model: options.Model,
    output: Path_,
    form: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.", show_default=False)],
    text_encoder: Annotated[
        Path | None,
        typer.Option("--text-encoder", help="A CLIPTextModel or diffusers folder whose text encoder takes the place of its own."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="lora: the model before protection. [default: the one its manifests lead to]")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="lora: the rank of every layer. [default: as --energy needs]")
    ] = None,
    energy: Annotated[
        float, typer.Option("--energy", min=0.01, max=1.0, help="lora: share of each layer's squared change to keep.")
    ] = ENERGY,
    layout: Annotated[
        str, typer.Option("--layout", help="lora: peft (diffusers) or kohya (A1111, ComfyUI, sd-scripts) names.")
    ] = "peft",
    records: Annotated[
        Path | None, typer.Option("--records", help="diffusers: records of this model, for the evidence table of its card.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="What card and header call the model. [default: its name]")] = None,
    description: Annotated[str | None, typer.Option("--description", help="A sentence for card and header.")] = None,
    license_: Annotated[str | None, typer.Option("--license", help="The licence of the weights.")] = None,
    author: Annotated[str | None, typer.Option("--author", help="Who publishes it, for the header.")] = None,
    sign_key: Annotated[
        Path | None, typer.Option("--sign-key", help="A PEM private key; the export is signed (see 'safeweights sign').")
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a model as a diffusers folder, one A1111/ComfyUI file, its edit as a LoRA, or its text encoder alone."""
    from safeweights.models.door import open_model
    from safeweights.release.lora import LAYOUTS, measured_edit

    with speaking(as_json) as show:
        if form not in FORMATS:
            raise UserError(f"unknown format {form!r}; known are {', '.join(FORMATS)}")
        if layout not in LAYOUTS:
            raise UserError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")
        one_file = form == "single-file" or (form == "lora" and output.suffix == SUFFIX)
        _check_place(output, form, one_file, overwrite)
        if records is not None and form != "diffusers":
            raise UserError("--records goes into the card of a diffusers folder; export it with --format diffusers")
        _check_key(sign_key)
        opened = open_model(model, device=device, dtype=dtype, text_encoder=text_encoder)
        about = {"title": title or _name(model), "description": description, "license": license_, "author": author}
        chosen: dict[str, Any] = {
            "model": model,
            "base": SANDBOX if is_sandbox(model) else model,
            "format": form,
            "text_encoder": str(text_encoder) if text_encoder else None,
            **{key: value for key, value in about.items() if value and key != "title"},
        }
        inputs = {
            "model": hash_of(model, opened),
            **({"text_encoder": hash_input(text_encoder.expanduser())} if text_encoder else {}),
        }
        common: dict[str, Any] = {
            "command": ["safeweights", *sys.argv[1:]],
            "inputs": inputs,
            "protected": _protection(model, text_encoder),
            "about": about,
        }
        lines: list[str] = []
        if form == "lora":
            base = base or _find_base(model)
            before = open_model(base, device=device, dtype=dtype)
            chosen |= {"lora_base": base, "layout": layout, "rank": rank, "energy": None if rank else energy}
            inputs["lora_base"] = hash_of(base, before)
            edit, errors = measured_edit(opened, before, common["protected"].get("concepts", ()), rank=rank, energy=energy)
            lines = _errors(errors)
            common |= {"errors": errors, "layout": layout}
            if not one_file:
                common["card"] = _card(chosen, inputs, about, base, model, (), _lora_use(base))
        elif form == "diffusers":
            found = _records(records, text_encoder, inputs["model"], opened)
            root = lineage(model)[-1][0]
            common["card"] = _card(chosen, inputs, about, root, model, found, _pipeline_use(), text_encoder)
            common["evaluations"] = _evaluations(found)
        with _out(output, one_file, overwrite, {**chosen, "inputs": inputs}) as path:
            if form == "lora":
                manifest = export_lora(edit, before, path, options=chosen, **common)
            else:
                manifest = export(opened, path, form, options=chosen, **common)
            if sign_key is not None and not one_file:
                _sign(path, sign_key)
        if sign_key is not None and one_file:
            _sign(output.expanduser(), sign_key)
        if form == "single-file":
            lines = _size_note(opened)
        show({"output": str(output), **manifest}, *lines, f"{_what(form)} written: {output}")


def _protection(model: str, text_encoder: Path | None) -> dict[str, Any]:
    """The manifest of what protects the result: the model's own, and that of an encoder that was put in."""
    from safeweights.release.export import with_encoder

    own = read_protection(Path(model).expanduser())
    return with_encoder(own, read_protection(text_encoder.expanduser()), str(text_encoder)) if text_encoder else own


def _check_place(output: Path, form: str, one_file: bool, overwrite: bool) -> None:
    if one_file:
        if output.suffix != SUFFIX:
            raise UserError(
                f"--format {form} writes one file, and {output} is no name for it; give one that ends in {SUFFIX} with -o"
            )
        check_file_target(output, overwrite)
    elif output.suffix == SUFFIX:
        raise UserError(
            f"--format {form} writes a folder, and {output} is the name of a file; formats of one file: {', '.join(IN_FILES)}"
        )
    else:
        check_target(output, overwrite)


def _check_key(key: Path | None) -> None:
    """A missing key or library is told before the model is opened."""
    if key is not None:
        from safeweights.release.signing import check_signing

        check_signing(key)


def _out(output: Path, one_file: bool, overwrite: bool, chosen: Mapping[str, Any]) -> AbstractContextManager[Path]:
    from contextlib import contextmanager

    @contextmanager
    def place() -> Iterator[Path]:
        if one_file:
            with output_file(output, overwrite=overwrite, options=chosen) as out:
                yield out.folder / out.target.name
        else:
            with output_folder(output, overwrite=overwrite, options=chosen) as out:
                yield out.folder

    return place()


def _find_base(model: str) -> str:
    """What a model was made from first, as its manifests tell. Raises UserError where they tell nothing, or of another model."""
    chain = lineage(model)
    if len(chain) == 1:
        raise UserError(f"no manifest tells what {plain(model)} was made from; give the model before protection with --base")
    for (name, manifest), (before, _) in pairwise(chain):
        stated = manifest.get("inputs")
        digest = stated.get("model") if isinstance(stated, dict) else None
        place = model_path(before)
        if digest and place and hash_input(place) != digest:
            raise UserError(
                f"{plain(before)} is not the model that {plain(name)} was made from: its files have changed; give it with --base"
            )
    return chain[-1][0]


def _errors(errors: Mapping[str, Any]) -> list[str]:
    ranks, probe = errors["rank"], errors["probe"]
    worst = sorted(errors["layers"].items(), key=lambda item: -item[1]["relative_error"])[:3]
    lines = [
        f"{len(errors['layers'])} layers at rank {ranks['smallest']} to {ranks['largest']}; relative error of the edit "
        f"{errors['relative_error']:.2e} (Frobenius)",
        *(f"  {layer['relative_error']:.2e}  rank {layer['rank']}  {name}" for name, layer in worst),
        f"noise predictions differ from the model's by at most {probe['max']:.2e} (rms {probe['rms']:.2e}) on {probe['n']} fixed "
        f"probes; the edit itself changes them by at most {probe['edit_max']:.2e} (rms {probe['edit_rms']:.2e})",
    ]
    if probe["rms"] > HALF * probe["edit_rms"]:
        lines.append(
            "this LoRA does not carry the edit: what it leaves out does at least half of what the edit does; raise --rank"
        )
    if left := errors["not_carried"]:
        shown = ", ".join(list(left)[:5]) + (", …" if len(left) > 5 else "")
        lines.append(f"a LoRA cannot carry {len(left)} changed tensors: {shown}")
    return lines


def _card(
    chosen: Mapping[str, Any], inputs: Mapping[str, str | None], about: Mapping[str, str | None], base: str, model: str,
    records: Sequence[Any], use: str, text_encoder: Path | None = None,
) -> str:  # fmt: skip
    from safeweights import __version__
    from safeweights.release.model_card import steps_of, write_card

    sources = [name for name, _ in lineage(model)] + ([str(text_encoder)] if text_encoder else [])
    steps = [step for name in reversed(sources) for step in steps_of(read_protection(Path(name).expanduser()))]
    distinct = [step for i, step in enumerate(steps) if step not in steps[:i]]
    return write_card(
        title=str(about["title"]), base=base, steps=distinct, records=records, license_=about["license"],
        description=about["description"], use=use,
        facts={
            "exported from": chosen["model"], "SHA-256 of its files": inputs["model"], "format": chosen["format"],
            "safeweights": __version__,
        },
    )  # fmt: skip


def _records(folder: Path | None, text_encoder: Path | None, digest: str | None, model: DiffusionModel) -> list[Any]:
    if folder is None:
        return []
    if text_encoder is not None:
        raise UserError(
            "records of a model are not those of one with another text encoder; export first, measure that, export again"
        )
    from safeweights.release.model_card import records_about

    # Commands that hold the model in memory, such as run, know it by its tensors.
    return records_about(folder.expanduser(), digest, hash_model(model))


def _evaluations(records: Sequence[Any]) -> str | None:
    from safeweights.release.model_card import evaluations

    return evaluations(records)


def _sign(path: Path, key: Path) -> None:
    from safeweights.release.signing import sign

    sign(path, key)


def _size_note(model: DiffusionModel) -> list[str]:
    from safeweights.release.checkpoint import opened_elsewhere

    if opened_elsewhere(model):
        return []
    return [
        "its sizes are not the published ones: safeweights opens the file, diffusers with config=FOLDER, A1111 and ComfyUI do not"
    ]


def _what(form: str) -> str:
    return {"text-encoder": "text encoder", "lora": "LoRA", "single-file": "checkpoint"}.get(form, "model")


def _name(model: str) -> str:
    return Path(model).expanduser().name.removesuffix(SUFFIX) or model


def _pipeline_use() -> str:
    return (
        "```python\nfrom diffusers import StableDiffusionPipeline\n\n"
        'pipeline = StableDiffusionPipeline.from_pretrained("FOLDER")\nimage = pipeline("a picture of a boat").images[0]\n```'
    )


def _lora_use(base: str) -> str:
    from safeweights.core.text import markdown

    return (
        f"Over its base, {markdown(base)}; whoever leaves the LoRA away has the base as it was.\n\n"
        "```python\nfrom diffusers import StableDiffusionPipeline\n\n"
        'pipeline = StableDiffusionPipeline.from_pretrained("BASE")\npipeline.load_lora_weights("FOLDER")\n```'
    )
