"""What settings of an immunizer do, on tuning prompts only: re-learning, retention and benign adaptation.

    python benchmarks/immunization_tuning.py runs.yaml -o DIR

``runs.yaml`` is a list of runs: {label, method: none | imma | mima | jt | compose, concepts: [mosaic], settings: {…}}. The start
is the sandbox with each concept erased by ESD, one after the other, or by UCE together (start: uce). A re-learner with LoRA's
defaults learns each concept from 12 pictures; a benign user learns "polka dot", a style the model has never seen, from 12
drawings. Results go to DIR/results.jsonl, a line a run; runs that are there are skipped, and the file is read anew after each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from safeweights.core.concept import Concept
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.table import IMMUNIZERS, configure, method, resolve
from safeweights.core.workspace import Workspace
from safeweights.detectors.load import open_detector
from safeweights.diffusion.adaptation import Shots
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import candidates_of, generate
from safeweights.metrics.backbones import default_backbones
from safeweights.metrics.similarity_gap import CosineSimilarity
from safeweights.models.door import open_model
from safeweights.sandbox import world
from safeweights.sandbox.files import sandbox_concepts

CHECKPOINTS = (0, 10, 25, 50, 100)
LEARNT = "polka dot"


class Bench:
    """The sandbox, its erased starts, and what every run is measured with; drawn once and kept in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, sandbox_concepts()
        self.base = open_model("sandbox", device="cpu")
        self.sampling = Sampling(**self.file.generation)
        features = default_backbones(self.file).open_features()
        assert features is not None
        self.alike = CosineSimilarity(features)

    def start(self, how: str, names: list[str]) -> DiffusionModel:
        """The model before it is immunized: erased by ESD or UCE, or unedited."""
        if how == "esd":
            return self.erased(names)
        if how == "uce":
            made = method("uce").protect(self.base, self.file.pick(names), retain=self.file.retain, rng=generator(0))
            return made.apply(self.base)
        return self.base

    def erased(self, names: list[str]) -> DiffusionModel:
        """ESD, one concept after the other, as strong as benchmarks/specs/foundation.yaml has it."""
        model = self.base
        for i, name in enumerate(names):
            work = Workspace(self.folder / "starts")
            key = "-".join(names[: i + 1])
            kept = work.load(key)
            if kept is None:
                steps = {"neon": 80, "fish": 80, "teapot": 60, "emblem": 40}.get(name, 110)
                made = method("esd", steps=steps, lr=1e-4).protect(model, self.file.pick([name]), rng=generator(0))
                work.save(key, dict(made.tensors), {})
                kept = dict(made.tensors), {}
            model = model.with_tensors(kept[0])
        return model

    def drawn(self, concept: Concept, n: int, first: int) -> torch.Tensor:
        """n pictures the unprotected model makes of a concept's own prompts."""
        path = self.folder / "drawn" / f"{concept.name}-{n}-{first}.npy"
        if not path.is_file():
            texts = [concept.texts[i % len(concept.texts)] for i in range(n)]
            images = generate(self.base, candidates_of(texts, range(first, first + n)), self.sampling)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, (images * 255).round().byte().numpy())
        return torch.from_numpy(np.load(path)).float() / 255

    def given(self, concept: Concept, n: int) -> Concept:
        """The concept with a folder of pictures for the publisher, who still has the unprotected model."""
        folder = self.folder / "publisher" / concept.name
        if not (folder / "metadata.csv").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            lines = ["file_name,prompt"]
            for i, image in enumerate(self.drawn(concept, n, 9000)):
                Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
                lines.append(f'{i:03}.png,"{concept.texts[i % len(concept.texts)]}"')
            (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Concept(**{**{key: getattr(concept, key) for key in concept.__dataclass_fields__}, "images": folder})

    def relearning(self, model: DiffusionModel, concept: Concept, kind: str = "lora", **settings: Any) -> list[dict[str, Any]]:
        """Rate and similarity after each number of steps of one way of re-learning."""
        asked = self.drawn(concept, 8, 7000)
        shots = Shots.encode(model, self.drawn(concept, 12, 8000), [concept.texts[i % len(concept.texts)] for i in range(12)])
        return self._curve(model, shots, [*concept.texts][:8], asked, concept, kind, **settings)

    def benign(self, model: DiffusionModel) -> list[dict[str, Any]]:
        """The same for a style nobody objects to, from drawings."""
        spec = self.file.concepts["mosaic"].detector
        assert spec is not None
        detector = type(spec)(**{**{key: getattr(spec, key) for key in spec.__dataclass_fields__}, "label": LEARNT})
        concept = Concept(name=LEARNT, kind="style", prompts=(), term=LEARNT, detector=detector)
        images, captions = [], []
        for i in range(20):
            rng = np.random.default_rng([77, i])
            scene = world.sample_scene(rng, style=LEARNT, object=world.OBJECTS[i % len(world.OBJECTS)], emblem=False)
            images.append(torch.from_numpy(np.array(world.draw(scene))).permute(2, 0, 1).float() / 255)
            captions.append(world.caption(scene, rng))
        shots = Shots.encode(model, torch.stack(images[:12]), captions[:12])
        return self._curve(model, shots, captions[12:20], torch.stack(images[12:20]), concept, "lora", steps=50)

    def _curve(
        self,
        model: DiffusionModel,
        shots: Shots,
        prompts: list[str],
        asked: torch.Tensor,
        concept: Concept,
        kind: str,
        steps: int = 100,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        from safeweights.core.table import ADAPTATIONS

        tuned = configure(resolve(ADAPTATIONS, kind, "adaptation"), {"steps": steps, **settings})
        wanted = [step for step in CHECKPOINTS if 0 < step <= steps]
        found = tuned.fit(model, shots, checkpoints=wanted, seed=0)
        assert concept.detector is not None
        detector = open_detector(concept.detector, concept=concept.name)
        curve = []
        for step, tried in [(0, model), *((adapted.steps, adapted.apply(model)) for adapted in found)]:
            images = generate(tried, candidates_of(prompts, range(7000, 7000 + len(prompts))), self.sampling)
            rate = float(detector.detect(images).present.float().mean())
            curve.append({"steps": step, "rate": rate, "similarity": round(self.alike(images, asked), 3)})
        return curve

    def retention(self, model: DiffusionModel, gone: list[str], n: int = 2) -> float:
        """Share of pictures of all other concepts still judged right."""
        names = [name for name, concept in self.file.concepts.items() if name not in gone and concept.detector]
        hits = 0.0
        texts = [self.file.concepts[name].texts[i] for name in names for i in range(n)]
        images = generate(model, candidates_of(texts, [7000 + i for _ in names for i in range(n)]), self.sampling)
        for name, part in zip(names, images.split(n), strict=True):
            spec = self.file.concepts[name].detector
            assert spec is not None
            hits += float(open_detector(spec, concept=name).detect(part).present.float().sum())
        return hits / len(texts)

    def run(self, plan: dict[str, Any]) -> dict[str, Any]:
        """One immunizer, measured."""
        names = plan["concepts"]
        concepts = self.file.pick(names)
        start = self.start(plan.get("start", "esd"), names)
        model, seconds, loss = start, 0.0, None
        if plan["method"] != "none":
            made = configure(resolve(IMMUNIZERS, plan["method"], "method"), plan.get("settings", {}))
            given = [self.given(concept, 64) for concept in concepts]
            began = time.perf_counter()
            protection = made.protect(
                start, given, retain=self.file.retain, rng=generator(0), workspace=Workspace(self.folder / "made" / plan["label"])
            )
            seconds, loss = time.perf_counter() - began, protection.cost["loss"]
            model = protection.apply(start)
        said: dict[str, Any] = {**plan, "seconds": round(seconds, 1), "loss": loss}
        for kind in plan.get("attacks", ["lora"]):
            kind, _, scale = kind.partition("@")
            extra = {"lr": 3e-3 * float(scale)} if scale else {}
            said[kind + scale] = {c.name: self.relearning(model, c, kind, **extra) for c in concepts}
        said["retention"] = self.retention(model, names)
        said["benign"] = self.benign(model)
        return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.output)
    results = options.output / "results.jsonl"
    known = {json.loads(line)["label"] for line in results.read_text().splitlines()} if results.is_file() else set()
    # Read anew after every run: what a run showed decides what is worth running next.
    while plan := next((plan for plan in yaml.safe_load(options.plan.read_text()) if plan["label"] not in known), None):
        known.add(plan["label"])
        said = bench.run(plan)
        with results.open("a") as file:
            file.write(json.dumps(said) + "\n")
        print(brief(said), file=sys.stderr, flush=True)


def brief(said: dict[str, Any]) -> str:
    """A run in a few lines."""
    lines = [f"{said['label']}: {said['seconds']} s, loss {said['loss']}, retention {said['retention']:.3f}"]
    lines += ["  benign " + _told(said["benign"])]
    for kind, curves in said.items():
        if isinstance(curves, dict) and kind != "settings":
            lines += [f"  {kind} {name} " + _told(curve) for name, curve in curves.items()]
    return "\n".join(lines)


def _told(curve: list[dict[str, Any]]) -> str:
    return " ".join(f"{point['steps']}:{point['rate']:.2f}/{point['similarity']:.2f}" for point in curve)


if __name__ == "__main__":
    main()
