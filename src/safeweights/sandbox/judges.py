"""The sandbox's judges: four detectors, a small CLIP and an embedder, all trained on drawn pictures only.

They see pictures as drawn and as the autoencoder gives them back, shifted, noisy, blurred, sharpened and in other
contrasts, but never a generated one: a judge must not learn the model it judges.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from safeweights.sandbox import generator, train, vae, workers, world

KINDS = ("style", "object", "identity", "content")
DETECTOR: dict[str, Any] = {
    "num_channels": 3,
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 96, 128],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
CLIP_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
}
CLIP_VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": world.SIZE,
    "patch_size": 8,
}
PEOPLE = 200  # further people the embedder learns to tell apart
JUNK = "none"  # the label of pictures that show nothing


def classes(kind: str) -> list[str]:
    """A detector's labels, held-back concepts included."""
    return {
        "style": [*world.STYLES, *world.HELD_BACK_STYLES, JUNK],
        "object": [*world.OBJECTS, *world.HELD_BACK_OBJECTS, "none"],
        "identity": [*(p.name for p in world.IDENTITIES), "other", "none"],
        "content": ["emblem", "none"],
    }[kind]


def augment(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Shift by up to 5 pixels, change contrast and light, blur or sharpen, add noise; (n, 3, h, w) in [-1, 1]."""
    n, _, height, width = x.shape
    padded = F.pad(x, (5, 5, 5, 5), mode="replicate")
    dy, dx = rng.integers(0, 11, (2, n))
    x = torch.stack([p[:, a : a + height, b : b + width] for p, a, b in zip(padded, dy, dx, strict=True)])

    def each(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (n, 1, 1, 1)).astype(np.float32))

    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + each(-1.0, 0.8) * (x - soft)
    middle = x.mean((1, 2, 3), keepdim=True)
    x = (x - middle) * each(0.75, 1.2) + middle + each(-0.15, 0.15)
    noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32))
    return (x + each(0.0, 0.12) * noise).clamp(-1, 1)


def junk(n: int, rng: np.random.Generator) -> Tensor:
    """Pictures of nothing: plain fields, white noise and clouds of every coarseness, (n, 3, 64, 64) in [-1, 1]."""
    made = []
    for cell in rng.choice([1, 2, 4, 8, 16, 32, 64], n):
        field = torch.from_numpy(rng.standard_normal((1, 3, world.SIZE // cell, world.SIZE // cell), np.float32))
        if cell > 1:
            field = F.interpolate(field, size=world.SIZE, mode="bilinear", align_corners=False)
        base = torch.from_numpy(rng.uniform(-0.9, 0.9, (1, 3, 1, 1)).astype(np.float32))
        made.append(base + field * float(rng.uniform(0.05, 0.7)))
    return torch.cat(made).clamp(-1, 1)


@dataclass
class _Pictures:
    """Drawn pictures, half of the draws of the first rows replaced by what the autoencoder makes of them."""

    work: Path

    def __post_init__(self) -> None:
        self._drawn = np.load(self.work / "judged.npy", mmap_mode="r")
        self._decoded = np.load(self.work / "decoded.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._drawn)

    def take(self, rows: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        found = self._drawn[rows]
        again = (rows < len(self._decoded)) & (rng.random(len(rows)) < 0.7)
        found[again] = self._decoded[rows[again]]
        return vae.to_model(found)


def _truths(work: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = train.load_json(work / "judged.json")["labels"]
    return found


def _balanced(labels: NDArray[np.int64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows: one half drawn freely, the other from every class alike."""
    free = rng.integers(0, len(labels), n - n // 2)
    present = np.unique(labels)
    chosen = [int(rng.choice(np.flatnonzero(labels == c))) for c in rng.choice(present, n // 2)]
    return np.concatenate([free, np.array(chosen, np.int64)])


@dataclass
class Detecting:
    """Classify pictures by one question."""

    work: Path
    kind: str
    batch: int
    seed: int

    def __post_init__(self) -> None:
        from transformers import ResNetConfig, ResNetForImageClassification

        names = classes(self.kind)
        config = ResNetConfig(**DETECTOR, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
        self.model: nn.Module = ResNetForImageClassification(config)
        self._pictures = _Pictures(self.work)
        self._labels = np.array([names.index(t[self.kind]) for t in _truths(self.work)], np.int64)
        self._nothing = names.index(JUNK)

    def loss(self, step: int, rank: int, workers: int) -> Tensor:
        rng = np.random.default_rng([self.seed, step, rank])
        rows = _balanced(self._labels, self.batch, rng)
        empty = max(1, self.batch // 16)
        x = torch.cat([augment(self._pictures.take(rows, rng), rng), junk(empty, rng)])
        y = torch.from_numpy(np.concatenate([self._labels[rows], np.full(empty, self._nothing)]))
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(x).logits
        return F.cross_entropy(logits.float(), y, label_smoothing=0.02)


class _Contrast(nn.Module):
    """CLIP, and linear questions about its image features that help it to learn and are thrown away."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
        text = {"vocab_size": vocabulary, "projection_dim": 128, **CLIP_TEXT, **ends}
        vision = {"projection_dim": 128, **CLIP_VISION}
        self.clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
        self.heads = nn.ModuleDict({kind: nn.Linear(128, len(classes(kind))) for kind in KINDS})


@dataclass
class Contrasting:
    """Tell which caption belongs to which picture of a batch."""

    work: Path
    batch: int
    seed: int

    def __post_init__(self) -> None:
        from transformers import CLIPTokenizer

        reader = CLIPTokenizer.from_pretrained(str(self.work / "tokenizer"))
        self.model = _Contrast(len(reader))
        captions = train.load_json(self.work / "judged.json")["captions"]
        self._tokens = torch.tensor(reader(captions, padding="longest")["input_ids"])
        self._pictures = _Pictures(self.work)
        self._labels = {kind: torch.tensor([classes(kind).index(t[kind]) for t in _truths(self.work)]) for kind in KINDS}

    def loss(self, step: int, rank: int, workers: int) -> Tensor:
        rng = np.random.default_rng([self.seed, step, rank])
        rows = vae.shuffled(len(self._pictures), self.batch * workers, step, self.seed)[rank::workers]
        x = augment(self._pictures.take(rows, rng), rng)
        tokens = self._tokens[rows]
        with torch.autocast("cpu", torch.bfloat16):
            out = self.model.clip(input_ids=tokens, pixel_values=x)
        image, text = out.image_embeds.float(), out.text_embeds.float()
        same = (tokens[:, None] == tokens[None]).all(-1).float()  # one caption may fit several pictures
        target = same / same.sum(1, keepdim=True)
        logits = image @ text.T * self.model.clip.logit_scale.exp().clamp(max=100.0)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        for kind, head in self.model.heads.items():
            loss = loss + 0.3 * F.cross_entropy(head(image * 8), self._labels[kind][rows])
        return loss


@dataclass
class Embedding:
    """Features that tell people, styles and objects apart by their direction."""

    work: Path
    batch: int
    seed: int

    def __post_init__(self) -> None:
        from transformers import ResNetConfig, ResNetModel

        counts = {"style": len(classes("style")), "object": len(classes("object")), "person": PEOPLE + 8}
        heads = nn.ModuleDict({name: nn.Linear(128, n, bias=False) for name, n in counts.items()})
        self.model = nn.ModuleDict({"net": ResNetModel(ResNetConfig(**DETECTOR)), "heads": heads})
        self._pictures = _Pictures(self.work)
        self._faces = np.load(self.work / "people.npy", mmap_mode="r")
        self._labels = {
            kind: torch.tensor([classes(kind).index(t[kind]) for t in _truths(self.work)]) for kind in ("style", "object")
        }

    def _logits(self, name: str, features: Tensor, margin_for: Tensor | None = None) -> Tensor:
        weight = self.model["heads"][name].weight  # type: ignore[index]
        cosine = F.normalize(features) @ F.normalize(weight).T
        if margin_for is not None:
            cosine = cosine - 0.15 * F.one_hot(margin_for, cosine.shape[1])
        return cosine * 20

    def loss(self, step: int, rank: int, workers: int) -> Tensor:
        rng = np.random.default_rng([self.seed, step, rank])
        n = self.batch // 2
        rows = rng.integers(0, len(self._pictures), n)
        people = rng.integers(0, len(self._faces), n)
        faces = vae.to_model(self._faces[people])
        x = augment(torch.cat([self._pictures.take(rows, rng), faces]), rng)
        with torch.autocast("cpu", torch.bfloat16):
            features = self.model["net"](x).pooler_output.flatten(1)
        features = features.float()
        who = torch.from_numpy(people % (PEOPLE + 8))
        loss = F.cross_entropy(self._logits("person", features[n:], who), who)
        for kind, labels in self._labels.items():
            loss = loss + F.cross_entropy(self._logits(kind, features[:n]), labels[rows])
        return loss


def draw_people(pictures_each: int, seed: int, first: int = 0, people: int = PEOPLE) -> NDArray[np.uint8]:
    """Faces of the eight identities and of `people` others, person after person and round after round."""
    rng = np.random.default_rng([seed, first])
    who = [*world.IDENTITIES, *(world.person(first + i) for i in range(people))]
    return np.stack([np.asarray(world.draw(world.sample_scene(rng, person=p))) for _ in range(pictures_each) for p in who])


def _processor(folder: Path, clip: bool = False) -> None:
    from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

    half = [0.5, 0.5, 0.5]
    if clip:
        side = {"height": world.SIZE, "width": world.SIZE}
        made = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False, image_mean=half, image_std=half)
    else:
        side = {"height": world.SIZE, "width": world.SIZE}
        made = ViTImageProcessorPil(size=side, image_mean=half, image_std=half)
    made.save_pretrained(str(folder))


def _job(job: tuple[str, Path, Any, int]) -> str:
    """Train one judge and put its folder into place."""
    name, work, budget, seed = job
    log = train.Log()
    kind = name.removeprefix("detector-")
    small, target = min(64, budget.judge_pictures), work / ("detectors" if kind != name else ".") / kind
    if (target / "config.json").exists():
        return name
    make: Callable[[], workers.Task]
    steps = budget.judge_steps
    if kind != name:
        make = partial(Detecting, work, kind, small, seed)
        steps = max(1, steps // 2) if kind == "content" else steps
    elif name == "clip":
        make, steps = partial(Contrasting, work, min(96, small * 2), seed), budget.clip_steps
    else:
        make, steps = partial(Embedding, work, small, seed), budget.embedder_steps
    fitting = workers.Fitting(steps=steps, seed=seed, ema=0.0, adam_lr=2e-3)
    model = workers.fit(make, work / f"{name}.safetensors", fitting, workers=1, report=log.follow(name, steps))
    beside = work / f"{name}.{os.getpid()}.part"
    parts = dict(model.named_children())
    kept = {"clip": parts.get("clip"), "embedder": parts.get("net")}.get(name) or model
    generator.save_half(kept, beside)
    _processor(beside, clip=name == "clip")
    if name == "clip":
        for file in (work / "tokenizer").iterdir():
            shutil.copy(file, beside / file.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(beside, target)
    return name


def _prepare(parent: int) -> None:
    threading.Thread(target=workers.die_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)


def train_all(work: Path, budget: Any, *, seed: int, processes: int, log: Any) -> dict[str, Any]:
    """Train every judge, `processes` side by side, each on one thread. Finished ones are skipped."""
    if not (work / "people.npy").exists():
        train.save_array(work / "people.npy", draw_people(max(1, budget.judge_pictures // 800), seed))
    names = ("detector-identity", "detector-object", "detector-style", "detector-content", "clip", "embedder")
    jobs = [(name, work, budget, seed + 10 + i) for i, name in enumerate(names)]
    if processes == 1:
        done = [_job(job) for job in jobs]
    else:
        context = torch.multiprocessing.get_context("spawn")
        with context.Pool(processes, initializer=_prepare, initargs=(os.getpid(),)) as pool:
            done = list(pool.imap_unordered(_job, jobs))
    log.say(f"trained {', '.join(sorted(done))}")
    return {"trained": sorted(done)}
