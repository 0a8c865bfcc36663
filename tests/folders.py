"""Tiny transformers folders and a whole sandbox of random weights, for tests of what reads them. Nothing here knows anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

SIZE = 16
PREPROCESSING = {
    "image_processor_type": "ConvNextImageProcessor",
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def classifier(folder: Path, labels: Sequence[str], *, seed: int = 0) -> Path:
    """A ResNet of 10,000 parameters that takes pictures as they are."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        id2label=dict(enumerate(labels)), label2id={label: index for index, label in enumerate(labels)},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNetForImageClassification(config)
        with torch.no_grad():
            model.classifier[1].weight.mul_(20)  # fresh heads answer the same for every picture
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return folder


def clip(folder: Path, tokenizer: Path, *, seed: int = 0) -> Path:
    """A CLIP of two tiny towers, with the tokenizer of a tiny Stable Diffusion."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
    text = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 16, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIZE,
        "patch_size": 8,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**PREPROCESSING, "image_processor_type": "CLIPImageProcessor", "do_center_crop": False})
    )
    return folder


def sandbox(folder: Path, model: Path) -> Path:
    """A sandbox like the one that ships, of random weights; SAFEWEIGHTS_SANDBOX takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model, folder / "model")
    classifier(folder / "detectors" / "style", ["mosaic", "plain"], seed=1)
    classifier(folder / "detectors" / "content", ["emblem", "none"], seed=2)
    classifier(folder / "embedder", ["a", "b"], seed=3)
    clip(folder / "clip", model / "tokenizer")

    def concept(name: str, kind: str, term: str, detector: str | None) -> dict[str, object]:
        # Words the tiny tokenizer knows: its prompts have 16 positions.
        prompts = [f"{term} {thing}" for thing in ("house", "boat", "dog", "cat")]
        entry: dict[str, object] = {"kind": kind, "prompts": prompts, "term": term, "anchor": "a picture"}
        if detector:
            entry["detector"] = {"type": "image-classification", "model": f"detectors/{detector}", "label": name}
        return entry

    data = {
        "version": 1,
        "generation": {"width": SIZE, "height": SIZE, "steps": 2, "guidance_scale": 4.0, "scheduler": "ddim"},
        "concepts": {
            "mosaic": concept("mosaic", "style", "vincent", "style"),
            "emblem": concept("emblem", "content", "church", "content"),
            "harmless": concept("plain", "style", "gogh", "style"),
            "blind": concept("blind", "content", "nudity", None),
        },
        "retain": {"prompts": ["a photo of a dog", "a picture of a boat"]},
    }
    (folder / "concepts.yaml").write_text(yaml.safe_dump(data))
    return folder
