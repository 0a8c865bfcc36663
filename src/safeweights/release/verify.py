"""Is a released model still what its manifest and its signature say?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.core.errors import UserError
from safeweights.core.text import plain
from safeweights.release.manifest import hash_files, hash_tensor, read_manifest, read_metadata
from safeweights.release.modelspec import data_hash
from safeweights.release.signing import signature_of, verify_signature

if TYPE_CHECKING:
    from torch import Tensor


MASKED = {"mask", "owner"}
"""Metadata entries of mask files: their tensors bear the names of weights and hold places."""


@dataclass
class Verdict:
    """What was looked at and what does not fit, one line each; "ok" only where something was looked at and all of it fits."""

    files: int = 0
    tensors: int = 0
    signature: str = "absent"
    """"valid", "invalid", "absent", or "not checked" where one is there and no key was given."""
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "ok": self.ok, "files_checked": self.files, "tensors_checked": self.tensors, "signature": self.signature,
            "problems": self.problems,
        }  # fmt: skip


def verify(path: Path, key: Path | None = None) -> Verdict:
    """Hold a folder or a ``.safetensors`` file against its manifest (files and changed tensors) and, with ``key``, its signature.

    A signature asked for and missing is a problem. Raises UserError where there is neither manifest nor signature.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give an exported folder or file")
    manifest, verdict = read_manifest(path), Verdict()
    signature = signature_of(path)
    if not manifest and not signature.is_file():
        raise UserError(f"{path} holds neither a manifest of safeweights nor a signature ({signature.name}): nothing to verify")
    if key is not None:
        problems = verify_signature(path, key)
        verdict.signature = "invalid" if problems else "valid"
        verdict.problems += [f"signature: {line}" for line in problems]
    elif signature.is_file():
        verdict.signature = "not checked"
    if isinstance(files := manifest.get("files"), dict) and path.is_dir():
        _check_files(path, files, verdict)
    if path.is_file():
        _check_data(path, verdict)
    changed = manifest.get("changed")
    if isinstance(changed, dict) and changed:
        _check_tensors(path, {str(name): str(digest) for name, digest in changed.items()}, verdict)
    if not (verdict.files or verdict.tensors or verdict.problems or verdict.signature == "valid"):
        verdict.problems.append("nothing here could be checked: no manifest tells the files, and the signature needs its --key")
    return verdict


def _check_files(folder: Path, files: Mapping[str, Any], verdict: Verdict) -> None:
    found = hash_files(folder)
    verdict.files = len(files)
    for name in sorted({*files, *found}):
        if name not in found:
            verdict.problems.append(f"file missing: {plain(name)}")
        elif name not in files:
            verdict.problems.append(f"file added: {plain(name)}")
        elif files[name] != found[name]:
            verdict.problems.append(f"file changed: {plain(name)}")


def _check_data(file: Path, verdict: Verdict) -> None:
    try:
        hashes = data_hash(file, read_metadata(file))
    except (OSError, ValueError):
        raise UserError(f"{file} is damaged; copy or download it again") from None
    if hashes:
        verdict.files = 1
        if hashes[0].lower() != hashes[1]:
            verdict.problems.append("tensors changed: their SHA-256 is not that of modelspec.hash_sha256")


def _check_tensors(path: Path, changed: Mapping[str, str], verdict: Verdict) -> None:
    """Every changed tensor of the manifest against the one that is there."""
    tensors = dict.fromkeys(changed, False)
    for name, tensor in _tensors(path, changed):
        tensors[name] = True
        verdict.tensors += 1
        if not any(hash_tensor(form) == changed[name] for form in _forms(tensor)):
            verdict.problems.append(f"tensor changed: {plain(name)}")
    if not any(tensors.values()) and _is_adapter(path):
        return  # an adapter's manifest names what was trained, not what the file calls it
    verdict.problems += [f"tensor missing: {plain(name)}" for name, found in tensors.items() if not found]


def _forms(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, also in shorter types that hold its very values: text encoders are written in float32 whatever they were."""
    import torch

    yield tensor
    for dtype in (torch.float16, torch.bfloat16):
        if tensor.dtype == torch.float32 and torch.equal(tensor.to(dtype).float(), tensor):
            yield tensor.to(dtype)


def _tensors(path: Path, wanted: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(name of the manifest, tensor) of every wanted tensor of a diffusers folder, a part's folder, a LoRA or a single file."""
    from safetensors import SafetensorError, safe_open

    places: list[tuple[Path, tuple[str, ...]]] = []
    if path.is_file():
        yield from _from_checkpoint(path, wanted)
        return
    for file in sorted(path.glob("*/*.safetensors")):
        places.append((file, (f"{file.parent.name}.", f"{file.parent.name}.text_model.")))
    for file in sorted(path.glob("*.safetensors")):
        places.append((file, ("", "text_encoder.", "text_encoder.text_model.")))
    for file, prefixes in places:
        try:
            with safe_open(file, framework="pt") as opened:
                if MASKED & set(opened.metadata() or {}):
                    continue
                for key in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    for name in dict.fromkeys(
                        prefix + part for prefix in prefixes for part in (key, key.removeprefix("text_model."))
                    ):
                        if name in wanted:
                            yield name, opened.get_tensor(key)
        except (SafetensorError, OSError):
            raise UserError(f"{file} is damaged or cut short; copy or download it again") from None


def _from_checkpoint(file: Path, wanted: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The same for a single file: a LoRA's tensors by their own names, a checkpoint's through the converter."""
    from safetensors import safe_open

    from safeweights.models.door import header, open_model

    shapes, _ = header(file)
    if any(name in shapes for name in wanted):
        with safe_open(file, framework="pt") as opened:
            for name in wanted:
                if name in shapes:
                    yield name, opened.get_tensor(name)
        return
    with safe_open(file, framework="pt") as opened:
        kinds = {opened.get_slice(name).get_dtype() for name in shapes if name.startswith("model.diffusion_model.")}
    stored = {"F16": "float16", "BF16": "bfloat16"}.get(kinds.pop()) if len(kinds) == 1 else None
    model = open_model(file, device="cpu", dtype=stored)
    yield from ((name, parameter.detach()) for name, parameter in model.named_parameters() if name in wanted)


def _is_adapter(path: Path) -> bool:
    return path.is_dir() and not (path / "model_index.json").is_file() and not (path / "config.json").is_file()
