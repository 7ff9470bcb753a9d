"""Texts of data and of errors as one printable line."""

from __future__ import annotations

from typing import Any
from unicodedata import bidirectional, category

REORDERING = (
    "LRE",
    "RLE",
    "LRO",
    "RLO",
    "PDF",
    "LRI",
    "RLI",
    "FSI",
    "PDI",
)  # characters that turn a line around


def printable(text: str) -> str:
    """The text with control and reordering characters, line separators and lone surrogates as their escapes."""
    return "".join(
        c.encode("unicode_escape").decode()
        if category(c) in ("Cc", "Cs", "Zl", "Zp") or bidirectional(c) in REORDERING
        else c
        for c in text
    )


def short(value: Any) -> str:
    """A path for a message; a long text (base64, say) is cut."""
    text = printable(str(value))
    return text if len(text) <= 300 else f"{text[:60]}… of {len(text)} characters"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
