"""What can end a run, and what is left of it: kills, signals, damaged files, full disks, numbers that are none."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import BAND, SMALL, composed, save_tiny_base

from latefusion.training import checkpoints, guard, parts, run
from latefusion.training.checks import read
from latefusion.training.monitor import Monitor, line, trackers
from latefusion.training.nonfinite import MOST_SKIPS, NonFinite, Watch, replay
from latefusion.training.objective import Objective
from latefusion.training.order import Order

QUICK = (
    *("train.dtype=float32", "train.threads=1", "train.log_every=1", "train.learning_rate=1e-2"),
    *("train.batch_size=4", "train.steps=3", "train.save_every=1", "train.keep_checkpoints=9"),
    *("data.scenes=4", "lora.dropout=0.2", "eval.enabled=false", "model.visipruner.boundary=1"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def train(base, output, *overrides):
    run.run(composed(*QUICK, *SMALL, *BAND, f"model.path={base}", f"output_dir={output}", *overrides))
    return output


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run of three steps that nothing disturbed, with a checkpoint of each."""
    return train(base, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def cut(whole, tmp_path):
    """The same run, as a kill after step 2 leaves it."""
    for step in (1, 2):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    return tmp_path


def entries(output):
    return [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(found, expected):
    weights = load_file(expected / "adapter_model.safetensors")
    assert weights
    for name, weight in load_file(found / "adapter_model.safetensors").items():
        assert torch.equal(weight, weights[name]), name


# ---------------------------------------------------------------- checkpoints

DAMAGE = {
    "truncated": (
        lambda c: os.truncate(c / "optimizer.pt", 100),
        r"holds 100 of the \d+ bytes of optimizer.pt",
    ),
    "changed": (
        lambda c: flip(c / "adapter_model.safetensors"),
        r"holds a changed adapter_model.safetensors",
    ),
    "incomplete": (lambda c: (c / "rng_state.pth").unlink(), r"lacks rng_state.pth"),
    "unsealed": (lambda c: (c / "files.json").write_text("{"), r"has no readable files.json"),
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(base, cut, kind):
    damage, what = DAMAGE[kind]
    damage(cut / "checkpoint-2")
    with pytest.raises(SystemExit, match=rf"^error: .*checkpoint-2 is damaged: it {what}; .*: resume=1\.$"):
        train(base, cut, "resume=true")


def test_the_offered_checkpoint_leads_to_the_same_weights(base, cut, whole):
    (cut / "checkpoint-2" / "optimizer.pt").unlink()
    train(base, cut, "resume=1")
    assert_same_weights(cut, whole)
    assert checkpoints.damage(cut / "checkpoint-2") is None  # written anew
    assert [e["step"] for e in entries(cut) if "loss" in e] == [1, 2, 3]
    assert [e["loss"] for e in entries(cut) if "loss" in e] == [
        e["loss"] for e in entries(whole) if "loss" in e
    ]


def test_what_cannot_be_resumed_is_said(base, cut, tmp_path):
    shutil.rmtree(cut / "checkpoint-1")
    with pytest.raises(SystemExit, match=r"resume=1 finds no checkpoint-1 in .*; there are steps 2\."):
        train(base, cut, "resume=1")
    with pytest.raises(
        SystemExit, match=r"checkpoint-2 was trained on 4 samples a step, but this run would take 8"
    ):
        train(base, cut, "resume=true", "train.accumulation=2")
    with pytest.raises(SystemExit, match=r"resume=true finds no checkpoint in .*; start the run without it"):
        train(base, tmp_path / "nothing", "resume=true")
    (cut / "checkpoint-2" / "files.json").unlink()
    with pytest.raises(SystemExit, match=r"none before it is whole: start again with overwrite=true"):
        train(base, cut, "resume=true")


def write(folder, step, text="state"):
    with checkpoints.writing(folder, step, samples=4, keep=2, main=True, barrier=lambda: None) as target:
        (target / "state").write_text(text)


def killed(folder, moment):
    """Write the checkpoint of step 3, and die at this moment."""

    def die(*unused):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "while files are written":
        with checkpoints.writing(folder, 3, samples=4, keep=2, main=True, barrier=lambda: None) as target:
            (target / "state").write_text("half a sta")
            die()
    elif moment == "before the seal":
        checkpoints.seal = die
    elif moment == "before the rename":
        checkpoints.replace = die
    elif moment == "while old ones go":
        checkpoints.shutil.rmtree = lambda path, **unused: die() if "checkpoint" in str(path) else None
    write(folder, 3)


@pytest.mark.parametrize(
    ("moment", "newest"),
    [
        ("while files are written", 2),
        ("before the seal", 2),
        ("before the rename", 2),
        ("while old ones go", 3),
    ],
)
def test_a_kill_while_saving_leaves_whole_checkpoints(tmp_path, moment, newest):
    write(tmp_path, 1)
    write(tmp_path, 2)
    child = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path, moment))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    found = checkpoints.find(tmp_path, True, samples=4)
    assert checkpoints.step_of(found) == newest and (found / "state").read_text() == "state"
    write(tmp_path, 4)
    left = [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path)]
    assert left == [newest, 4] and not (tmp_path / checkpoints.STAGING).exists()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 1, "old")
    write(tmp_path, 1, "new")
    assert (checkpoints.find(tmp_path, 1, samples=4) / "state").read_text() == "new"


def test_a_full_disk_ends_in_a_sentence_and_leaves_the_last_checkpoint(base, cut, whole):
    """A limit on the size of files stands for the disk: the system refuses to write beyond it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))  # an optimizer's state is larger
    try:
        with pytest.raises(
            SystemExit, match=r"^error: checkpoint-3 could not be written to .*; mend that, then go on"
        ):
            train(base, cut, "resume=true")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints.step_of(checkpoints.find(cut, True, samples=4)) == 2
    train(base, cut, "resume=true")
    assert_same_weights(cut, whole)


def test_a_folder_that_cannot_be_written_is_said_before_anything_loads(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"output_dir=.*file/out cannot be written \(Not a directory\)"):
        train(base, tmp_path / "file" / "out")


# ---------------------------------------------------------------- signals, locks, worlds


@pytest.mark.parametrize(
    ("engine", "number"),
    [
        ("accelerate", signal.SIGTERM),
        pytest.param("accelerate", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("lightning", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("lightning", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_happened(
    base, whole, tmp_path, monkeypatch, engine, number, capsys
):
    options = (f"engine={engine}", "train.save_every=100")
    reference = whole if engine == "accelerate" else train(base, tmp_path / "reference", *options)
    before, calls, output = signal.getsignal(number), [], tmp_path / "out"
    call = Objective.__call__

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return call(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train(base, output, *options)
    assert stopped.value.code == guard.PREEMPTED == 75
    assert signal.getsignal(number) == before
    assert [p.name for p in output.glob("checkpoint-*")] == ["checkpoint-2"] and len(calls) == 2
    assert (output / "interrupted").read_text() == "2\n" and not (
        output / "adapter_model.safetensors"
    ).exists()
    assert (
        "stopped by a signal after step 2, which is saved; go on with resume=true." in capsys.readouterr().out
    )
    train(base, output, *options, "resume=true")
    assert_same_weights(output, reference)
    assert not (output / "interrupted").exists()


HOLD = """
import sys
from latefusion.training.claim import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_use_is_refused_until_its_run_ends(base, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SystemExit, match=rf"^error: .* in use by another run \(process {holder.pid} on "):
            train(base, tmp_path)
    finally:
        holder.kill()  # no chance to clean up
        holder.wait()
    train(base, tmp_path, "train.steps=1")


def test_processes_that_would_train_apart_are_refused(base, tmp_path, monkeypatch):
    with pytest.raises(
        SystemExit, match=r"engine.processes=2, but 1 process\(es\) were started; launch with"
    ):
        train(base, tmp_path, "engine.processes=2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(SystemExit, match=r"SLURM started 4 tasks but WORLD_SIZE is not set"):
        train(base, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")  # but nothing has joined a process group
    with pytest.raises(
        ValueError, match=r"started 2 process\(es\), but the engine counts 1 and torch.distributed 1"
    ):
        guard.check_world(1)
    with pytest.raises(
        ValueError, match=r"started 2 process\(es\), but the engine counts 2 and torch.distributed 1"
    ):
        guard.check_world(2)


def test_fsdp_is_refused_where_it_would_silently_be_something_else(base, tmp_path):
    with pytest.raises(SystemExit, match=r"engine=fsdp2 needs GPUs: accelerate would run it as DDP"):
        train(base, tmp_path, "engine=fsdp2")


# ---------------------------------------------------------------- numbers that are none


def test_a_loss_that_is_no_number_stops_the_run_and_can_be_seen_again(base, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        train(base, tmp_path, "train.learning_rate=1e30", "train.max_grad_norm=1e9", "lora.dropout=0")
    said = str(stopped.value)
    assert said.startswith("error: step 2 is not finite: loss ") and "go on with resume=true" in said
    (folder,) = tmp_path.glob("nonfinite-*")
    assert folder.name == "nonfinite-step-2-rank-0" and str(folder) in said
    (batch,) = json.loads((folder / "rows.json").read_text())["batches"]
    assert len(batch["rows"]) == 4 and all(row["id"] in said for row in batch["rows"])
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not torch.tensor(replay(folder)).isfinite().any()


def test_the_named_samples_are_those_of_the_step(base, tmp_path, monkeypatch):
    """Their questions are what the poisoned batch spells."""
    poison(monkeypatch, {4})  # the second micro-batch of the second step
    with pytest.raises(SystemExit, match="step 2 is not finite: loss nan"):
        train(base, tmp_path, "train.batch_size=2", "train.accumulation=2")
    (folder,) = tmp_path.glob("nonfinite-*")
    batches = json.loads((folder / "rows.json").read_text())["batches"]
    assert [b["loss"] == "nan" for b in batches] == [False, True]
    config = read(composed(*QUICK, *SMALL, *BAND, f"model.path={base}", "output_dir=x"))
    rows, tokenizer = parts.samples(config.data), parts.student_of(config).processor.tokenizer
    saved = torch.load(folder / "batches.pt", weights_only=True)["batches"]
    for named, inputs in zip(batches, saved, strict=True):
        for row, ids in zip(named["rows"], inputs["input_ids"], strict=True):
            sample, text = rows[row["index"]], tokenizer.decode(ids)
            assert sample["id"] == row["id"]
            for message in sample["messages"]:
                assert message["content"][-1]["text"] in text
    assert torch.tensor(replay(folder)).isfinite().all()  # nothing is wrong with these without the poison


def poison(monkeypatch, calls):
    """These calls of the objective give nan."""
    call, count = Objective.__call__, []

    def poisoned(self, *args, **kwargs):
        count.append(1)
        loss, terms = call(self, *args, **kwargs)
        return (loss * float("nan") if len(count) in calls else loss), terms

    monkeypatch.setattr(Objective, "__call__", poisoned)


@pytest.mark.parametrize("engine", ["accelerate", pytest.param("lightning", marks=pytest.mark.slow)])
def test_such_a_step_can_be_skipped(base, whole, tmp_path, monkeypatch, capsys, engine):
    poison(monkeypatch, {2})
    train(base, tmp_path, "train.on_nonfinite=skip", f"engine={engine}")
    assert "step 2 skipped: loss nan" in capsys.readouterr().out
    one, two = (load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 2))
    three = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any((two[name] != three[name]).any() for name in two)
    assert all(weight.isfinite().all() for weight in three.values())


def test_skipping_ends_when_nothing_else_happens(tmp_path):
    samples = [{"id": f"row {i}"} for i in range(40)]
    order = Order(40, steps=20, size=2, seed=0)
    watch = Watch(tmp_path, dataset=samples, order=order, rank=0, world=1, micro=2, skip=True, student=None)

    def take(step, loss, norm):
        watch.begin()
        watch.saw({"input_ids": torch.zeros(2, 3)}, torch.tensor(loss), 7)
        return watch.passes(step, norm)

    assert not take(0, float("inf"), float("inf")) and take(
        1, 1.0, torch.tensor(2.0)
    )  # a good step starts anew
    assert not any(take(step, 1.0, float("nan")) for step in range(2, 2 + MOST_SKIPS))
    with pytest.raises(
        NonFinite, match=rf"step 13 is not finite \({MOST_SKIPS} steps in a row were skipped\)"
    ):
        take(12, 1.0, float("nan"))
    assert watch.skipped == MOST_SKIPS + 2


# ---------------------------------------------------------------- logs


def test_metrics_hold_every_log_entry_and_the_console_shows_them(base, tmp_path, capsys):
    train(base, tmp_path, "train.steps=2")
    first, second = (e for e in entries(tmp_path) if "loss" in e)
    assert (first["step"], second["step"]) == (1, 2)
    for name in (
        "ce",
        "kl",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "samples_per_second",
        "memory_gb",
    ):
        assert first[name] > 0
    assert second["eta_seconds"] == 0 < first["eta_seconds"] and second["epoch"] == pytest.approx(
        8 / 7, rel=0.2
    )
    printed = capsys.readouterr().out
    assert f"1/2  loss {first['loss']:.4f}  ce {first['ce']:.4f}  kl {first['kl']:.4f}" in printed
    assert "samples/s" in printed and "0:00 left" in printed


def test_rates_are_what_was_done_by_the_time_it_took(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("latefusion.training.monitor.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("latefusion.training.monitor.peak_flops", lambda dtype: 1e12)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monitor = Monitor(tmp_path, name="x", steps=10, first=2, samples=8, dtype=torch.float32, main=True)
    clock[0] += 4
    rates = monitor.rates(4, 1000, 16e10)
    assert rates["tokens_per_second"] == 250 and rates["samples_per_second"] == 4
    assert rates["eta_seconds"] == 12 and rates["mfu"] == pytest.approx(16e10 / 4 / 2e12)
    text = line(
        4, 10, {"loss": 1.5, "ce": 1.25, "kl": 0.0, **rates, "tokens_per_second": 2500.0, "memory_gb": 3.0}
    )
    assert text == " 4/10  loss 1.5000  ce 1.2500  2.5k tokens/s  4 samples/s  3.0 GB  MFU 2%  0:12 left"


def test_trackers_are_named_or_refused(monkeypatch, capsys):
    monkeypatch.setattr("latefusion.training.monitor.find_spec", lambda name: name == "wandb" or None)
    assert trackers(["tensorboard", "wandb"], main=True) == ["wandb"]
    assert "TensorBoard is not installed" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"train.trackers=trackio is not installed; pip install trackio"):
        trackers(["trackio"], main=True)
    with pytest.raises(
        ValueError, match=r"train.trackers names 'mlflow'; there are tensorboard, wandb, trackio"
    ):
        trackers(["mlflow"], main=True)
