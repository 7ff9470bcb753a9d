"""Training runs of three steps in this process."""

from __future__ import annotations

import json

from helpers.tiny_base import BAND, SMALL, composed

from latefusion.training.offline import write_answers
from latefusion.training.preflight import checked, checked_teaching
from latefusion.training.run import train as train_checked

QUICK = (
    *("train.dtype=float32", "train.threads=1", "train.log_every=1", "train.learning_rate=1e-2"),
    *("train.batch_size=4", "train.steps=3", "train.save_every=1", "train.keep_checkpoints=9"),
    *("data.scenes=4", "lora.dropout=0.2", "eval.enabled=false", "model.visipruner.boundary=1"),
)


def run_config(cfg):
    """Train as `training/train.py` does with this composed configuration."""
    train_checked(cfg, *checked(cfg))


def teach_config(cfg):
    """Write the teacher's answers as `training/teach.py` does with this composed configuration."""
    write_answers(checked_teaching(cfg))


def train(base, output, *overrides):
    """Train for three steps on the tiny base; the output folder."""
    run_config(composed(*QUICK, *SMALL, *BAND, f"model.path={base}", f"output_dir={output}", *overrides))
    return output


def metrics_entries(output):
    """The entries of the run's metrics.jsonl."""
    return [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
