"""Texts of data and of errors as one printable line."""

from __future__ import annotations

from typing import Any

from latefusion.recipes.printable import printable


def short(value: Any) -> str:
    """A path for a message; a long text (base64, say) is cut."""
    text = printable(str(value))
    return text if len(text) <= 300 else f"{text[:60]}… of {len(text)} characters"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
