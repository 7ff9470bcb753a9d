"""Texts of data, policies and checkpoints as one printable line."""

from __future__ import annotations

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


def error_line(error: object) -> str:
    """What a command ends with: a message may quote a file, whose control characters must not reach a terminal."""
    return f"error: {printable(str(error))}"
