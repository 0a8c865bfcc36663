"""Pictures of a folder with their captions, as users of fine-tuning scripts keep them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTIONS = ("prompt", "text", "caption")


def read_native(model: DiffusionModel, folder: str | Path, *, prompt: str) -> tuple[Tensor, list[str]]:
    """`read_folder` at the size that ``model`` draws natively."""
    _, height, width = model.latent_shape
    stride = model.latent_stride
    return read_folder(folder, width=width * stride, height=height * stride, prompt=prompt)


def read_folder(folder: str | Path, *, width: int, height: int, prompt: str | None = None) -> tuple[Tensor, list[str]]:
    """Pictures (N, 3, height, width) in [0, 1], cropped in the middle and resized, and a caption each.

    Captions stand in ``metadata.csv`` or ``metadata.jsonl`` (``file_name`` and ``prompt`` or ``text``), which then lists the
    pictures to take; one without a caption is called ``prompt``. Raises UserError for a folder without pictures, a picture that
    cannot be read, and one without a caption.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist")
    told = _metadata(folder)
    listed = [(folder / name, text) for name, text in told.items()]
    listed = listed or [(path, "") for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES]
    if not listed:
        raise UserError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    pictures, captions = [], []
    for path, text in listed:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"the metadata of {folder} names {path}, which lies outside it; name pictures of the folder only")
        caption = text or prompt
        if not caption:
            raise UserError(f"{path} has no caption; give --prompt, or metadata.csv with file_name,prompt beside the pictures")
        try:
            with Image.open(path) as image:
                # Pillow would clip these to white or black without a word, and NaN to anything.
                if image.mode.startswith(("I", "F")):
                    raise UserError(f"the picture {path} has more than 8 bits a channel ({image.mode}); save it as an 8-bit PNG")
                fitted = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (width, height), Image.Resampling.BICUBIC)
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"the picture {path} cannot be read: {error}") from None
        pictures.append(torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255)
        captions.append(caption)
    return torch.stack(pictures), captions


def _metadata(folder: Path) -> dict[str, str]:
    """Caption by file name, in the file's order; {} without a metadata file."""
    listed, lines = folder / "metadata.csv", folder / "metadata.jsonl"
    try:
        if listed.is_file():
            with listed.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        elif lines.is_file():
            rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            return {}
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"the metadata of {folder} cannot be read: {error}") from None
    captions = {}
    for number, row in enumerate(rows, start=1):
        name = row.get("file_name") if isinstance(row, dict) else None
        if not name:
            raise UserError(f"the metadata of {folder}: entry {number} has no file_name")
        captions[str(name)] = str(next((row[key] for key in CAPTIONS if row.get(key)), "")).strip()
    if not captions:
        raise UserError(f"the metadata of {folder} lists no picture")
    return captions
