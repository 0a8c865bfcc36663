"""Pre-trained picture and text encoders from transformers folders: the networks behind detectors and metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safeweights.core.errors import UserError
from safeweights.models.quiet import quiet

BATCH = 64


class Backbone:
    """A frozen transformers model of a folder or a Hub id, in fp32, with the pixel preprocessing that belongs to it.

    Raises UserError where the folder is missing or incomplete, or holds no safetensors weights.
    """

    def __init__(self, name: str, auto: str, what: str) -> None:
        import transformers

        if not name:
            raise UserError(f"{what}: no model is named; add 'model: FOLDER' (or a Hub id)")
        self.name, self.what = name, what
        self.local = Path(name).is_dir()
        if not self.local and (name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()):
            raise UserError(f"{what}: {name} is not a folder with a transformers model")
        options: dict[str, Any] = {"local_files_only": self.local}
        try:
            with quiet():
                self.model, info = getattr(transformers, auto).from_pretrained(
                    name, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
                )
                # Without backend="pil" the resizing depends on whether torchvision happens to be installed.
                self.processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil", **options)
        except Exception as error:  # whatever the loaders raise, the folder is what is wrong
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            where = "the folder" if self.local else "neither a folder here nor a Hub id that can be loaded:"
            raise UserError(f"{what}: {where} {name} cannot be used: {reason}") from None
        self.missing = sorted(info["missing_keys"])
        self.model.eval().requires_grad_(False)

    @cached_property
    def sha256(self) -> str:
        """Digest of the weight files."""
        if self.local:
            return hash_files(sorted(Path(self.name).glob("*.safetensors")))
        from transformers.utils.hub import cached_file

        return hash_files([Path(str(cached_file(self.name, "model.safetensors")))])

    def refuse_missing(self) -> None:
        """UserError where the folder lacks weights that the model needs: they would be random."""
        if self.missing:
            raise UserError(f"{self.what}: {self.name} is not a complete model; it lacks e.g. {self.missing[0]}")

    def pixels(self, images: Tensor) -> Iterator[Tensor]:
        """Preprocessed batches of pictures (N, 3, H, W) in [0, 1]. The model moves to where the pictures are.

        Pictures are rounded to bytes first, so that one in memory is judged exactly like its PNG.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"pictures are (N, 3, H, W), not {tuple(images.shape)}")
        self.model.to(images.device)
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            rounded = (part.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            batch = self.processor(list(rounded.cpu().numpy()), return_tensors="pt", input_data_format="channels_last")
            yield batch["pixel_values"].to(images.device)


class CLIP(Backbone):
    """A CLIP model: unit vectors of pictures and texts, and the scale it was trained with."""

    def __init__(self, name: str, what: str = "CLIP model") -> None:
        import transformers

        super().__init__(name, "AutoModel", what)
        if not hasattr(self.model, "get_text_features") or not hasattr(self.model, "logit_scale"):
            raise UserError(f"{what}: {name} is a {self.model.config.model_type} model, not a CLIP")
        self.refuse_missing()
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=self.local)
        except Exception as error:
            raise UserError(f"{what}: the tokenizer of {name} cannot be opened: {str(error).splitlines()[0]}") from None
        self.length = int(self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Unit vectors (N, D) of pictures (N, 3, H, W) in [0, 1]."""
        return torch.cat([_unit(self.model.get_image_features(pixel_values=batch)) for batch in self.pixels(images)])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, D) of texts, cut to the length the model reads."""
        parts = []
        for start in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                list(texts[start : start + BATCH]),
                padding="max_length", truncation=True, max_length=self.length, return_tensors="pt",
            )  # fmt: skip
            given = {key: tokens[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
            parts.append(_unit(self.model.get_text_features(**given)))
        return torch.cat(parts)

    @property
    def scale(self) -> float:
        """Factor between cosines and logits."""
        return float(self.model.logit_scale.exp())


class Embedder(Backbone):
    """One feature vector per picture, from any transformers vision model; the head of a classifier is left out."""

    def __init__(self, name: str, what: str = "feature model") -> None:
        super().__init__(name, "AutoModel", what)
        # A classifier's folder may lack the bare model's pooler; its class token is used then, never a random pooler.
        self.class_token = bool(self.missing) and all("pooler" in key for key in self.missing)
        if not self.class_token:
            self.refuse_missing()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (N, D) of pictures (N, 3, H, W) in [0, 1]."""
        return torch.cat([self._forward(batch) for batch in self.pixels(images)])

    def _forward(self, pixels: Tensor) -> Tensor:
        if hasattr(self.model, "get_image_features"):
            return _pooled(self.model.get_image_features(pixel_values=pixels))
        output = self.model(pixel_values=pixels)
        if self.class_token:
            hidden: Tensor = output.last_hidden_state
            return hidden[:, 0]
        return _pooled(output)


class AsModule(nn.Module):
    """An embedder as the ``feature=`` module of torchmetrics."""

    def __init__(self, embedder: Embedder, num_features: int) -> None:
        super().__init__()
        self.embedder, self.num_features = embedder, num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.embedder.features(images)


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 of one file, or of the names and digests of several."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    listing = "\n".join(f"{digest} {path.name}" for digest, path in zip(digests, paths, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


def _pooled(output: Any) -> Tensor:
    """(N, D) from what a transformers model hands back: a tensor, or an output with a pooled part."""
    pooled = output if isinstance(output, Tensor) else output.pooler_output
    if pooled is None:
        pooled = output.last_hidden_state.mean(dim=1)
    return pooled.flatten(1).float()


def _unit(output: Any) -> Tensor:
    return nn.functional.normalize(_pooled(output), dim=-1)
