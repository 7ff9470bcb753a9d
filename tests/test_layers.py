"""The order of the code: imports go down, never in a circle, and commands refuse before torch loads.

Everything is read from the source by `ast`; nothing is imported.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each folder imports from itself and from those before it.
LAYERS = ("recipes", "models", "serving", "data", "training", "eval")

# The only imports that go up, and they stand inside a function: a run ends with its evaluation, and
# schedule=auto begins with a profile.
MAY_GO_UP = {
    ("training/run.py", "eval/evaluate.py"),
    ("training/prepare.py", "eval/profile_model.py"),
}

# These check their arguments and refuse them before torch loads, in under a second.
REFUSE_EARLY = (
    "training/train.py",
    "training/teach.py",
    "training/export.py",
    "training/import_llava.py",
    "training/preflight.py",
    "eval/evaluate.py",
    "eval/generate.py",
    "eval/calibrate.py",
    "eval/profile_model.py",
    "eval/compare.py",
    "data/validate.py",
    "recipes/check.py",
    "recipes/compose.py",
    "recipes/launcher.py",
    "recipes/schema.py",
    "serving/plugin.py",
    "serving/refusals.py",
)
# What `latefusion export` imports, its arguments checked; and what latefusion[vllm] does not bring for it.
EXPORTS = (
    "training/export.py",
    "training/import_llava.py",
    "training/model_card.py",
    "models/student/save.py",
)
TRAINS = {"accelerate", "datasets", "deepspeed", "pytorch_lightning", "scipy", "matplotlib", "jinja2"}
LOADS_TORCH = {
    "torch",
    "torchvision",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "pytorch_lightning",
    "datasets",
    "lmms_eval",
}

# Stems that several folders may have, because they play one role in each.
ROLES = {
    "__init__": "a package",
    "base": "what every file of the folder implements",
    "run": "the folder's work from start to end",
    "settings": "the options of the folder's work",
    "page": "an HTML page",
    "figures": "the pictures of a page",
    "train_base": "trains a base that ships",
    "record": "measures a trained base and writes what ships",
    "card": "writes the model card of a base",
    "ranking": "ranks vision tokens by text, or measures what that costs",
}


@dataclass(frozen=True)
class Import:
    source: str  # path from the root, such as models/schedule.py
    line: int
    target: str  # a path likewise, or the name of a foreign package
    inside: bool  # stands in a function
    typing: bool  # stands under `if TYPE_CHECKING`


def modules(root: Path) -> dict[str, Path]:
    """The code's modules by path from the root."""
    return {str(path.relative_to(root)): path for folder in LAYERS for path in (root / folder).rglob("*.py")}


def file_of(name: str, files: dict[str, Path]) -> str | None:
    """The file of a module such as `latefusion.models.schedule`."""
    parts = name.split(".")
    if parts[0] != "latefusion":
        return None
    path = "/".join(parts[1:])
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in files), None)


def imports_of(source: str, files: dict[str, Path]) -> Iterator[Import]:
    """Every import of a file, wherever it stands in it."""

    def visit(node: ast.AST, inside: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                target = file_of(alias.name, files) or alias.name.split(".")[0]
                yield Import(source, node.lineno, target, inside, typing)
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                parents = ["latefusion", *source.split("/")[:-1]]
                name = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                submodule = file_of(f"{name}.{alias.name}", files)
                target = submodule or file_of(name, files) or name.split(".")[0]
                yield Import(source, node.lineno, target, inside, typing)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, inside, True)
            for child in node.orelse:
                yield from visit(child, inside, typing)
        else:
            inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside, typing)

    yield from visit(ast.parse(files[source].read_text()), False, False)


@cache
def imports(root: Path) -> list[Import]:
    files = modules(root)
    return [one for source in sorted(files) for one in imports_of(source, files)]


def layer(path: str) -> int:
    return LAYERS.index(path.split("/")[0])


def going_up(root: Path, may_go_up: set[tuple[str, str]] = MAY_GO_UP) -> list[str]:
    """Imports from a later folder, except the named ones inside a function."""
    return [
        f"{one.source} imports {one.target}"
        for one in imports(root)
        if one.target.endswith(".py")
        and layer(one.target) > layer(one.source)
        and not (one.inside and (one.source, one.target) in may_go_up)
    ]


def circles(root: Path, may_go_up: set[tuple[str, str]] = MAY_GO_UP) -> list[str]:
    """Groups of modules that import each other, in functions and for types included."""
    graph: dict[str, set[str]] = defaultdict(set)
    for one in imports(root):
        pair = (one.source, one.target)
        if one.target.endswith(".py") and one.source != one.target and pair not in may_go_up:
            graph[one.source].add(one.target)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            if (module := waiting.pop()) not in seen:
                seen.add(module)
                waiting += graph[module]
        return seen

    reach = {module: reached(module) for module in list(graph)}
    groups = {
        frozenset(other for other in reach[module] if module in reach.get(other, set()))
        for module in reach
        if module in reach[module]
    }
    return sorted(" <-> ".join(sorted(group)) for group in groups)


def loading(root: Path, entries: tuple[str, ...], packages: set[str]) -> list[str]:
    """Files of `entries` that load one of these foreign packages when they are imported, with the way to it."""
    files = modules(root)
    at_module_level: dict[str, list[str]] = defaultdict(list)
    for one in imports(root):
        if not one.inside and not one.typing:
            at_module_level[one.source].append(one.target)

    def way(module: str, path: tuple[str, ...], seen: set[str]) -> tuple[str, ...] | None:
        if module in packages:
            return (*path, module)
        if module not in files or module in seen:
            return None
        seen.add(module)
        parents = [str(parent / "__init__.py") for parent in Path(module).parents if str(parent) != "."]
        for target in [*at_module_level[module], *parents]:
            if whole := way(target, (*path, module), seen):
                return whole
        return None

    ways = [way(entry, (), set()) for entry in entries]
    return [" -> ".join(path) for path in ways if path]


def loading_torch(root: Path, entries: tuple[str, ...] = REFUSE_EARLY) -> list[str]:
    """Files of `entries` that load torch when they are imported, with the way to it."""
    return loading(root, entries, LOADS_TORCH)


def shared_stems(root: Path) -> list[str]:
    """Module names that two folders use for different ideas."""
    by_stem: dict[str, list[str]] = defaultdict(list)
    for path in modules(root):
        by_stem[Path(path).stem].append(path)
    return sorted(
        ", ".join(sorted(paths)) for stem, paths in by_stem.items() if len(paths) > 1 and stem not in ROLES
    )


def test_a_student_is_exported_without_what_trains() -> None:
    """`latefusion[vllm]` brings what export needs: what trains needs another transformers than vLLM has."""
    assert not loading(ROOT, EXPORTS, TRAINS)
    assert loading(ROOT, ("training/trust.py",), TRAINS)


UNSAFE = {"load", "loads", "load_all", "unsafe_load", "full_load"}
READERS = {"torch", "np", "numpy", "yaml", "pickle", "dill", "joblib", "marshal"}
SAFE = {("torch", "load"): {"weights_only": True}, ("np", "load"): {}}  # with these arguments


def running_code(root: Path) -> list[str]:
    """Calls that run what a file says, pickles above all: a checkpoint, a policy and a row are data."""
    unsafe = []
    for path, file in modules(root).items():
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            reader, _, method = name.rpartition(".")
            if name not in ("eval", "exec") and (method not in UNSAFE or reader not in READERS):
                continue
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            needed = SAFE.get((reader, method))
            if (
                needed is None
                or "allow_pickle" in given
                or any(given.get(k) != str(v) for k, v in needed.items())
            ):
                unsafe.append(f"{path}: {name}")
    return unsafe


CHECKS = {
    "up": going_up,
    "circle": circles,
    "torch": loading_torch,
    "stem": shared_stems,
    "code": running_code,
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_code_keeps_its_order(check: str) -> None:
    assert not CHECKS[check](ROOT)


def test_what_is_named_here_is_there() -> None:
    files = modules(ROOT)
    named = {*REFUSE_EARLY, *(path for pair in MAY_GO_UP for path in pair)}
    assert not named - files.keys()
    lazy = {(one.source, one.target) for one in imports(ROOT) if one.inside}
    assert not MAY_GO_UP - lazy, "an exception that nothing needs any more"


def test_no_module_imports_the_package_itself() -> None:
    """`from latefusion import attach` would be a circle: the package offers what its folders hold."""
    whole_package = [one for one in imports(ROOT) if one.target == "latefusion"]
    assert not [one for one in whole_package if "__version__" not in line_of(one)]


def line_of(one: Import) -> str:
    return (ROOT / one.source).read_text().splitlines()[one.line - 1]


def test_no_test_file_imports_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[-1].startswith("test_") for name in names), (path, names)


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """A tree with one fault of each kind."""
    texts = {
        "models/low.py": "def f():\n    from latefusion.training import high\n",
        "models/mask.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from latefusion.models.cache import Cache\n",
        "models/cache.py": "def f():\n    from . import mask\n",
        "training/high.py": "import latefusion.data.heavy\n",
        "training/order.py": "import latefusion.data.light\n",
        "data/heavy.py": "from torch import nn\n",
        "data/light.py": "def f():\n    import torch\n",
        "data/order.py": "",
        "eval/base.py": "",
        "models/base.py": "",
        "data/read.py": "torch.load(f, weights_only=True); np.load(f); torch.load(f); np.load(f, allow_pickle=True)",
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_each_check_sees_its_fault(small_tree: Path) -> None:
    assert going_up(small_tree, set()) == ["models/low.py imports training/high.py"]
    assert going_up(small_tree, {("models/low.py", "training/high.py")}) == []
    (small_tree / "models/low.py").write_text("from latefusion.training import high\n")  # not in a function
    imports.cache_clear()
    assert going_up(small_tree, {("models/low.py", "training/high.py")}) != []
    assert circles(small_tree, set()) == ["models/cache.py <-> models/mask.py"]
    assert loading_torch(small_tree, ("training/high.py", "training/order.py")) == [
        "training/high.py -> data/heavy.py -> torch"
    ]
    assert shared_stems(small_tree) == ["data/order.py, training/order.py"]
    assert running_code(small_tree) == ["data/read.py: torch.load", "data/read.py: np.load"]
