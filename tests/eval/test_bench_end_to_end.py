"""The end-to-end benchmark: its stopwatch, its data, and one small run as `make gpu` makes it."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from latefusion.eval.bench import end_to_end, gpu
from latefusion.eval.bench.phases import Phases
from latefusion.eval.bench.training_run import PHASES, Runs, Settings, band_of, published_work
from latefusion.eval.bench.whole_model import SHAPES, build_model, picture, processor_for, question
from latefusion.models.attach import attach


class Work:
    def outer(self):
        self.spin(0.02)
        self.inner()

    def inner(self):
        self.spin(0.05)

    @staticmethod
    def spin(seconds):
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass


def test_a_phase_counts_its_own_time_without_that_of_phases_inside():
    phases = Phases("cpu")
    with phases.watching({(Work, "outer"): "outer", (Work, "inner"): "inner"}):
        Work().outer()
        phases.note()
        Work().inner()
    assert 0.02 <= phases.noted["outer"] < 0.04 and 0.05 <= phases.noted["inner"] < 0.07
    assert phases.seconds["inner"] >= 0.1
    Work().inner()  # no longer watched
    assert phases.seconds["inner"] < 0.14


@pytest.fixture(scope="module")
def toy():
    return build_model(SHAPES["toy"], device="cpu", dtype=torch.float32), processor_for(SHAPES["toy"])


@pytest.mark.parametrize("text", [16, 64])
def test_a_prompt_has_as_many_text_tokens_as_were_wanted(toy, text):
    _, processor = toy
    rendered = processor.apply_chat_template(question(text, 0), add_generation_prompt=True)
    inputs = processor(text=[rendered], images=[picture(0)], return_tensors="pt")
    vision = SHAPES["toy"].vision
    assert (inputs["input_ids"] == 3).sum() == vision
    assert inputs["input_ids"].shape == (1, text + vision)


@torch.no_grad()
def test_the_work_of_the_synthetic_visipruner_is_counted_as_it_runs(toy):
    model, processor = toy
    rendered = processor.apply_chat_template(question(16, 0), add_generation_prompt=True)
    inputs = processor(text=[rendered], images=[picture(0)], return_tensors="pt")
    work = published_work(8)
    with attach(model, work) as attachment:
        model(**inputs)
        ran = attachment.trace[0].vision
    vision = SHAPES["toy"].vision
    assert ran == band_of(work).vision_tokens(8, vision) == [vision] * 4 + [10] * 2 + [0] * 2


@pytest.mark.slow
def test_a_signal_ends_the_benchmark_and_not_one_run_alone(toy, tmp_path):
    cell = Settings(SHAPES["toy"], "cpu", "float32", batch=1, text=24, steps=3)
    handle = register_optimizer_step_post_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            Runs(toy[0], tmp_path).run("dense", "none", cell)
    finally:
        handle.remove()


@pytest.mark.slow
def test_a_dry_run_writes_every_cell_and_draws_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--only", "speed", "--out", str(tmp_path)])
    gpu.main()
    file = tmp_path / "gpu_end_to_end.json"
    rows = json.loads(file.read_text())["rows"]
    trained = {row["recipe"]: row for row in rows if row["part"] == "training"}
    assert list(trained) == ["dense/none", "cross_only"]
    taught = trained["cross_only"]
    assert set(taught["phases"]) == set(PHASES)
    assert all(seconds > 0 for seconds in taught["phases"].values()), taught["phases"]
    assert trained["dense/none"]["phases"]["teacher"] == 0
    assert trained["dense/none"]["ratio"] == trained["dense/none"]["predicted_ratio"] == 1
    assert taught["checkpoint_seconds"] > 0
    answered = {row["system"]: row for row in rows if row["part"] == "request"}
    assert list(answered) == list(end_to_end.SYSTEMS)
    for name, row in answered.items():
        assert row["until"]["2"]["ms"] > row["until"]["1"]["ms"] > 0
        if name != "dense":
            assert row["predicted_ratio"] < 1 and row["kv_bytes"] < answered["dense"]["kv_bytes"]
    assert "cross_only, merged" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", "--show", str(file), "--draw", str(tmp_path / "bars")])
    end_to_end.main()
    assert sorted(path.name for path in (tmp_path / "bars").iterdir()) == [
        "request_1x24.svg",
        "training_1x24.svg",
    ]


USED = """
import re, runpy, sys
from importlib.metadata import packages_distributions, requires
sys.argv = ["gpu.py", "--dry-run", "--only", "speed", "--out", sys.argv[1]]
runpy.run_path("eval/bench/gpu.py", run_name="__main__")
import pytest, hypothesis, tensorboardX
installed = packages_distributions()
def plain(name):
    return name.lower().replace("_", "-")

used = {plain(name) for module in list(sys.modules) for name in installed.get(module.split(".")[0], [])}

def brought(name):
    for line in requires(name) or []:
        if "extra ==" not in line:
            needed = plain(re.match("[A-Za-z0-9-_.]+", line)[0])
            yield needed
            yield from brought(needed)

print("USED", *sorted(used - {"latefusion", "torch"} - set(brought("torch"))))
"""


@pytest.mark.slow
def test_make_gpu_names_every_wheel_that_it_needs(tmp_path):
    """What is in use once it has run, but for what torch brings."""
    run = subprocess.run(
        [sys.executable, "-c", USED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    used = run.stdout.rsplit("USED", 1)[1].split()
    words = set(re.findall("[a-z0-9-]+", gpu.__doc__.lower()))
    assert "transformers" in used and not set(used) - words


def test_outcomes_of_gpu_tests_are_read_from_what_pytest_printed():
    log = """collected 4 items
tests/a/test_a.py::test_one PASSED   [ 25%]
tests/a/test_a.py::test_two[x-y] SKIPPED (flash-attn is n...) [ 50%]
tests/a/test_a.py::test_three FAILED [ 75%]
tests/a/test_a.py::test_four
=== short test summary info ===
SKIPPED [1] tests/a/test_a.py:80: flash-attn is not installed
FAILED tests/a/test_a.py::test_three - assert 1 == 2
"""
    name = "tests/a/test_a.py::test"
    assert gpu.outcomes(log) == [
        {"name": f"{name}_one", "outcome": "passed"},
        {"name": f"{name}_two[x-y]", "outcome": "skipped", "why": "flash-attn is not installed"},
        {"name": f"{name}_three", "outcome": "failed", "why": "assert 1 == 2"},
        {"name": f"{name}_four", "outcome": "unfinished"},
    ]
