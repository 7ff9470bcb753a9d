"""The pages as a set: one width, links and paths that exist, commands whose keys exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from latefusion.data import motion
from latefusion.eval import evaluate, generate, profile_model
from latefusion.eval.thresholds import settings
from latefusion.recipes.compose import compose_tree
from latefusion.recipes.schema import RECIPES
from latefusion.training import export, import_llava

ROOT = Path(__file__).parents[2]


def names_of(arguments: type) -> set[str]:
    return {field.name for field in fields(arguments)}


FOLDERS = ("recipes", "models", "serving", "data", "training", "eval", "tests", "docs")
WIDTH = 100
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "tests/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# what a command or a run writes, or what stands for a name of the reader's
STANDS_FOR_OTHERS = ("NAME", "data/llava_v1_5_mix665k.json", "models/...")


def prose(text: str) -> str:
    """A page without code blocks, tables, figures and what a script writes between two marks."""
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ *[|<!].*$", "", text, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def too_long(text: str) -> list[str]:
    """Lines over the width that could be shorter: of more than a word and its bullet."""
    lines = prose(text).splitlines()
    return [line for line in lines if len(line) > WIDTH and len(line.split()) > 2]


def dead_links(page: Path, text: str) -> list[str]:
    """Relative links whose file or heading does not exist."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            dead.append(link)
    return dead


def missing_paths(text: str) -> list[str]:
    """Paths of the repository that a text names and that do not exist; `*` and `{a,b}` may stand for several."""
    missing = []
    for path in re.findall(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/(?:[\w./*-]|{{[\w,]+}})*\.\w+)", text):
        if any(name in path for name in STANDS_FOR_OTHERS):
            continue
        choice = re.search(r"\{(.*?)\}", path)
        each = [path.replace(choice[0], one) for one in choice[1].split(",")] if choice else [path]
        missing += [one for one in each if not any(ROOT.glob(one))]
    return missing


def missing_names(text: str) -> list[str]:
    """Dotted names such as `latefusion.models.schedule.VisionSchedule` whose module or last part does not exist."""
    missing = []
    for name in re.findall(r"(?<![\w./-])latefusion(?:\.[A-Za-z_]\w*)+", text):
        path, parts = ROOT, name.split(".")[1:]
        while parts and (path / parts[0]).is_dir():
            path /= parts.pop(0)
        file = (
            path / f"{parts.pop(0)}.py"
            if parts and (path / f"{parts[0]}.py").is_file()
            else path / "__init__.py"
        )
        if not file.is_file() or not all(re.search(rf"\b{part}\b", file.read_text()) for part in parts):
            missing.append(name)
    for module, names in re.findall(r"^from (latefusion[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        missing += missing_names(" ".join(f"{module}.{name.strip()}" for name in names.split(",")))
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_one_width_and_names_what_exists(page: Path) -> None:
    text = page.read_text()
    assert not too_long(text)
    assert not dead_links(page, text)
    assert not missing_paths(text) and not missing_names(text)
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z_]+\b|\bTODO\b", re.sub(r"`[^`]*`", "", prose(text))), (
        "left to fill in"
    )
    assert prose(text).count("\n# ") == 0 and text.startswith("# "), "one title, on the first line"


def test_the_checks_of_a_page_can_fail(tmp_path: Path) -> None:
    assert too_long("a " * 51) and not too_long("| " * 60) and not too_long(f"```\n{'a ' * 60}\n```")
    page = tmp_path / "page.md"
    page.write_text("# One title\n")
    links = "[a](gone.md) [b](page.md#one-title) [c](#two) [d](https://x.org)"
    assert dead_links(page, links) == ["gone.md", "#two"]
    assert missing_paths("`eval/profile.py`, eval/evaluate.py, tests/helpers/{oracle,gone}.py") == [
        "eval/profile.py",
        "tests/helpers/gone.py",
    ]
    assert missing_names("latefusion.models.attach.attach, latefusion.load, latefusion.models.gone") == [
        "latefusion.models.gone"
    ]
    assert missing_names("from latefusion.models.schedule import VisionSchedule, Gone") == [
        "latefusion.models.schedule.Gone"
    ]


SOURCES = [
    path
    for folder in FOLDERS
    for kind in ("*.py", "*.yaml", "*.sh")
    for path in (ROOT / folder).rglob(kind)
    if path != Path(__file__) and "helpers" not in path.parts
]


def test_comments_messages_and_docstrings_name_files_that_exist() -> None:
    """In the code, too: an error message that sends the reader to a file that has moved."""
    sources = [path for path in SOURCES if path.parts[len(ROOT.parts)] != "tests"]
    missing = {
        str(path.relative_to(ROOT)): missing_paths(path.read_text()) + missing_names(path.read_text())
        for path in sources
    }
    assert not {path: names for path, names in missing.items() if names}


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Every command of the pages, of docstrings and of comments in recipes: where it stands, its script, its words."""
    for path in [*PAGES, *SOURCES]:
        if path.parts[len(ROOT.parts)] == "tests" and path.suffix == ".py":
            continue
        text = path.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ *(?:# )?((?:accelerate launch|torchrun|python) .*)$", text, re.MULTILINE):
            script = re.search(r"(?:training|eval|data)/\w+\.py(?= *$| +[\"']?[\w.]+=| +#)", line)
            if script:
                rest = re.split(r"\s#|  |\. ", line[script.end() :].strip().replace("$init", "calibrated"))[0]
                words = [word for word in shlex.split(rest) if re.match(r"[\w.]+=", word)]
                words = [word for word in words if word != "key=value"]
                yield str(path.relative_to(ROOT)), script[0], words


KEYS = {
    "eval/evaluate.py": names_of(evaluate.Arguments),
    "eval/generate.py": {
        *names_of(generate.Arguments),
        *(path.stem for path in (RECIPES / "policy").glob("*.yaml")),
    },
    "eval/calibrate.py": names_of(settings.Arguments),
    "eval/profile_model.py": set(profile_model.KEYS),
    "eval/compare.py": set(),
    "data/motion.py": names_of(motion.Arguments),
    "training/export.py": names_of(export.Arguments),
    "training/import_llava.py": names_of(import_llava.Arguments),
}


def test_the_keys_of_every_command_exist() -> None:
    checked, composed = 0, set()
    for where, script, words in commands():
        if script in ("training/train.py", "training/teach.py", "data/validate.py"):
            if tuple(words) not in composed:
                compose_tree(words)
            composed.add(tuple(words))
        else:
            unknown = {re.split(r"[.=]", word)[0] for word in words} - KEYS[script]
            assert not unknown, (where, script, unknown)
        checked += 1
    assert checked > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_recipes_exist(page: Path) -> None:
    """`recipe=NAME`, `engine=NAME` and `schedule=NAME` wherever a page says them; capitals stand for any name."""
    for group in ("recipe", "engine", "schedule"):
        names = {path.stem for path in (RECIPES / group).glob("*.yaml")}
        for value in re.findall(rf"(?<![\w.]){group}=([\w|]+)", page.read_text()):
            assert value.isupper() or set(value.split("|")) <= names, f"{group}={value}"
