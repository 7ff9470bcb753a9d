"""What `latefusion[lmms-eval]` brings replaces no package: neither the CPU build of torch nor omegaconf's antlr."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_extra_leaves_lmms_eval_itself_to_a_command_of_its_own() -> None:
    names = {plain(re.split(r"[\[<>=~ ]", requirement)[0]) for requirement in EXTRAS["lmms-eval"]}
    assert not names & {"lmms-eval", "latex2sympy2", "torch", "torchvision", "av"}


@pytest.mark.slow
def test_a_dry_run_replaces_nothing(tmp_path: Path) -> None:
    """Asks the package index; the resolver is pip's."""
    more = [name for name in EXTRAS["lmms-eval"] if not name.startswith("latefusion")]
    words = ["install", "--dry-run", "--quiet", "--report", str(tmp_path / "report.json")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "-c", str(ROOT / "constraints.txt"), *more],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    brought = {
        plain(one["metadata"]["name"])
        for one in json.loads((tmp_path / "report.json").read_text())["install"]
    }
    here = {plain(one.metadata["Name"]) for one in distributions()}
    assert {"evaluate", "sacrebleu", "math-verify"} <= brought | here
    assert {"torch", "omegaconf", "antlr4-python3-runtime", "transformers"} <= here
    assert not brought & here
