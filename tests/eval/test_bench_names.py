"""`python FOLDER/FILE.py` puts FOLDER first on the import path: no file there may hide a module that others import."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  # what it imports by top-level name is in sys.modules
import transformers  # noqa: F401

ROOT = Path(__file__).parents[2]


def is_ours(name: str) -> bool:
    file = getattr(sys.modules[name], "__file__", None)
    return file is not None and ROOT in Path(file).parents and ".venv" not in Path(file).parts


def hidden(stems: set[str]) -> set[str]:
    """The stems that hide a module of Python, or one that is loaded with torch and transformers."""
    loaded = {name for name in sys.modules if "." not in name and not is_ours(name)}
    return stems & (set(sys.stdlib_module_names) | loaded)


@pytest.mark.parametrize("folder", ["eval/bench", "eval", "training", "data"])
def test_no_file_of_a_folder_with_commands_hides_a_module(folder: str) -> None:
    stems = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert stems and not hidden(stems)


def test_a_file_that_hides_a_module_is_seen() -> None:
    assert hidden({"profile", "torch", "yaml", "executor"}) == {"profile", "torch", "yaml"}


@pytest.mark.parametrize(
    "stem", [path.stem for path in (ROOT / "eval/bench").glob("*.py") if path.stem != "__init__"]
)
def test_no_benchmark_has_the_name_of_an_installed_package(stem: str) -> None:
    spec = importlib.util.find_spec(stem)
    assert spec is None or ROOT in Path(str(spec.origin)).parents
