"""``safeweights leakage``: what a shared LoRA tells about the pictures it was trained on."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeweights.cli import options
from safeweights.cli.common import full_command, hash_of, is_sandbox, say, speaking, workspace_in
from safeweights.core.errors import UserError
from safeweights.core.text import plain
from safeweights.release.output import check_target, output_folder, write_json

if TYPE_CHECKING:
    from safeweights.core.model import DiffusionModel
    from safeweights.leakage.audit import Audited
    from safeweights.leakage.keys import LoraFile
    from safeweights.leakage.train import Encoders
    from safeweights.records.record import Record

app = typer.Typer(
    help="What a shared LoRA tells about its training pictures.", add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip
Base = Annotated[
    str,
    typer.Option(
        "--base", help="The model the LoRA belongs to: 'sandbox', a folder, a checkpoint or a Hub id.", show_default=False
    ),
]


@app.command("audit")
def audit(
    lora: Annotated[list[Path], typer.Argument(help="A LoRA's file or folder; several of one subject.", show_default=False)],
    base: Base,
    output: options.Output,
    images: Annotated[
        Path | None, typer.Option("--images", help="The training pictures: tests whether the file tells them from others.")
    ] = None,
    non_members: Annotated[
        Path | None,
        typer.Option(
            "--non-members", help="Pictures of the same kind it was not trained on. [default: the base model draws some]"
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="What the pictures are called in the membership test. [default: the encoders' class]"),
    ] = None,
    encoders: Annotated[
        Path | None,
        typer.Option("--encoders", help="What 'leakage train' wrote. [default: the sandbox's, for the sandbox model]"),
    ] = None,
    pool: Annotated[int, typer.Option("--pool", min=8, help="Pictures drawn where --non-members is not given.")] = 64,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> int:
    """Does this file alone reveal who or what it was trained on? Exit code 1 where it does."""
    from safeweights.leakage import keys
    from safeweights.leakage.audit import audit as run
    from safeweights.models.door import open_model
    from safeweights.records.store import Store
    from safeweights.report.page import write_report

    with speaking(as_json) as show:
        check_target(output, overwrite)
        if non_members is not None and images is None:
            raise UserError("--non-members is compared with --images; give the training pictures too")
        if images is not None and non_members is not None and images.expanduser().resolve() == non_members.expanduser().resolve():
            raise UserError("--images and --non-members are one folder; give pictures that were not trained on as the latter")
        paths = [keys.find(path) for path in lora]
        folder = encoders or sandbox_encoders(base)
        model = open_model(base, device=device, dtype=dtype)
        files = [keys.read(path, model) for path in paths]
        known, missing = _encoders(folder, model, files, base, given=encoders is not None)
        says = prompt if prompt is not None else str(known.facts["prompt"]) if known else ""
        pictures, members = _pictures(model, images, says)
        unseen, others = _pictures(model, non_members, says)
        chosen: dict[str, Any] = {
            "lora": [str(path) for path in paths], "base": base, "images": str(images) if images else None,
            "non_members": str(non_members) if non_members else None, "prompt": says, "seed": seed,
            "encoders": str(folder) if known else None, "pool": pool,
        }  # fmt: skip
        started = time.perf_counter()
        with output_folder(output, overwrite=overwrite, options=chosen) as out:
            say(f"auditing {', '.join(path.name for path in paths)}")
            found = run(
                files, model, encoders=known, missing=missing, embedder=_embedder(known, folder) if known and images else None,
                members=members, images=pictures, others=others, unseen=unseen, prompt=says, pool=pool, seed=seed,
                workspace=workspace_in(out.work),
            )  # fmt: skip
            result = _json(found)
            store = Store(out.folder)
            store.add(_record(found, result, store, files, base, model, chosen, pictures, time.perf_counter() - started))
            write_json(out.folder / "leakage.json", result)
            write_report(out.folder)
        show(result, *_lines(found), f"report: {output / 'report.html'}")
        return 0 if found.finding.verdict == "not shown" else 1


@app.command("train")
def train(
    context: typer.Context,
    base: Base,
    output: options.Output,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="A folder of people, one folder of pictures each. [default: drawn, for the sandbox model]"),
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", help="What a picture is called; {} stands for the trigger word.")
    ] = "a picture of a {} person",
    embedder: Annotated[
        str | None,
        typer.Option("--embedder", help="A vision model's folder or Hub id that tells subjects apart. [default: the sandbox's]"),
    ] = None,
    adapters: Annotated[int, typer.Option("--adapters", min=10, help="Adapters of training people.")] = 300,
    tests: Annotated[int, typer.Option("--tests", min=10, help="Adapters of people that only judge the encoders.")] = 100,
    nulls: Annotated[
        int, typer.Option("--nulls", min=20, help="Adapters that show nobody: false alarms are counted over them.")
    ] = 100,
    null_images: Annotated[
        Path | None,
        typer.Option(
            "--null-images",
            help="With --images: a folder of things and styles, one folder of pictures each, for some of those adapters.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Longest adapter training.")] = 40,
    generator_steps: Annotated[int, typer.Option("--generator-steps", min=1, help="Steps that teach the generator.")] = 800,
    generator_people: Annotated[
        int,
        typer.Option(
            "--generator-people", min=0, help="People without adapters that teach the generator too, where there are any."
        ),
    ] = 1000,
    also: Annotated[
        list[str] | None,
        typer.Option("--also", help="Encoders besides the closed forms: tokens, or vnae (the paper's); repeat for both."),
    ] = None,
    also_steps: Annotated[int, typer.Option("--also-steps", min=1, help="Steps that train each of those.")] = 400,
    together: Annotated[int, typer.Option("--together", min=1, help="Adapters trained at once.")] = 16,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Train adapters of known people, and from them the encoders that `leakage audit` uses. Some 80 minutes for the sandbox."""
    from safeweights.leakage import learned
    from safeweights.leakage.factory import HELD, Plan
    from safeweights.leakage.sources import Drawn, Folders, Source
    from safeweights.leakage.train import train as run
    from safeweights.models.door import open_model
    from safeweights.models.vision import Embedder

    with speaking(as_json) as show:
        check_target(output, overwrite)
        if null_images is not None and images is None:
            raise UserError("--null-images goes with --images; without it, styles and objects are drawn")
        if prompt.count("{}") != 1:
            raise UserError("--prompt must hold {} once, where the trigger word goes")
        more = learned.check(also or ())
        own = is_sandbox(base)
        if images is None and not own:
            raise UserError(
                f"{base} needs pictures to learn from: give --images DIR with one folder for each of {adapters + tests + 20} "
                "people or things (16 pictures or more in each), and an --embedder that tells them apart"
            )
        if embedder is None and not own:
            raise UserError("give --embedder FOLDER (or a Hub id): a vision model that tells the subjects apart")
        name = embedder or str(_weights() / "embedder")
        judge = Embedder(name, "--embedder")
        model = open_model(base, device=device, dtype=dtype)
        _, height, width = model.latent_shape
        source: Source = (
            Drawn(template=prompt)
            if images is None
            else Folders(images, width * model.latent_stride, height * model.latent_stride, template=prompt, things=null_images)
        )
        plan = Plan(
            train=adapters, test=tests, val=min(20, adapters // 10), twins=min(20, tests), nulls=nulls,
            steps=tuple(dict.fromkeys((steps, max(1, steps * 5 // 8)))),
            checkpoints=tuple(dict.fromkeys(max(1, steps * part // 4) for part in (1, 2))), seed=seed,
        )  # fmt: skip
        # Too few people or pictures are told before anything is trained.
        plan.entries(source.template, len(source), source.nulls)
        if isinstance(source, Folders):
            source.check(plan.train + plan.val + plan.test, HELD + max(plan.images), max(plan.images))
        chosen = {
            "base": base, "images": str(images) if images else None, "prompt": prompt, "embedder": name, "plan": asdict(plan),
            "null_images": str(null_images) if null_images else None,
            "generator_steps": generator_steps, "generator_people": generator_people, "together": together,
            **({"also": list(more), "also_steps": also_steps} if more else {}),
            "inputs": {"base": hash_of(base, model)},
        }  # fmt: skip
        with output_folder(output, overwrite=overwrite, resume=resume, options=chosen) as out:
            encoders, _, judged = run(
                model, source, plan, judge, embedder_name=name if embedder else "../embedder",
                generator_steps=generator_steps, generator_people=generator_people, also=more,
                also_steps=also_steps,
                workspace=workspace_in(out.work), together=together,
            )  # fmt: skip
            # The sandbox's own embedder goes without saying: where it lies is this machine's business.
            encoders.facts["command"] = full_command(context)
            encoders.facts["device"] = str(model.device)
            encoders.save(out.folder)
        result = {
            "output": str(output),
            "encoders": {
                trust.encoder: {**asdict(trust), "passed": trust.passed, "doubt": trust.doubt} for trust in encoders.trusts
            },
            "controls": {
                name: {
                    "direct": {arm.name: arm.found.rank for arm in found.direct_arms},
                    "generator": {arm.name: arm.found.rank for arm in found.drawn_arms},
                }
                for name, found in judged.items()
            },
        }
        show(
            result,
            *(
                f"{'trusted' if trust.passed else 'not trusted'}: {trust.power}{trust.doubt and '; ' + trust.doubt}"
                for trust in encoders.trusts
            ),
            str(output),
        )


@app.command("defend")
def defend(
    lora: Annotated[Path, typer.Argument(help="A LoRA's file or folder.", show_default=False)],
    base: Base,
    output: options.Output,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Cut every update to this rank.")] = None,
    bits: Annotated[int | None, typer.Option("--bits", min=2, max=16, help="Round factors to so many bits.")] = None,
    noise: Annotated[
        float | None, typer.Option("--noise", min=0.0, max=10.0, help="Add normal noise, as a share of each factor's own size.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of the noise; whoever knows it can take the noise off. [default: the system's]")
    ] = None,
    device: options.Device = "cpu",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a LoRA anew so that its file tells less: factored anew, without its header, and what else is asked for."""
    import secrets

    from safeweights.leakage import defences, keys
    from safeweights.leakage.canonical import effective_rank, tokens
    from safeweights.models.door import open_model

    with speaking(as_json) as show:
        check_target(output, overwrite)
        if seed is not None and noise is None:
            raise UserError("--seed is that of --noise; give both, or neither")
        model = open_model(base, device=device)
        file = keys.read(keys.find(lora), model)
        if file.ignored:
            raise UserError(
                f"{file.path} holds {len(file.ignored)} tensors that are no LoRA factors and would be left out, "
                f"{plain(file.ignored[0], 80)} the first; only plain LoRAs can be written anew"
            )
        factors: Any = defences.refactor(file.factors)
        if rank is not None:
            factors = defences.truncate(factors, rank)
        if noise is not None:
            factors = defences.add_noise(factors, noise, seed=secrets.randbits(62) if seed is None else seed)
        if bits is not None:
            factors = defences.quantise(factors, bits)
        moved = defences.difference(file.factors, factors)
        before, after = (
            sum(effective_rank(token.s) for token in tokens(item).values()) / len(item) for item in (file.factors, factors)
        )
        shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        name = "lora.safetensors" if file.layout == "kohya" else keys.FILES[0]  # the name of a file tells, too
        chosen = {"lora": str(lora), "base": base, "rank": rank, "bits": bits, "noise": noise}
        with output_folder(output, overwrite=overwrite, options=chosen) as out:
            keys.write(factors, out.folder / name, layout=file.layout, shapes=shapes)
        dropped = sorted(key for key in file.metadata if key != "format")
        show(
            {
                "output": str(output / name), "layout": file.layout, "moved": moved, "effective_rank": [before, after],
                "header_entries_dropped": dropped, "options": chosen,
            },
            f"{file.path.name}: the update moved by {moved:.1%} of its norm; effective rank {before:.1f} -> {after:.1f}",
            f"{len(dropped)} entries of the header dropped" if dropped else "its header told nothing",
            f"LoRA, in float32: {output / name}; 'safeweights leakage audit' says what it still tells",
        )  # fmt: skip


def _weights() -> Path:
    from safeweights.sandbox.files import weights_folder

    return weights_folder()


def sandbox_encoders(base: str) -> Path | None:
    """Where the sandbox's encoders lie, for the sandbox model or one made from it; None where there are none."""
    folder = _weights() / "leakage"
    return folder if is_sandbox(base) and (folder / "encoders.json").is_file() else None


def _encoders(
    folder: Path | None, model: DiffusionModel, files: list[LoraFile], base: str, *, given: bool
) -> tuple[Encoders | None, str]:
    """The encoders that can judge these files, or why there are none."""
    from safeweights.leakage.audit import fits
    from safeweights.leakage.train import Encoders

    if folder is None:
        return None, (
            f"no encoders for {base}: 'safeweights leakage train --base {base} --images DIR --embedder MODEL -o OUT' makes them "
            "from a folder of some hundreds of people or things (16 pictures each), then --encoders OUT"
        )
    known = Encoders.load(folder)
    reason = fits(known, model, files)
    if reason and given:
        raise UserError(reason)
    return (None, reason) if reason else (known, "")


def _embedder(encoders: Encoders, folder: Path | None) -> Any:
    from safeweights.models.vision import Embedder

    name = str(encoders.facts["embedder"])
    beside = (folder / name).resolve() if folder is not None else Path(name)
    return Embedder(str(beside) if name.startswith("..") or beside.is_dir() else name, "the encoders' embedder")


def _pictures(model: DiffusionModel, folder: Path | None, prompt: str) -> tuple[Any, Any]:
    """(pictures in [0, 1], encoded shots) of a folder; (None, None) without one."""
    from safeweights.diffusion.adaptation import Shots
    from safeweights.diffusion.image_folder import read_native

    if folder is None:
        return None, None
    images, captions = read_native(model, folder, prompt=prompt or "-")
    return images, Shots.encode(model, images, captions)


def _json(found: Audited) -> dict[str, Any]:
    finding = found.finding
    return {
        "verdict": finding.verdict, "why": finding.why, "measurements": [asdict(entry) for entry in found.measurements],
        "power": finding.power, "warnings": found.warnings, "files": [asdict(item) for item in found.files],
        "answers": found.answers, "notes": found.notes,
    }  # fmt: skip


def _record(
    found: Audited, result: dict[str, Any], store: Any, files: list[LoraFile], base: str, model: DiffusionModel,
    chosen: dict[str, Any], pictures: Any, seconds: float,
) -> Record:  # fmt: skip
    from safeweights.records.machine import versions
    from safeweights.records.record import Record
    from safeweights.release.manifest import hash_input

    artefacts = []
    if pictures is not None:
        artefacts += [
            store.save_artefact(picture, role="reference", prompt="a training picture", seed=0, group=i)
            for i, picture in enumerate(pictures[:4])
        ]
    if found.reconstructions is not None:
        for place, (file, drawn) in enumerate(zip(files, found.reconstructions, strict=True)):
            artefacts += [
                store.save_artefact(
                    picture, role="attacked", prompt=f"read from {file.path.name}", seed=chosen["seed"], group=4 * place + i
                )
                for i, picture in enumerate(drawn)
            ]
    return Record(
        kind="leakage", status="ok", model=str(files[0].path), reference=base, method="lora",
        concept=files[0].path.stem, concept_kind="", attack="leakage audit", seed=chosen["seed"],
        settings={"prompt": chosen["prompt"], "pool": chosen["pool"]},
        measurements=tuple(found.measurements), artefacts=tuple(artefacts), details={**result, "plots": found.plots},
        provenance={
            "inputs": {"base": hash_of(base, model), **{str(file.path): hash_input(file.path) for file in files}},
            "command": ["safeweights", *sys.argv[1:]], "versions": versions(), "time": {"seconds": round(seconds, 3)},
        },
    )  # fmt: skip


def _lines(found: Audited) -> list[str]:
    finding = found.finding
    lines = [f"{finding.verdict}: {finding.why}", *(f"warning: {text}" for text in found.warnings), f"power: {finding.power}"]
    for item in found.files:
        count = "unknown" if item.images is None else f"about {item.images:.0f} (from {item.images_from})"
        lines.append(
            f"{item.name}: {item.layout} layout, rank {item.rank}, {item.layers} layers, {item.parameters} numbers, "
            f"norm {item.norm:.3g}, training pictures: {count}"
        )
        lines += [f"  header {entry.kind}: {entry.key} = {entry.value[:100]}" for entry in item.told]
    return [*lines, *found.notes]
