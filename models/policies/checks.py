"""Checks of a policy's arguments, which may come from a file; no torch."""

from __future__ import annotations

from operator import index
from typing import Any


def whole_number(name: str, value: Any) -> int:
    """A layer, or a number of tokens; JSON has layers as text where they are keys.

    Raises:
        ValueError: it is not a whole number.
    """
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} has {value!r} where a whole number must be.")


def number(name: str, value: Any) -> float:
    """A share or a threshold.

    Raises:
        ValueError: it is not a number.
    """
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name} has {value!r} where a number must be.")


def settle(policy: Any, kind: Any, *names: str) -> None:
    """Put `kind(name, value)`, one of the functions above, in the place of these arguments of a frozen dataclass."""
    for name in names:
        object.__setattr__(policy, name, kind(name, getattr(policy, name)))


def check_ratio(name: str, ratio: float) -> None:
    """Raise ValueError unless `ratio` is a share of the vision tokens to keep."""
    if not 0 < ratio <= 1:
        raise ValueError(
            f"{name}={ratio:g} is the share of vision tokens to keep; choose it above 0, at most 1."
        )


def check_layer(name: str, layer: int, num_layers: int) -> None:
    """Raise ValueError unless the decoder has this layer."""
    if layer >= num_layers:
        raise ValueError(
            f"{name}={layer} is beyond a decoder with layers 0 to {num_layers - 1}; choose at most {num_layers - 1}."
        )
