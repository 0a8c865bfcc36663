"""safeweights: make the weights of a text-to-image model safe to release, and prove it.

The public names are loaded on first use, so that ``import safeweights`` stays instant and imports no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Concept": "safeweights.core.concept",
    "ConceptFile": "safeweights.core.concept",
    "Protection": "safeweights.core.method",
    "Record": "safeweights.records.record",
    "Sampling": "safeweights.core.model",
    "UserError": "safeweights.core.errors",
    "evaluate": "safeweights.audit.evaluate",
    "load_concepts": "safeweights.core.concept",
    "method": "safeweights.core.table",
    "open_model": "safeweights.models.door",
    "sandbox_concepts": "safeweights.sandbox.files",
    "write_report": "safeweights.report.page",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'safeweights' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
