"""Signatures of released models by a local elliptic-curve key, in the format of the ``model-signing`` library (OpenSSF)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from safeweights.core.errors import UserError
from safeweights.core.text import plain
from safeweights.release.manifest import SIGNATURE

MAKE_KEY = (
    "openssl ecparam -name prime256v1 -genkey -noout -out private.pem && openssl ec -in private.pem -pubout -out public.pem"
)
PASSWORD = "SAFEWEIGHTS_KEY_PASSWORD"


def signature_of(path: Path) -> Path:
    """Where the signature of a folder or a single file lies: ``FOLDER/model.sig``, ``FILE.sig``."""
    return path / SIGNATURE if path.is_dir() else path.with_name(f"{path.name}.sig")


def check_signing(key: Path) -> None:
    """Raise, before any work is done, the UserError of a missing library or key."""
    _library("signing")
    _check_key(key, "private")


def sign(path: Path, key: Path) -> Path:
    """Sign every file of a folder, or a single file, with a PEM private key (P-256, P-384, P-521); returns the signature's path.

    An encrypted key is opened with the password in SAFEWEIGHTS_KEY_PASSWORD. Raises UserError for a key that cannot be used.
    """
    signing, hashing = _library("signing"), _library("hashing")
    if not path.exists():
        raise UserError(f"{path} does not exist; give an exported folder or file")
    _check_key(key, "private")
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key, password=os.environ.get(PASSWORD))
    except Exception as error:  # whatever the library says of a key, the key is what is wrong
        raise UserError(f"{key} cannot be used as a private key ({plain(error)}); make one with: {MAKE_KEY}") from None
    target = signature_of(path)
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder) / SIGNATURE
        try:
            config.set_hashing_config(_hashing(hashing, target)).sign(path, partial)
        except Exception as error:
            raise UserError(f"{path} cannot be signed: {plain(error)}") from None
        waiting = target.with_name(f".{target.name}.partial")
        try:
            waiting.write_bytes(partial.read_bytes())
            waiting.replace(target)
        except OSError as error:
            raise UserError(f"{target} cannot be written: {error.strerror}") from None
    return target


def verify_signature(path: Path, key: Path) -> list[str]:
    """Why the signature of ``path`` does not hold under a PEM public key, one line each; [] where it holds.

    Raises UserError for a key that cannot be used.
    """
    verifying, hashing = _library("verifying"), _library("hashing")
    _check_key(key, "public")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        raise UserError(f"{key} cannot be used as a public key ({plain(error)})") from None
    signature = signature_of(path)
    if not signature.is_file():
        return [f"{signature.name} is missing: nothing here is signed"]
    try:
        config.set_hashing_config(_hashing(hashing, signature)).verify(path, signature)
    except Exception as error:  # a forged or damaged signature can fail anywhere in the library
        return _reasons(error)
    return []


def _reasons(error: Exception) -> list[str]:
    text = str(error)
    if not text.startswith("Signature mismatch: "):
        if type(error).__name__ == "InvalidSignature" or "key mismatch" in text.lower():
            return ["it was not made with this key, or was altered"]
        return [f"it cannot be verified with this key{f' ({plain(text)})' if text else ''}"]
    import ast

    try:
        lines = ast.literal_eval(text.removeprefix("Signature mismatch: "))
    except (ValueError, SyntaxError):
        lines = [text]
    return [plain(line.split(": Expected")[0]) for line in lines] or ["the files are not those that were signed"]


def _hashing(hashing: Any, signature: Path) -> Any:
    # The signature cannot sign itself.
    return hashing.Config().set_ignored_paths(paths=[Path(signature.name)], ignore_git_paths=True)


def _check_key(key: Path, kind: str) -> None:
    if not key.is_file():
        raise UserError(f"the {kind} key {key} does not exist; make a pair with: {MAKE_KEY}")


def _library(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"model_signing.{name}")
    except ImportError:
        raise UserError("signing needs the model-signing library; run: pip install 'safeweights[sign]'") from None
