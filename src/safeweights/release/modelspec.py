"""The header that A1111, ComfyUI and model sites read: ModelSpec 1.0.1 entries of a safetensors file. No torch."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safeweights.core.text import plain

VERSION = "1.0.1"
NO_HASH = "0x" + "0" * 64
"""Stands in the header until the tensors are written; replaced by `fill_hash`."""
LONG = ("description", "license", "author", "usage_hint")
STANDARD_WIDTHS = (320, 640, 1280, 1280)


def modelspec(model: Any, *, title: str, part: str = "", **more: str | None) -> dict[str, str]:
    """The entries for an opened model or a ``part`` of it ("lora"); ``more`` are description, license, author and the like.

    Architecture and resolution are those of the published models where the sizes are theirs; a model of another size is
    ``stable-diffusion-vN-custom``, so that no program takes it for what it is not. All text is made one plain line.
    """
    two = model.text_encoder.config.hidden_act == "gelu"
    v = model.prediction == "v_prediction"
    _, height, width = model.latent_shape
    pixels = f"{width * model.latent_stride}x{height * model.latent_stride}"
    entries = {
        "sai_model_spec": VERSION,
        "architecture": architecture(model) + (f"/{part}" if part else ""),
        "implementation": "https://github.com/Stability-AI/generative-models" if not part else "diffusers",
        "title": plain(title),
        "resolution": pixels,
        "prediction_type": "v" if v else "epsilon",
        "date": _today(),
        "hash_sha256": NO_HASH,
        **({"encoder_layer": "2" if two else "1"} if not part else {}),
    }
    for key, value in more.items():
        if value:
            entries[key] = plain(value, 2000 if key in LONG else 200)
    return {f"modelspec.{key}": value for key, value in entries.items()}


def architecture(model: Any) -> str:
    """ModelSpec's name of the architecture: told from sizes, never from the model's name."""
    two = model.text_encoder.config.hidden_act == "gelu"
    config = model.denoiser.config
    standard = tuple(config.block_out_channels) == STANDARD_WIDTHS and config.layers_per_block == 2
    if not standard or config.cross_attention_dim != (1024 if two else 768):
        return f"stable-diffusion-v{2 if two else 1}-custom"
    if not two:
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if model.prediction == "v_prediction" else "stable-diffusion-v2-512"


def fill_hash(file: Path) -> str:
    """Replace the hash that stands in for the real one, the SHA-256 of everything behind the header, and return it."""
    with file.open("rb+") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = opened.read(size)
        digest = hashlib.sha256()
        while block := opened.read(2**22):
            digest.update(block)
        found = "0x" + digest.hexdigest()
        # A string of the same length: nothing in the file moves.
        at = header.index(f'"modelspec.hash_sha256":{json.dumps(NO_HASH)}'.encode()) + len('"modelspec.hash_sha256":"')
        opened.seek(8 + at)
        opened.write(found.encode("ascii"))
        opened.flush()
        os.fsync(opened.fileno())
    return found


def data_hash(file: Path, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(stated, real) hash of a file's tensors; None where the file states none."""
    stated = metadata.get("modelspec.hash_sha256")
    if not stated:
        return None
    with file.open("rb") as opened:
        opened.seek(8 + int.from_bytes(opened.read(8), "little"))
        return stated, "0x" + hashlib.file_digest(opened, "sha256").hexdigest()


def _today() -> str:
    """The date of now, or of SOURCE_DATE_EPOCH where a build must be repeatable."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    when = datetime.datetime.fromtimestamp(int(epoch), datetime.UTC) if epoch.isdigit() else datetime.datetime.now(datetime.UTC)
    return when.date().isoformat()
