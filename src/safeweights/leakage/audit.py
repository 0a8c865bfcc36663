"""The audit of somebody's own adapters: what the file says, what encoders read in it, and whether given pictures were members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.text import plain
from safeweights.core.workspace import Workspace
from safeweights.diffusion.adaptation import Shots
from safeweights.diffusion.latent_bank import fingerprint
from safeweights.diffusion.noise import generator
from safeweights.diffusion.sampling import sample
from safeweights.leakage import keys
from safeweights.leakage.canonical import effective_rank, norm, tokens
from safeweights.leakage.generator import reconstruct
from safeweights.leakage.membership import Copies, Membership, copied, judge, losses
from safeweights.leakage.metrics import cosines, percentile_ranks
from safeweights.leakage.train import Encoders, embed_pictures
from safeweights.leakage.verdict import Finding, decide, judges
from safeweights.models.vision import Embedder
from safeweights.records.record import Measurement

PLAIN = ("captions", "names", "picture", "comment", "paths")
"""Kinds of header entries that say in plain words who or what was trained on, or whose machine did it."""
TOO_LARGE = "{}: the base model's predictions are not finite with this LoRA; its factors are far too large, get it again"


@dataclass(frozen=True)
class FileSays:
    """What one file tells without any encoder."""

    name: str
    layout: str
    rank: int
    layers: int
    parameters: int
    norm: float
    """Of all updates together."""
    effective_rank: float
    """Mean over layers."""
    spectrum: list[list[float]]
    """Singular values of every layer, in the file's order."""
    told: list[keys.Told]
    images: float | None
    """Number of training pictures, from the header or estimated from spectra."""
    images_from: str


def read_file(file: keys.LoraFile, encoders: Encoders | None) -> FileSays:
    """Rank, spectra, header and the estimated number of pictures."""
    canonical = tokens(file.factors)
    stated = keys.image_count(file.metadata)
    images, source = (float(stated), "header") if stated is not None else (None, "no encoder for it")
    if stated is None and encoders is not None and _overlap(file, encoders):
        images, source = max(1.0, float(encoders.count.predict([file.factors])[0, 0])), "spectra"
    return FileSays(
        name=str(file.path), layout=file.layout, rank=file.rank, layers=len(file.factors), parameters=file.parameters,
        norm=sum(norm(a, b) ** 2 for a, b in file.factors.values()) ** 0.5,
        effective_rank=sum(effective_rank(token.s) for token in canonical.values()) / len(canonical),
        spectrum=[[round(float(value), 6) for value in token.s] for token in canonical.values()],
        told=keys.telling(file.metadata), images=images, images_from=source,
    )  # fmt: skip


def fits(encoders: Encoders, model: DiffusionModel, files: Sequence[keys.LoraFile]) -> str:
    """Why the encoders cannot judge these files; "" where they can."""
    if encoders.facts.get("base") != fingerprint(model):
        return "the encoders were trained for another base model; train some with 'safeweights leakage train --base MODEL'"
    for file in files:
        if not _overlap(file, encoders):
            return f"{file.path} changes none of the layers the encoders read"
    return ""


def _overlap(file: keys.LoraFile, encoders: Encoders) -> bool:
    return any(name in file.factors for name in encoders.spectrum.layers)


@dataclass
class Audited:
    """Everything an audit found, ready for JSON and records."""

    finding: Finding
    measurements: list[Measurement]
    files: list[FileSays]
    answers: dict[str, list[float]] = field(default_factory=dict)
    """Length of every file's answer, by encoder."""
    reconstructions: Tensor | None = None
    """(files, n, 3, H, W), drawn by the base model from the best encoder's answers."""
    membership: Membership | None = None
    copies: Copies | None = None
    warnings: list[str] = field(default_factory=list)
    """What headers tell in plain words: found without any attack, and no part of the verdict about the weights."""
    plots: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def audit(
    files: Sequence[keys.LoraFile],
    model: DiffusionModel,
    *,
    encoders: Encoders | None = None,
    missing: str = "",
    embedder: Embedder | None = None,
    members: Shots | None = None,
    images: Tensor | None = None,
    others: Shots | None = None,
    unseen: Tensor | None = None,
    prompt: str = "",
    pool: int = 64,
    seed: int = 0,
    workspace: Workspace | None = None,
) -> Audited:
    """Audit adapters of one subject. ``members`` are the pictures they were (perhaps) trained on, ``images`` the same in [0, 1];
    ``others`` are pictures of the same kind that were not, ``unseen`` the same in [0, 1]; without them the base model draws
    ``pool`` for the prompt.

    ``missing`` says why there are no encoders.
    """
    workspace = workspace or Workspace()
    says = [read_file(file, encoders) for file in files]
    found = Audited(Finding("not shown", "", ""), [], says)
    for item in says:
        found.measurements += [
            Measurement(name="rank", value=float(item.rank), n=item.layers, why=item.name),
            Measurement(name="update_norm", value=item.norm, n=item.layers, why=item.name),
            Measurement(name="effective_rank", value=item.effective_rank, n=item.layers, why=item.name),
            _count(item, encoders),
        ]
        _header(found, item)
    for file, item in zip(files, says, strict=True):
        _remark(found, file, item, encoders)
    if encoders is not None:
        _ask(found, files, model, encoders, embedder, images, seed)
        if embedder is not None and images is not None and unseen is not None:
            _copies(found, embedder, images, unseen, seed)
    if members is not None:
        _membership(found, files, model, members, others, prompt, pool, seed, workspace)
    found.finding = decide(
        encoders.trusts if encoders else [], found.answers, membership=found.membership, copies=found.copies, missing=missing
    )
    if found.warnings and found.finding.verdict == "not shown":
        found.finding = replace(found.finding, why=f"{found.finding.why}; its header does, see the warning")
    found.plots.insert(0, _spectra(says))
    return found


def _remark(found: Audited, file: keys.LoraFile, item: FileSays, encoders: Encoders | None) -> None:
    """What a reader must know of a file that is unlike the ones the encoders know."""
    if file.ignored:
        count, name = len(file.ignored), plain(file.ignored[0], 80)
        found.notes.append(f"{item.name}: {count} tensors are no LoRA factors and were not read, {name} the first")
    if not item.norm:
        found.notes.append(f"{item.name} changes nothing: all its updates are zero, so there is nothing to read")
    if encoders is not None:
        rank, known = encoders.facts.get("plan", {}).get("rank", item.rank), set(encoders.spectrum.layers)
        if item.rank != rank or set(file.factors) != known:
            found.notes.append(
                f"{item.name}: the encoders learnt from adapters of rank {rank} on {len(known)} layers; this one has rank "
                f"{item.rank} and {len(known & set(file.factors))} of those layers, so their false alarms are not known for it"
            )


def _header(found: Audited, item: FileSays) -> None:
    plain = [entry for entry in item.told if entry.kind in PLAIN]
    found.measurements.append(
        Measurement(
            name="header_entries_that_tell", value=float(len(plain)), n=1, better="lower",
            why="; ".join([item.name, *(f"{entry.key}: {entry.value[:60]}" for entry in plain[:5])]),
        )
    )  # fmt: skip
    if plain:
        said = "; ".join(f"{entry.key}: {entry.value[:60]}" for entry in plain[:5])
        more = f" and {len(plain) - 5} entries more" if len(plain) > 5 else ""
        found.warnings.append(
            f"the header of {item.name} tells in plain words: {said}{more}; safetensors' save_file(load_file(FILE), NEW) drops it"
        )


def _copies(found: Audited, embedder: Embedder, images: Tensor, unseen: Tensor, seed: int) -> None:
    assert found.reconstructions is not None
    features = [embedder.features(part) for part in (found.reconstructions.flatten(0, 1), images, unseen)]
    found.copies = copied(*features, seed=seed)
    found.measurements.append(found.copies.measurement())


def _count(item: FileSays, encoders: Encoders | None) -> Measurement:
    if item.images is None:
        return Measurement(name="training_images", value=None, n=1, why=item.images_from)
    error = encoders.facts.get("count_error", {}) if encoders and item.images_from == "spectra" else {}
    why = f"from {item.images_from}"
    if error:
        why += f"; mean error {error['error']:.1f} on people never seen, {error['constant']:.1f} for always saying the mean"
    return Measurement(name="training_images", value=item.images, n=1, unit="pictures", why=why)


def _ask(
    found: Audited, files: Sequence[keys.LoraFile], model: DiffusionModel, encoders: Encoders, embedder: Embedder | None,
    images: Tensor | None, seed: int,
) -> None:  # fmt: skip
    adapters = [file.factors for file in files]
    # The probe runs adapters side by side where they change the same layers.
    groups = (
        [adapters] if len(keys.layers_of(files)) == len({name for item in adapters for name in item}) else [[a] for a in adapters]
    )
    answers: dict[str, Tensor] = {}
    asked = torch.cat([encoders.probe.ask(model, group) for group in groups])
    for name in encoders.names:
        probed = asked if name == "functional" else None
        answers[name] = (
            encoders.predict(name, model, adapters, answers=probed)
            if probed is not None
            else torch.cat([encoders.predict(name, model, group) for group in groups])
        )
        if not torch.isfinite(answers[name]).all():
            raise UserError(TOO_LARGE.format(files[int((~torch.isfinite(answers[name]).all(1)).nonzero()[0])].path))
        found.answers[name] = [round(float(value), 6) for value in encoders.strength(name, answers[name], probed)]
        known = next((trust for trust in encoders.trusts if trust.encoder == name), None)
        for file, value in zip(files, found.answers[name], strict=True):
            found.measurements.append(
                Measurement(
                    name=f"{name}_answer",
                    value=value,
                    n=1,
                    better="lower",
                    reference=known.threshold if known else None,
                    why=str(file.path),
                )
            )
    trusted = judges(encoders.trusts, answers)
    best = trusted[0].encoder if trusted else encoders.names[-1]
    found.reconstructions = reconstruct(model, encoders.slot, answers[best].float(), n=4, seed=seed)
    found.notes.append(f"pictures are what the {best} encoder reads, drawn by the base model without the adapter")
    if embedder is not None and images is not None:
        own = encoders.space(embed_pictures(embedder, images[None]))
        gallery = torch.cat([own, encoders.gallery])
        for name, said in answers.items():
            ranks = percentile_ranks(cosines(said, gallery), [0] * len(files))
            for file, rank in zip(files, ranks.tolist(), strict=True):
                found.measurements.append(
                    Measurement(
                        name=f"{name}_percentile_rank", value=rank, n=len(gallery) - 1, better="lower", reference=0.5,
                        why=f"{file.path}: the given pictures' subject among {len(gallery) - 1} others; 0.5 is chance",
                    )
                )  # fmt: skip


def _membership(
    found: Audited, files: Sequence[keys.LoraFile], model: DiffusionModel, members: Shots, others: Shots | None, prompt: str,
    pool: int, seed: int, workspace: Workspace,
) -> None:  # fmt: skip
    c = model.embed([prompt])
    if others is None:
        rng = generator("non-members", seed)
        noise = torch.randn((pool, *model.latent_shape), generator=rng)
        drawn = sample(model, c, noise, Sampling(steps=20, guidance_scale=4.0), workspace=Workspace(progress=workspace.progress))
        others = Shots.encode(model, drawn, [prompt or "-"])
        found.notes.append("non-members are the base model's own pictures for the prompt; --non-members DIR gives a fairer pool")
    cut = [len(members), len(others)]
    both = torch.cat([members.x_0, others.x_0])
    adapters = [file.factors for file in files]
    # One picture counts once, however many files were given: their losses are averaged.
    inside, outside = losses(model, adapters, both, c, prompt=prompt, seed=seed, workspace=workspace).split(cut)
    if not torch.isfinite(inside.adapted.sum() + outside.adapted.sum()):
        raise UserError(TOO_LARGE.format(", ".join(str(file.path) for file in files)))
    found.membership = judge([inside], [outside], seed=seed)
    found.measurements += [
        replace(entry, why="; ".join(filter(None, [entry.why, f"{len(members)} pictures against {len(others)} others"])))
        for entry in found.membership.measurements()
    ]
    bars = [
        {"name": what, "value": round(float(item.scores.mean()), 6)}
        for what, item in (("given pictures", inside), ("other pictures", outside))
    ]
    found.plots.append(
        {"kind": "bars", "title": "What the adapter knows better than the base model", "unit": "loss", "bars": bars}
    )


def _spectra(says: Sequence[FileSays]) -> dict[str, Any]:
    series = []
    for item in says[:6]:
        width = max(len(values) for values in item.spectrum)
        mean = [
            sum(values[i] for values in item.spectrum if i < len(values))
            / max(1, sum(i < len(values) for values in item.spectrum))
            for i in range(width)
        ]
        series.append(
            {"name": item.name.rsplit("/", 1)[-1], "points": [[i + 1, round(value, 6)] for i, value in enumerate(mean)]}
        )
    return {
        "kind": "line", "title": "Mean singular values of the updates", "x": {"label": "direction", "scale": "linear"},
        "y": {"label": "singular value"}, "series": series,
    }  # fmt: skip
