"""`schedule=auto`: profiled once, by the first process; the others wait for it and train under the same schedule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.data_rows import IMAGE_PART, grey_image, turn, write_rows
from helpers.launch import free_port, launch
from helpers.quick_runs import QUICK, run_config, train
from helpers.tiny_base import SMALL, composed, configured

from latefusion.models import profile_schedule
from latefusion.models.policies.configured import schedule_of
from latefusion.models.schedule import RANKINGS, VisionSchedule
from latefusion.training import prepare, run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
AUTO = ("schedule=auto", "schedule.samples=4", "schedule.confirm=4", "schedule.bound=0.02", "entry.images=16")


@pytest.mark.slow
def test_two_processes_profile_once_and_a_resumed_run_not_at_all(base, tmp_path) -> None:
    printed = launch("torchrun", base, tmp_path, *AUTO, "entry.init=calibrated")
    assert "in 2 process(es)" in printed and printed.count("4 samples, 6 layers: up to") == 1
    trained = json.loads((tmp_path / "vision_schedule.json").read_text())
    assert trained == profile_schedule.read_schedule(tmp_path / "profile").to_dict()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "profile").iterdir()}
    printed = launch(
        "torchrun", base, tmp_path, *AUTO, "entry.init=calibrated", "resume=true", "train.steps=4"
    )
    assert "samples, 6 layers" not in printed and "in 2 process(es)" in printed
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "profile").iterdir()}
    assert json.loads((tmp_path / "vision_schedule.json").read_text()) == trained


@pytest.mark.slow
def test_one_process_profiles_first(base, tmp_path) -> None:
    small = ("train.dtype=float32", "train.threads=1", "train.batch_size=2", "train.steps=1", "data.scenes=2")
    small += ("eval.enabled=false", "model=other", "model.visipruner.boundary=1", "lora.r=2", "entry.rank=2")
    run_config(composed(*small, f"model.path={base}", f"output_dir={tmp_path}", *AUTO))
    trained = json.loads((tmp_path / "vision_schedule.json").read_text())
    assert trained == profile_schedule.read_schedule(tmp_path / "profile").to_dict()


WORK = """
import sys, time
import torch.distributed as dist
from latefusion.training.prepare import from_first_process

def work():
    time.sleep(1)
    print("worked", flush=True)
    if sys.argv[1] == "fails":
        raise ValueError("it cannot be.")
    return {"enter": 2}

try:
    print(from_first_process("it", work), flush=True)
except ValueError as error:
    print(f"error: {error}", flush=True)
dist.init_process_group("gloo")  # as an engine does afterwards, at the same port
dist.barrier()
print("together", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("way", "message"), [("works", "{'enter': 2}"), ("fails", "error: it cannot be.")])
def test_all_read_what_the_first_process_sent_where_no_launcher_keeps_the_store(
    way: str, message: str
) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, way],
            env={**os.environ, **where, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0].splitlines() for process in processes]
    assert outputs == [["worked", message, "together"], [message, "together"]]


def test_one_process_needs_no_store(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert prepare.from_first_process("it", lambda: {"enter": 1}) == {"enter": 1}


def test_a_resumed_run_reads_its_profile_and_another_run_makes_its_own(base, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    made: list[str] = []

    def profile(config) -> None:
        made.append(config.schedule.profile)
        (tmp_path / "profile").mkdir(exist_ok=True)
        (tmp_path / "profile" / "schedule.yaml").write_text("enter: 1\nexit: 3\nkeep: {2: 2}\n")

    monkeypatch.setattr(prepare, "profile", profile)
    options = (f"model.path={base}", f"output_dir={tmp_path}", *AUTO)
    for resumed, times in ((tmp_path, 1), (tmp_path, 1), (None, 2)):  # nothing there yet; there; not resumed
        config, cfg = configured(*options), composed(*options)
        prepare.settle_schedule(config, cfg, resumed)
        assert len(made) == times
        assert (config.schedule.enter, config.schedule.exit, config.schedule.keep) == (1, 3, {2: 2})
        assert cfg.schedule.enter == 1 and cfg.schedule.profile == str(tmp_path / "profile")


@pytest.mark.parametrize("where", [(), ("schedule=auto",)])
def test_a_resumed_run_does_not_go_on_under_a_profile_that_has_changed(where, base, tmp_path) -> None:
    """Its weights learnt under the schedule that the profile had before."""
    run, folder = tmp_path / "run", tmp_path / ("run/profile" if where else "made_before")
    folder.mkdir(parents=True)
    file = folder / "schedule.yaml"
    file.write_text("enter: 1\nexit: 4\nkeep: {2: 2}\n")
    words = (*where, f"output_dir={run}", f"model.path={base}", "model=other", "recipe=dense", "teacher=none")
    words += ("entry.init=identity", *(() if where else (f"schedule.profile={folder}",)))
    steps = ("train.steps=1", "resume=false")
    run_config(composed(*QUICK, *words, *steps, f"schedule.profile={folder}"))
    again = (*QUICK, *words, "train.steps=2", "resume=true")
    file.write_text("enter: 1\nexit: 3\nkeep: {}\n")
    with pytest.raises(
        SystemExit, match=r"with other settings: schedule\.exit=3 \(it had 4\), schedule\.keep"
    ):
        run_config(composed(*again))
    file.unlink()
    with pytest.raises(SystemExit, match="no profile at"):
        run_config(composed(*again))
    file.write_text("enter: 1\nexit: 4\nkeep: {2: 2}\n")
    run_config(composed(*again))


def test_the_student_to_start_from_has_a_place_under_the_schedule_that_the_profile_finds(
    base, tmp_path, monkeypatch
) -> None:
    """Before anything is fitted or loaded; no command line shows it."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    first, second = tmp_path / "first", tmp_path / "second"
    train(base, first, "teacher=none", "train.steps=1")

    def profile(config) -> None:
        (second / "profile").mkdir(parents=True)
        (second / "profile" / "schedule.yaml").write_text("enter: 0\nexit: 4\n")

    monkeypatch.setattr(prepare, "profile", profile)
    monkeypatch.delattr(run, "student_of")
    with pytest.raises(SystemExit, match=r"has an entry adapter, .* \(it enters at layer 2\)"):
        words = (*QUICK, *SMALL, f"model.path={base}", f"output_dir={second}", "teacher=none", *AUTO)
        run_config(composed(*words, f"init={first}"))


def test_a_profile_of_other_weights_is_noted(base, tmp_path, capsys) -> None:
    (tmp_path / "schedule.yaml").write_text("enter: 1\nexit: 4\n")
    options = (f"model.path={base}", f"schedule.profile={tmp_path}")
    for weights, noted in (("others", True), (prepare.model_fingerprint(str(base)), False)):
        (tmp_path / "profile.json").write_text(json.dumps({"about": {"weights": weights}}))
        prepare.settle_schedule(configured(*options), composed(*options))
        assert ("is of other weights than those of model.path" in capsys.readouterr().out) == noted


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_run_ranks_by_the_rule_that_the_profile_measured(ranking, base, tmp_path) -> None:
    """Whatever rule the configuration names."""
    schedule = VisionSchedule(enter=1, exit=4, keep={2: 2}, ranking=ranking)
    (tmp_path / "schedule.yaml").write_text(json.dumps(schedule.to_dict()))
    for other in RANKINGS:
        options = (f"model.path={base}", f"schedule.profile={tmp_path}", f"schedule.ranking={other}")
        config, cfg = configured(*options), composed(*options)
        prepare.settle_schedule(config, cfg)
        assert schedule_of(config.schedule) == schedule
        assert cfg.schedule.ranking == ranking


def test_a_folder_that_machines_do_not_share_is_refused(tmp_path: Path) -> None:
    schedule = {"enter": 1, "exit": 3, "keep": {}}
    with pytest.raises(ValueError, match=r"choose an output_dir=FOLDER that all machines share") as error:
        prepare.schedule_at(str(tmp_path), schedule)
    assert "\n" not in str(error.value)
    (tmp_path / "schedule.yaml").write_text("enter: 1\nexit: 4\n")
    with pytest.raises(ValueError, match="all machines share"):
        prepare.schedule_at(str(tmp_path), schedule)
    (tmp_path / "schedule.yaml").write_text("enter: 1\nexit: 3\n")
    assert prepare.schedule_at(str(tmp_path), schedule).to_dict() == schedule
    with pytest.raises(FileNotFoundError, match=r"no profile at"):
        prepare.schedule_at(str(tmp_path / "nowhere"), None)


def test_too_few_rows_name_the_key_of_the_run(base, tmp_path) -> None:
    rows = [{"messages": [{"role": "user", "content": "t"}, {"role": "assistant", "content": "t"}]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ("data=dataset", f"data.path={tmp_path / 'rows.jsonl'}")
    config = configured(f"model.path={base}", f"output_dir={tmp_path}", *AUTO, *data)
    with pytest.raises(ValueError, match=r"^schedule\.samples=4 is more than the 0 samples with images"):
        prepare.profile(config)


@pytest.mark.parametrize("keep", ["{}", "{2: 2}"])
def test_rows_are_held_to_the_keeps_of_the_profile(keep, base, tmp_path) -> None:
    """An image behind an answer could only be ranked by text that has read that answer; no recipe has keeps here."""
    grey_image(200).save(tmp_path / "a.png")
    (tmp_path / "schedule.yaml").write_text(f"enter: 1\nexit: 4\nkeep: {keep}\n")
    ask, answer = turn("user", IMAGE_PART, "how many?"), turn("assistant", "2")
    row = {"messages": [ask, answer, ask, answer], "images": ["a.png", "a.png"]}
    data = (
        "data=dataset",
        f"data.path={write_rows(tmp_path, *[row] * 4, name='rows.jsonl')}",
        "data.scenes=null",
    )
    model = ("model=other", f"model.path={base}", "teacher=none", "recipe=dense", "entry.init=identity")
    words = (*QUICK, *data, *model, f"schedule.profile={tmp_path}", f"output_dir={tmp_path / 'run'}")
    if keep == "{}":
        run_config(composed(*words))
        return
    with pytest.raises(SystemExit, match="has an image after an answer; that takes a schedule without keep"):
        run_config(composed(*words))
