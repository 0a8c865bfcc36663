"""From a population of adapters to encoders, a generator and what they may be trusted with: all an audit needs, in one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import comb
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel
from safeweights.core.workspace import Workspace
from safeweights.diffusion.latent_bank import fingerprint
from safeweights.leakage import controls, learned
from safeweights.leakage.canonical import Factors, factors_of
from safeweights.leakage.defences import random_directions
from safeweights.leakage.encoders import ridge
from safeweights.leakage.encoders.functional import Functional, Probe, unit
from safeweights.leakage.encoders.gram import Compressed, Gram, Kind, gram, weights_of
from safeweights.leakage.encoders.spectrum import Spectrum
from safeweights.leakage.encoders.spectrum import features as spectra
from safeweights.leakage.factory import HELD, Made, Plan, make
from safeweights.leakage.generator import Slot, Taught, reconstruct, slot_of, teach
from safeweights.leakage.learned import Learned
from safeweights.leakage.metrics import Retrieval, cosines, retrieval
from safeweights.leakage.sources import Source
from safeweights.leakage.verdict import Trust
from safeweights.models.vision import Embedder

NAME = "encoders.json"
COMPONENTS = 32
"""Directions of the embedding in which people differ; targets live in these."""
SURVIVES = "as the encoder"
"""What an arm must give that is no rival: reading the subject must survive it."""


@dataclass(frozen=True)
class Space:
    """Embeddings of pictures as targets: unit vectors, minus their mean, in the directions in which people differ most."""

    centre: Tensor
    basis: Tensor
    """(D, components), orthonormal."""

    @classmethod
    def fit(cls, people: Tensor) -> Space:
        """From one embedding (n, D) of each training person."""
        centre = people.mean(0)
        _, _, right = torch.linalg.svd((people - centre).double(), full_matrices=False)
        return cls(centre, right[:COMPONENTS].mT.float().contiguous())

    def __call__(self, embeddings: Tensor) -> Tensor:
        found: Tensor = (embeddings - self.centre) @ self.basis
        return found


def embed_pictures(embedder: Embedder, pictures: Tensor) -> Tensor:
    """The mean unit feature (N, D) of N sets of pictures (N, k, 3, H, W)."""
    features = F.normalize(embedder.features(pictures.flatten(0, 1)), dim=1)
    mean: Tensor = features.view(len(pictures), pictures.shape[1], -1).mean(1)
    return mean


@dataclass
class Population:
    """Finished adapters with what is known of each."""

    made: list[Made]
    people: dict[int, Tensor] = field(default_factory=dict)
    """Embedding (D,) of every identity, from pictures that no adapter has seen."""

    def of(self, *splits: str) -> list[Made]:
        """The adapters of these splits, in the plan's order."""
        return [item for item in self.made if item.entry.split in splits]

    @property
    def nulls(self) -> list[str]:
        """The splits of adapters that show nobody, in the order of their first."""
        return list(dict.fromkeys(item.entry.split for item in self.made if item.entry.split.startswith("null-")))

    def factors(self, *splits: str) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """Their factors as released."""
        return [factors_of(item.phi) for item in self.of(*splits)]

    def embeddings(self, *splits: str) -> Tensor:
        """The embedding (n, D) of each one's identity."""
        return torch.stack([self.people[item.entry.identity] for item in self.of(*splits)])


def gather(
    model: DiffusionModel, source: Source, plan: Plan, embedder: Embedder, *, workspace: Workspace, together: int = 16
) -> Population:
    """Train, or take from ``workspace``, every adapter of the plan, and embed everybody."""
    made = sorted(
        make(model, source, plan, workspace=workspace.child("factory"), together=together), key=lambda item: item.entry.seed
    )
    population = Population(made)
    wanted = sorted({item.entry.identity for item in made if item.entry.identity >= 0})
    stored = workspace.load("people")
    told = {"source": source.name, "people": wanted, "embedder": embedder.sha256}
    if stored is None or stored[1] != told:
        sets = torch.stack([embed_pictures(embedder, source.pictures(identity, 0, HELD)[None])[0] for identity in wanted])
        stored = {"people": sets}, told
        workspace.save("people", *stored)
    population.people = dict(zip(wanted, stored[0]["people"], strict=True))
    return population


@dataclass
class Encoders:
    """What is trained once for a base model and used by every audit of an adapter of it."""

    space: Space
    probe: Probe
    functional: Functional
    gram: Compressed | None
    spectrum: Spectrum
    count: Spectrum
    """E0 for the number of training pictures."""
    slot: Slot
    gallery: Tensor
    """Test people (m, components)."""
    trusts: list[Trust]
    facts: dict[str, Any]
    learned: dict[str, Learned] = field(default_factory=dict)
    """Encoders trained by descent, where `train` was asked for them."""

    def predict(self, name: str, model: DiffusionModel, adapters: Sequence[Factors], *, answers: Tensor | None = None) -> Tensor:
        """An encoder's answers (n, components); ``answers`` are the probe's, where they are known already."""
        if name == "functional":
            return self.functional.predict(self.probe.ask(model, adapters) if answers is None else answers)
        if name in self.learned:
            return self.learned[name].predict(adapters)
        found: Compressed | Spectrum | None = self.gram if name == "gram" else self.spectrum
        if found is None:
            raise UserError(f"this folder holds no {name} encoder")
        return found.predict(adapters)

    def strength(self, name: str, said: Tensor, answers: Tensor | None = None) -> Tensor:
        """How much an encoder reads of somebody (n,): its answers' length from the mean, near 0 where it reads nobody.

        With the probe's ``answers`` times the likeness to adapters of a subject, since what is like none of them is not read.
        """
        length = lengths(said)
        return length * self.functional.likeness(answers).double() if name == "functional" and answers is not None else length

    @property
    def names(self) -> list[str]:
        """The encoders here, the simplest first."""
        return ["spectrum", *self.learned, *(["gram"] if self.gram is not None else []), "functional"]

    def save(self, folder: Path) -> None:
        """Write everything in half precision beside ``encoders.json``."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        parts: dict[str, Mapping[str, Tensor]] = {
            "space": {"centre": self.space.centre, "basis": self.space.basis, "gallery": self.gallery},
            "functional": self.functional.tensors(), "spectrum": self.spectrum.tensors(), "count": self.count.tensors(),
            "generator": self.slot.state_dict(), **({"gram": self.gram.tensors()} if self.gram is not None else {}),
            **{name: encoder.tensors() for name, encoder in self.learned.items()},
        }  # fmt: skip
        whole = ("space", "count", "spectrum", *self.learned)
        for name, tensors in parts.items():
            half = {key: value.float() if name in whole else value.half() for key, value in tensors.items()}
            save_file({key: value.contiguous() for key, value in half.items()}, folder / f"{name}.safetensors", {"format": "pt"})
        told = {
            "version": 1, **self.facts, "probe": asdict(self.probe), "layers": list(self.spectrum.layers),
            "trusts": [asdict(trust) for trust in self.trusts],
            **({"learned": {name: encoder.facts() for name, encoder in self.learned.items()}} if self.learned else {}),
        }  # fmt: skip
        (folder / NAME).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Encoders:
        """The inverse of `save`. Raises UserError for a folder that holds no encoders or is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not (folder / NAME).is_file():
            raise UserError(
                f"{folder} holds no encoders ({NAME}); train some with 'safeweights leakage train --base MODEL -o DIR'"
            )
        try:
            told = json.loads((folder / NAME).read_text(encoding="utf-8"))
            names = [
                "space",
                "functional",
                "spectrum",
                "count",
                "generator",
                *(["gram"] if (folder / "gram.safetensors").is_file() else []),
                *told.get("learned", ()),
            ]
            part = {
                name: {key: value.float() for key, value in load_file(folder / f"{name}.safetensors").items()} for name in names
            }
            probe = Probe(**{**told["probe"], "levels": tuple(told["probe"]["levels"])})
            layers = told["layers"]
            return cls(
                Space(part["space"]["centre"], part["space"]["basis"]), probe, Functional.from_tensors(part["functional"]),
                Compressed.from_tensors(part["gram"]) if "gram" in part else None,
                Spectrum.from_tensors(part["spectrum"], layers), Spectrum.from_tensors(part["count"], layers),
                slot_of(part["generator"]), part["space"]["gallery"], [Trust.from_json(item) for item in told["trusts"]],
                {key: value for key, value in told.items() if key not in ("version", "probe", "layers", "trusts", "learned")},
                {name: learned.load(name, part[name], facts) for name, facts in told.get("learned", {}).items()},
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"the encoders in {folder} cannot be read ({reason}); train them again") from None


def lengths(answers: Tensor) -> Tensor:
    """How far each answer lies from the training people's mean (n,): near 0 for an encoder that reads nobody."""
    found: Tensor = answers.double().norm(dim=1)
    return found


def threshold_of(nulls: Tensor, share: float = 0.05) -> float:
    """The length that, nine times in ten, at most ``share`` of all null adapters exceed, judged by these ones.

    The k-th highest of n is exceeded by more than ``share`` of all with probability P(Binomial(n, share) < k), so the largest k
    that keeps this to a tenth is taken (Wilks, 1941); with few nulls nothing below their highest is safe.
    """
    ordered = nulls.double().sort(descending=True).values
    n, below, k = len(ordered), 0.0, 0
    while k < n:
        below += comb(n, k) * share**k * (1 - share) ** (n - k)
        if below > 0.1:
            break
        k += 1
    return float(ordered[max(0, k - 1)])


@dataclass(frozen=True)
class Judged:
    """One encoder on the test people: its own estimate, and pictures of a generator that holds no audited weight."""

    name: str
    direct: Retrieval
    drawn: Retrieval
    direct_arms: tuple[controls.Arm, ...]
    """Controls measured on estimates."""
    drawn_arms: tuple[controls.Arm, ...]
    """Controls measured on the generator's pictures."""
    pictures: Tensor = field(repr=False)
    answers: Tensor = field(repr=False)


def prompt_of(source: Source) -> str:
    """What pictures of the source are called by somebody who does not know the trigger word."""
    return " ".join(source.template.replace("{}", " ").split())


def train(
    model: DiffusionModel,
    source: Source,
    plan: Plan,
    embedder: Embedder,
    *,
    embedder_name: str,
    generator_steps: int = 800,
    generator_people: int = 1000,
    pictures_each: int = 8,
    pictures: int = 2,
    drawing_steps: int = 8,
    also: Sequence[str] = (),
    also_steps: int = 400,
    workspace: Workspace | None = None,
    together: int = 16,
) -> tuple[Encoders, Population, dict[str, Judged]]:
    """Everything from the adapters on; each stage is kept in ``workspace`` and not done twice.

    ``also`` are encoders of `learned.KINDS` to train besides the closed forms, for ``also_steps`` steps.

    The generator learns from ``pictures_each`` of every training person and of up to ``generator_people`` more, of whom there
    are no adapters; encoders are judged by ``pictures`` of every test person, drawn in ``drawing_steps``.
    """
    workspace, also = workspace or Workspace(), learned.check(also)
    population = gather(model, source, plan, embedder, workspace=workspace, together=together)
    people = population.embeddings("train")
    space = Space.fit(people)
    targets = space(people)
    adapters = population.factors("train")
    probe = Probe(prompt_of(source), seed=plan.seed)
    answers = probed(model, probe, population, workspace)
    functional = Functional.fit(answers["train"], targets)
    kernel = Gram.fit(adapters, targets)
    linear = kernel if kernel.kind != "left" else Gram.fit(adapters, targets, kinds=("update", "cosine"))
    spectrum = Spectrum.fit(adapters, targets)
    images = torch.tensor([[float(item.entry.images)] for item in population.of("train")])
    count = Spectrum.fit(adapters, images)
    each = min(pictures_each, HELD)
    x_0, others = _shown(model, source, population, embedder, each, generator_people, workspace)
    slot = _slot(model, x_0, torch.cat([targets, space(others)]), each, functional, targets, answers["train"], generator_steps,
                 workspace)  # fmt: skip

    def learn(name: str, order: Sequence[int], place: str) -> Learned:
        draw = learned.drawing(x_0, each, model.latent_shape)
        return learned.fit(
            name, model, population.of("train"), targets[list(order)], lambda i, rng: draw(order[i], rng), steps=also_steps,
            seed=plan.seed, workspace=workspace.child(f"{name}{place}"),
        )  # fmt: skip

    encoders = Encoders(
        space, probe, functional, linear.compress(), spectrum, count, slot, space(population.embeddings("test")), [],
        {
            "base": fingerprint(model), "source": source.name, "prompt": prompt_of(source), "template": source.template,
            "embedder": embedder_name, "plan": asdict(plan),
            "count_error": _count_error(count, population), "leave_one_out": {
                "functional": functional.error, "gram": ridge.loo_error(kernel.ridge, targets), "spectrum": spectrum.error,
            },
        },
        {name: learn(name, range(len(targets)), "") for name in also},
    )  # fmt: skip
    judged = {
        name: judge(
            name,
            encoders,
            model,
            embedder,
            population,
            answers,
            workspace,
            seed=plan.seed,
            pictures=pictures,
            steps=drawing_steps,
            learn=learn,
        )
        for name in encoders.names
    }
    encoders.trusts.extend(
        trust(judged[name], encoders, model, population, answers) for name in ("functional", "gram", *also, "spectrum")
    )
    return encoders, population, judged


def probed(model: DiffusionModel, probe: Probe, population: Population, workspace: Workspace) -> dict[str, Tensor]:
    """The probe's answers by split; kept."""
    found: dict[str, Tensor] = {}
    for split in dict.fromkeys(item.entry.split for item in population.made):
        told = {
            "probe": json.loads(json.dumps(asdict(probe))), "split": split, "n": len(population.of(split)),
            "adapters": [float(sum(value.double().abs().sum() for value in item.phi.values())) for item in population.of(split)],
        }  # fmt: skip
        stored = workspace.load(f"probe-{split}")
        if stored is None or stored[1] != told:
            stored = (
                {"answers": probe.ask(model, population.factors(split), workspace=Workspace(progress=workspace.progress))},
                told,
            )
            workspace.save(f"probe-{split}", *stored)
        found[split] = stored[0]["answers"]
    return found


def _shown(
    model: DiffusionModel, source: Source, population: Population, embedder: Embedder, each: int, others: int,
    workspace: Workspace,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Latents of ``each`` pictures of every training person, then of up to ``others`` nobody has trained an adapter on; and the
    embeddings (m, D) of the latter. Adapters are not needed for it: pictures alone teach a generator."""
    stored = workspace.load("taught")
    ids = [item.entry.identity for item in population.of("train")]
    used = {item.entry.identity for item in population.made}
    spare = [identity for identity in range(len(source)) if identity not in used][:others]
    told = {"people": ids, "spare": spare, "each": each, "source": source.name, "model": fingerprint(model)}
    if stored is None or stored[1] != told:
        x_0, features = [], [population.embeddings("train")[:0].cpu()]
        everybody = [*ids, *spare]
        for place in workspace.track(range(len(everybody)), "pictures for the generator"):
            try:
                shown = source.pictures(everybody[place], 0, each).to(model.device)
            except UserError:
                if place < len(ids):
                    raise
                continue  # a folder of too few pictures; nobody needs these
            x_0.append(model.encode(shown).float().cpu())
            if place >= len(ids):  # the others' embeddings are known
                features.append(embed_pictures(embedder, shown[None]).cpu())
        stored = {"x_0": torch.cat(x_0), "features": torch.cat(features)}, told
        workspace.save("taught", *stored)
    return stored[0]["x_0"], stored[0]["features"]


def _slot(
    model: DiffusionModel, x_0: Tensor, z: Tensor, each: int, functional: Functional, targets: Tensor, answers: Tensor,
    steps: int, workspace: Workspace,
) -> Slot:  # fmt: skip
    """The generator, taught with latents x_0 of subjects z (P, D), ``each`` of every one, shaken as the best encoder errs."""
    # How far the best encoder is off on people it was not fitted on.
    noise = (targets - functional.predict(answers).float()).std(0)
    loo = float(max(functional.error, 1e-3)) ** 0.5
    noise = torch.maximum(noise, 0.5 * loo * targets.std(0))
    taught = Taught(x_0, torch.arange(len(z)).repeat_interleave(each), z, noise)
    return teach(model, taught, steps=steps, workspace=workspace.child("generator"))


def judge(
    name: str, encoders: Encoders, model: DiffusionModel, embedder: Embedder, population: Population,
    answers: Mapping[str, Tensor], workspace: Workspace, *, seed: int = 0, pictures: int = 2,
    steps: int = 8, learn: Callable[[str, Sequence[int], str], Learned] | None = None,
) -> Judged:  # fmt: skip
    """Retrieval of the test people by an encoder, with its controls, each measured on both paths.

    ``learn(name, order, place)`` trains an encoder of `Encoders.learned` anew, each adapter with the target and the pictures of
    another one's subject. One such refit is all that is made of it, where closed forms have twenty; and the nearest training
    identity is the one whose answer is nearest, where theirs is nearest in weights.
    """
    test = population.factors("test")
    own = list(range(len(test)))

    def draw(what: str, z: Tensor) -> Tensor:
        kept = f"drawn-{name}{what and '-' + what.replace(' ', '-')}"
        stored = workspace.load(kept)
        # Sums of absolute values: a generator or an answer that moved at all draws anew.
        told = {
            "answers": float(z.double().abs().sum()), "n": pictures, "steps": steps,
            "slot": float(sum(value.double().abs().sum() for value in encoders.slot.state_dict().values())),
        }  # fmt: skip
        if stored is None or stored[1] != told:
            stored = {"pictures": reconstruct(model, encoders.slot, z, n=pictures, steps=steps, seed=seed).half()}, told
            workspace.save(kept, *stored)
        return stored[0]["pictures"].float()

    def seen(drawn: Tensor) -> Tensor:
        return encoders.space(embed_pictures(embedder, drawn))

    def found(predicted: Tensor) -> Retrieval:
        return retrieval(cosines(predicted, encoders.gallery), own, seed=seed)

    said = encoders.predict(name, model, test, answers=answers["test"]).float()
    drawn = draw("", said)
    features = seen(drawn)
    targets = encoders.space(population.embeddings("train"))
    if name in encoders.learned:
        assert learn is not None
        known = encoders.predict(name, model, population.factors("train")).float()
        nearest = targets[cosines(said, known).argmax(1)]
        order = controls.exchanged(len(targets), seed=seed).tolist()
        permuted = learn(name, order, "-permuted").predict(test).float()
        pairs = controls.Arm("permuted pairs", found(permuted), "chance")
    else:
        kernel, cross = _kernels(name, encoders, population, answers)
        nearest = targets[_nearest(kernel, cross)]
        permuted = controls.permuted_answers(kernel, cross, targets, seed=seed).float()
        pairs = controls.permuted_pairs(kernel, cross, targets, encoders.gallery, own, seed=seed)
    centre = torch.zeros(said.shape[1])
    direct = [
        *controls.simple(said, encoders.gallery, own, centre=centre, nearest=nearest, seed=seed),
        pairs,
    ]
    through = [
        *controls.simple(
            features, encoders.gallery, own, centre=centre, nearest=seen(draw("nearest training identity", nearest)), seed=seed
        ),
        controls.Arm("permuted pairs", found(seen(draw("permuted pairs", permuted))), "chance"),
    ]
    if name != "spectrum":  # its input would not change
        blind = encoders.predict(name, model, [random_directions(item, seed=seed + i) for i, item in enumerate(test)]).float()
        matched = "same spectrum, random directions"
        direct.append(controls.Arm(matched, found(blind), "chance"))
        through.append(controls.Arm(matched, found(seen(draw(matched, blind))), "chance"))
    equal = encoders.predict(name, model, controls.norm_equalised(test)).float()
    direct.append(controls.Arm("norms made equal", found(equal), SURVIVES))
    return Judged(name, found(said), found(features), tuple(direct), tuple(through), drawn, said)


def _kernels(name: str, encoders: Encoders, population: Population, answers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The encoder's own kernel among training adapters (n, n), and of test adapters with them (m, n)."""
    items, test = population.factors("train"), population.factors("test")
    if name == "functional":
        rows, others = unit(answers["train"]), unit(answers["test"])
        return ridge.linear(rows), ridge.linear(others, rows)
    if name == "gram":
        assert encoders.gram is not None
        kind: Kind = "cosine" if encoders.gram.normalised else "update"
        layers = tuple(items[0])
        weights = weights_of(items, layers, kind)
        return (
            gram(items, layers=layers, kind=kind, weights=weights),
            gram(test, items, layers=layers, kind=kind, weights=weights),
        )
    scaled = [
        (spectra(part, encoders.spectrum.layers) - encoders.spectrum.centre) / encoders.spectrum.spread for part in (items, test)
    ]
    return ridge.linear(scaled[0]), ridge.linear(scaled[1], scaled[0])


def _nearest(kernel: Tensor, cross: Tensor) -> Tensor:
    """The training adapter with the largest cosine to each test adapter, by kernels alone."""
    lengths_ = kernel.diagonal().clamp(min=1e-30).rsqrt()
    found: Tensor = (cross * lengths_).argmax(1)
    return found


def trust(
    judged: Judged, encoders: Encoders, model: DiffusionModel, population: Population, answers: Mapping[str, Tensor]
) -> Trust:
    """What the encoder may be trusted with.

    Each half of the null adapters tries the threshold that the other half sets; the higher of the two is kept, so that the false
    alarms counted over all of them are, if anything, too many.
    """
    kinds = {
        split: encoders.strength(
            judged.name,
            encoders.predict(judged.name, model, population.factors(split), answers=answers[split]),
            answers[split],
        )
        for split in population.nulls
    }
    # Every other one, so that all kinds are in both halves.
    halves = [torch.cat([part[start::2] for part in kinds.values()]) if kinds else torch.zeros(0) for start in (0, 1)]
    limits = [threshold_of(half) if len(half) else float("inf") for half in halves]
    known = [limit for limit in limits if limit != float("inf")]
    tried = {
        split: (
            sum(int((part[start::2] > limits[1 - start]).sum()) for start in (0, 1)),
            sum(len(part[start::2]) for start in (0, 1) if limits[1 - start] in known),
        )
        for split, part in kinds.items()
    }
    flagged = encoders.strength(judged.name, judged.answers, answers["test"])
    # A threshold that nothing set is out of reach, and stays a number in the file.
    threshold = max(known) if known else float(flagged.max())
    return Trust(
        encoder=judged.name, rank=judged.drawn.rank, interval=judged.drawn.interval, n=judged.drawn.n,
        gallery=judged.drawn.gallery, controls=_bounds(judged.drawn_arms), threshold=threshold,
        flagged_nulls=(sum(hits for hits, _ in tried.values()), sum(n for _, n in tried.values())),
        flagged=(int((flagged > threshold).sum()), len(flagged)),
        direct_rank=judged.direct.rank, direct_interval=judged.direct.interval, direct_controls=_bounds(judged.direct_arms),
        null_kinds=tried,
    )  # fmt: skip


def _bounds(arms: Sequence[controls.Arm]) -> dict[str, float]:
    """Upper bounds of the controls that an encoder must beat."""
    return {arm.name: arm.found.interval[1] for arm in arms if arm.expected != SURVIVES}


def _count_error(count: Spectrum, population: Population) -> dict[str, float]:
    """Mean absolute error of the picture count on test people, beside that of always saying the training mean."""
    truth = torch.tensor([float(item.entry.images) for item in population.of("test")])
    if not len(truth):
        return {}
    said = count.predict(population.factors("test"))[:, 0].float()
    return {"error": float((said - truth).abs().mean()), "constant": float((truth - count.offset[0]).abs().mean())}
