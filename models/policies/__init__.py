"""Policies, one file a method; `named` builds one from `recipes/policy/NAME.yaml`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import yaml

from latefusion.recipes.hints import did_you_mean

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
    name = str(name)
    file = Path(name) if name.endswith(".yaml") else RECIPES / f"{name}.yaml"
    if name.endswith(".yaml") and not file.is_file():
        raise FileNotFoundError(f"no policy file at {name}; name one, or one of {', '.join(names())}.")
    if not file.is_file():
        hint = did_you_mean(name, names())
        raise ValueError(f"policy={name} does not exist{hint}; policy can be {', '.join(names())}.")
    return file


def tuned(name: str, thresholds: Mapping[str, Any], **overrides: Any) -> Policy:
    """`named`, but `visipruner` begins from a model's own thresholds, not from the paper's.

    Args:
        thresholds: of the model's recipe; empty: it has none.
    """
    return named(name, **({**thresholds, **overrides} if name == "visipruner" else overrides))


def named(name: str, **overrides: Any) -> Policy:
    """The policy of `recipes/policy/NAME.yaml`, or of a YAML file of your own, with some of its arguments replaced.

    Raises:
        ValueError: there is no such policy, it has no such argument, a value is out of its range, or the file names
            something that is not a policy.
        FileNotFoundError: there is no such file.
    """
    try:
        arguments: Any = yaml.safe_load(recipe_of(name).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0].strip()
        raise ValueError(
            f"policy {name} is not YAML ({reason}); it needs _target_ and plain arguments, in UTF-8."
        ) from None
    if not isinstance(arguments, dict):
        raise ValueError(f"policy {name} holds no keys; it needs _target_ and the arguments of that class.")
    policy = policy_class(str(arguments.pop("_target_", None)), name)
    exists, arguments = sorted(inspect.signature(policy).parameters), arguments | overrides
    for key in map(str, arguments):
        if key not in exists:
            hint = did_you_mean(key, exists)
            raise ValueError(f"policy {name} has no {key!r}{hint}; it has {', '.join(exists)}.")
    try:
        return policy(**arguments)
    except TypeError as error:  # a class that takes no such values, or cannot be made
        raise ValueError(f"policy {name} cannot be made of its arguments: {error}.") from None


def unsearched(target: str, name: str) -> str:
    """How to make Python search the folder of a policy's module, if it lies beside its file or the user; else empty.

    It is not searched unasked: importing a module runs its code.
    """
    module = target.partition(".")[0]
    for folder in (Path(name).absolute().parent, Path.cwd()):
        if (folder / f"{module}.py").is_file():
            return f"; {module}.py lies in {folder}, so write PYTHONPATH={folder} before the command"
    return ""


def policy_class(target: str, name: str) -> type[Policy]:
    """The class that a policy file names, if it is one of policies: nothing else is imported or called.

    Args:
        target: such as `latefusion.models.policies.fastv.FastV`.
        name: of the policy or its file, for the message.
    """
    cls: object = None
    if target.partition(".")[0] not in sys.stdlib_module_names:
        try:
            cls = resolve_name(target)
        except (ImportError, AttributeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"policy {name} names _target_: {target}, which cannot be imported ({reason})"
                f"{unsearched(target, name)}."
            ) from None
    methods = (getattr(cls, method, None) for method in ("validate", "begin"))
    if not (inspect.isclass(cls) and all(map(inspect.isfunction, methods))):
        raise ValueError(
            f"policy {name} names _target_: {target}, which is not a policy; name a class with the methods "
            "validate(num_layers) and begin(prompt)."
        )
    return cls
