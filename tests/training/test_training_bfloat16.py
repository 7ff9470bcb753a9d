"""Every engine in bfloat16 trains as plain DDP does: on two CPU processes, and on all GPUs of this machine."""

from __future__ import annotations

import json
import math
from functools import cache

import pytest
import torch
from helpers.launch import launch
from helpers.tiny_base import save_tiny_base

from latefusion.models.student.save import load_student

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
BATCH = 24  # divides among 1, 2, 4 or 8 GPUs
DEVICES = [
    pytest.param("torchrun", marks=pytest.mark.slow, id="cpu"),
    pytest.param("gpus", marks=[pytest.mark.gpu, NO_GPU], id="gpu"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What an engine logs under a launcher, and its student's folder."""
    base = save_tiny_base(tmp_path_factory.mktemp("base"))

    @cache
    def of(launcher, engine):
        output = tmp_path_factory.mktemp(engine)
        processes = torch.cuda.device_count() if launcher == "gpus" else 2
        share = f"train.batch_size={BATCH // processes}"
        launch(launcher, base, output, f"engine={engine}", share, "train.dtype=bfloat16")
        entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [entry for entry in entries if "loss" in entry], output

    return of


@pytest.mark.parametrize("launcher", DEVICES)
@pytest.mark.parametrize(
    "engine", ["deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2", "lightning"]
)
def test_an_engine_trains_as_accelerate_does(trained, engine, launcher):
    (losses, output), (expected, _) = trained(launcher, engine), trained(launcher, "accelerate")
    assert len(losses) == 3
    for name in ("loss", "ce", "kl"):
        assert [e[name] for e in losses] == pytest.approx([e[name] for e in expected], rel=2e-2), name
    assert load_student(output, dtype=torch.float32).schedule.exit == 5


@pytest.mark.gpu
@NO_GPU
def test_a_run_logs_memory_and_utilisation(trained):
    entries, _ = trained("gpus", "accelerate")
    assert all(entry["memory_gb"] > 0 and math.isfinite(entry["loss"]) for entry in entries)
    shares = [entry["mfu"] for entry in entries if "mfu" in entry]
    assert all(0 < share < 1 for share in shares)  # none on a card whose peak is not known
