"""What prose and benchmarks' commands set exists: keys and their values, options, helpers and tasks."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latefusion.eval.tasks import TASKS
from latefusion.recipes.schema import RECIPES, SCHEMA, Config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SECTIONS = [
    field.name for field in fields(Config) if is_dataclass(field.default_factory)
]  # data, train, kl, ...
FENCED = re.compile(r"```\w*\n.*?```", re.DOTALL)
# keys of engines' dictionaries, which the schema leaves to DeepSpeed and FSDP
OPEN = ("engine.deepspeed.", "engine.fsdp.", "model.processor.")


def settings(text: str) -> Iterator[str]:
    """The `section.key=value` words of a page's inline code, an alternative `a|b` as two of them."""
    for inline in re.findall(r"`([^`]+)`", re.sub(FENCED, "", text)):
        for word in re.findall(
            rf"(?<![\w.])(?:{'|'.join(SECTIONS)})\.[\w.]+=(?:\{{.*?\}}|\[.*?\]|[^\s',]+)", inline
        ):
            key, value = word.split("=", 1)
            if not value.isupper() and "..." not in value and not key.startswith(OPEN):
                yield from (f"{key}={one}" for one in value.split("|"))


def refused(word: str) -> str:
    """What the schema says against a setting; empty: nothing."""
    try:
        OmegaConf.merge(SCHEMA, OmegaConf.from_dotlist([word]))
    except OmegaConfBaseException as error:
        return str(error).splitlines()[0]
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_prose_have_keys_and_values_that_exist(page: Path) -> None:
    assert not {word: why for word in settings(page.read_text()) if (why := refused(word))}


def test_a_setting_that_does_not_exist_is_seen() -> None:
    text = "`kl.trust=labels` and `train.step=3`, `lora.layers=busy|some`, `'schedule.keep={4: 48, 8: 16}' kl.share=1`"
    words = list(settings(text))
    assert words[2:] == ["lora.layers=busy", "lora.layers=some", "schedule.keep={4: 48, 8: 16}", "kl.share=1"]
    assert [word for word in words if refused(word)] == [
        "kl.trust=labels",
        "train.step=3",
        "lora.layers=some",
    ]


class Parsed(Exception):
    """A command line was read."""


def benchmarks() -> Iterator[tuple[str, list[str]]]:
    """The commands of benchmarks in pages, the Makefile and docstrings: their module and their words."""
    for path in [*PAGES, ROOT / "Makefile", *(ROOT / "eval/bench").glob("*.py")]:
        text = re.sub(r"\\+\n\s*", " ", path.read_text())
        if path.suffix == ".md":
            inline = re.findall(r"`([^`]+)`", re.sub(FENCED, "", text))
            text = "\n".join([*re.findall(FENCED, text), *(code.replace("\n", " ") for code in inline)])
        for stem, rest in re.findall(r"eval/bench/(\w+)\.py( [^\n`]*--[^\n`]*)", text):
            rest = re.split(r"\s#| \[|; ", rest.replace(" ... ", " "))[0]
            words = shlex.split(rest.strip(" ,.)"))
            yield stem, ["0" if word in ("N", "FILE...") else word for word in words]


def test_the_options_of_every_benchmark_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def stop(parser: Any, words: Any = None, namespace: Any = None, parse: Any = parse) -> None:
            parse(parser, words, namespace)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    commands = {(stem, tuple(words)) for stem, words in benchmarks()}
    assert len({stem for stem, _ in commands}) > 20
    for stem, words in sorted(commands):
        if stem == "served_answers":  # needs vLLM
            continue
        monkeypatch.setattr(sys, "argv", [f"{stem}.py", *words])
        main = importlib.import_module(f"latefusion.eval.bench.{stem}").main
        with pytest.raises(Parsed):
            main(*([list(words)] if main.__code__.co_argcount else []))


def test_pages_name_every_helper_task_model_recipe_and_policy() -> None:
    helpers = {path.stem for path in (ROOT / "tests/helpers").glob("*.py")} - {"__init__"}
    named = set(re.findall(r"`(\w+)`", (ROOT / "tests/README.md").read_text()))
    assert helpers <= named
    assert set(TASKS) <= set(re.findall(r"`(\w+)`", (ROOT / "docs/evaluation.md").read_text()))
    for page, groups in (("docs/models.md", ("model", "recipe")), ("docs/inference.md", ("policy",))):
        named = set(re.findall(r"`(\w+)`", (ROOT / page).read_text()))
        named |= {
            f"hidrop{name}" for name in named if name.startswith("_tok")
        }  # a row names the three in short
        files = {path.stem for group in groups for path in (RECIPES / group).glob("*.yaml")}
        assert files <= named
