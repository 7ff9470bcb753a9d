"""A command line of `key=value` words as the dataclass that describes its keys."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

Kind = TypeVar("Kind")


def check_words(words: Sequence[str], kind: type, usage: str) -> list[str]:
    """The words, `--` before them forgiven; ends the program with how to use it where one says nothing of a key."""
    words = [word.removeprefix("--") for word in words]
    if any("=" not in word for word in words):
        sys.exit(f"{usage}\n{kind.__doc__}")
    return words


def parsed(words: Sequence[str] | Any, kind: type[Kind]) -> Kind:
    """The arguments that `key=value` words (or a DictConfig of them) say; the others keep their defaults.

    Raises:
        ValueError: a key that does not exist, a value of another type, or none for a key that needs one.
    """
    try:
        said = words if OmegaConf.is_config(words) else OmegaConf.from_cli(list(words))
        merged = OmegaConf.merge(OmegaConf.structured(kind), said)
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise ValueError(f"{key} is not set; add {key}=VALUE.")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(wrong(error, [field.name for field in fields(kind)])) from None  # type: ignore[arg-type]


def wrong(error: OmegaConfBaseException, keys: Sequence[str]) -> str:
    """One sentence of what OmegaConf refused."""
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)):
        return unknown(str(error.full_key), keys)
    return f"{error.full_key}: {str(error).splitlines()[0].rstrip('.')}; the keys are {', '.join(keys)}."


def unknown(key: str, keys: Sequence[str]) -> str:
    """One sentence of a key that does not exist."""
    near = difflib.get_close_matches(key, keys, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{key} does not exist{hint}; the keys are {', '.join(keys)}."
