"""A whole model in one ``.safetensors`` file under the names of the original layout, as A1111 and ComfyUI open it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safeweights.core.errors import UserError
from safeweights.release.manifest import EMBEDDED
from safeweights.release.modelspec import architecture, fill_hash, modelspec


def write_checkpoint(model: Any, file: Path, manifest: Mapping[str, Any], *, about: Mapping[str, str | None]) -> dict[str, str]:
    """Write ``file`` and return its metadata: ModelSpec entries, the parts' configs, the tokenizer and the manifest.

    ``about`` is title, description, license and author as far as given. Raises UserError for a model that has no original layout.
    """
    from safetensors.torch import save_file

    from safeweights.models.embedded import pack
    from safeweights.models.single_file import original_layout
    from safeweights.models.stable_diffusion import follow_umask

    if not hasattr(model, "vae"):
        raise UserError(f"{model.name} has no VAE of its own, so it cannot be one file")
    tensors = original_layout(model)
    # Fused and reshaped tensors may share memory with others, which safetensors refuses.
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen or not tensor.is_contiguous():
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    metadata = {
        "format": "pt",
        **modelspec(model, **{"title": str(model.name), **{key: value for key, value in about.items() if value}}),
        **pack(model),
        EMBEDDED: json.dumps(manifest, ensure_ascii=False, default=str),
    }
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, file, metadata)
    follow_umask([file])
    return {**metadata, "modelspec.hash_sha256": fill_hash(file)}


def opened_elsewhere(model: Any) -> bool:
    """Whether programs that know the published sizes only can open this model as a single file."""
    return not architecture(model).endswith("custom")
