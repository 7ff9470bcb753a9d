"""What a user may have meant by a name that does not exist; without any other package."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, existing: Iterable[str]) -> str:
    """` (did you mean NAME?)` for the existing name nearest to a mistyped one; empty if none is near."""
    near = get_close_matches(name, list(existing), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
