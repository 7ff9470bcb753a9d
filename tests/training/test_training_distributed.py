"""Two processes on a CPU: the losses are those of one, under DDP, ZeRO-2 and ZeRO-3, and Lightning."""

import json
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.launch import TRAIN, free_port, launch, start
from PIL import Image
from safetensors.torch import load_file

from latefusion.models.student.save import load_student
from latefusion.training.order import Order

pytestmark = pytest.mark.slow
LOSS = 1e-4  # float32; measured: 2e-7
FROZEN = ("schedule.enter=0", "schedule.exit=null", "schedule.keep=null", "schedule.cross=[1, 3]")


def losses(output: Path) -> list[float]:
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def metrics(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [
        entry[name] for entry in map(json.loads, lines) if "loss" in entry for name in ("loss", "ce", "kl")
    ]


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """One process with a batch of 8."""
    output = tmp_path_factory.mktemp("alone")
    launch("alone", base, output, "train.batch_size=8")
    return output


def assert_same_student(output: Path, expected: Path) -> None:
    actual = load_file(output / "adapter_model.safetensors")
    for name, weight in load_file(expected / "adapter_model.safetensors").items():
        assert (actual[name] - weight).abs().max() < 1e-3 * weight.abs().max() + 1e-4, name


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_train_as_one(base, alone, tmp_path, launcher):
    printed = launch(launcher, base, tmp_path, "train.batch_size=4")
    assert "4 x 1 samples in 2 process(es)" in printed and printed.count("Trained in") == 1
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=LOSS)
    assert_same_student(tmp_path, alone)


def test_a_batch_may_be_divided_among_processes_and_accumulation(base, alone, tmp_path):
    """8 = 2 x accumulation 4 = 2 processes x 2 x accumulation 2, with an epoch that ends inside the second step."""
    for launcher, accumulation in (("alone", 4), ("torchrun", 2)):
        output = tmp_path / launcher
        launch(launcher, base, output, "train.batch_size=2", f"train.accumulation={accumulation}")
        assert losses(output) == pytest.approx(losses(alone), rel=LOSS)
        assert_same_student(output, alone)


@pytest.mark.parametrize(
    ("stage", "launcher"),
    [("zero2", "torchrun"), ("zero3", "torchrun"), ("zero3_offload", "torchrun"), ("zero3", "alone")],
)
def test_zero_trains_as_one(base, alone, tmp_path, stage, launcher):
    size = 8 if launcher == "alone" else 4
    printed = launch(launcher, base, tmp_path, f"engine=deepspeed_{stage}", f"train.batch_size={size}")
    assert f"{size} x 1 samples in {8 // size} process(es)" in printed and printed.count("Trained in") == 1
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=LOSS)
    assert_same_student(tmp_path, alone)
    assert (tmp_path / "checkpoint-3" / "global_step3").is_dir()  # DeepSpeed's own state: it was not bypassed
    student = load_student(tmp_path, dtype=torch.float32)
    assert student.schedule.exit == 5


@pytest.mark.parametrize(
    ("engine", "projector", "schedule"),
    [
        ("deepspeed_zero3", "false", ()),
        ("deepspeed_zero3", "true", ()),
        ("deepspeed_zero3", "false", FROZEN),
        ("accelerate", "true", ()),
    ],
)
def test_processes_with_and_without_images_do_not_wait_for_each_other(
    base, tmp_path, engine, projector, schedule
):
    Image.new("RGB", (20, 30), (200, 0, 0)).save(tmp_path / "a.jpg")
    seen = {"image": "a.jpg", "conversations": printed_by("<image>\nwhat color is it?", "red")}
    records = [seen if i < 3 else {"conversations": printed_by("how many?", "nothing")} for i in range(6)]
    shuffled = Order(6, steps=3, size=2, seed=0)
    assert [[i < 3 for i in shuffled.share(step, 0, 1, 2)[0]] for step in range(3)] == [
        [True, False],
        [False, True],
        [True, False],
    ]
    (tmp_path / "mix.json").write_text(json.dumps(records))
    options = (
        *("data=llava_mix665k", f"data.path={tmp_path / 'mix.json'}", f"data.images={tmp_path}"),
        f"lora.train_projector={projector}",
        "data.group=none",  # or no step would have both
        f"engine={engine}",
        *schedule,
    )
    launch("torchrun", base, tmp_path / "two", "train.batch_size=1", *options)
    with socket.socket() as another:
        with suppress(OSError):  # what torch would choose; if another run has it already, so much the better
            another.bind(("", 29500))
            another.listen()
        launch("alone", base, tmp_path / "one", "train.batch_size=2", *options)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=LOSS)


def printed_by(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_lightning_ddp_trains_as_lightning_alone(base, alone, tmp_path):
    for launcher, size in (("alone", 8), ("torchrun", 4)):
        printed = launch(launcher, base, tmp_path / launcher, "engine=lightning", f"train.batch_size={size}")
        assert f"samples in {8 // size} process(es)" in printed
    assert_same_student(tmp_path / "torchrun", tmp_path / "alone")
    assert metrics(tmp_path / "torchrun") == pytest.approx(metrics(tmp_path / "alone"), rel=LOSS)
    assert_same_student(tmp_path / "alone", alone)  # the other engine's


def nodes(base: Path, outputs: list[Path], *options: str) -> list[tuple[int, str, str]]:
    """What two launchers, each for one node, end with: status, what they printed, what they complained of."""
    port = free_port()
    launched = [start(f"node {rank}", base, output, *options, at=port) for rank, output in enumerate(outputs)]
    outputs_of_nodes = [process.communicate(timeout=900) for process in launched]
    return [
        (process.returncode, *printed) for process, printed in zip(launched, outputs_of_nodes, strict=True)
    ]


def test_two_nodes_train_as_one(base, alone, tmp_path):
    """Two `accelerate launch`, as docs/training.md types them, on one machine."""
    outputs = nodes(base, [tmp_path, tmp_path], "train.batch_size=4", "engine.processes=2")
    for status, _, complained in outputs:
        assert status == 0, complained[-3000:]
    assert [printed.count("Trained in") for _, printed, _ in outputs] == [1, 0]
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=LOSS)
    assert_same_student(tmp_path, alone)


def test_nodes_that_share_no_folder_are_refused(base, tmp_path):
    outputs = nodes(base, [tmp_path / "a", tmp_path / "b"], "train.batch_size=4", "engine.processes=2")
    assert all(status != 0 for status, _, _ in outputs)
    assert any("all nodes must share it" in complained for _, _, complained in outputs)
    assert not list(tmp_path.glob("*/checkpoint-*"))


def test_the_whole_line_as_the_readme_types_it(tmp_path):
    """`accelerate launch`, the shipped base, a few steps, the evaluation and its report."""
    command = [
        *(
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            str(TRAIN),
            "recipe=late_fusion",
            "train.steps=4",
        ),
        *("train.batch_size=4", "data.scenes=20", "eval.split=validation", "eval.samples=24"),
        f"output_dir={tmp_path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"late_fusion: 0\.\d+M of \d\.\dM parameters train", done.stdout)
    results = json.loads((tmp_path / "report.json").read_text())
    assert set(results["systems"]) == {"dense", "pruned", "student"}
    assert (tmp_path / "report.html").stat().st_size > 10_000
