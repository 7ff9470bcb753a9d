"""What can end a run, and what is left of it: kills, signals, damaged files, full disks, numbers that are none."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.data_rows import IMAGE_PART, grey_image, turn, write_rows
from helpers.quick_runs import metrics_entries, train
from safetensors.torch import load_file, save_file

from latefusion.training import checkpoints
from latefusion.training import signals as guard
from latefusion.training.objective import Objective


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


def assert_same_weights(actual, expected):
    weights = load_file(expected / "adapter_model.safetensors")
    assert weights
    for name, weight in load_file(actual / "adapter_model.safetensors").items():
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


def test_the_offered_checkpoint_leads_to_the_same_weights(base, cut, whole, capsys):
    (cut / "checkpoint-2" / "optimizer.pt").unlink()
    train(base, cut, "resume=1")
    assert f"Going on from step 1 of 3 ({cut / 'checkpoint-1'})." in capsys.readouterr().out
    assert_same_weights(cut, whole)
    assert checkpoints.damage(cut / "checkpoint-2") is None  # written again
    assert [e["step"] for e in metrics_entries(cut) if "loss" in e] == [1, 2, 3]
    assert [e["loss"] for e in metrics_entries(cut) if "loss" in e] == [
        e["loss"] for e in metrics_entries(whole) if "loss" in e
    ]


def test_what_cannot_be_resumed_is_refused(base, cut, tmp_path):
    shutil.rmtree(cut / "checkpoint-1")
    with pytest.raises(SystemExit, match=r"resume=1 finds no checkpoint-1 in .*; there are steps 2\."):
        train(base, cut, "resume=1")
    with pytest.raises(
        SystemExit, match=r"checkpoint-2 was trained on 4 samples a step, but this run would take 8"
    ):
        train(base, cut, "resume=true", "train.accumulation=2")
    with pytest.raises(SystemExit, match=r"resume=true finds no checkpoint in .*; start the run without it"):
        train(base, tmp_path / "nothing", "resume=true")
    for shorter in (["train.steps=1"], ["train.steps=null", "train.epochs=0.01"]):
        with pytest.raises(
            SystemExit, match=r"checkpoint-2 is past the last step of .* train\.steps=1; choose"
        ):
            train(base, cut, "resume=true", *shorter)
    (cut / "checkpoint-2" / "files.json").unlink()
    with pytest.raises(SystemExit, match=r"no earlier one is whole: start again with overwrite=true"):
        train(base, cut, "resume=true")


def test_only_the_run_that_began_goes_on(base, whole, tmp_path, capsys):
    """Places may be others, and how it computes; what it computes may not."""
    output = tmp_path / "run"
    output.mkdir()
    shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2")
    shutil.copy(whole / "config.yaml", output)
    for change, message in (
        ("lora.r=8", r"other settings: lora\.r=8 \(it had 4\); resume it with its own, as .*config\.yaml"),
        ("train.learning_rate=3", r"train\.learning_rate=3\.0 \(it had 0\.01\);"),
        ("schedule.exit=6", r"schedule\.exit=6 \(it had 5\);"),
        ("teacher=dense", r"teacher=dense \(it had visipruner\);"),
        ("engine=lightning", r"engine\.trainer=lightning \(it had accelerate\);"),
        ("recipe=align", r"teacher=none \(it had visipruner\), tune=align \(it had lora\)"),
    ):
        with pytest.raises(SystemExit, match=message):
            train(base, output, "resume=true", change)
    shutil.copy(whole / "identity.json", output)
    moved = shutil.copytree(base, tmp_path / "moved")
    train(moved, output, "resume=true", "train.batch_size=2", "train.accumulation=2", "train.save_every=9")
    printed = capsys.readouterr().out
    assert f"goes on with model.path={moved}, where the run had {base}" in printed
    assert "identity.json is missing" not in printed


def lose_a_row(folder, base):
    rows = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(rows[1:]))


def reorder(folder, base):
    rows = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(reversed(rows)))


def swap_an_image(folder, base):
    """The same file name, the same size, other pixels."""
    grey_image(40).save(folder / "a.png")


def change_a_weight(folder, base):
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if weights[name].dim() > 1)
    save_file({**weights, name: weights[name] + 1}, base / "model.safetensors", metadata={"format": "pt"})


def change_the_processor(folder, base):
    file = next(base.glob("*processor_config.json"))
    values = json.loads(file.read_text())
    (values.get("image_processor") or values)["image_mean"] = [0.25, 0.25, 0.25]
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_a_row, "rows of its training set were lost, added, changed or reordered"),
        (reorder, "rows of its training set were lost, added, changed or reordered"),
        (swap_an_image, "rows of its training set were lost, added, changed or reordered"),
        (change_a_weight, r"the weights at model\.path have changed"),
        (change_the_processor, "the processor of its model has changed"),
    ],
)
def test_a_run_goes_on_with_the_data_and_the_model_it_began_with(base, tmp_path, change, message):
    """All of them lie where they lay, so that no setting differs."""
    copied = shutil.copytree(base, tmp_path / "base")
    grey_image(200).save(tmp_path / "a.png")
    ask = {"messages": [turn("user", IMAGE_PART, "how many?"), turn("assistant", "2")], "images": ["a.png"]}
    rows = [{**ask, "id": f"r{number}"} for number in range(6)]
    options = ("data=dataset", f"data.path={write_rows(tmp_path, *rows, name='rows.jsonl')}", "train.steps=2")
    train(copied, tmp_path / "run", *options)
    change(tmp_path, copied)
    with pytest.raises(SystemExit, match=rf"^error: the run in .* cannot go on, since {message}; restore"):
        train(copied, tmp_path / "run", *options, "resume=true", "train.steps=3")


def test_a_run_does_not_go_on_in_another_dtype(base, tmp_path):
    """`train.dtype=auto` would change it silently on another machine; here both are settings."""
    train(base, tmp_path, "train.steps=2", "train.dtype=auto")
    identity = json.loads((tmp_path / "identity.json").read_text())
    other = "float32" if identity["dtype"] == "bfloat16" else "bfloat16"
    (tmp_path / "identity.json").write_text(json.dumps({**identity, "dtype": other}))
    with pytest.raises(SystemExit, match=r"it computed in another dtype \(train\.dtype\); restore"):
        train(base, tmp_path, "train.steps=3", "train.dtype=auto", "resume=true")


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
    checkpoint = checkpoints.find(tmp_path, True, samples=4)
    assert checkpoints.step_of(checkpoint) == newest and (checkpoint / "state").read_text() == "state"
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


def test_a_folder_that_cannot_be_written_is_refused_before_anything_loads(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"output_dir=.*file/out cannot be written \(Not a directory\)"):
        train(base, tmp_path / "file" / "out")


# ---------------------------------------------------------------- signals, locks, worlds


@pytest.mark.parametrize(
    ("engine", "number"),
    [
        ("accelerate", signal.SIGTERM),
        ("accelerate", signal.SIGINT),
        pytest.param("accelerate", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("lightning", signal.SIGINT, marks=pytest.mark.slow),
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


def test_a_second_ctrl_c_stops_at_once(base, tmp_path, monkeypatch, capfd):
    before, calls, call = signal.getsignal(signal.SIGINT), [], Objective.__call__

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # the launcher's, of the same key
            assert "Ctrl-C again stops at once" in capfd.readouterr().err
            clock = time.monotonic() + guard.AT_ONCE
            monkeypatch.setattr(guard.time, "monotonic", lambda: clock + 1)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("went on")
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Objective, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(base, tmp_path)
    assert signal.getsignal(signal.SIGINT) == before
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


HOLD = """
import sys
from latefusion.training.run_folder import claimed
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
