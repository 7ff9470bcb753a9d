"""Runs killed at a random step, on one process and two: resumed, they end as if nothing had happened."""

import json
import os
import random
import signal
import time

import psutil
import pytest
import torch
from helpers.launch import launch, start
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
STEPS = 12
# 13 rows, so that epochs end inside steps; dropout, so that the state of every generator matters
RUN = (
    *(f"train.steps={STEPS}", "train.save_every=3", "train.keep_checkpoints=2", "lora.dropout=0.2"),
    "kl.share=0.4",  # the teacher runs in the same steps
)
KINDS = {
    "alone": ("alone", "train.batch_size=4"),
    "lightning": ("alone", "train.batch_size=4", "engine=lightning"),
    "two processes": ("torchrun", "train.batch_size=2"),
    "two processes, Lightning": ("torchrun", "train.batch_size=2", "engine=lightning"),
    "ZeRO-2": ("torchrun", "train.batch_size=2", "engine=deepspeed_zero2"),
    "ZeRO-3": ("torchrun", "train.batch_size=2", "engine=deepspeed_zero3"),
}


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The undisturbed run of each kind; DeepSpeed compiles here, for a killed compiler leaves a lock."""
    runs = {}

    def of(kind):
        if kind not in runs:
            runs[kind] = tmp_path_factory.mktemp("whole")
            launcher, *options = KINDS[kind]
            launch(launcher, base, runs[kind], *RUN, *options)
        return runs[kind]

    return of


def steps(output):
    path = output / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.is_file() else 0


def started_and_at(step, kind, base, output, *options):
    """A run that has logged this step."""
    launcher, *overrides = KINDS[kind]
    process = start(launcher, base, output, *RUN, *overrides, *options)
    while steps(output) < step:
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.002)
    return process


def alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_same_weights(actual, expected):
    weights = load_file(expected / "adapter_model.safetensors")
    for name, weight in load_file(actual / "adapter_model.safetensors").items():
        assert torch.equal(weight, weights[name]), name
    assert losses(actual) == losses(expected) and len(losses(actual)) == STEPS


def losses(output):
    entries = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_a_random_step_and_resumed_it_is_the_same_run(base, whole, tmp_path, kind):
    expected = whole(kind)
    at, delay = random.randint(4, STEPS - 2), random.random() * 0.1
    print(f"killed {delay:.3f} s after step {at}")
    process = started_and_at(at, kind, base, tmp_path)
    time.sleep(delay)
    workers = psutil.Process(process.pid).children(recursive=True)  # in groups of their own
    os.killpg(process.pid, signal.SIGKILL)
    for worker in workers:
        worker.kill()
    process.wait()
    while any(map(alive, workers)):  # they hold the output folder until then
        time.sleep(0.01)
    assert not (tmp_path / "adapter_model.safetensors").exists(), "it had finished"
    launcher, *options = KINDS[kind]
    launch(launcher, base, tmp_path, *RUN, *options, "resume=true")
    assert_same_weights(tmp_path, expected)


def test_when_one_process_is_lost_all_end_and_the_run_can_go_on(base, whole, tmp_path):
    kind = "two processes"
    process = started_and_at(4, kind, base, tmp_path)
    workers = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "train.py" in " ".join(p.cmdline())
    ]
    lost = next(p for p in workers if p.environ()["RANK"] == "1")
    lost.kill()
    process.communicate(timeout=120)
    assert process.returncode != 0 and not any(p.is_running() for p in workers)
    launcher, *options = KINDS[kind]
    launch(launcher, base, tmp_path, *RUN, *options, "resume=true")
    assert_same_weights(tmp_path, whole(kind))


def test_a_signal_to_one_process_stops_both_after_the_same_step(base, whole, tmp_path):
    kind = "two processes"
    process = started_and_at(4, kind, base, tmp_path, "train.save_every=100")
    workers = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "train.py" in " ".join(p.cmdline())
    ]
    next(p for p in workers if p.environ()["RANK"] == "1").send_signal(signal.SIGUSR1)
    printed, complained = process.communicate(timeout=120)
    step = int((tmp_path / "interrupted").read_text())
    assert process.returncode == 1 and "exitcode  : 75" in complained
    assert f"stopped by a signal after step {step}" in printed
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    launcher, *options = KINDS[kind]
    launch(launcher, base, tmp_path, *RUN, *options, "resume=true")
    assert_same_weights(tmp_path, whole(kind))


@pytest.mark.parametrize("kind", ["alone", "lightning"])
def test_a_run_goes_on_from_any_of_its_checkpoints(base, whole, tmp_path, kind):
    launcher, *options = KINDS[kind]
    options += ["train.save_every=2", f"train.keep_checkpoints={STEPS}"]
    launch(launcher, base, tmp_path, *RUN, *options)
    for step in (8, 4, 2):  # after, before and far from half of the run
        launch(launcher, base, tmp_path, *RUN, *options, f"resume={step}")
        assert_same_weights(tmp_path, whole(kind))
