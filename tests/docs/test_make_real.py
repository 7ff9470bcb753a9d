"""`make real`: its commands are those that exist, and, in a short form, they end with a report."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from latefusion.data.local_files import check_local_files
from latefusion.models.smollm_icons.packages import missing_packages
from latefusion.recipes.schema import DataConfig, Source

ROOT = Path(__file__).parents[2]
SHORT = {
    "PROFILE": "samples=2 confirm=2 images=12 batch_size=2",
    "CALIBRATION": "samples=4 confirm=0 batch_size=4 layer_thresholds=[0.98] tokens_thresholds=[0.5] "
    "boundaries=[18,22] kl=1",
    "TRAINING": "train.steps=2 train.batch_size=1 data.scenes=32 entry.images=32",
    "QUESTIONS": "samples=6 batch_size=6",
}

LAUNCHERS = {  # as a command, and as modules of this Python
    ("python",): [],
    ("accelerate", "launch"): ["-m", "accelerate.commands.launch"],
    ("torchrun",): ["-m", "torch.distributed.run"],
}


def commands(**variables: str) -> list[list[str]]:
    """The words of every command of `make real` that is no installation."""
    done = subprocess.run(
        ["make", "-n", "real", *(f"{name}={value}" for name, value in variables.items())],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line.partition("&& ")[2] for line in done.stdout.splitlines()]
    return [shlex.split(line) for line in lines if ".py " in line]


def test_it_profiles_calibrates_trains_and_evaluates() -> None:
    scripts = [next(word for word in words if word.endswith(".py")) for words in commands()]
    assert scripts == [
        *("eval/profile_model.py", "eval/calibrate.py", "training/train.py", "training/train.py"),
        "eval/evaluate.py",
    ]
    assert all("model=smollm_icons" in words for words in commands())


def possible() -> bool:
    try:
        check_local_files(DataConfig(source=Source.icons))
    except FileNotFoundError:
        return False
    return not missing_packages()


@pytest.mark.slow
@pytest.mark.skipif(not possible(), reason="needs make icons, and npm")
def test_a_short_form_ends_with_a_report(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for words in commands(REAL=str(tmp_path), **SHORT):
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        launcher = next(name for name in LAUNCHERS if words[: len(name)] == list(name))
        command = [sys.executable, *LAUNCHERS[launcher], *words[len(launcher) :]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-3000:]}"
    report = json.loads((tmp_path / "evaluation/report.json").read_text())
    names = {row["name"] for row in report["systems"].values()}
    assert {
        "Dense base",
        "VisiPruner (calibration)",
        "FastV",
        "cross_only",
        "late_fusion",
        "No image",
    } <= names
    assert report["data"]["source"] == "data/icons"
    assert (tmp_path / "evaluation/report.html").is_file()
    assert (tmp_path / "profile/schedule.yaml").is_file()
