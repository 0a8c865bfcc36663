"""Somebody's text in our files and on our terminal: shown as text, whatever it holds. No torch."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

STEERING = set("\u200b\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff")
"""Characters that reverse or hide what stands around them."""


def plain(value: Any, longest: int = 200) -> str:
    """One line of at most ``longest`` characters that cannot steer a terminal or reverse itself: such characters become marks."""
    text = str(value)[: 4 * longest]
    text = "".join("�" if unicodedata.category(c) in ("Cc", "Cs") or c in STEERING else c for c in re.sub(r"\s+", " ", text))
    return text if len(text) <= longest else text[: longest - 1] + "…"


def markdown(value: Any, longest: int = 200) -> str:
    """`plain` text that Markdown shows as it stands: no link, picture, HTML, table cell, mention or emphasis comes of it."""
    text = plain(value, longest).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#+\-.!|~$:@=\"'])", r"\\\1", text)
    return text or "–"


def whole_words(words: str) -> re.Pattern[str]:
    """Finds ``words`` where they stand as whole words, in any case: "art" in "Art of a party" once, at its beginning."""
    # An edge that is no letter needs no boundary: "<new>s" holds "<new>".
    before, after = (edge if re.fullmatch(r"\w", end) else "" for edge, end in ((r"(?<!\w)", words[:1]), (r"(?!\w)", words[-1:])))
    return re.compile(rf"{before}{re.escape(words)}{after}", re.IGNORECASE)


def slug(value: Any, longest: int = 60) -> str:
    """A file name of letters, digits and dashes only."""
    return re.sub(r"[^a-z0-9]+", "-", plain(value).lower()).strip("-")[:longest].strip("-") or "unnamed"
