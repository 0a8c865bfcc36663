"""What an adaptation leaves behind, in the form that users of that method expect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.core.errors import UserError

if TYPE_CHECKING:
    from safeweights.core.model import DiffusionModel
    from safeweights.diffusion.adaptation import Adapted

LORA, EMBEDDING = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"


def write_adapted(adapted: Adapted, model: DiffusionModel, folder: Path, *, merge: bool = False) -> str:
    """Write what ``adapted`` made of ``model`` and return what was written.

    Factors become a PEFT LoRA file (the scale multiplied into B, so that alpha is the rank), a word alone an embedding file, and
    everything else, or anything with ``merge``, a diffusers folder, a learnt word in its tokenizer. Raises UserError for a word
    that cannot be added.
    """
    adapter = adapted.adapter
    own = adapter.parameters is not None
    if not merge and not own and adapter.targets is not None:
        save_lora(adapted, folder / LORA)
        return LORA
    if not merge and not own and adapter.token is not None:
        save_embedding(adapted, folder / EMBEDDING)
        return EMBEDDING
    merged = adapted.apply(model)
    if adapter.token is not None:
        add: Any = getattr(merged, "with_words", None)
        if add is None:
            raise UserError(f"{model.name} cannot take a new word")
        merged = add(new_words(adapted))
    merged.save(folder)
    return "diffusers"


def save_lora(adapted: Adapted, path: Path) -> None:
    """``unet.<layer>.lora_A.weight`` (r, in) and ``lora_B.weight`` (out, r), as peft and diffusers read them.

    Beside a convolution they are kernels, (r, in, h, w) and (out, r, 1, 1).
    """
    from safetensors.torch import save_file

    from safeweights.models.stable_diffusion import follow_umask

    tensors = {}
    kernels = {name.rpartition("/")[0] for name, value in adapted.phi.items() if value.dim() == 4}
    for name, value in adapted.phi.items():
        beside, _, end = name.rpartition("/")
        layer = beside.removeprefix("lora/").removesuffix(".weight")
        scaled = value if end == "down" else value * adapted.adapter.scale
        if beside in kernels and scaled.dim() == 2:
            scaled = scaled[:, :, None, None]
        tensors[f"{layer}.lora_{'A' if end == 'down' else 'B'}.weight"] = scaled.detach().cpu().contiguous()
    save_file(tensors, path, {"format": "pt"})
    follow_umask([path])


def save_embedding(adapted: Adapted, path: Path) -> None:
    """One tensor under the word's name: (D,) for one vector, (k, D) for several, as ``load_textual_inversion`` reads it."""
    from safetensors.torch import save_file

    from safeweights.models.stable_diffusion import follow_umask

    rows = adapted.phi["token"].detach().cpu().contiguous()
    save_file({str(adapted.adapter.token): rows[0].clone() if len(rows) == 1 else rows}, path, {"format": "pt"})
    follow_umask([path])


def new_words(adapted: Adapted) -> dict[str, Any]:
    """Embedding (D,) by new word: the token, and token_1, token_2, … for further vectors, as diffusers names them."""
    rows = adapted.phi["token"].detach()
    return {f"{adapted.adapter.token}{f'_{i}' if i else ''}": row for i, row in enumerate(rows)}
