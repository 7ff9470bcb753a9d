"""What is wrong with a command line of `key=value`, in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException


def unknown(key: str, keys: Sequence[str]) -> str:
    """Of a key that does not exist."""
    near = difflib.get_close_matches(key, keys, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{key} does not exist{hint}; the keys are {', '.join(keys)}."


def wrong(error: OmegaConfBaseException, keys: Sequence[str]) -> str:
    """Of what OmegaConf refused."""
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)):
        return unknown(str(error.full_key), keys)
    return f"{error.full_key}: {str(error).splitlines()[0].rstrip('.')}; the keys are {', '.join(keys)}."
