"""Every engine on all GPUs of this machine: in bfloat16 it trains as plain DDP does, and logs its utilisation."""

from __future__ import annotations

import json
import math
from functools import cache

import pytest
import torch
from launching import launch
from tiny import save_tiny_base

from latefusion.models.saved import load_student

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BATCH = 24  # divides among 1, 2, 4 or 8 GPUs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What an engine logs, and its student's folder."""
    base = save_tiny_base(tmp_path_factory.mktemp("base"))

    @cache
    def of(engine):
        output = tmp_path_factory.mktemp(engine)
        share = f"train.batch_size={BATCH // torch.cuda.device_count()}"
        launch("gpus", base, output, f"engine={engine}", share, "train.dtype=bfloat16")
        entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [entry for entry in entries if "loss" in entry], output

    return of


@pytest.mark.parametrize(
    "engine", ["deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2", "lightning"]
)
def test_an_engine_trains_as_accelerate_does(trained, engine):
    (found, output), (expected, _) = trained(engine), trained("accelerate")
    assert len(found) == 3
    for name in ("loss", "ce", "kl"):
        assert [e[name] for e in found] == pytest.approx([e[name] for e in expected], rel=2e-2), name
    assert load_student(output, dtype=torch.float32).schedule.exit == 5


def test_a_run_logs_memory_and_utilisation(trained):
    entries, _ = trained("accelerate")
    assert all(entry["memory_gb"] > 0 and math.isfinite(entry["loss"]) for entry in entries)
    shares = [entry["mfu"] for entry in entries if "mfu" in entry]
    assert all(0 < share < 1 for share in shares)  # none on a card whose peak is not known
