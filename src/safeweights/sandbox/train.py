"""Train the sandbox from nothing: autoencoder, generator, judges. Two processor cores, under two hours.

The work is cut into stages. Each leaves a done-file in the work folder, so that the same command after an interruption
skips what is finished and continues the rest from its last checkpoint. Budgets are counts of steps, not minutes, so
that the same seed gives the same weights on the same machine.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from safeweights.core.errors import UserError
from safeweights.sandbox import tokenizer, world

LEAST = 64
"""Pictures that the smallest budget draws: a batch of every stage."""
STAGES = ("data", "tokenizer", "autoencoder", "latents", "generator", "decoder", "judges")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of everything; the defaults are what the shipped weights were trained with."""

    pictures: int = 30_000
    """Pictures the generator learns from; none shows a held-back concept."""
    judge_pictures: int = 24_000
    """Pictures for the autoencoder, the judges, CLIP and the embedder; held-back concepts included."""
    autoencoder_steps: int = 900
    generator_steps: int = 4_800
    decoder_steps: int = 450
    judge_steps: int = 800
    clip_steps: int = 1_600
    embedder_steps: int = 1_500
    batch: int = 32
    autoencoder: dict[str, Any] = field(default_factory=dict)
    """Changes to the autoencoder's configuration, for tests."""
    unet: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)

    def lasting(self, minutes: float, *, generator_only: bool = False) -> Budget:
        """This budget scaled to about `minutes` on two cores, pictures along with steps.

        The default takes about 110, the generator alone with its pictures about 45.
        """
        share = minutes / (45 if generator_only else 110)
        least = {**{k: 1 for k in asdict(self) if k.endswith("_steps")}, "pictures": LEAST, "judge_pictures": LEAST}
        return replace(self, **{k: max(low, round(getattr(self, k) * share)) for k, low in least.items()})


@dataclass(frozen=True, kw_only=True)
class Variation:
    """What sets a model apart from the one that ships; nothing by default."""

    without: tuple[str, ...] = ()
    """Concepts that the generator is never shown (the judges still know them): a gold model, that never knew them."""
    base: Path | None = None
    """A finished sandbox whose tokenizer, autoencoder and judges are taken over: only the generator is trained."""
    keep_text_encoder: bool = False
    """The text encoder of ``base`` is taken over too: only the UNet is trained."""

    def __post_init__(self) -> None:
        known = {*world.STYLES, *world.OBJECTS, *(person.name for person in world.IDENTITIES), "emblem"}
        if strange := sorted({*self.without} - known):
            raise UserError(f"the world has no concept {strange[0]!r} to leave out; it has {', '.join(sorted(known))}")
        if "flat" in self.without:
            raise UserError("the flat style cannot be left out: all people and the emblem are drawn in it")
        if self.base is None and self.keep_text_encoder:
            raise UserError("a text encoder is kept from a finished sandbox; name it")
        if self.base is not None and not (self.base / "model" / "model_index.json").is_file():
            raise UserError(f"{self.base} is no sandbox folder; give 'sandbox' or one that 'safeweights sandbox train' wrote")

    def facts(self) -> dict[str, Any]:
        """What a work folder remembers, so that it is not gone on with as another one."""
        told = {"without": list(self.without), "base": self.base and str(self.base), "keep_text_encoder": self.keep_text_encoder}
        return {key: value for key, value in told.items() if value}


class Log:
    """Progress on stderr: a bar on a terminal, else a line every half minute."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    def __reduce__(self) -> tuple[type[Log], tuple[()]]:
        # Runs travel to worker processes; a console holds locks, which do not.
        return Log, ()

    def say(self, text: str) -> None:
        self._console.print(f"[{time.strftime('%H:%M:%S')}] {text}", highlight=False, markup=False)

    def follow(self, name: str, steps: int) -> Callable[[int, float], None]:
        """A function to call after each step with the number of steps done and the loss."""
        began, last, first, mean = time.monotonic(), 0.0, -1, 0.0

        def report(step: int, loss: float) -> None:
            nonlocal last, first, mean
            if first < 0:
                first, mean = step - 1, loss
            mean += 0.02 * (loss - mean)
            now = time.monotonic()
            if now - last > 30 or step == steps:
                last = now
                left = (now - began) / (step - first) * (steps - step) / 60
                text = f"{name}: step {step}/{steps}, loss {mean:.4f}, {left:.1f} min left"
                if self._console.is_terminal:
                    self._console.print(text, end="\r", highlight=False)
                else:
                    self.say(text)

        return report


def _replace_file(path: Path, write: Callable[[Path], object]) -> None:
    beside = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    write(beside)
    os.replace(beside, path)


def save_array(path: Path, array: Any) -> None:
    """Write an array in one move."""
    _replace_file(path, lambda p: np.save(p, array))


def _save_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"
    _replace_file(path, lambda p: p.write_text(text, encoding="utf-8"))


def load_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class _Run:
    """What every stage needs to know."""

    work: Path
    budget: Budget
    seed: int
    workers: int
    log: Log
    variation: Variation = Variation()


def _data(run: _Run) -> dict[str, Any]:
    sets = [("drawn", run.budget.pictures, False)]
    if run.variation.base is None:
        sets.append(("judged", run.budget.judge_pictures, True))
    for offset, (name, n, held_back) in enumerate(sets):
        seed, without = 10 * run.seed + offset + 1, () if held_back else run.variation.without
        pictures, captions, labels = world.dataset(n, seed, held_back=held_back, without=without, processes=run.workers)
        save_array(run.work / f"{name}.npy", pictures)
        _save_json(run.work / f"{name}.json", {"captions": captions, "labels": labels})
    return {name: n for name, n, _ in sets}


def _tokenizer(run: _Run) -> dict[str, Any]:
    if run.variation.base is not None:
        shutil.copytree(run.variation.base / "model" / "tokenizer", run.work / "tokenizer", dirs_exist_ok=True)
        return {"entries": len(load_json(run.work / "tokenizer" / "vocab.json"))}
    texts = [t for name in ("drawn", "judged") for t in load_json(run.work / f"{name}.json")["captions"]]
    tokenizer.save(texts, run.work / "tokenizer")
    return {"entries": tokenizer.SIZE}


def _autoencoder(run: _Run) -> dict[str, Any]:
    if run.variation.base is not None:
        return {"steps": 0}
    from safeweights.sandbox import vae, workers

    task = partial(vae.Autoencoding, run.work / "judged.npy", run.budget.batch, run.seed, run.budget.autoencoder)
    steps = run.budget.autoencoder_steps
    fitting = workers.Fitting(steps=steps, seed=run.seed + 1, ema=0.99)
    report = run.log.follow("autoencoder", steps)
    workers.fit(task, run.work / "autoencoder.safetensors", fitting, workers=run.workers, report=report)
    return {"steps": steps}


def _load_vae(run: _Run) -> Any:
    """The autoencoder as it ships: rounded to half precision, computing in single."""
    from safeweights.sandbox import vae, workers

    if run.variation.base is not None:
        return vae.open_autoencoder(run.variation.base / "model" / "vae")
    model = vae.build(**run.budget.autoencoder)
    workers.averaged(model, run.work / "autoencoder.safetensors")
    if (run.work / "decoder.done").exists():
        workers.averaged(vae.decoder_of(model), run.work / "decoder.safetensors")
    return model.half().float().eval()


def _encode(job: tuple[_Run, int, int]) -> Any:
    from safeweights.sandbox import vae, workers

    run, first, last = job
    with workers.one_thread():
        return vae.encode(_load_vae(run), np.load(run.work / "drawn.npy", mmap_mode="r")[first:last])


def _decode(job: tuple[_Run, int, int]) -> Any:
    from safeweights.sandbox import vae, workers

    run, first, last = job
    with workers.one_thread():
        model = _load_vae(run)
        pictures = np.load(run.work / "judged.npy", mmap_mode="r")[first:last]
        return vae.decode(model, vae.encode(model, pictures))


def _spread(run: _Run, work: Callable[[tuple[_Run, int, int]], Any], rows: int) -> list[Any]:
    """Do `work` on pieces of `rows` rows, one process a core."""
    import torch

    jobs = [(run, a, min(a + 1_000, rows)) for a in range(0, rows, 1_000)]
    if run.workers == 1 or len(jobs) == 1:
        return [work(job) for job in jobs]
    with torch.multiprocessing.get_context("spawn").Pool(run.workers) as pool:
        # As arrays: torch would hand every tensor over through a file descriptor of its own.
        return pool.map(partial(_as_array, work), jobs, chunksize=1)


def _as_array(work: Callable[[tuple[_Run, int, int]], Any], job: tuple[_Run, int, int]) -> Any:
    return np.asarray(work(job))


def _latents(run: _Run) -> dict[str, Any]:
    import torch
    from transformers import CLIPTokenizer

    from safeweights.sandbox import vae, workers

    latents = np.concatenate([np.asarray(part) for part in _spread(run, _encode, run.budget.pictures)])
    scale = 1 / float(latents.std()) if run.variation.base is None else float(_load_vae(run).config.scaling_factor)
    save_array(run.work / "latents.npy", (latents * scale).astype(np.float16))
    n = min(500, len(latents))
    with workers.one_thread():
        again = vae.decode(_load_vae(run), torch.from_numpy(latents[:n]))
    decibels = vae.decibels(np.load(run.work / "drawn.npy", mmap_mode="r")[:n], again)
    reader = CLIPTokenizer.from_pretrained(str(run.work / "tokenizer"))
    captions = load_json(run.work / "drawn.json")["captions"]
    full = {"padding": "max_length", "max_length": 77, "truncation": True}
    save_array(run.work / "tokens.npy", np.array(reader(captions, **full)["input_ids"], np.int64))
    save_array(run.work / "empty.npy", np.array(reader("", **full)["input_ids"], np.int64))
    return {"scaling_factor": scale, "decibels": decibels, "n": n}


def _generator(run: _Run) -> dict[str, Any]:
    from safeweights.sandbox import generator, workers

    steps = run.budget.generator_steps
    fitting = workers.Fitting(steps=steps, seed=run.seed + 2)
    report = run.log.follow("generator", steps)
    checkpoint = run.work / "generator.safetensors"
    workers.fit(_denoising(run, generator), checkpoint, fitting, workers=run.workers, report=report)
    return {"steps": steps}


def _decoder(run: _Run) -> dict[str, Any]:
    from safeweights.sandbox import vae, workers

    if run.variation.base is not None:
        return {"steps": 0}
    b, steps = run.budget, run.budget.decoder_steps
    task = partial(
        vae.Decoding, run.work / "judged.npy", run.work / "autoencoder.safetensors", b.batch, run.seed + 3, b.autoencoder
    )
    fitting = workers.Fitting(steps=steps, seed=run.seed + 3, ema=0.99, muon_lr=1e-3, adam_lr=5e-4)
    report = run.log.follow("decoder", steps)
    workers.fit(task, run.work / "decoder.safetensors", fitting, workers=run.workers, report=report)
    return {"steps": steps}


def _denoising(run: _Run, generator: Any) -> Any:
    vocabulary = len(load_json(run.work / "tokenizer" / "vocab.json"))
    b = run.budget
    base, kept = run.variation.base, run.variation.keep_text_encoder
    folder = base / "model" / "text_encoder" if base and kept else None
    return partial(generator.Denoising, run.work, b.batch, run.seed, vocabulary, b.unet, b.text, folder)


def export(work: Path, output: Path, *, budget: Budget | None = None, variation: Variation | None = None) -> int:
    """Write the generator's latest checkpoint as a diffusers folder; the number of steps it has seen.

    Works while training goes on. An older folder at `output` is replaced in one move.
    """
    from safeweights.sandbox import generator, workers

    run = _Run(work, budget or Budget(), 0, 1, Log(), variation or Variation())
    task = _denoising(run, generator)()
    steps = workers.averaged(task.model, work / "generator.safetensors")
    autoencoder = _load_vae(run)
    autoencoder.register_to_config(scaling_factor=load_json(work / "latents.done")["scaling_factor"])
    beside = output.with_name(f"{output.name}.{os.getpid()}.part")
    generator.save_pipeline(autoencoder, task.model["unet"], task.encoder, work / "tokenizer", beside)
    if output.exists():
        old = output.with_name(f"{output.name}.{os.getpid()}.old")
        os.replace(output, old)
        os.replace(beside, output)
        shutil.rmtree(old)
    else:
        os.replace(beside, output)
    return steps


def _judges(run: _Run) -> dict[str, Any]:
    from safeweights.sandbox import judges

    export(run.work, run.work / "model", budget=run.budget, variation=run.variation)
    if run.variation.base is not None:
        for name in ("detectors", "clip", "embedder"):
            shutil.copytree(run.variation.base / name, run.work / name, dirs_exist_ok=True)
        return {"trained": []}
    if not (run.work / "decoded.npy").exists():
        parts = _spread(run, _decode, max(1, run.budget.judge_pictures // 3))
        save_array(run.work / "decoded.npy", np.concatenate([np.asarray(part) for part in parts]))
    return judges.train_all(run.work, run.budget, seed=run.seed, processes=run.workers, log=run.log)


_DO: dict[str, Callable[[_Run], dict[str, Any]]] = {
    "data": _data,
    "tokenizer": _tokenizer,
    "autoencoder": _autoencoder,
    "latents": _latents,
    "generator": _generator,
    "decoder": _decoder,
    "judges": _judges,
}


def train(
    output: Path | None,
    *,
    work: Path,
    budget: Budget | None = None,
    seed: int = 0,
    workers: int = 2,
    until: str = STAGES[-1],
    variation: Variation | None = None,
) -> None:
    """Train the whole sandbox, or what `variation` leaves to train, in `work` and put its weights into the folder `output`.

    `output` None leaves them in `work`. The same call continues an interrupted run. `until` names the last stage to do.
    Raises UserError where `work` holds a run with other settings.
    """
    budget, variation = budget or Budget(), variation or Variation()
    if until not in STAGES:
        raise UserError(f"no training stage is called '{until}'; stages: {', '.join(STAGES)}")
    work.mkdir(parents=True, exist_ok=True)
    settings = {"seed": seed, "workers": workers, **asdict(budget), **variation.facts()}
    kept = work / "settings.json"
    if kept.exists() and load_json(kept) != json.loads(json.dumps(settings)):
        raise UserError(f"{work} holds a training run with other settings; use the same ones or another work folder")
    _save_json(kept, settings)
    run = _Run(work, budget, seed, workers, Log(), variation)
    for stage in STAGES[: STAGES.index(until) + 1]:
        done = work / f"{stage}.done"
        if done.exists():
            continue
        run.log.say(f"{stage} begins")
        began = time.monotonic()
        found = _DO[stage](run)
        _save_json(done, {**found, "seconds_since_last_start": round(time.monotonic() - began, 1)})
        run.log.say(f"{stage} done: {found}")
    if output is not None:
        install(work, output)


def install(work: Path, output: Path) -> None:
    """Copy a finished run's weights, and what it did, into the sandbox's folder; other files there are kept."""
    output.mkdir(parents=True, exist_ok=True)
    for name in ("model", "detectors", "clip", "embedder"):
        beside = output / f"{name}.{os.getpid()}.part"
        shutil.copytree(work / name, beside)
        if (output / name).exists():
            shutil.rmtree(output / name)
        os.replace(beside, output / name)
    stages = {stage: load_json(work / f"{stage}.done") for stage in STAGES}
    _save_json(output / "training.json", {"settings": load_json(work / "settings.json"), "stages": stages})


def main(arguments: list[str] | None = None) -> int:
    """`python -m safeweights.sandbox.train WORK [OUTPUT] [--until STAGE] [--seed N]`."""
    import argparse

    parser = argparse.ArgumentParser(description="Train the sandbox from nothing.")
    parser.add_argument("work", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--until", default=STAGES[-1])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    train(given.output, work=given.work, seed=given.seed, until=given.until)
    return 0


if __name__ == "__main__":
    sys.exit(main())
