"""The edit of a protected model alone, as a LoRA: the best low-rank form of MODEL minus its base, with the error told."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.core.errors import UserError
from safeweights.release.manifest import EMBEDDED, hash_tensor
from safeweights.release.modelspec import fill_hash, modelspec

if TYPE_CHECKING:
    from torch import Tensor

    from safeweights.core.model import DiffusionModel
    from safeweights.diffusion.low_rank import Factors

LAYOUTS = ("peft", "kohya")
ENERGY = 0.9999
"""Share of each layer's squared change that is kept where no rank is asked for: a relative error of 1 % at most."""
PROBE_SEED = 8000


@dataclass(frozen=True)
class Edit:
    """What changed from a base to a model: factors by weight name, and what a LoRA cannot carry with its norm."""

    factors: dict[str, Factors]
    left_out: dict[str, float] = field(default_factory=dict)
    """Norm of the change of each changed tensor that is no linear or convolution weight."""

    @property
    def norm(self) -> float:
        """|| change ||_F over every changed tensor."""
        return math.hypot(*(f.norm for f in self.factors.values()), *self.left_out.values())

    @property
    def error(self) -> float:
        """|| change - what the LoRA adds ||_F over every changed tensor, those left out included."""
        return math.hypot(*(f.error for f in self.factors.values()), *self.left_out.values())

    def deltas(self) -> dict[str, Tensor]:
        """What the LoRA adds, by weight name."""
        return {name: factors.delta for name, factors in self.factors.items()}


def find_edit(model: DiffusionModel, base: DiffusionModel, *, rank: int | None = None, energy: float = ENERGY) -> Edit:
    """Factor MODEL minus BASE, layer by layer, at ``rank`` or as high as ``energy`` needs.

    Raises UserError for two models of different shape and for an edit that changes no layer.
    """
    import torch

    from safeweights.diffusion.low_rank import factor, layer_weights

    ours, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            where = "has no counterpart" if name not in ours or name not in theirs else "has another shape"
            raise UserError(
                f"{name} of {model.name} {where} in {base.name}, so it is not its base; give the right one with --base"
            )
    layers = {*layer_weights(base, "full"), *_text_layers(base)}
    changed = [name for name in ours if not torch.equal(ours[name], theirs[name].to(ours[name]))]
    edit = Edit({})
    for name in changed:
        change = ours[name].detach().cpu().double() - theirs[name].detach().cpu().double()
        if name in layers:
            edit.factors[name] = factor(change, rank=rank, energy=energy)
        else:
            edit.left_out[name] = float(change.norm())
    edit.left_out.update(_vae_changes(model, base))
    if not edit.factors:
        what = "nothing differs" if not edit.left_out else "only tensors differ that a LoRA cannot carry"
        raise UserError(
            f"{what} between {model.name} and its base {base.name}; give another base with --base or another --format"
        )
    return edit


def probe(model: DiffusionModel, base: DiffusionModel, edit: Edit, prompts: Sequence[str]) -> dict[str, float]:
    """Noise predictions of MODEL, of the base, and of the base with the LoRA, on fixed latents, timesteps and ``prompts``.

    "max" and "rms" are the largest and the root mean square difference between MODEL and base plus LoRA; "edit_max" and
    "edit_rms" those between MODEL and base, against which the error is to be read. Predictions are of unit size.
    """
    import torch

    from safeweights.diffusion.noise import generator

    current = dict(base.named_parameters())
    merged = base.with_tensors({name: current[name] + delta.to(current[name]) for name, delta in edit.deltas().items()})
    off: list[Tensor] = []
    whole: list[Tensor] = []
    with torch.no_grad():
        for index, prompt in enumerate(prompts):
            t = torch.tensor([int((index + 0.5) / len(prompts) * len(base.alpha))], device=base.device)
            x_t = torch.randn((1, *base.latent_shape), generator=generator("lora probe", PROBE_SEED, index)).to(base.device)
            outs = [m.eps(x_t, t, m.embed([prompt])).double() for m in (model, merged, base)]
            off.append(outs[0] - outs[1])
            whole.append(outs[0] - outs[2])
    a, b = torch.cat(off), torch.cat(whole)
    return {
        "max": float(a.abs().max()), "rms": float(a.square().mean().sqrt()),
        "edit_max": float(b.abs().max()), "edit_rms": float(b.square().mean().sqrt()), "n": len(prompts),
    }  # fmt: skip


def measured_edit(
    model: DiffusionModel, base: DiffusionModel, concepts: Sequence[str], *, rank: int | None = None, energy: float = ENERGY
) -> tuple[Edit, dict[str, Any]]:
    """The edit and what is told of its errors; probed with the first four ``concepts``, with ordinary words and with none."""
    edit = find_edit(model, base, rank=rank, energy=energy)
    prompts = [_fitting(base, f"a picture of {name}") for name in list(concepts)[:4]] + ["a picture", ""]
    return edit, describe(edit, probe(model, base, edit, prompts))


def describe(edit: Edit, measured: Mapping[str, float]) -> dict[str, Any]:
    """The errors as JSON: per layer rank and relative Frobenius error, in total, what is left out, and the probe."""
    return {
        "layers": {
            name: {"rank": f.rank, "relative_error": f.error / f.norm if f.norm else 0.0}
            for name, f in sorted(edit.factors.items())
        },
        "rank": {"smallest": min(f.rank for f in edit.factors.values()), "largest": max(f.rank for f in edit.factors.values())},
        "relative_error": edit.error / edit.norm,
        "not_carried": {name: norm / edit.norm for name, norm in sorted(edit.left_out.items())},
        "probe": dict(measured),
    }


def write_lora(
    edit: Edit, base: Any, file: Path, manifest: Mapping[str, Any], *, layout: str, about: Mapping[str, str | None]
) -> dict[str, str]:
    """Write the LoRA under the names of ``layout`` and return the file's metadata."""
    from safetensors.torch import save_file

    from safeweights.models.stable_diffusion import follow_umask

    tensors = lora_tensors(edit, layout)
    largest = max(f.rank for f in edit.factors.values())
    metadata = {
        "format": "pt",
        **modelspec(base, part="lora", **{"title": str(base.name), **{key: value for key, value in about.items() if value}}),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(largest),
        "ss_network_alpha": str(largest),
        "ss_base_model_version": "sd_v2" if base.text_encoder.config.hidden_act == "gelu" else "sd_v1",
        "ss_v2": str(base.text_encoder.config.hidden_act == "gelu"),
        EMBEDDED: json.dumps(manifest, ensure_ascii=False, default=str),
    }
    save_file(tensors, file, metadata)
    follow_umask([file])
    return {**metadata, "modelspec.hash_sha256": fill_hash(file)}


def lora_tensors(edit: Edit, layout: str) -> dict[str, Tensor]:
    """The factors by the names of ``layout``: "peft" for diffusers and peft, "kohya" for A1111, ComfyUI and sd-scripts."""
    import torch

    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")
    tensors: dict[str, Tensor] = {}
    alpha = max(factors.rank for factors in edit.factors.values())
    for name, factors in edit.factors.items():
        up = factors.up if factors.down.ndim == 2 else factors.up[:, :, None, None]
        if layout == "peft":
            layer = peft_name(name)
            tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = factors.down, up.contiguous()
        else:
            key = kohya_name(name)
            # Readers scale by alpha / rank. One alpha for all layers: diffusers loses those of attention layers that differ.
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = factors.down, up * (factors.rank / alpha)
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    return tensors


def peft_name(name: str) -> str:
    """``unet.<layer>``, ``text_encoder.text_model.<layer>``: where transformers has no ``text_model``, diffusers takes it off."""
    part, _, layer = name.removesuffix(".weight").partition(".")
    return f"unet.{layer}" if part == "unet" else f"text_encoder.text_model.{layer.removeprefix('text_model.')}"


def kohya_name(name: str) -> str:
    """``unet.down_blocks.0.….to_q.weight`` as ``lora_unet_down_blocks_0_…_to_q``; text layers as ``lora_te_text_model_…``."""
    part, _, layer = name.removesuffix(".weight").partition(".")
    if part == "unet":
        return "lora_unet_" + layer.replace(".", "_")
    # Kohya's names are those of transformers before version 5, which wrapped the text encoder's layers once more.
    return "lora_te_text_model_" + layer.removeprefix("text_model.").replace(".", "_")


def hashes(edit: Edit, layout: str) -> dict[str, str]:
    """SHA-256 of each tensor of the file, for its manifest."""
    return {name: hash_tensor(tensor) for name, tensor in sorted(lora_tensors(edit, layout).items())}


def _fitting(model: DiffusionModel, prompt: str) -> str:
    """The prompt, or none where a manifest's concept is too long a text for the model."""
    try:
        model.tokenize([prompt])
    except UserError:
        return ""
    return prompt


def _text_layers(model: DiffusionModel) -> Iterator[str]:
    from safeweights.diffusion.low_rank import layer_weights

    # Projections of attention and of the feed-forward network: what diffusers looks for in a LoRA of a text encoder.
    ends = (".q_proj.weight", ".k_proj.weight", ".v_proj.weight", ".out_proj.weight", ".fc1.weight", ".fc2.weight")
    return (name for name in layer_weights(model, "text_encoder") if name.endswith(ends))


def _vae_changes(model: Any, base: Any) -> dict[str, float]:
    ours, theirs = getattr(model, "vae", None), getattr(base, "vae", None)
    if ours is None or theirs is None:
        return {}
    after, before = ours.state_dict(), theirs.state_dict()
    if {k: v.shape for k, v in after.items()} != {k: v.shape for k, v in before.items()}:
        raise UserError(f"the VAE of {model.name} is not of the shape of that of {base.name}; give the right base with --base")
    norms = {name: float((after[name].double() - before[name].double()).norm()) for name in after}
    return {f"vae.{name}": norm for name, norm in norms.items() if norm > 0}
