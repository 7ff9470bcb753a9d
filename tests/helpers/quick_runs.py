"""Training runs of three steps in this process."""

from __future__ import annotations

import json

from helpers.tiny_base import BAND, SMALL, composed

from latefusion.training import run

QUICK = (
    *("train.dtype=float32", "train.threads=1", "train.log_every=1", "train.learning_rate=1e-2"),
    *("train.batch_size=4", "train.steps=3", "train.save_every=1", "train.keep_checkpoints=9"),
    *("data.scenes=4", "lora.dropout=0.2", "eval.enabled=false", "model.visipruner.boundary=1"),
)


def train(base, output, *overrides):
    """Train for three steps on the tiny base; the output folder."""
    run.run(composed(*QUICK, *SMALL, *BAND, f"model.path={base}", f"output_dir={output}", *overrides))
    return output


def metrics_entries(output):
    """The entries of the run's metrics.jsonl."""
    return [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
