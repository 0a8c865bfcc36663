"""``safeweights prune``: put a mask on a model, take it off again, hide where it was, look at it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeweights.cli import options
from safeweights.cli.common import SANDBOX, hash_of, is_sandbox, speaking
from safeweights.release.manifest import hash_input, write_manifest
from safeweights.release.output import check_target, output_folder

if TYPE_CHECKING:
    from torch import Tensor

    from safeweights.core.model import DiffusionModel
    from safeweights.release.mask_files import MaskFile

app = typer.Typer(help="Masks of pruned models: apply, undo, conceal, inspect.", no_args_is_help=True)
MaskPath = Annotated[Path, typer.Argument(help="mask.safetensors of a pruned model.", show_default=False)]
OwnerPath = Annotated[Path, typer.Argument(help="owner.safetensors, written with the mask for its owner.", show_default=False)]


@app.command("apply")
def apply_command(
    model: options.Model,
    mask: MaskPath,
    output: options.Output,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Prune the model that a mask was made for: a mask is all that has to be shipped."""
    from safeweights.models.stable_diffusion import follow_umask
    from safeweights.release.mask_files import MASK, apply, read_mask, write_mask

    with speaking(as_json) as show:
        check_target(output, overwrite)
        file = read_mask(mask)
        opened = _open(model, device, dtype)
        tensors = apply(opened, file)
        before = {name: p for name, p in opened.named_parameters() if name in tensors}

        def beside(folder: Path) -> None:
            if file.mask.fill == "zero":
                write_mask(folder / MASK, file.mask, before, file.facts)
                follow_umask([folder / MASK])

        manifest = _write(model, opened, tensors, file, output, "prune apply", {"mask": mask}, overwrite, beside)
        show(
            {"output": str(output), "pruned": file.mask.count, **manifest},
            f"{file.mask.count} weights of {len(tensors)} tensors pruned",
            f"pruned model: {output}",
        )


@app.command("undo")
def undo_command(
    model: options.Model,
    mask: MaskPath,
    owner: OwnerPath,
    output: options.Output,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Put the original weights back, bit for bit, as only the owner can."""
    from safeweights.release.mask_files import read_mask, read_owner, undo

    with speaking(as_json) as show:
        check_target(output, overwrite)
        file = read_owner(owner, read_mask(mask))
        opened = _open(model, device, dtype)
        tensors = undo(opened, file)
        manifest = _write(model, opened, tensors, file, output, "prune undo", {"mask": mask, "owner": owner}, overwrite)
        show(
            {"output": str(output), "restored": file.mask.count, "base_sha256": file.base, **manifest},
            f"{file.mask.count} weights of {len(tensors)} tensors are what they were",
            f"restored model: {output}",
        )


@app.command("conceal")
def conceal_command(
    model: options.Model,
    mask: MaskPath,
    output: options.Output,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Fill the pruned places of a model with noise like the rest of their rows, so that no zeros show them. Keep the mask."""
    import secrets

    from safeweights.release.mask_files import conceal, read_mask

    with speaking(as_json) as show:
        check_target(output, overwrite)
        file = read_mask(mask)
        opened = _open(model, device, dtype)
        # The noise of a key that somebody can guess tells its own places; nobody needs this one again.
        tensors, _ = conceal(opened, file, secrets.randbits(62))
        manifest = _write(model, opened, tensors, file, output, "prune conceal", {"mask": mask}, overwrite)
        show(
            {"output": str(output), "concealed": file.mask.count, "recovery": _recovery(tensors, file), **manifest},
            f"{file.mask.count} weights of {len(tensors)} tensors filled; judge the model again, since it is another one now",
            f"concealed model: {output}",
        )


@app.command("inspect")
def inspect_command(
    mask: MaskPath,
    model: Annotated[
        str | None, typer.Option("--model", help="Say what this model is to the mask, and how well its places show.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """What a mask prunes, tensor by tensor; with a model also how well the places can be told without the mask."""
    from safeweights.release.mask_files import masked_tensors, read_mask, state_of

    with speaking(as_json) as show:
        file = read_mask(mask)
        counts = {name: len(where) for name, where in sorted(file.mask.indices.items())}
        data: dict[str, Any] = {
            "mask": str(mask), "bytes": mask.expanduser().stat().st_size, "pruned": file.mask.count, "entries": file.entries,
            "fill": file.mask.fill, "base_sha256": file.base, "tensors": counts, "facts": dict(file.facts),
        }  # fmt: skip
        lines = [
            f"{count:8}  {count / file.mask.indices[name].new_empty(file.shapes[name]).numel():7.2%}  {name}"
            for name, count in counts.items()
        ]
        lines.append(
            f"{file.mask.count:8}  {file.mask.count / max(file.entries, 1):7.2%}  of {len(counts)} tensors, fill {file.mask.fill}"
        )
        if model is not None:
            weights = masked_tensors(_open(model, device, dtype), file)
            data |= {"model": model, "state": state_of(weights, file), "recovery": _recovery(weights, file)}
            lines.append(f"{model} is {data['state']} to this mask")
            lines += [
                f"telling places by '{row['score']}': AUC {row['auc']:.3f} ({row['ci95'][0]:.3f}–{row['ci95'][1]:.3f})"
                for row in data["recovery"]
            ]
        show(data, *lines)


def _open(model: str, device: str, dtype: str | None) -> DiffusionModel:
    from safeweights.models.door import open_model

    return open_model(model, device=device, dtype=dtype)


def _recovery(weights: dict[str, Tensor], file: MaskFile) -> list[dict[str, Any]]:
    """How well places show, score by score."""
    from safeweights.diffusion.completion import recover_positions

    return [
        {"score": found.score, "auc": round(found.auc, 4), "ci95": [round(found.low, 4), round(found.high, 4)], "n": found.n}
        for found in recover_positions(weights, file.mask.indices)
    ]


def _write(
    model: str, opened: DiffusionModel, tensors: dict[str, Tensor], file: MaskFile, output: Path, method: str,
    inputs: dict[str, Path], overwrite: bool, beside: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the model with those tensors and its manifest, which is returned."""
    started = time.perf_counter()
    hashes = {"model": hash_of(model, opened), **{name: hash_input(path.expanduser()) for name, path in inputs.items()}}
    chosen = {"model": model, "base": SANDBOX if is_sandbox(model) else model, **{name: str(p) for name, p in inputs.items()}}
    with output_folder(output, overwrite=overwrite, options={**chosen, "inputs": hashes}) as out:
        opened.with_tensors(tensors).save(out.folder)
        if beside is not None:
            beside(out.folder)
        return write_manifest(
            out.folder,
            command=["safeweights", *sys.argv[1:]],
            method=method,
            concepts=[str(name) for name in file.facts.get("concepts", ())],
            options={**chosen, "settings": dict(file.facts.get("settings", {}))},
            seed=0,
            inputs=hashes,
            tensors=tensors,
            cost={"pruned": float(file.mask.count)},
            seconds=time.perf_counter() - started,
        )
