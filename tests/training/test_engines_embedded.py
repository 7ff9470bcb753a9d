"""The recipe on the model that ships here: every engine goes the way of one process, loss by loss."""

import json
from pathlib import Path

import pytest
from helpers.launch import finish, spawn

pytestmark = pytest.mark.slow
SIZE, STEPS = 8, 4
RUN = (
    *(
        "recipe=late_fusion",
        "train.dtype=float32",
        "train.threads=1",
        "train.log_every=1",
        "eval.enabled=false",
    ),
    *(f"train.steps={STEPS}", f"train.save_every={STEPS}", "train.warmup=0", "entry.images=64"),
    *("kl.trust=all", "kl.share=0.5"),  # the teacher runs in the same two steps under every engine
)
NAMES = ("loss", "ce", "kl", "grad_norm")


def trajectory(launcher: str, output: Path, *overrides: str) -> list[list[float]]:
    """Loss, cross-entropy, KL and gradient norm of each step."""
    size = SIZE if launcher == "alone" else SIZE // 2
    printed = finish(spawn(launcher, *RUN, f"train.batch_size={size}", f"output_dir={output}", *overrides))
    assert f"{size} x 1 samples in {SIZE // size} process(es)" in printed
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [[line.get(name, 0) for name in NAMES] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    steps = trajectory("alone", tmp_path_factory.mktemp("alone"))
    assert len(steps) == STEPS
    assert len({loss for loss, *_ in steps}) == STEPS  # no step repeats another
    assert sum(kl > 0 for _, _, kl, _ in steps) == STEPS / 2
    return steps


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        ("accelerate", "accelerate"),
        ("torchrun", "deepspeed_zero2"),
        ("torchrun", "deepspeed_zero3"),
        ("torchrun", "fsdp2"),
        ("alone", "lightning"),
        ("torchrun", "lightning"),
    ],
)
def test_every_engine_goes_the_way_of_one_process(
    alone: list[list[float]], tmp_path: Path, launcher: str, engine: str
) -> None:
    steps = trajectory(launcher, tmp_path, f"engine={engine}")
    worst = max(
        abs(a - b) / max(b, 1e-9)  # kl is 0 without a teacher
        for step, expected in zip(steps, alone, strict=True)
        for a, b in zip(step, expected, strict=True)
    )
    print(f"{engine}, {launcher}: {worst:.1e}")
    for step, expected in zip(steps, alone, strict=True):
        assert step == pytest.approx(expected, rel=3e-4)
