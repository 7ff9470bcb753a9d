"""From a command line to a checked configuration: compose `recipes/`, parse `key=value` words, explain a typo."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from latefusion.recipes.check import check_config
from latefusion.recipes.hints import did_you_mean
from latefusion.recipes.printable import error_line
from latefusion.recipes.schema import RECIPES, Config
from latefusion.recipes.unread import OFFERS, check_read

Kind = TypeVar("Kind")
TYPES = {  # a type in words, and how OmegaConf says that a value has another
    "a whole number": "could not be converted to Integer",
    "a number": "could not be converted to Float",
    "true or false": "is not a valid bool",
    "a list: KEY=[A,B]": "is not a ListConfig",
    "a dictionary: KEY={NAME: VALUE}": "^Cannot assign .* to Dict|^Invalid type assigned",
}
HELP = {"-h", "--help"}
INTERPOLATION = re.compile(r"(\\*)\$\{")  # of OmegaConf, with the backslashes that may escape it


def compose_config(overrides: Sequence[str]) -> Config:
    """Compose the configuration of a run from `recipes/` and these command-line overrides, and check it.

    Raises:
        ValueError: names the bad key or value and what exists.
    """
    return check_config(compose_tree(overrides))


def compose_tree(overrides: Sequence[str]) -> DictConfig:
    """Compose without checking the values.

    Raises:
        ValueError: a key, group or word that does not exist, named with what does; or one that the run would not read.
    """
    for word in overrides:
        group, _, choice = word.partition("=")
        options = sorted(file.stem for file in (RECIPES / group).glob("*.yaml")) if group.isalpha() else []
        if options and choice not in options:
            raise ValueError(_unknown_choice(group, choice, options))
    with initialize_config_dir(str(RECIPES.resolve()), version_base="1.3"):
        try:
            tree = compose("config", with_one_length(overrides))
        except OverrideParseException as error:
            raise ValueError(
                f"{error.override} is not read as key=value; in a shell, quote what has brackets or spaces: "
                "'schedule.keep={12: 64}'."
            ) from None
        except AssertionError:  # what OmegaConf makes of a key inside a dictionary that is None
            nested = [word for word in overrides if "." in word.partition("=")[0]]
            raise ValueError(
                f"one of {', '.join(nested)} sets a key inside one that holds nothing; give it as a whole: "
                "KEY={NAME: VALUE}."
            ) from None
        except MissingConfigException as error:
            group, _, choice = (error.missing_cfg_file or "").rpartition("/")
            raise ValueError(_unknown_choice(group, choice, error.options or ())) from None
        except ConfigCompositionException as error:
            cause = error.__cause__
            if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
                raise ValueError(_unknown_config_key(str(cause.full_key))) from None
            override = str(error).splitlines()[0].removeprefix("Error merging override ")
            raise ValueError(wrong_value(override, str(cause or error))) from None
    check_read(overrides, tree)
    return tree


def with_one_length(words: Sequence[str]) -> list[str]:
    """The words, in which `train.steps=N` puts a recipe's epochs aside, and `train.epochs=N` its steps."""
    named = {word.lstrip("+").partition("=")[0] for word in words}
    other = {"train.steps": "train.epochs", "train.epochs": "train.steps"}
    result: list[str] = []
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        result.append(word)
        if key in other and other[key] not in named and value not in ("null", ""):
            result.append(f"{other[key]}=null")
    return result


def refuse_typos(arguments: Sequence[str]) -> None:
    """End the program with one sentence if a Hydra command line names a key, group or value that does not exist.

    Hydra would explain a typo in a paragraph. Its own flags (`--cfg job`, `--help`) are left to it.
    """
    try:
        options, flags = get_args_parser().parse_known_args(list(arguments))
        if flags:
            raise ValueError(
                f"{flags[0]} is no option; settings are KEY=VALUE without dashes, such as train.steps=4, and --cfg job "
                "lists them."
            )
        for word in options.overrides:
            if "=" not in word and not word.startswith("~"):  # ~KEY removes a key
                raise ValueError(f"{word} is no setting; settings are KEY=VALUE, such as train.steps=4.")
        compose_tree(options.overrides)
    except ValueError as error:
        sys.exit(error_line(error))


def print_configuration(arguments: Sequence[str]) -> None:
    """End a Hydra command line with its configuration as YAML if it says `--cfg job`.

    Values stand for what they refer to. What a model offers for `schedule` and `teacher` is left out, as a recipe has
    taken of it what it uses.
    """
    options = get_args_parser().parse_args(list(arguments))
    if options.cfg != "job" or options.package is not None:
        return  # another question, which Hydra answers
    tree: Any = OmegaConf.to_container(compose_tree(options.overrides), resolve=True)
    tree["model"] = {name: value for name, value in tree["model"].items() if name not in OFFERS}
    print_and_exit(lambda: tree)


def _unknown_choice(group: str, choice: str, options: Sequence[str]) -> str:
    """That a group has no file of this name, in one sentence."""
    folder = {
        "model": " (a folder or hub id of your own: model=other model.path=...)",
        "data": " (a file, folder or hub id of your own: data=dataset data.path=...)",
    }.get(group, "")
    hint = did_you_mean(choice, options)
    return f"{group}={choice} does not exist{hint}; {group} can be {', '.join(options)}{folder}."


def _unknown_config_key(key: str) -> str:
    parent, _, name = key.rpartition(".")
    root = compose("config")
    try:
        keys = {str(k) for k in OmegaConf.select(root, parent)} if parent else {"recipe", *map(str, root)}
        exists = sorted(keys)
    except TypeError:  # the parent is itself a value
        return f"{key} does not exist: {parent} is a value."
    return f"{key} does not exist{did_you_mean(name, exists)}; {parent or 'the top level'} has {', '.join(exists)}."


def wrong_value(override: str, reason: str) -> str:
    """Name a key's type in one sentence, for a value of another type; OmegaConf's own words are longer.

    Args:
        override: the `key=value` word.
        reason: OmegaConf's.
    """
    reason = reason.splitlines()[0].rstrip(".")
    if override.partition("=")[0] == "resume":
        return (
            f"{override} must be true, for the newest checkpoint in output_dir, or the step of one; name the folder of "
            "another run with output_dir=FOLDER."
        )
    kind = next((words for words, pattern in TYPES.items() if re.search(pattern, reason)), None)
    return f"{override}: {reason}." if kind is None else f"{override} must be {kind}."


def check_words(
    words: Sequence[str], kind: type, usage: str, *, show: Callable[[list[str]], Any] | None = None
) -> list[str]:
    """The `key=value` words of a command line; a leading `--` is forgiven.

    The program ends here with its usage for `--help`, with its configuration as YAML for `--cfg job`, as Hydra's
    commands do, and with one sentence if a word is not `key=value`.

    Args:
        kind: the dataclass of the keys.
        show: the configuration that these words make, for `--cfg job`; None: a `kind`.
    """
    if HELP & set(words):
        print(f"{usage}\n{kind.__doc__}")
        sys.exit(0)
    words, printed = without_cfg(words)
    words = [word.removeprefix("--") for word in words]
    refuse_bare_words(words)
    if printed:
        print_and_exit(lambda: show(words) if show else merged_words(words, kind))
    return words


def refuse_bare_words(words: Sequence[str]) -> None:
    """End the program with one sentence if a word is not `key=value`."""
    for word in words:
        if "=" not in word:
            sys.exit(error_line(f"{word} is not key=value; --help lists the keys."))


def without_cfg(words: Sequence[str]) -> tuple[list[str], bool]:
    """The words without `--cfg job`, and whether it was among them: print the configuration, do not run."""
    flag = ["--cfg", "job"]
    for at in range(len(words) - 1):
        if list(words[at : at + 2]) == flag:
            return [*words[:at], *words[at + 2 :]], True
    return list(words), False


def print_and_exit(configuration: Callable[[], Any]) -> NoReturn:
    """Print a configuration as YAML and end the program, in one sentence if it cannot be composed."""
    try:
        print(OmegaConf.to_yaml(OmegaConf.create(configuration())), end="")
    except ValueError as error:
        sys.exit(error_line(error))
    sys.exit(0)


def parse_words(words: Sequence[str] | Any, kind: type[Kind]) -> Kind:
    """Parse `key=value` words (or a DictConfig of them) into the dataclass that describes their keys.

    Raises:
        ValueError: a key that does not exist, a value of another type, or a key without a value that needs one.
    """
    merged = merged_words(words, kind)
    for key in sorted(OmegaConf.missing_keys(merged)):
        raise ValueError(f"{key} is not set; add {key}=VALUE.")
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def merged_words(words: Sequence[str] | Any, kind: type) -> DictConfig:
    """The `key=value` words over the defaults of `kind`; raises ValueError as `parse_words` does."""
    try:
        values = words if OmegaConf.is_config(words) else OmegaConf.from_cli(list(words))
        return OmegaConf.merge(OmegaConf.structured(kind), values)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(refusal(error, [field.name for field in fields(kind)])) from None


def stored_values(path: Path) -> Any:
    """Read a YAML file that a run has written, as data: `${...}` in it is text, and reads nothing of this machine.

    Raises:
        ValueError: the file is not YAML.
    """
    try:
        return OmegaConf.create(_as_text(yaml.safe_load(path.read_text())) or {})
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML ({str(error).splitlines()[0]}).") from None


def _as_text(value: Any) -> Any:
    """`value` with every interpolation escaped."""
    if isinstance(value, dict):
        return {key: _as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    if isinstance(value, str):
        return INTERPOLATION.sub(lambda match: 2 * match[1] + "\\${", value)
    return value


def refusal(error: OmegaConfBaseException, keys: Sequence[str]) -> str:
    """Say in one sentence what OmegaConf refused."""
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)):
        return unknown_key(str(error.full_key), keys)
    if str(error.full_key).isdigit():  # inside a list of lists, whose key OmegaConf does not name
        return f"value {error.full_key} of a list of lists must be a list: KEY=[[A,B]]; the keys are {', '.join(keys)}."
    value = re.match(r"Value '(.*?)'", str(error))
    word = f"{error.full_key}={value[1]}" if value else str(error.full_key)
    return f"{wrong_value(word, str(error)).rstrip('.')}; the keys are {', '.join(keys)}."


def unknown_key(key: str, keys: Sequence[str]) -> str:
    """Say in one sentence that a key does not exist."""
    return f"{key} does not exist{did_you_mean(key, keys)}; the keys are {', '.join(keys)}."
