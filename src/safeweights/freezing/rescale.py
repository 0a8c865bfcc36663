"""A freeze that lives in the weights: the same function, written so that optimisers hardly move it.

A network computes the same when what a layer reads is divided by s and its weight multiplied by s. With s a power of two every
product and sum scales exactly, so no picture changes; but a step of AdamW is about its learning rate whatever the weight's size,
so that beside a weight s times as large it is s times as small, and so is what a low-rank adapter adds there.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.core.method import Protection
from safeweights.core.model import DiffusionModel
from safeweights.diffusion.noise import generator

BLOCK = re.compile(r"unet\.(?:.*\.)?transformer_blocks\.\d+(?=\.norm1\.weight$)")
RESNET = re.compile(r"unet\.(?:.*\.)?resnets\.\d+(?=\.conv1\.weight$)")
LAST_NORM = re.compile(r"text_encoder\.(?:text_model\.)?final_layer_norm(?=\.weight$)")
Exponents = Mapping[str, tuple[int, int]]
"""Powers of two by tensor name, of the first and of the second half of its rows (the same but for gated layers)."""


@dataclass(frozen=True)
class Rescaling:
    """A rewriting of a model: what is multiplied by which power of two, and what that means for the mask."""

    exponents: Exponents
    stiff: tuple[str, ...]
    """Frozen tensors that became large: steps on them count little."""
    beside: tuple[str, ...]
    """Tensors outside the mask that became large with them, since they read the same input."""
    partners: tuple[str, ...]
    """Tensors that became small, so that steps on them count much: to be left alone by those who honour the mask."""
    unreached: tuple[str, ...]
    """Frozen tensors that no exact rewriting makes large: biases, norms, and what reads or writes the residual stream."""

    def tensors(self, model: DiffusionModel) -> dict[str, Tensor]:
        """The new values of all tensors that change, in the dtype of ``model``. Raises UserError where that cannot hold them."""
        found = scaled(dict(model.named_parameters()), self.exponents)
        for name, value in found.items():
            if not bool(torch.isfinite(value).all()):
                told = str(value.dtype).removeprefix("torch.")
                raise UserError(f"{name} times 2^{max(self.exponents[name])} overflows {told}; take a smaller power or float32")
        return found


def rescale(names: Sequence[str], frozen: Iterable[str], *, power: int = 6, share: float = 0.5, nearly: bool = True) -> Rescaling:
    """How to make the frozen tensors of a model with these parameter names 2^power times as large, function unchanged.

    Exact: query, key, value and feed-forward inputs against their LayerNorm; proj_in against the GroupNorm before it; keys of
    cross-attention against their queries; output linears against the values or the value half before them; keys and values of
    cross-attention against the text encoder's last norm, which all of them share, if at least ``share`` of them are frozen.
    ``nearly``: first convolutions and time projections, too, whose GroupNorm divides by the size of what it reads but for its eps
    (the outcome moves by less than eps / (2 variance) of itself).
    Raises UserError where nothing in the mask can be reached.
    """
    frozen = frozenset(frozen)
    if not 1 <= power <= 12:
        raise UserError(f"power must be from 1 to 12, not {power}")
    known = set(names)
    moved: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])

    def move(name: str, by: int, half: int | None = None) -> None:
        if name in known and by:
            for side in (0, 1) if half is None else (half,):
                moved[name][side] += by

    def norm(prefix: str, by: int) -> None:
        move(f"{prefix}.weight", by)
        move(f"{prefix}.bias", by)

    blocks = [match[0] for name in names if (match := BLOCK.match(name))]
    # Which way a tensor goes: "held(x)" asks for 2^power.
    held = frozen.__contains__
    text = _text_power(names, blocks, frozen, power, share)
    for block in blocks:
        _self_attention(f"{block}.attn1", f"{block}.norm1", held, power, move, norm)
        _cross_attention(f"{block}.attn2", f"{block}.norm2", held, power, text, move, norm)
        _feed_forward(f"{block}.ff.net", f"{block}.norm3", held, power, move, norm)
    for transformer in dict.fromkeys(block.rpartition(".transformer_blocks.")[0] for block in blocks):
        if held(f"{transformer}.proj_in.weight"):
            move(f"{transformer}.proj_in.weight", power)
            norm(f"{transformer}.norm", -power)
    if text:
        for name in names:
            if match := LAST_NORM.match(name):
                norm(match[0], -text)
    for name in names if nearly else ():
        if (match := RESNET.match(name)) and (held(name) or held(f"{match[0]}.time_emb_proj.weight")):
            for layer in ("conv1", "time_emb_proj"):
                norm(f"{match[0]}.{layer}", power)
    exponents = {name: (pair[0], pair[1]) for name, pair in moved.items() if any(pair)}
    if not exponents:
        raise UserError("nothing in this mask can be frozen in the weights of this model; enforce it where models are trained")
    least = {name: min(pair) for name, pair in exponents.items()}
    return Rescaling(
        exponents,
        stiff=tuple(name for name in names if name in frozen and least.get(name, 0) > 0),
        beside=tuple(name for name in names if name not in frozen and max(exponents.get(name, (0, 0))) > 0),
        partners=tuple(name for name in names if least.get(name, 0) < 0),
        unreached=tuple(name for name in names if name in frozen and least.get(name, 0) <= 0),
    )


Move = Callable[[str, int], None]


def _text_power(names: Sequence[str], blocks: Sequence[str], frozen: frozenset[str], power: int, share: float) -> int:
    """By how much the text states shrink: all keys and values of cross-attention read them, so all become large together."""
    keys = [f"{block}.attn2.{side}.weight" for block in blocks for side in ("to_k", "to_v")]
    keys = [name for name in keys if name in set(names)]
    if not keys or not any(LAST_NORM.match(name) for name in names) or sum(k in frozen for k in keys) < share * len(keys):
        return 0
    # A value whose output linear is frozen, too, is made small again by that one's sake.
    both = any(f"{b}.attn2.to_v.weight" in frozen and f"{b}.attn2.to_out.0.weight" in frozen for b in blocks)
    return 2 * power if both else power


def _self_attention(at: str, before: str, held: Callable[[str], bool], power: int, move: Move, norm: Move) -> None:
    q, k, v, out = (f"{at}.{side}.weight" for side in ("to_q", "to_k", "to_v", "to_out.0"))
    b = -power if held(out) else 0  # v by 2^b, out by 2^-b
    a = max(power if held(q) or held(k) else 0, (power if held(v) else 0) - b)  # q, k, v by 2^a, the norm by 2^-a
    for name, by in ((q, a), (k, a), (v, a + b), (out, -b)):
        move(name, by)
    norm(before, -a)


def _cross_attention(at: str, before: str, held: Callable[[str], bool], power: int, text: int, move: Move, norm: Move) -> None:
    q, k, v, out = (f"{at}.{side}.weight" for side in ("to_q", "to_k", "to_v", "to_out.0"))
    # Without the text norm's help values cannot grow but at the cost of the output linear, nor that one but at theirs.
    b = -power if held(out) and text else 0
    c = -power if held(k) and not text else 0  # q by 2^c, k by 2^-c
    a = (power if held(q) else 0) - c
    for name, by in ((q, a + c), (k, text - c), (v, text + b), (out, -b)):
        move(name, by)
    norm(before, -a)


def _feed_forward(at: str, before: str, held: Callable[[str], bool], power: int, move: Callable[..., None], norm: Move) -> None:
    proj, out = f"{at}.0.proj", f"{at}.2.weight"
    f = -power if held(out) else 0  # the value half by 2^f, out by 2^-f; the gate goes through a GELU and cannot
    a = (power if held(f"{proj}.weight") else 0) - f
    move(f"{proj}.weight", a + f, 0)
    move(f"{proj}.weight", a, 1)
    move(f"{proj}.bias", f, 0)
    move(out, -f)
    norm(before, -a)


def scaled(tensors: Mapping[str, Tensor], exponents: Exponents) -> dict[str, Tensor]:
    """The named tensors times their powers of two."""
    found = {}
    for name, (first, second) in exponents.items():
        value = tensors[name].detach()
        if first == second:
            found[name] = value * 2.0**first
        else:
            upper, lower = value.chunk(2)
            found[name] = torch.cat([upper * 2.0**first, lower * 2.0**second])
    return found


def apply_in_weights(
    model: DiffusionModel, frozen: frozenset[str], *, power: int = 6, share: float = 0.5, nearly: bool = True
) -> tuple[Protection, Rescaling]:
    """The rescaling of ``model`` for a mask, as new tensor values; settings as for `rescale`."""
    rescaling = rescale([name for name, _ in model.named_parameters()], frozen, power=power, share=share, nearly=nearly)
    return (
        Protection(
            method="freeze-in-weights", concepts=(), tensors=rescaling.tensors(model), frozen=frozen,
            settings={"power": power, "share": share, "nearly": nearly},
        ),
        rescaling,
    )  # fmt: skip


@torch.no_grad()
def deviation(model: DiffusionModel, other: DiffusionModel, *, n: int = 4, seed: int = 0) -> float:
    """The largest difference of two models' noise predictions on ``n`` random latents, over the largest prediction."""
    rng = generator("deviation", seed)
    x = torch.randn((n, *model.latent_shape), generator=rng).to(model.device)
    t = torch.randint(len(model.alpha), (n,), generator=rng).to(model.device)
    ours = model.eps(x, t, model.embed(["a picture"]))
    theirs = other.eps(x, t, other.embed(["a picture"]))
    return float((ours - theirs).abs().max() / ours.abs().max())


@torch.no_grad()
def level(model: DiffusionModel) -> dict[str, Tensor]:
    """What an attacker does first who knows of rescaling but has not the original: bring every pair back to usual sizes.

    Norm gains go to a root mean square of about one, their readers take the rest; queries to their keys' size, output linears to
    their values', a value half to its gate's, a first convolution to the size of the second. All by powers of two, so that the
    model stays what it is.
    """
    tensors = {name: value.detach().float() for name, value in model.named_parameters()}
    powers: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])

    def size(name: str, half: int | None = None) -> float:
        value = tensors[name] if half is None else tensors[name].chunk(2)[half]
        by = powers[name][half or 0]
        return math.log2(max(float(value.square().mean().sqrt()), 1e-30)) + by

    def move(name: str, by: int, half: int | None = None) -> None:
        if name in tensors:
            for side in (0, 1) if half is None else (half,):
                powers[name][side] += by

    def from_norm(norm: str, readers: Sequence[str]) -> None:
        if f"{norm}.weight" in tensors and (by := round(size(f"{norm}.weight"))):
            for leaf in ("weight", "bias"):
                move(f"{norm}.{leaf}", -by)
            for reader in readers:
                move(reader, by)

    names = [*tensors]
    blocks = [match[0] for name in names if (match := BLOCK.match(name))]
    if last := next((match[0] for name in names if (match := LAST_NORM.match(name))), None):
        from_norm(last, [f"{block}.attn2.{side}.weight" for block in blocks for side in ("to_k", "to_v")])
    for block in blocks:
        one, two, ff = f"{block}.attn1", f"{block}.attn2", f"{block}.ff.net"
        from_norm(f"{block}.norm1", [f"{one}.{side}.weight" for side in ("to_q", "to_k", "to_v")])
        from_norm(f"{block}.norm2", [f"{two}.to_q.weight"])
        from_norm(f"{block}.norm3", [f"{ff}.0.proj.weight"])
        for attention in (one, two):
            for first, second in (("to_q", "to_k"), ("to_v", "to_out.0")):
                if f"{attention}.{first}.weight" not in tensors:
                    continue
                by = round((size(f"{attention}.{first}.weight") - size(f"{attention}.{second}.weight")) / 2)
                move(f"{attention}.{first}.weight", -by)
                move(f"{attention}.{second}.weight", by)
        if f"{ff}.0.proj.weight" in tensors:
            by = round(size(f"{ff}.0.proj.weight", 0) - size(f"{ff}.0.proj.weight", 1))
            for leaf in ("weight", "bias"):
                move(f"{ff}.0.proj.{leaf}", -by, 0)
            move(f"{ff}.2.weight", by)
    for transformer in dict.fromkeys(block.rpartition(".transformer_blocks.")[0] for block in blocks):
        from_norm(f"{transformer}.norm", [f"{transformer}.proj_in.weight"])
    for name in names:
        if match := RESNET.match(name):
            by = round(size(name) - size(f"{match[0]}.conv2.weight"))
            for layer in ("conv1", "time_emb_proj"):
                for leaf in ("weight", "bias"):
                    move(f"{match[0]}.{layer}.{leaf}", -by)
    moved = {name: (pair[0], pair[1]) for name, pair in powers.items() if any(pair)}
    return {name: value.to(dict(model.named_parameters())[name].dtype) for name, value in scaled(tensors, moved).items()}
