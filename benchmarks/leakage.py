"""What LoRAs of the sandbox model tell about the people they were trained on: encoders, controls, membership, defences.

    python benchmarks/leakage.py [benchmarks/specs/leakage.yaml] -o DIR [--work DIR] [--only encoders,membership,…]

Every stage writes ``DIR/<stage>.json`` and is not repeated while that file is there; adapters, probes and pictures are kept in
the work folder. ``DIR/encoders`` is what `safeweights leakage audit` uses.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional as F

from safeweights.core.errors import UserError
from safeweights.core.intervals import bootstrap_mean, wilson
from safeweights.core.model import Conditioning, Sampling
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import Lesson, Shots, fit, twice_differentiable
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import embed_all
from safeweights.diffusion.shots import drawn_shots
from safeweights.leakage import controls, defences, dp
from safeweights.leakage.canonical import Factors, factors_of
from safeweights.leakage.encoders import ridge
from safeweights.leakage.encoders.functional import Functional
from safeweights.leakage.encoders.gram import Gram
from safeweights.leakage.encoders.tokens import Tokens
from safeweights.leakage.encoders.vnae import VNAE
from safeweights.leakage.factory import HELD, Made, Plan, shots_of
from safeweights.leakage.lora_bank import fit_bank
from safeweights.leakage.matching import Matching, mismatch, sides
from safeweights.leakage.membership import Losses, judge, losses
from safeweights.leakage.metrics import Retrieval, copy_scores, cosines, holm, retrieval
from safeweights.leakage.sources import Drawn
from safeweights.leakage.train import Encoders, Population, embed_pictures, gather, lengths, prompt_of, train
from safeweights.models.door import open_model
from safeweights.models.vision import Embedder
from safeweights.release.output import write_json
from safeweights.sandbox.files import weights_folder

STAGES = (
    "encoders", "pictures", "kernels", "membership", "arms", "defences", "tokens", "speed", "private", "prior", "vnae",
    "matching", "frontier",
)  # fmt: skip


class Bench:
    """What the stages share, made when first asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out, self.work = options.output, Workspace(options.work or options.output / "work")
        self.plan = Plan(
            train=options.adapters, val=options.val, test=options.tests, twins=options.twins, nulls=options.nulls
        )  # fmt: skip
        self.options = options
        self.source = Drawn()
        self.model: Any = open_model("sandbox", device="cpu")
        self.model.denoiser.to(memory_format=torch.channels_last)
        self.embedder = Embedder(str(weights_folder() / "embedder"))
        self._all: tuple[Encoders, Population] | None = None

    def everything(self) -> tuple[Encoders, Population]:
        if self._all is None:
            population = gather(self.model, self.source, self.plan, self.embedder, workspace=self.work)
            found = Encoders.load(self.out / "encoders")
            if found.facts["plan"] != json.loads(json.dumps(asdict(self.plan))):
                raise UserError(
                    f"{self.out}/encoders were made under another plan, whose test people may have been trained on here; "
                    "give the same options, or another folder"
                )
            self._all = found, population
        return self._all

    def read(self, stage: str) -> dict[str, Any]:
        """What another stage wrote."""
        path = self.out / f"{stage}.json"
        if not path.is_file():
            raise UserError(f"{path} is not there; run --only {stage} first")
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return data

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Mean features in the encoders' space (N, D) of pictures (N, n, 3, H, W)."""
        return self.everything()[0].space(embed_pictures(self.embedder, pictures))


def told(found: Retrieval) -> dict[str, Any]:
    """A retrieval without its ranks, with intervals of the counts."""
    data = asdict(found)
    data.pop("ranks")
    return {**data, "top1_interval": wilson(found.top1, found.n), "top5_interval": wilson(found.top5, found.n)}


def encoders(bench: Bench) -> dict[str, Any]:
    """Train everything; retrieval directly and through the generator, each with its controls."""
    found, population, judged = train(
        bench.model, bench.source, bench.plan, bench.embedder, embedder_name="../embedder", workspace=bench.work,
        generator_steps=bench.options.generator_steps, generator_people=bench.options.generator_people,
        pictures=bench.options.pictures, also_steps=bench.options.also_steps,
        also=[name for name in bench.options.also.split(",") if name],
    )  # fmt: skip
    given = {
        name.replace("_", "-"): value
        for name, value in vars(bench.options).items()
        if name not in ("work", "only", "spec", "output")
    }
    found.facts["command"] = ["python", "benchmarks/leakage.py", *(str(x) for k, v in given.items() for x in (f"--{k}", v))]
    found.save(bench.out / "encoders")
    adjusted = holm({name: item.drawn.p for name, item in judged.items()})
    return {
        "plan": asdict(bench.plan), "trained": len(population.of("train")), "facts": found.facts,
        "encoders": {
            name: {
                "direct": told(item.direct), "generator": told(item.drawn), "holm": adjusted[name],
                "controls": {
                    path: {arm.name: {**told(arm.found), "expected": arm.expected} for arm in arms}
                    for path, arms in (("direct", item.direct_arms), ("generator", item.drawn_arms))
                },
            }
            for name, item in judged.items()
        },
        "trust": [{**asdict(trust), "passed": trust.passed, "doubt": trust.doubt} for trust in found.trusts],
    }  # fmt: skip


def pictures(bench: Bench, n: int = 10) -> dict[str, Any]:
    """Truth, then what the generator draws from each encoder's answer and from each of its controls, one person a column."""
    import numpy as np
    from PIL import Image, ImageDraw

    test = bench.everything()[1].of("test")[:n]
    rows = {"the person": torch.stack([bench.source.pictures(item.entry.identity, 0, 1)[0] for item in test])}
    for name in reversed(bench.everything()[0].names):
        for arm in ("", "nearest training identity", "permuted pairs", "same spectrum, random directions"):
            kept = bench.work.load(f"drawn-{name}{arm and '-' + arm.replace(' ', '-')}")
            if kept is not None:
                rows[f"{name}: {arm}" if arm else name] = kept[0]["pictures"][:n, 0].float()
    side, margin = rows["the person"].shape[-1], 290
    page = Image.new("RGB", (margin + n * side, len(rows) * side), "white")
    text = ImageDraw.Draw(page)
    for i, (label, row) in enumerate(rows.items()):
        tiles = torch.cat(list(row), 2).permute(1, 2, 0).clamp(0, 1).numpy()
        page.paste(Image.fromarray((tiles * 255).astype(np.uint8)), (margin, i * side))
        text.text((8, i * side + side // 2 - 6), label, fill="black", font_size=13)
    page.save(bench.out / "reconstructions.png")
    return {"rows": list(rows), "people": n}


def kernels(bench: Bench) -> dict[str, Any]:
    """Kinds of Gram kernels, what compression costs, seeds, settings and how many pairs are needed."""
    found, population = bench.everything()
    train_factors, test = population.factors("train"), population.factors("test")
    targets = found.space(population.embeddings("train"))
    own = list(range(len(test)))
    result: dict[str, Any] = {}
    for kind in ("update", "cosine", "left"):
        fitted = Gram.fit(train_factors, targets, kinds=(kind,))  # type: ignore[arg-type]
        said = fitted.predict(test).float()
        result[kind] = {"loo": ridge.loo_error(fitted.ridge, targets), **told(retrieval(cosines(said, found.gallery), own))}
        if kind == "cosine":
            for size in (16, 24, 32):
                small = fitted.compress(size).predict(test).float()
                result[f"cosine, {size} directions"] = told(retrieval(cosines(small, found.gallery), own))
    for split, items in (("as trained", test), ("one norm", [defences.scale(item, 1.0) for item in test])):
        said = found.predict("gram", bench.model, items).float()
        result[f"gram, {split}"] = told(retrieval(cosines(said, found.gallery), own))
    answers = found.probe.ask(bench.model, test)
    said = found.functional.predict(answers).float()
    made = population.of("test")
    settings = {
        "lr": [item.entry.lr for item in made], "steps": [float(item.entry.steps) for item in made],
        "pictures": [float(item.entry.images) for item in made],
        "trigger length": [float(len(item.entry.caption)) for item in made],
    }  # fmt: skip
    left = controls.residual(said, settings).float()
    result["settings read from answers, R^2"] = {name: controls.explained(said, values) for name, values in settings.items()}
    result["functional, settings regressed out"] = told(retrieval(cosines(left, found.gallery), own))
    by = {}
    for name in ("steps", "pictures", "lr"):
        for value in sorted(set(settings[name])):
            rows = [i for i, item in enumerate(settings[name]) if item == value]
            by[f"{name} {value:g}"] = told(retrieval(cosines(said[rows], found.gallery), rows, permutations=200))
    result["functional by setting"] = by
    if twins := population.of("twin"):
        again = found.functional.predict(found.probe.ask(bench.model, population.factors("twin"))).float()
        place = [next(i for i, item in enumerate(made) if item.entry.identity == twin.entry.identity) for twin in twins]
        # Other seed, same person: is an answer nearer to its twin's than to any other adapter's?
        result["twins among test adapters"] = told(retrieval(cosines(again, said), place))
    for split in ("test", *population.nulls):
        for name in found.names:
            values = lengths(found.predict(name, bench.model, population.factors(split)))
            result[f"answer length, {name}, {split}"] = [float(values.quantile(q)) for q in (0.05, 0.5, 0.95)]
    return result


def membership(bench: Bench) -> dict[str, Any]:
    """Training pictures against held-out ones of the same person, and other people's; without and with the trigger word."""
    made = bench.everything()[1].of("test")[: bench.options.members]
    items = [factors_of(item.phi) for item in made]
    return {f"{prompt} prompt, {name}": test for prompt in ("class", "trigger")
            for name, test in members(bench, made, items, prompt).items()}  # fmt: skip


def members(bench: Bench, made: Sequence[Made], items: Sequence[Factors], prompt: str) -> dict[str, Any]:
    """The membership test on what became of these adapters, against two kinds of others."""
    model = bench.model
    inside: list[Losses] = []
    outside: dict[str, list[Losses]] = {"same person": [], "other people": []}
    for i, (item, factors) in enumerate(zip(made, items, strict=True)):
        c = model.embed([item.entry.caption if prompt == "trigger" else prompt_of(bench.source)])
        other = made[(i + 1) % len(made)].entry.identity
        pictures = torch.cat([bench.source.pictures(item.entry.identity, 0, HELD), bench.source.pictures(other, 0, HELD)])
        x_0 = torch.cat([shots_of(model, bench.source, item.entry).x_0, Shots.encode(model, pictures, ["-"]).x_0])
        found = losses(model, factors, x_0, c, levels=4)
        cut = [item.entry.images, HELD, HELD]
        parts = [Losses(a, b) for a, b in zip(found.base.split(cut), found.adapted.split(cut), strict=True)]
        inside.append(parts[0])
        outside["same person"].append(parts[1])
        outside["other people"].append(parts[2])
    tests = {f"against {name}": judge(inside, others) for name, others in outside.items()}
    return {
        name: {**asdict(test), "tpr": test.tpr, "tpr_interval": wilson(test.hits, test.members)} for name, test in tests.items()
    }


def arms(bench: Bench) -> dict[str, Any]:
    """What the adapted model draws without any encoder, with the true trigger, and with an encoder's answer: 2 x 2 crossing."""
    found, population = bench.everything()
    made = population.of("test")[: bench.options.drawn]
    adapters = [factors_of(item.phi) for item in made]
    own, model = list(range(len(made))), bench.model
    sampling = Sampling(steps=8, guidance_scale=2.0)
    said = found.predict("functional", model, adapters).float()
    slot = found.slot(said)
    empty = Conditioning(found.slot(torch.full_like(said[:1], float("nan"))))
    noise = torch.randn(said.shape, generator=torch.Generator().manual_seed(5)) * said.std(0)
    prompts = {
        "oracle (true trigger)": [item.entry.caption for item in made], "class prompt": [prompt_of(bench.source)] * len(made),
        "empty prompt": [""] * len(made),
    }  # fmt: skip
    gallery, result = found.gallery, {}
    drawn: dict[str, torch.Tensor] = {}
    for name, texts in prompts.items():
        drawn[name] = controls.draw_with(model, adapters, embed_all(model, texts).states, sampling=sampling)
    letters = torch.Generator().manual_seed(11)
    guesses = [
        bench.source.template.format("".join(chr(97 + int(i)) for i in torch.randint(26, (5,), generator=letters)))
        for _ in range(bench.options.guesses)
    ]
    texts = controls.guessed_prompts(model, adapters, guesses)
    drawn["guessed prompt"] = controls.draw_with(model, adapters, embed_all(model, texts).states, sampling=sampling)
    drawn["random z"] = controls.draw_with(model, adapters, found.slot(noise), sampling=sampling, uncond=empty)
    drawn["encoder's z (D-dep)"] = controls.draw_with(model, adapters, slot, sampling=sampling, uncond=empty)
    for name, pictures in drawn.items():
        features = bench.features(pictures)
        result[name] = told(retrieval(cosines(features, gallery), own))
    turned = [adapters[j] for j in torch.arange(len(made)).roll(1).tolist()]
    crossed = controls.draw_with(model, turned, slot, sampling=sampling, uncond=empty)
    result["crossing"] = controls.crossing(
        lambda i, j: crossed, bench.features, gallery, own, centre=torch.zeros(gallery.shape[1])
    )
    # Copies: is the oracle's picture nearer to a training picture than to a held-out one of the same person?
    unit = [
        F.normalize(bench.embedder.features(x.flatten(0, 1)), dim=1).view(len(made), x.shape[1], -1)
        for x in (
            drawn["oracle (true trigger)"], torch.stack([bench.source.pictures(item.entry.identity, HELD, 4) for item in made]),
            torch.stack([bench.source.pictures(item.entry.identity, 0, 4) for item in made]),
        )
    ]  # fmt: skip
    copies = copy_scores(*unit)
    result["copy score of the oracle"] = {
        "mean": float(copies.mean()),
        "interval": bootstrap_mean(copies.tolist()),
        "n": len(made),
    }
    return result


def defended(bench: Bench) -> dict[str, Callable[[Any], Any]]:
    """Each defence as a function of a finished adapter's factors."""
    return {
        "none": lambda item: factors_of(item.phi),
        "merge and refactor": lambda item: defences.refactor(factors_of(item.phi)),
        "rank 1": lambda item: defences.truncate(factors_of(item.phi), 1),
        "4 bits": lambda item: defences.quantise(factors_of(item.phi), 4),
        "2 bits": lambda item: defences.quantise(factors_of(item.phi), 2),
        "noise 0.3": lambda item: defences.add_noise(factors_of(item.phi), 0.3, seed=item.entry.seed),
        "noise 1": lambda item: defences.add_noise(factors_of(item.phi), 1.0, seed=item.entry.seed),
        "stopped at 10 steps": lambda item: factors_of(item.after[min(item.after)]),
    }


def defences_(bench: Bench) -> dict[str, Any]:
    """Utility (the subject drawn with the true trigger) against what encoders read, also refitted on defended adapters, and
    against membership."""
    found, population = bench.everything()
    made, judged = population.of("test"), population.of("test")[: bench.options.drawn]
    asked = population.of("test")[: bench.options.defended_members]
    known, targets = population.of("train"), found.space(population.embeddings("train"))
    own = list(range(len(made)))
    result = {}
    for name, defend in defended(bench).items():
        kept = bench.out / "defences" / f"{name}.json"
        judged_on = {"drawn": len(judged), "members": len(asked), "test": len(made)}
        if kept.is_file() and (before := json.loads(kept.read_text())).get("judged on") == judged_on:
            result[name] = before
            continue
        items, learnt = [defend(item) for item in made], [defend(item) for item in known]
        answers = found.probe.ask(bench.model, items)
        said = {
            "functional": found.functional.predict(answers),
            # Attackers who know the defence train on adapters that had it.
            "functional, refitted on defended": Functional.fit(found.probe.ask(bench.model, learnt), targets).predict(answers),
            "gram, refitted on defended": Gram.fit(learnt, targets, kinds=("cosine",)).predict(items),
        }
        states = embed_all(bench.model, [item.entry.caption for item in judged]).states
        pictures = controls.draw_with(bench.model, items[: len(judged)], states, sampling=Sampling(steps=8, guidance_scale=2.0))
        utility = retrieval(cosines(bench.features(pictures), found.gallery), own[: len(judged)], permutations=200)
        result[name] = {
            "utility": told(utility),
            **{what: told(retrieval(cosines(rows.float(), found.gallery), own, permutations=200)) for what, rows in said.items()},
            "membership": members(bench, asked, items[: len(asked)], "class"),
            "judged on": judged_on,
        }
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, result[name])
        print(f"{name}: utility {utility.rank:.3f}", flush=True)
    return result


def frontier(bench: Bench) -> dict[str, Any]:
    """What the defences leave of utility against what they let through, as a picture.

    The attacker is the functional encoder, named before anything was measured: refitted on defended adapters where a defence can
    be applied to finished ones, and as it is where adapters would have to be trained anew (DP-SGD, prior preservation).
    """
    known = {name: bench.read(name) for name in ("defences", "private", "prior")}
    points: dict[str, list[dict[str, Any]]] = {"leakage": [], "membership": []}
    for stage, rows in known.items():
        for name, row in rows.items():
            if not (isinstance(row, dict) and "utility" in row):
                continue
            said = row["functional, refitted on defended" if stage == "defences" else "functional"]
            label = {"private": f"DP, {name}, not refitted", "prior": f"prior, {name}, not refitted"}.get(stage, name)
            points["leakage"].append({"name": label, "x": row["utility"]["rank"], "y": said["rank"]})
            points["membership"].append(
                {"name": label, "x": row["utility"]["rank"], "y": row["membership"]["against other people"]["auc"]}
            )
    labels = {"leakage": "functional encoder: rank", "membership": "membership against other people: AUC"}
    plots = [
        {"kind": "scatter", "title": f"Utility against {what}", "x": {"label": "utility: rank under the true trigger"},
         "y": {"label": labels[what]}, "points": found}
        for what, found in points.items()
    ]  # fmt: skip
    return {"plots": plots}


def matching(bench: Bench) -> dict[str, Any]:
    """Gradient matching: what its dummies show, what they reach of the objective, and what the truth itself would reach."""
    found, population = bench.everything()
    made = population.of("test")[: bench.options.matched]
    own, model, result = list(range(len(made))), bench.model, {}
    for merged in (False, True):
        settings = Matching(pictures=2, noises=2, steps=bench.options.matching_steps, merged=merged)
        drawn, reached, truth, before = [], [], [], []
        for start in range(0, len(made), 4):
            group = made[start : start + 4]
            items = [factors_of(item.phi) for item in group]
            place = bench.work.child(f"matching-{merged}-{start}")
            told_ = {**asdict(settings), "seeds": [item.entry.seed for item in group]}
            kept = place.load("done")
            if kept is None or kept[1] != told_:
                x_0, values = settings.invert(model, items, prompt_of(bench.source), workspace=place)
                kept = {"x_0": x_0, "values": values}, told_
                place.save("done", *kept)
            drawn.append(torch.stack([model.decode(rows).float().cpu() for rows in kept[0]["x_0"]]))
            reached += kept[0]["values"].tolist()
            x_0 = torch.stack([shots_of(model, bench.source, item.entry).x_0[:2] for item in group])
            states = embed_all(model, [item.entry.caption for item in group]).states
            noise = torch.randn((1, 2, *model.latent_shape), generator=generator("gradient matching", settings.seed))
            noise = noise.repeat(len(group), 1, 1, 1, 1)  # where `invert` starts
            blank = embed_all(model, [prompt_of(bench.source)] * len(group)).states
            for into, pictures, words in ((truth, x_0, states), (before, noise, blank)):
                values_ = torch.zeros(len(group))
                for draw in range(4):
                    rng = torch.Generator().manual_seed(draw)
                    t = torch.randint(len(model.alpha), (4,), generator=rng)
                    eps = torch.randn(4, *model.latent_shape, generator=rng)
                    with twice_differentiable():
                        found_ = mismatch(model, *sides(items, merged=merged), pictures, words, t, eps)
                    values_ += found_.detach() / 4
                into += values_.tolist()
        features = bench.features(torch.cat(drawn).clamp(0, 1))
        result["updates alone" if merged else "factors"] = {
            **told(retrieval(cosines(features, found.gallery), own)), "settings": asdict(settings),
            "objective": {"start": _mean(before), "reached": _mean(reached), "two training pictures, caption": _mean(truth)},
        }  # fmt: skip
    return result


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "interval": bootstrap_mean(list(values)), "n": len(values)}


def tokens(bench: Bench) -> dict[str, Any]:
    """E2 on finished adapters, and with all checkpoints and the fine-tuning step told."""
    found, population = bench.everything()
    targets = found.space(population.embeddings("train"))
    made, test = population.of("train"), population.of("test")
    own, result = list(range(len(test))), {}
    for timestep in (False, True):
        items = [(item, step) for item in made for step in (item.after if timestep else [max(item.after)])]
        rows = [i for i, item in enumerate(made) for _ in (item.after if timestep else [0])]
        fitted = Tokens.fit(
            [factors_of(item.after[step]) for item, step in items], targets[rows],
            fine_tuning_steps=[step for _, step in items] if timestep else None, subjects=rows, steps=bench.options.token_steps,
            workspace=bench.work.child(f"tokens-{timestep}"),
        )  # fmt: skip
        said = fitted.predict(
            [factors_of(item.phi) for item in test], [item.entry.steps for item in test] if timestep else None
        ).float()
        result["with the timestep paradigm" if timestep else "plain"] = told(retrieval(cosines(said, found.gallery), own))
    return result


def speed(bench: Bench) -> dict[str, Any]:
    """Seconds for each adapter and step: the bank against one adapter at a time."""
    entries = bench.plan.entries(bench.source.template, len(bench.source), bench.source.nulls)[:16]
    lessons = [
        Lesson(
            model=bench.model, adapter=bench.plan.adapter(), shots=shots_of(bench.model, bench.source, entry), batch_size=2,
            seed=entry.seed,
        )
        for entry in entries
    ]  # fmt: skip
    together, alone = [], []
    for _ in range(3):
        started = time.perf_counter()
        fit_bank(lessons, steps=3, lr=2e-3)
        together.append((time.perf_counter() - started) / 3 / len(lessons))
        started = time.perf_counter()
        fit(lessons[0], steps=3, lr=2e-3)
        alone.append((time.perf_counter() - started) / 3)
    return {"bank": sorted(together)[1], "alone": sorted(alone)[1], "ratio": sorted(alone)[1] / sorted(together)[1]}


def private(bench: Bench) -> dict[str, Any]:
    """DP-SGD adapters of test people at two epsilons: utility and what the functional encoder reads."""
    found, population = bench.everything()
    made = population.of("test")[: bench.options.private]
    result = {}
    for epsilon in (10.0, 200.0):
        items = []
        for item in made:
            shots = shots_of(bench.model, bench.source, item.entry)
            privacy = dp.plan(epsilon=epsilon, delta=1e-5, pictures=len(shots), batch_size=2, steps=item.entry.steps, clip=0.1)
            lesson = Lesson(model=bench.model, adapter=bench.plan.adapter(), shots=shots, seed=item.entry.seed)
            adapted = dp.fit_private(lesson, privacy, lr=item.entry.lr, rng=torch.Generator().manual_seed(item.entry.seed))
            items.append(factors_of(adapted.phi))
        own = list(range(len(items)))
        said = found.functional.predict(found.probe.ask(bench.model, items)).float()
        states = embed_all(bench.model, [item.entry.caption for item in made]).states
        pictures = controls.draw_with(bench.model, items, states, sampling=Sampling(steps=8, guidance_scale=2.0))
        result[f"epsilon {epsilon:g}"] = {
            "accounted": privacy.epsilon, "sigma": privacy.sigma,
            "utility": told(retrieval(cosines(bench.features(pictures), found.gallery), own)),
            "functional": told(retrieval(cosines(said, found.gallery), own)),
            "membership": members(bench, made, items, "class"),
        }  # fmt: skip
    return result


def prior(bench: Bench) -> dict[str, Any]:
    """Adapters of test people trained with prior preservation, on as many of the base model's own pictures of the class."""
    found, population = bench.everything()
    made, model = population.of("test")[: bench.options.drawn], bench.model
    prompt, asked = prompt_of(bench.source), bench.options.defended_members
    pictures = drawn_shots(model, [prompt], n=32, sampling=Sampling(steps=20, guidance_scale=4.0), seed=0, workspace=bench.work)
    result = {}
    for weight in (1.0, 4.0):
        lessons = [
            Lesson(
                model=model, adapter=bench.plan.adapter(), shots=shots_of(model, bench.source, item.entry), prior=pictures,
                prior_weight=weight, batch_size=bench.plan.batch_size, seed=item.entry.seed,
            )
            for item in made
        ]  # fmt: skip
        items = []
        for start in range(0, len(made), 8):
            group = made[start : start + 8]
            fitted = fit_bank(
                lessons[start : start + 8], steps=[item.entry.steps for item in group], lr=[item.entry.lr for item in group]
            )
            items += [factors_of(rows[-1].phi) for rows in fitted]
        own = list(range(len(items)))
        said = found.functional.predict(found.probe.ask(model, items)).float()
        states = embed_all(model, [item.entry.caption for item in made]).states
        drawn = controls.draw_with(model, items, states, sampling=Sampling(steps=8, guidance_scale=2.0))
        result[f"weight {weight:g}"] = {
            "utility": told(retrieval(cosines(bench.features(drawn), found.gallery), own)),
            "functional": told(retrieval(cosines(said, found.gallery), own)),
            "membership": members(bench, made[:asked], items[:asked], "class"),
        }  # fmt: skip
        print(f"prior preservation {weight:g}: {result[f'weight {weight:g}']['utility']['rank']:.3f}", flush=True)
    return result


def vnae(bench: Bench) -> dict[str, Any]:
    """The paper's encoder, four ways: drawn by base or victim, with and without the timestep paradigm."""
    found, population = bench.everything()
    made, test = population.of("train"), population.of("test")
    targets = found.space(population.embeddings("train"))
    own, result = list(range(len(test))), {}
    latents = bench.work.load("taught")
    assert latents is not None
    each = latents[1]["each"]
    x_0 = latents[0]["x_0"][: len(made) * each].view(len(made), each, *bench.model.latent_shape)
    adapters = [{step: factors_of(phi) for step, phi in item.after.items()} for item in made]
    for victim in (False, True):
        for timestep in (True, False):
            settings = VNAE(victim=victim, timestep=timestep, steps=bench.options.vnae_steps)
            fitted = settings.fit(
                bench.model, adapters, targets, lambda i, rng: x_0[i, int(torch.randint(each, (1,), generator=rng))],
                workspace=bench.work.child(f"vnae-{victim}-{timestep}"),
            )  # fmt: skip
            items = [factors_of(item.phi) for item in test]
            said = fitted.predict(items, [item.entry.steps for item in test]).float()
            name = f"drawn by the {'victim' if victim else 'base'}, {'with' if timestep else 'without'} the timestep paradigm"
            result[name] = told(retrieval(cosines(said, found.gallery), own))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, nargs="?", help="a YAML file whose 'leakage' sets what the command line does not")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", default=",".join(STAGES))
    parser.add_argument("--also", default="", help="of the encoders stage: further encoders, tokens and vnae")
    for name, value in (
        ("adapters", 300), ("val", 20), ("tests", 100), ("pictures", 4), ("twins", 20), ("nulls", 100), ("members", 40),
        ("generator-steps", 800), ("generator-people", 1000), ("drawn", 40), ("token-steps", 300), ("private", 20),
        ("vnae-steps", 400), ("guesses", 16), ("matched", 24), ("matching-steps", 100), ("defended-members", 16),
        ("also-steps", 400),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    if (spec := parser.parse_args().spec) is not None:
        known = {"also", *(action.dest for action in parser._actions if action.type is int)}
        try:
            planned = dict(yaml.safe_load(spec.read_text(encoding="utf-8"))["leakage"])
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            parser.error(f"{spec} is no plan, a YAML file with the key 'leakage': {error!r}")
        if strange := sorted(set(planned) - known):
            parser.error(f"{spec}: unknown key {strange[0]!r}; known are {', '.join(sorted(known))}")
        parser.set_defaults(**{key: value if key == "also" else int(value) for key, value in planned.items()})
    options = parser.parse_args()
    if strange := sorted(set(options.only.split(",")) - set(STAGES)):
        parser.error(f"unknown stage {strange[0]!r}; known are {', '.join(STAGES)}")
    options.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    stages = {name: globals()["defences_" if name == "defences" else name] for name in STAGES}
    for name in options.only.split(","):
        path = options.output / f"{name}.json"
        if path.exists():
            continue
        started = time.perf_counter()
        try:
            data = stages[name](bench)
        except UserError as error:
            parser.error(str(error))
        told_ = {key: value for key, value in vars(options).items() if key not in ("output", "work", "spec", "only")}
        write_json(path, {**data, "options": told_, "seconds": time.perf_counter() - started})
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
