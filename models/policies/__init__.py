"""Policies, one file a method; `named` builds one from `recipes/policy/NAME.yaml`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_class
from omegaconf import OmegaConf

from latefusion.recipes.compose import did_you_mean

if TYPE_CHECKING:
    from latefusion.models.policies.base import Policy

RECIPES = Path(__file__).parents[2] / "recipes" / "policy"


def names() -> list[str]:
    """The policies that have a recipe."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_of(name: str) -> Path:
    """The YAML file of a policy's name, or that file itself.

    Raises:
        ValueError: there is no such policy.
        FileNotFoundError: there is no such file.
    """
    file = Path(name) if name.endswith(".yaml") else RECIPES / f"{name}.yaml"
    if name.endswith(".yaml") and not file.is_file():
        raise FileNotFoundError(f"no policy file at {name}; name one, or one of {', '.join(names())}.")
    if not file.is_file():
        hint = did_you_mean(name, names())
        raise ValueError(f"policy={name} does not exist{hint}; policy can be {', '.join(names())}.")
    return file


def named(name: str, **overrides: Any) -> Policy:
    """The policy of `recipes/policy/NAME.yaml`, or of a YAML file of your own, with some of its arguments replaced.

    Raises:
        ValueError: there is no such policy, it has no such argument, or a value is out of its range.
        FileNotFoundError: there is no such file.
    """
    arguments: Any = OmegaConf.to_container(OmegaConf.load(recipe_of(name)))
    policy = get_class(arguments.pop("_target_"))
    exists = sorted(inspect.signature(policy).parameters)
    for key in overrides:
        if key not in exists:
            hint = did_you_mean(key, exists)
            raise ValueError(f"policy {name} has no {key!r}{hint}; it has {', '.join(exists)}.")
    return policy(**arguments | overrides)
