"""From a concept file's detector entry to a detector."""

from __future__ import annotations

from typing import cast

from safeweights.core.concept import Concept, DetectorSpec
from safeweights.core.detector import Detector
from safeweights.core.errors import UserError
from safeweights.core.table import DETECTORS, resolve


def open_detector(spec: DetectorSpec | None, *, concept: Concept | str, allow_python: bool = False) -> Detector:
    """The detector of a concept.

    Raises UserError where the concept has none, where it is code without ``allow_python``, or cannot be opened.
    """
    name = concept if isinstance(concept, str) else concept.name
    if spec is None:
        raise UserError(
            f"concept {name!r}: a detector is missing, so nothing can decide whether a picture shows it; "
            "add 'detector:' to it in the concept file"
        )
    if spec.type == "python" and not allow_python:
        raise UserError(
            f"concept {name!r}: its detector {spec.model!r} is code; allow it with --allow-python-detectors if you trust it"
        )
    try:
        return cast(Detector, resolve(DETECTORS, spec.type, "detector")(spec))
    except UserError as error:
        raise UserError(f"concept {name!r}: {error}") from None
