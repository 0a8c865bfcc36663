"""How good the sandbox is: its judges on fresh drawings, its generator before its judges, and what it looks like."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from safeweights.core.intervals import wilson
from safeweights.models.quiet import quiet
from safeweights.models.vision import CLIP, Backbone, Embedder
from safeweights.sandbox import vae, world
from safeweights.sandbox.workers import one_thread

FRESH_SEED = 9_000_000  # pictures and people drawn for measuring; training never comes near
STEPS, GUIDANCE = 20, 4.0
Say = Callable[[str], None]


def _rate(right: int, n: int) -> dict[str, Any]:
    """A measured proportion with its Wilson 95 % interval."""
    low, high = wilson(right, n)
    return {"n": n, "right": right, "rate": round(right / n, 4), "ci95": [round(low, 4), round(high, 4)]}


def concepts() -> list[tuple[str, str]]:
    """(kind, name) of everything the generator is trained on and judged by."""
    return [
        *(("style", s) for s in world.STYLES),
        *(("object", o) for o in world.OBJECTS),
        *(("identity", p.name) for p in world.IDENTITIES),
        ("content", "emblem"),
    ]


def open_pipeline(folder: Path) -> Any:
    """The Stable Diffusion pipeline of a folder, quiet."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(folder: Path, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 32) -> NDArray[np.uint8]:
    """One picture a prompt by DDIM, 20 steps, guidance 4; the same seed gives the same start. (n, 64, 64, 3)."""
    pipeline = open_pipeline(folder)
    parts = []
    with one_thread(), quiet():
        for i in range(0, len(prompts), batch):
            chances = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch]]
            made = pipeline(
                list(prompts[i : i + batch]),
                height=world.SIZE,
                width=world.SIZE,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=chances,
                output_type="np",
            ).images
            parts.append((made * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def _sample(job: tuple[Path, list[str], list[int]]) -> NDArray[np.uint8]:
    return sample(*job)


def sample_side_by_side(folder: Path, prompts: Sequence[str], seeds: Sequence[int], processes: int = 2) -> NDArray[np.uint8]:
    """`sample` in several processes; their number changes nothing beyond rounding."""
    if processes == 1:
        return sample(folder, prompts, seeds)
    cut = np.array_split(np.arange(len(prompts)), processes)
    jobs = [(folder, [prompts[i] for i in c], [int(seeds[i]) for i in c]) for c in cut if len(c)]
    with torch.multiprocessing.get_context("spawn").Pool(processes) as pool:
        return np.concatenate(pool.map(_sample, jobs, chunksize=1))


class Detectors:
    """The four detectors of a sandbox folder."""

    def __init__(self, folder: Path) -> None:
        # Through the same door as a user's own detector, preprocessing included.
        self._models = {
            kind: Backbone(str(folder / "detectors" / kind), "AutoModelForImageClassification", f"{kind} detector")
            for kind in ("style", "object", "identity", "content")
        }

    @torch.no_grad()
    def probabilities(self, kind: str, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, classes)."""
        judge = self._models[kind]
        logits = [judge.model(pixel_values=pixels).logits for pixels in judge.pixels(_as_images(pictures))]
        found: NDArray[np.float32] = torch.cat(logits).softmax(1).numpy()
        return found

    def names(self, kind: str) -> list[str]:
        labels = self._models[kind].model.config.id2label
        return [labels[i] for i in range(len(labels))]

    def label(self, kind: str, pictures: NDArray[np.uint8]) -> list[str]:
        """The likeliest label of every picture."""
        names = self.names(kind)
        return [names[i] for i in self.probabilities(kind, pictures).argmax(1)]


def judge_judges(folder: Path, *, n: int = 4_000, seed: int = FRESH_SEED, processes: int = 2) -> dict[str, Any]:
    """The detectors, CLIP and the embedder on freshly drawn pictures, held-back concepts included."""
    pictures, captions, truths = world.dataset(n, seed, held_back=True, processes=processes)
    detectors = Detectors(folder)
    model = open_pipeline(folder / "model")
    part = pictures[: max(1, n // 4)]
    again = vae.decode(model.vae, vae.encode(model.vae, part))
    found: dict[str, Any] = {"n": n, "seed": seed, "detectors": {}}
    found["autoencoder"] = {"decibels": round(vae.decibels(part, again), 2), "n": len(part)}
    for kind in ("style", "object", "identity", "content"):
        guesses, truth = detectors.label(kind, pictures), [t[kind] for t in truths]
        right = [a == b for a, b in zip(guesses, truth, strict=True)]
        after = [a == b for a, b in zip(detectors.label(kind, again), truth, strict=False)]
        classes = {
            name: _rate(sum(r for r, t in zip(right, truth, strict=True) if t == name), truth.count(name))
            for name in detectors.names(kind)
            if name in truth
        }
        # What an eraser's user sees: how often a detector reports a concept that is not there, at threshold 0.5.
        names, probabilities = detectors.names(kind), detectors.probabilities(kind, pictures)
        absent = {
            name: _rate(int((probabilities[[t != name for t in truth], i] >= 0.5).sum()), sum(t != name for t in truth))
            for i, name in enumerate(names)
            if name not in ("none", "other")
        }
        found["detectors"][kind] = {
            "drawn": _rate(sum(right), len(right)),
            "reconstructed": _rate(sum(after), len(after)),
            "per_class": classes,
            "false_alarms": absent,
        }
    found["clip"] = _judge_clip(folder, pictures[:1000], captions[:1000], truths[:1000])
    found["embedder"] = _judge_embedder(folder)
    return found


def _as_images(pictures: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255


def _judge_clip(
    folder: Path, pictures: NDArray[np.uint8], captions: Sequence[str], truths: Sequence[dict[str, str]]
) -> dict[str, Any]:
    """Zero-shot choice among all names of a kind, and the cosine of a caption with its own and another picture."""
    clip = CLIP(str(folder / "clip"))
    seen = clip.images(_as_images(pictures))
    texts = {
        "style": ("a {} picture", [*world.STYLES, *world.HELD_BACK_STYLES]),
        "object": ("a picture of a {}", [*world.OBJECTS, *world.HELD_BACK_OBJECTS]),
        "identity": ("a portrait of {}", [p.name for p in world.IDENTITIES]),
    }
    found: dict[str, Any] = {}
    for kind, (template, names) in texts.items():
        asked = [i for i, t in enumerate(truths) if t[kind] in names and (kind != "style" or t["object"] != "none")]
        best = (seen[asked] @ clip.texts([template.format(name) for name in names]).T).argmax(1)
        right = sum(names[b] == truths[i][kind] for b, i in zip(best.tolist(), asked, strict=True))
        found[f"zero_shot_{kind}"] = _rate(right, len(asked))
    written = clip.texts(captions)
    found["cosine_own_caption"] = round(float((seen * written).sum(1).mean()), 4)
    found["cosine_other_caption"] = round(float((seen * written.roll(1, 0)).sum(1).mean()), 4)
    return found


def _judge_embedder(folder: Path, people: int = 60, each: int = 6) -> dict[str, Any]:
    """Can faces of people never seen before be told apart by the cosine of their features?"""
    from safeweights.sandbox.judges import draw_people

    faces = draw_people(each, FRESH_SEED, first=1_000_000, people=people)
    features = Embedder(str(folder / "embedder")).features(_as_images(faces))
    features = torch.nn.functional.normalize(features, dim=1).reshape(each, people + 8, -1)[:, 8:].reshape(each * people, -1)
    cosine = (features @ features.T).numpy()
    who = np.tile(np.arange(people), each)
    upper = np.triu(np.ones_like(cosine, bool), 1)
    same, other = cosine[(who[:, None] == who) & upper], cosine[(who[:, None] != who) & upper]
    cuts = np.quantile(other, np.linspace(0, 1, 2001))
    errors = np.maximum([(same < c).mean() for c in cuts], [(other >= c).mean() for c in cuts])
    return {
        "held_back_people": people,
        "pairs": [len(same), len(other)],
        "equal_error_rate": round(float(errors.min()), 4),
        "cosine_same": round(float(same.mean()), 4),
        "cosine_other": round(float(other.mean()), 4),
    }


def judge_generator(
    folder: Path, *, n: int = 32, seed: int = 0, processes: int = 2, only: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[tuple[str, str], NDArray[np.uint8]]]:
    """Rates judged right of `n` generated pictures a concept, prompted from the test split, and the pictures."""
    asked = [c for c in concepts() if not only or c[1] in only]
    prompts = [world.concept_prompts(kind, name, n=n, seed=seed, split="test") for kind, name in asked]
    flat = [p for group in prompts for p in group]
    pictures = sample_side_by_side(folder / "model", flat, [1_000_000 * seed + i for i in range(len(flat))], processes=processes)
    detectors = Detectors(folder)
    found: dict[str, Any] = {}
    sheets = {}
    for i, (kind, name) in enumerate(asked):
        mine = pictures[i * n : (i + 1) * n]
        sheets[kind, name] = mine
        found[name] = {"kind": kind, **_rate(detectors.label(kind, mine).count(name), n)}
    return found, sheets


def evaluate(
    folder: Path, *, n: int = 32, fresh: int = 4_000, seed: int = 0, processes: int = 2, sheet: Path | None = None
) -> dict[str, Any]:
    """Measure a sandbox folder (model, detectors, clip, embedder); `sheet` is where the contact sheet goes."""
    began = time.monotonic()
    with one_thread():
        judged = judge_judges(folder, n=fresh, processes=processes)
        generated, pictures = judge_generator(folder, n=n, seed=seed, processes=processes)
    if sheet is not None:
        contact_sheet(pictures, sheet, rates={name: v["rate"] for name, v in generated.items()})
    training = folder / "training.json"
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    return {
        "judges": judged,
        "generator": {
            "sampling": {"scheduler": "ddim", "steps": STEPS, "guidance_scale": GUIDANCE, "dtype": "float32"},
            "prompts": "world.concept_prompts(split='test')",
            "seed": seed,
            "concepts": generated,
        },
        "weights_bytes": size,
        "training": json.loads(training.read_text(encoding="utf-8")) if training.exists() else None,
        "seconds": round(time.monotonic() - began, 1),
    }


def keep(found: dict[str, Any], folder: Path) -> None:
    """Ship what `evaluate` found: measured.json for the whole, and one beside each detector with its error rates by label.

    A detector's ``false_positive`` and ``false_negative`` are of fresh drawings; ``generated`` counts the generated pictures of
    the concept that it missed.
    """
    made = found["generator"]["concepts"]
    tables = {}
    for kind, judged in found["judges"]["detectors"].items():
        tables[kind] = {
            label: {
                "false_positive": alarms["rate"],
                "false_negative": round(1 - judged["per_class"][label]["rate"], 4) if label in judged["per_class"] else None,
                "drawn": {"present": judged["per_class"].get(label, {}).get("n", 0), "absent": alarms["n"]},
                **(
                    {"generated": {"n": made[label]["n"], "missed": made[label]["n"] - made[label]["right"]}}
                    if label in made
                    else {}
                ),
            }
            for label, alarms in judged["false_alarms"].items()
        }
    (folder / "measured.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for kind, labels in tables.items():
        path = folder / "detectors" / kind / "measured.json"
        path.write_text(json.dumps({"labels": labels}, indent=1) + "\n", encoding="utf-8")


def contact_sheet(
    pictures: dict[tuple[str, str], NDArray[np.uint8]],
    path: Path,
    *,
    rates: dict[str, float] | None = None,
    columns: int = 7,
    title: str = "the safeweights sandbox",
) -> None:
    """A labelled grid, one row a concept: styles and people on the left, objects and the emblem on the right."""
    side, gap, label, top = 80, 4, 150, 64
    ink, faint, paper = (32, 33, 40), (130, 132, 142), (250, 249, 246)
    halves: list[list[tuple[str, str]]] = [
        [c for c in pictures if c[0] in ("style", "identity")],
        [c for c in pictures if c[0] in ("object", "content")],
    ]
    halves = [half for half in halves if half]
    wide = label + columns * (side + gap)
    rows = [len(half) + len({kind for kind, _ in half}) * 0.45 for half in halves]
    image = Image.new("RGB", (40 + len(halves) * (wide + 20), int(top + max(rows) * (side + gap) + 24)), paper)
    draw = ImageDraw.Draw(image)
    big, middle, small = (ImageFont.load_default(size=s) for s in (24, 15, 12))
    draw.text((30, 20), title, font=big, fill=ink)
    words = {"style": "styles", "identity": "people", "object": "objects", "content": "content"}
    for h, half in enumerate(halves):
        left, y, before = 30 + h * (wide + 20), float(top), ""
        for kind, name in half:
            if kind != before:
                draw.text((left, y + 10), words[kind], font=middle, fill=faint)
                y += 0.45 * (side + gap)
                before = kind
            draw.text((left, y + side / 2 - 16), name, font=middle, fill=ink)
            if rates and name in rates:
                draw.text((left, y + side / 2 + 4), f"judged right {rates[name]:.0%}", font=small, fill=faint)
            for i, picture in enumerate(pictures[kind, name][:columns]):
                shown = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
                image.paste(shown, (int(left + label + i * (side + gap)), int(y)))
            y += side + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)


def main(arguments: list[str] | None = None) -> int:
    """`python -m safeweights.sandbox.evaluate FOLDER [--n N] [--sheet PNG] [--json FILE]`."""
    import argparse

    parser = argparse.ArgumentParser(description="Measure a sandbox folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--fresh", type=int, default=4_000)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    found = evaluate(given.folder, n=given.n, fresh=given.fresh, sheet=given.sheet)
    text = json.dumps(found, indent=1)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
