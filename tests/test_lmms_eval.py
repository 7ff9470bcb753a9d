"""The plugin, through lmms-eval's own command on a small local task. Needs the extra: `pytest -m extra`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from latefusion.data.scenes import load_scenes

pytestmark = pytest.mark.extra

TASK = """
task: small_scenes
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function small_scenes.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, until: ["\\n"]}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
"""
FUNCTIONS = "def visual(document):\n    return [document['image'].convert('RGB')]\n"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    load_scenes("test", 2).select(range(12)).to_parquet(folder / "questions.parquet")
    (folder / "small_scenes.py").write_text(FUNCTIONS)
    (folder / "small_scenes.yaml").write_text(TASK.format(data=folder / "questions.parquet"))
    return folder


def score(task: Path, output: Path, model_args: str) -> float:
    words = ["--model", "latefusion", "--model_args", model_args, "--tasks", "small_scenes"]
    words += ["--include_path", str(task), "--batch_size", "5", "--output_path", str(output)]
    command = [sys.executable, "-m", "lmms_eval", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (found,) = output.rglob("*results.json")
    return json.loads(found.read_text())["results"]["small_scenes"]["exact_match,none"]


def test_a_base_under_a_policy(task: Path, tmp_path: Path) -> None:
    """The embedded base answers nearly everything; without vision it guesses."""
    dense = score(task, tmp_path / "dense", "pretrained=embedded,dtype=float32")
    assert dense >= 10 / 12
    assert (
        score(task, tmp_path / "random", "pretrained=embedded,policy=random,keep_ratio=0.02,dtype=float32")
        < dense
    )


def test_a_checkpoint_under_its_own_schedule(task: Path, tmp_path: Path) -> None:
    from tiny import save_tiny_base

    from latefusion.models.base import load_base
    from latefusion.models.build import build_student
    from latefusion.models.saved import save_student
    from latefusion.models.schedule import VisionSchedule

    base = str(save_tiny_base(tmp_path / "base"))
    import torch

    model, processor = load_base(base, dtype=torch.float32)
    schedule = VisionSchedule(enter=2, exit=5)
    student = build_student(
        model, processor, base=base, schedule=schedule, rank=2, alpha=4, dropout=0.0, entry_rank=2
    )
    save_student(student, tmp_path / "student")
    assert score(task, tmp_path / "out", f"checkpoint={tmp_path / 'student'}") <= 1
