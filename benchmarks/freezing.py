"""What a mask does to fine-tuning: illegal and legal users on pictures of their own, under every mask, on the sandbox.

    python benchmarks/freezing.py run -o runs/freezing --domain styles --masks none freezeasguard random xattn task-vector
    python benchmarks/freezing.py weights -o runs/freezing --domain styles     the freeze in the weights, and who undoes it
    python benchmarks/freezing.py tables -o runs/freezing                      Markdown, plots.json and mask.png of all that

Styles: polka dot and crosshatch are illegal, the style paper cut and the snowman legal; the generator has never seen any of
them, so what a fine-tune makes of them it has learnt from its pictures. Portraits and the emblem are known to it and erased with
UCE first. The publisher's pictures, the user's and those that tell likeness are disjoint; users are judged on test prompts.
Every cell is a line of cells.jsonl; a second run measures only what is missing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safeweights.core.concept import Concept, DetectorSpec, Prompt
from safeweights.core.intervals import wilson
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import ADAPTATIONS, GUARDS, configure, method, resolve
from safeweights.core.workspace import Workspace
from safeweights.detectors.load import open_detector
from safeweights.diffusion.adaptation import Shots
from safeweights.diffusion.noise import add_noise, generator
from safeweights.diffusion.sampling import candidates_of, generate
from safeweights.freezing.guard import shares, unet_shapes
from safeweights.freezing.rescale import apply_in_weights, level
from safeweights.metrics.similarity import similarity
from safeweights.models.door import open_model
from safeweights.models.vision import Embedder
from safeweights.records.depth_map import depth_map
from safeweights.records.mask import overlap
from safeweights.sandbox import world
from safeweights.sandbox.files import sandbox_concepts, weights_folder

SAMPLING = Sampling(width=64, height=64, steps=20, guidance_scale=4.0)
BASELINES = ("jt", "uce")
PUBLISHER, USER, JUDGE = 16, 16, 32
"""Pictures of each concept that the publisher has, that a user has, and that tell likeness."""


@dataclass(frozen=True)
class Domain:
    """Who is illegal, who is legal: (kind, what captions call it); ``erased`` are erased with UCE before the mask is learnt."""

    illegal: tuple[tuple[str, str], ...]
    legal: tuple[tuple[str, str], ...]
    erased: tuple[str, ...] = ()


DOMAINS = {
    "styles": Domain((("style", "polka dot"), ("style", "crosshatch")), (("style", "paper cut"), ("object", "snowman"))),
    "portraits": Domain(
        (("identity", "mira lund"), ("identity", "hugo santos")), (("object", "snowman"), ("style", "paper cut")),
        ("mira-lund", "hugo-santos"),
    ),
    "explicit": Domain((("content", world.EMBLEM),), (("object", "snowman"), ("style", "paper cut")), ("emblem",)),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "weights", "tables"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--domain", choices=DOMAINS, default="styles")
    parser.add_argument(
        "--masks",
        nargs="+",
        default=["none", *GUARDS],
        help="of the guards; none; or jt, uce: the illegal protected, nothing frozen",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the guards that have them")
    parser.add_argument("--label", default="", help="what the tables call a mask with other settings")
    parser.add_argument("--no-legal", action="store_true", help="learn masks without legal concepts")
    parser.add_argument("--illegal", type=int, help="learn masks from the first so many illegal concepts; the rest is unseen")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--budget", default="tensors")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--method", default="full", choices=ADAPTATIONS)
    parser.add_argument("--steps", nargs="+", type=int, default=[40, 80], help="optimiser steps after which a user is judged")
    parser.add_argument("--lr-scales", nargs="+", type=float, default=[1.0])
    parser.add_argument("--concepts", nargs="+", help="only these users")
    parser.add_argument("--power", type=int, default=6)
    parser.add_argument("--n", type=int, default=16, help="judged pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.what == "tables":
        tables(options.output)
        return
    for seed in options.seeds:
        for name in options.masks:
            mask = Bench(options, seed).mask(name)
            for concept, side in Bench(options, seed).users():
                if options.concepts and concept.term not in options.concepts:
                    continue
                for scale in options.lr_scales:
                    for freeze in ("honoured",) if options.what == "run" else ("in weights", "levelled first"):
                        Bench(options, seed).user(name, mask, concept, side, scale, freeze)


def pictures(kind: str, term: str, n: int, seed: int) -> tuple[Tensor, list[str]]:
    """n drawn pictures (n, 3, 64, 64) of a concept with captions that name it."""
    rng = np.random.default_rng([seed, *term.encode()])
    given: dict[str, Any] = {kind: term} if kind in ("style", "object") else {}
    if kind == "identity":
        given = {"person": term}
    if kind == "content":
        given = {"emblem": True}
    images, captions = [], []
    while len(captions) < n:
        scene = world.sample_scene(rng, **given)
        text = world.caption(scene, rng)
        if term in text:
            images.append(torch.from_numpy(np.array(world.draw(scene))).permute(2, 0, 1).float() / 255)
            captions.append(text)
    return torch.stack(images), captions


def concept_of(kind: str, term: str, folder: Path) -> Concept:
    """The concept with the publisher's pictures in a folder."""
    name = term.replace(" ", "-")
    place = folder / "publisher" / name
    if not (place / "metadata.jsonl").is_file():
        place.mkdir(parents=True, exist_ok=True)
        images, captions = pictures(kind, term, PUBLISHER, seed=1)
        for i, image in enumerate(images):
            Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(place / f"{i:03}.png")
        lines = [json.dumps({"file_name": f"{i:03}.png", "prompt": text}) for i, text in enumerate(captions)]
        (place / "metadata.jsonl").write_text("\n".join(lines))
    label = "emblem" if kind == "content" else term
    return Concept(
        name=name, kind=kind, term=term, prompts=tuple(Prompt(t) for t in world.concept_prompts(kind, term, n=8, seed=3)),
        test_prompts=tuple(Prompt(t) for t in world.concept_prompts(kind, term, n=64, seed=5, split="test")),
        images=place, anchor="a picture of a house",
        detector=DetectorSpec(type="image-classification", model=str(weights_folder() / "detectors" / kind), label=label),
    )  # fmt: skip


@cache
def start(domain: str) -> DiffusionModel:
    """The released model of a domain."""
    model, file = open_model("sandbox", device="cpu"), sandbox_concepts()
    if erased := DOMAINS[domain].erased:
        eraser = method("uce", latent_pixels=256)
        model = eraser.protect(model, file.pick(erased), retain=file.retain, rng=generator(0)).apply(model)
    return model


@cache
def protected(name: str, domain: str, folder: Path, seed: int) -> DiffusionModel:
    """A domain's model after another defence with its defaults: JT (IMMA on all illegal concepts) or UCE."""
    model, file = start(domain), sandbox_concepts()
    illegal = [concept_of(kind, term, folder) for kind, term in DOMAINS[domain].illegal]
    began = time.process_time()
    protection = method(name, latent_pixels=256).protect(
        model, illegal, retain=file.retain, rng=generator(seed), workspace=Workspace()
    )
    print(f"{name} on {domain}: {time.process_time() - began:.0f} s", flush=True)
    return protection.apply(model)


@cache
def embedder() -> Embedder:
    return Embedder(str(weights_folder() / "embedder"))


@torch.no_grad()
def loss_on(model: DiffusionModel, concept: Concept, noises: int = 2) -> float:
    """The denoising loss on the pictures that tell likeness, at timesteps spread evenly: how well the concept was learnt."""
    images, captions = pictures(concept.kind, concept.term, JUDGE, seed=7)
    rng, total = generator("loss", concept.name), 0.0
    x_0, c = Shots.encode(model, images, captions).x_0, model.embed(captions)
    for i in range(noises):
        t = ((torch.arange(JUDGE) + (i + 0.5) / noises) * len(model.alpha) / JUDGE).long()
        eps = torch.randn(x_0.shape, generator=rng)
        total += float((model.eps(add_noise(model, x_0, t, eps), t, c) - eps).square().mean())
    return total / noises


class Bench:
    """One seed of one domain: its masks and its users."""

    def __init__(self, options: Any, seed: int) -> None:
        self.options, self.seed, self.folder = options, seed, options.output
        self.domain: str = options.domain

    def users(self) -> list[tuple[Concept, str]]:
        """Every concept with the side it is on."""
        domain, known = DOMAINS[self.domain], self.options.illegal
        sides = (
            ("illegal", domain.illegal[:known]),
            ("unseen", domain.illegal[known:] if known else ()),
            ("legal", domain.legal),
        )
        return [(concept_of(kind, term, self.folder), side) for side, listed in sides for kind, term in listed]

    def label(self, name: str) -> str:
        """What tables and files call a mask."""
        if name in ("none", *BASELINES):
            return name
        told = self.options.label or name
        if name != "random":  # the only one that looks at no concept
            told += "-no-legal" if self.options.no_legal else ""
            told += f"-{self.options.illegal}-illegal" if self.options.illegal else ""
        return told

    def mask(self, name: str) -> frozenset[str]:
        """The names a guard freezes, learnt once."""
        if name in ("none", *BASELINES):
            return frozenset()
        o = self.options
        label = self.label(name)
        place = self.folder / "masks" / f"{self.domain}-{label}-{o.ratio}-{o.budget}-{self.seed}.json"
        if not place.is_file():
            place.parent.mkdir(exist_ok=True)
            given = dict(pair.split("=") for pair in o.set)
            cls = resolve(GUARDS, name, "guard")
            known = {key: value for key, value in given.items() if key in cls.__dataclass_fields__}
            guard = configure(cls, {**known, "ratio": o.ratio, "budget": o.budget})
            sides = self.users()
            began = time.process_time()
            illegal, legal = ([c for c, of in sides if of == side] for side in ("illegal", "legal"))
            legal = [] if o.no_legal else legal
            protection = guard.protect(start(self.domain), illegal, legal=legal, rng=generator(self.seed), workspace=Workspace())
            facts = {
                "domain": self.domain, "mask": label, "ratio": o.ratio, "budget": o.budget, "seed": self.seed,
                "settings": dict(protection.settings), "cost": dict(protection.cost), "frozen": sorted(protection.frozen),
                "shares": shares(protection.frozen, unet_shapes(start(self.domain))), "seconds": time.process_time() - began,
            }  # fmt: skip
            place.write_text(json.dumps(facts))
            print(f"{place.stem}: {facts['shares']} in {facts['seconds']:.0f} s", flush=True)
        return frozenset(json.loads(place.read_text())["frozen"])

    def released(self, name: str) -> DiffusionModel:
        """What users get: the domain's model, with a baseline protected against the illegal concepts."""
        if name not in BASELINES:
            return start(self.domain)
        return protected(name, self.domain, self.folder, self.seed)

    def user(self, name: str, mask: frozenset[str], concept: Concept, side: str, scale: float, freeze: str) -> None:
        """Fine-tune on the user's pictures and judge what the model then draws."""
        o = self.options
        key = {
            "domain": self.domain, "mask": self.label(name),
            "ratio": o.ratio if mask else 0.0, "budget": o.budget if mask else "", "seed": self.seed, "concept": concept.name,
            "side": side, "method": o.method, "lr_scale": scale, "freeze": freeze if mask else "none",
            "power": o.power if freeze != "honoured" and mask else 0, "n": o.n,
        }  # fmt: skip
        wanted = [steps for steps in o.steps if not self._known({**key, "steps": steps})]
        if not wanted:
            return
        model = self.released(name)
        if mask and freeze != "honoured":
            model = apply_in_weights(model, mask, power=o.power)[0].apply(model)
        if mask and freeze == "levelled first":
            model = model.with_tensors(level(model))
        tuned = configure(resolve(ADAPTATIONS, o.method, "adaptation"), {})
        tuned = replace(tuned, lr=tuned.lr * scale, steps=max(wanted))
        images, captions = pictures(concept.kind, concept.term, USER, seed=1000 + self.seed)
        began = time.process_time()
        found = tuned.fit(
            model, Shots.encode(model, images, captions), frozen=mask if freeze == "honoured" else frozenset(),
            class_prompts=["a picture of a house", "a tree", "a drawing of a car"], checkpoints=wanted, seed=self.seed,
        )  # fmt: skip
        seconds = time.process_time() - began
        for adapted in found:
            if adapted.steps in wanted:
                self._write({**key, "steps": adapted.steps, **self._judge(adapted.apply(model), concept), "fit_seconds": seconds})

    def _judge(self, model: DiffusionModel, concept: Concept) -> dict[str, Any]:
        n = self.options.n
        told: dict[str, Any] = {"loss": loss_on(model, concept), "seen": 0, "cosine": None, "cosine_interval": None}
        if not n:
            return told
        texts = [prompt.text for prompt in concept.test_prompts[:n]]
        drawn = generate(model, candidates_of(texts, [9000 + 100 * self.seed + i for i in range(n)]), SAMPLING)
        shown = open_detector(concept.detector, concept=concept).detect(drawn)
        likeness = similarity(drawn, pictures(concept.kind, concept.term, JUDGE, seed=7)[0], embedder(), paired=False)
        seen = int(shown.present.sum())
        return {**told, "seen": seen, "cosine": likeness.value, "cosine_interval": likeness.interval}

    def _write(self, cell: Mapping[str, Any]) -> None:
        with (self.folder / "cells.jsonl").open("a") as file:
            file.write(json.dumps(cell) + "\n")
        told = " ".join(str(cell[key]) for key in ("mask", "freeze", "concept", "method", "lr_scale", "steps"))
        print(f"{told}: {cell['seen']}/{cell['n']} cosine {cell['cosine']} loss {cell['loss']:.4f}", flush=True)

    def _known(self, key: Mapping[str, Any]) -> bool:
        return any(all(cell.get(name) == value for name, value in key.items()) for cell in cells(self.folder))


def cells(folder: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    file = folder / "cells.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


# ---------------------------------------------------------------------------------------------------- tables


def tables(folder: Path) -> None:
    """Print what was measured, and draw the masks."""
    measured = cells(folder)
    for domain in dict.fromkeys(cell["domain"] for cell in measured):
        mine = [cell for cell in measured if cell["domain"] == domain and cell["n"]]
        print(f"\n## {domain}\n")
        columns = (
            "mask",
            "freeze",
            "method, rate",
            "steps",
            "illegal rate",
            "cosine",
            "loss",
            "unseen rate",
            "cosine",
            "loss",
            "legal rate",
            "cosine",
            "loss",
            "seeds",
        )
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        rows = dict.fromkeys(
            (c["mask"], c["ratio"], c["budget"], c["freeze"], c["method"], c["lr_scale"], c["steps"]) for c in mine
        )
        for row in sorted(rows, key=lambda row: (row[4:], row[3], row[1], row[0])):
            own = [
                c
                for c in mine
                if (c["mask"], c["ratio"], c["budget"], c["freeze"], c["method"], c["lr_scale"], c["steps"]) == row
            ]
            told = [_side([cell for cell in own if cell["side"] == side]) for side in ("illegal", "unseen", "legal")]
            mask = row[0] if row[0] == "none" else f"{row[0]}, {100 * row[1]:.0f} % of {row[2]}"
            seeds = len({cell["seed"] for cell in own})
            print(f"| {mask} | {row[3]} | {row[4]} x{row[5]:g} | {row[6]} | {' | '.join(told)} | {seeds} |")
    masks = [json.loads(path.read_text()) for path in sorted((folder / "masks").glob("*.json"))]
    _stability(masks)
    learned = [mask for mask in masks if mask["mask"] == "freezeasguard"]
    plots = [depth_plot(learned)] if learned else []
    (folder / "plots.json").write_text(json.dumps(plots, indent=1))
    if plots:
        draw_heatmap(plots[0], folder / "mask.png")


def _side(found: Sequence[Mapping[str, Any]]) -> str:
    """rate (interval, n) | mean cosine, of all concepts and seeds of one side."""
    if not found:
        return "– | – | –"
    seen, n = sum(cell["seen"] for cell in found), sum(cell["n"] for cell in found)
    low, high = wilson(seen, n)
    means = [sum(cell[what] for cell in found) / len(found) for what in ("cosine", "loss")]
    return f"{seen / n:.2f} ({low:.2f}–{high:.2f}), n = {n} | {means[0]:.3f} | {means[1]:.4f}"


def _stability(masks: Iterable[Mapping[str, Any]]) -> None:
    groups: dict[tuple[Any, ...], list[frozenset[str]]] = {}
    told: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for mask in masks:
        key = (mask["domain"], mask["mask"], mask["ratio"], mask["budget"])
        groups.setdefault(key, []).append(frozenset(mask["frozen"]))
        told.setdefault(key, []).append(mask)
    columns = ("domain", "mask", "ratio", "share of tensors", "of parameters", "Jaccard over seeds", "chance")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for key, found in groups.items():
        pairs = [overlap(a, b) for i, a in enumerate(found) for b in found[:i]]
        jaccard = f"{sum(pairs) / len(pairs):.2f} ({len(found)} seeds)" if pairs else "one seed"
        share = [sum(m["shares"][what] for m in told[key]) / len(found) for what in ("tensors", "parameters")]
        chance = f"{share[0] / (2 - share[0]):.2f}"
        told_share = " | ".join(f"{value:.3f}" for value in share)
        print(f"| {key[0]} | {key[1]} | {key[2]} of {key[3]} | {told_share} | {jaccard} | {chance} |")


def depth_plot(masks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of frozen tensors by block and kind, over all given masks, as the report draws heatmaps."""
    frozen = Counter(name for mask in masks for name in mask["frozen"])
    domains = ", ".join(dict.fromkeys(mask["domain"] for mask in masks))
    whole = dict.fromkeys(unet_shapes(open_model("sandbox", device="cpu")), len(masks))
    return depth_map(frozen, whole, f"Share of tensors the learned masks freeze ({len(masks)} masks, {domains})")


def draw_heatmap(plot: Mapping[str, Any], path: Path) -> None:
    """A plain picture of a heatmap: darker is more."""
    from PIL import ImageDraw

    cell, left, top = 62, 130, 60
    image = Image.new("RGB", (left + cell * len(plot["columns"]) + 60, top + 28 * len(plot["rows"]) + 10), "white")
    pen = ImageDraw.Draw(image)
    pen.text((8, 8), plot["title"], fill="black")
    for j, column in enumerate(plot["columns"]):
        pen.text((left + cell * j + 2, top - 18), column[:11], fill="black")
    for i, (row, values) in enumerate(zip(plot["rows"], plot["values"], strict=True)):
        pen.text((8, top + 28 * i + 8), row, fill="black")
        for j, value in enumerate(values):
            box = (left + cell * j, top + 28 * i, left + cell * j + cell - 2, top + 28 * i + 26)
            if value is None:
                pen.rectangle(box, outline=(225, 225, 225))
                continue
            shade = int(255 * (1 - 0.85 * value))
            pen.rectangle(box, fill=(shade, shade, 255))
            pen.text((box[0] + 18, box[1] + 8), f"{value:.2f}", fill="white" if value > 0.6 else "black")
    image.save(path)


if __name__ == "__main__":
    main()
