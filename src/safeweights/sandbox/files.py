"""Where the sandbox's weights and concepts lie. No torch at import."""

from __future__ import annotations

import os
from pathlib import Path

from safeweights.core.concept import ConceptFile, load_concepts
from safeweights.core.errors import UserError


def weights_folder() -> Path:
    """The folder that holds ``model``, ``concepts.yaml`` and the detectors; SAFEWEIGHTS_SANDBOX points to another one."""
    other = os.environ.get("SAFEWEIGHTS_SANDBOX")
    return Path(other).expanduser() if other else Path(__file__).parent / "weights"


def model_folder() -> Path:
    """The sandbox model, a plain diffusers folder. Raises UserError where it is missing."""
    folder = weights_folder() / "model"
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"the sandbox model is not at {folder}; reinstall safeweights, train one with 'safeweights sandbox train', "
            "or point SAFEWEIGHTS_SANDBOX to a folder that holds it"
        )
    return folder


def concepts_path() -> Path:
    """The sandbox's concept file."""
    return weights_folder() / "concepts.yaml"


def sandbox_concepts() -> ConceptFile:
    """The sandbox's concepts, ready to pick from."""
    return load_concepts(concepts_path())
