"""What a single file must say about itself to be opened without its folder: the parts' configs and the tokenizer, as metadata.

The original layout holds tensors only; readers know the published sizes by heart. Two entries make a file of any size whole.
"""

from __future__ import annotations

import base64
import binascii
import json
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safeweights.core.errors import UserError

CONFIG, TOKENIZER = "safeweights.config", "safeweights.tokenizer"
LARGEST = 32 * 2**20
"""Bytes of a tokenizer unpacked; CLIP's takes 4 MB. A larger one is not ours, but made to fill a memory."""
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
NOT_ARCHITECTURE = ("_name_or_path", "_class_name", "auto_map", "quantization_config", "_commit_hash")


def pack(model: Any) -> dict[str, str]:
    """The metadata entries of an opened `StableDiffusion`: JSON, and for the tokenizer zlib in base64."""
    configs = {
        "unet": _plain(model.denoiser.config),
        "vae": _plain(model.vae.config),
        "text_encoder": _plain(model.text_encoder.config.to_dict()),
        "scheduler": {"_class_name": type(model.scheduler).__name__, **_plain(model.scheduler.config)},
    }
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save_pretrained(folder)
        files = {name: (Path(folder) / name).read_text("utf-8") for name in TOKENIZER_FILES if (Path(folder) / name).is_file()}
    packed = base64.b64encode(zlib.compress(json.dumps(files).encode(), 9)).decode("ascii")
    return {CONFIG: json.dumps(configs, sort_keys=True), TOKENIZER: packed}


def unpack(path: Path, metadata: Mapping[str, str], folder: Path) -> Path | None:
    """Write what ``metadata`` packs as a diffusers folder without weights; None where nothing is packed.

    Only files of fixed names are written, and classes are chosen here, not by the file. Raises UserError for damaged entries.
    """
    if CONFIG not in metadata or TOKENIZER not in metadata:
        return None
    try:
        configs = json.loads(metadata[CONFIG])
        inflate = zlib.decompressobj()
        text = inflate.decompress(base64.b64decode(metadata[TOKENIZER], validate=True), LARGEST)
        if inflate.unconsumed_tail:
            raise ValueError("the tokenizer is too large")
        files = json.loads(text)
        scheduler = str(configs["scheduler"]["_class_name"])
        _check_scheduler(scheduler)
        written: dict[str, str] = {
            f"{part}/config.json": json.dumps({**_plain(configs[part]), "_class_name": name, "architectures": [name]})
            for part, name in CLASSES.items()
        }
        written["scheduler/scheduler_config.json"] = json.dumps({**_plain(configs["scheduler"]), "_class_name": scheduler})
        written |= {f"tokenizer/{name}": str(files[name]) for name in TOKENIZER_FILES if name in files}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, zlib.error, binascii.Error) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{path}: what it says about its architecture cannot be read ({reason}); give --config or its folder"
        ) from None
    index = {
        "_class_name": "StableDiffusionPipeline",
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", CLASSES["unet"]],
        "vae": ["diffusers", CLASSES["vae"]],
        "text_encoder": ["transformers", CLASSES["text_encoder"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    for name, content in {"model_index.json": json.dumps(index), **written}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that describe an architecture, JSON-ready."""
    kept = {key: value for key, value in dict(config).items() if key not in NOT_ARCHITECTURE}
    data: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return data


def _check_scheduler(name: str) -> None:
    import diffusers

    found = getattr(diffusers, name, None) if name.endswith("Scheduler") and name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise ValueError(f"{name[:60]!r} is no scheduler of diffusers")
