"""Groups of parameters by the names the papers give them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from safeweights.core.errors import UserError

# Names as in ``DiffusionModel.named_parameters``. The text encoder may or may not wrap its layers in ``text_model``.
_TEXT = r"text_encoder\.(text_model\.)?"
GROUPS = {
    "xattn": r"unet\.(.*\.)?attn2\.",
    "xattn_kv": r"unet\.(.*\.)?attn2\.to_[kv]\.",
    # Everything but cross-attention, the output layers and the time embedding.
    "noxattn": r"unet\.(?!(.*\.)?attn2\.)(?!conv_norm_out\.|conv_out\.|time_embedding\.)",
    "attention": r"unet\.(.*\.)?attn[12]\.",
    "selfattn": r"unet\.(.*\.)?attn1\.",
    # The weights around neurons: into and out of the feed-forward layers, and the keys and values that the text becomes.
    "ffn": r"unet\.(.*\.)?ff\.net\.(0\.proj|2)\.weight$",
    "neurons": r"unet\.(.*\.)?(ff\.net\.(0\.proj|2)|attn2\.to_[kv])\.weight$",
    # Attention, feed-forward and projections: everything inside the transformer blocks.
    "transformer": r"unet\.(.*\.)?attentions\.",
    "full": r"unet\.",
    "text_encoder": _TEXT + r"(encoder\.layers\.|final_layer_norm\.)",
}
ALIASES = {"unet": "full", "esd-x": "xattn", "esd-x-strict": "xattn_kv", "esd-u": "noxattn", "esd-all": "full"}


def pattern(group: str) -> re.Pattern[str]:
    """The pattern a group's names match from their start. Raises UserError for an unknown group, listing the valid ones."""
    name = ALIASES.get(group, group)
    if first := re.fullmatch(r"text_encoder:([1-9]\d*)", name):
        # Layers 0 … N-1 by whole number, so that layer 1 is not also 10 and 11.
        return re.compile(_TEXT + rf"encoder\.layers\.({'|'.join(str(layer) for layer in range(int(first[1])))})\.")
    if name not in GROUPS:
        raise UserError(f"unknown parameters {group!r}; known are {', '.join([*GROUPS, 'text_encoder:N', *ALIASES])}")
    return re.compile(GROUPS[name])


def select(named_parameters: Iterable[tuple[str, Any]], group: str | Sequence[str]) -> list[str]:
    """The names of a group, in the model's order; an explicit list of names is checked and returned as it is.

    Raises UserError for an unknown group or name, and for a group that selects nothing in this model.
    """
    names = [name for name, _ in named_parameters]
    if not isinstance(group, str):
        if unknown := sorted(set(group) - set(names)):
            raise UserError(
                f"this model has no parameter {unknown[0]!r} ({len(unknown)} unknown names); list names as the model gives them"
            )
        return list(group)
    wanted = pattern(group)
    if match := re.fullmatch(r"text_encoder:(\d+)", group):
        layers = {int(found[2]) for name in names if (found := re.match(_TEXT + r"encoder\.layers\.(\d+)\.", name))}
        if layers and int(match[1]) > len(layers):
            raise UserError(f"parameters {group!r}: this text encoder has only {len(layers)} layers")
    selected = [name for name in names if wanted.match(name)]
    if not selected:
        raise UserError(f"parameters {group!r} select nothing in this model; try one of {', '.join(GROUPS)}")
    return selected
