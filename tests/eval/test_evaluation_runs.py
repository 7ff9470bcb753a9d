"""How an evaluation runs: interrupted, in several processes, on several tasks, against a stored reference; energy."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import evaluated_student
from helpers.launch import free_port
from helpers.tiny_base import save_tiny_base
from PIL import Image

from latefusion.data.question_file import rows_of
from latefusion.eval.comparison import energy, results, run
from latefusion.eval.comparison.answers import answer_questions
from latefusion.eval.comparison.systems import policies_of
from latefusion.eval.ledger import Ledger, Processes
from latefusion.eval.metrics import Measure
from latefusion.eval.tasks.base import Task
from latefusion.eval.tasks.choice import circular
from latefusion.eval.tasks.clusters import with_clusters
from latefusion.eval.tasks.exact import questions_of_file

ROOT = Path(__file__).parents[2]


def ask(ledger: Ledger | None) -> dict[str, list[str]]:
    student = evaluated_student.student()
    student.model.eval()
    by_system = answer_questions(
        model=student.model,
        processor=evaluated_student.processor(),
        attachment=student.attachment,
        systems=evaluated_student.SYSTEMS,
        task=evaluated_student.task(),
        batch_size=9,
        ledger=ledger,
    )
    return {key: [answer.prediction for answer in answers] for key, answers in by_system.items()}


def expected_answers() -> dict[str, list[str]]:
    return {key: [text for text, _ in answers] for key, answers in evaluated_student.naive().items()}


def test_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = evaluated_student.student().model
    expected, generate, calls = expected_answers(), model.generate, []

    def interrupted(**kwargs: Any) -> Any:
        calls.append(len(kwargs["input_ids"]))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(Ledger(tmp_path / "unfinished.jsonl", "identity", Processes()))
    lines = tmp_path / "unfinished.jsonl"
    with lines.open("a") as file:
        file.write('{"system": "dense", "task": "sce')  # cut off in the middle of a line
    ledger = Ledger(tmp_path / "unfinished.jsonl", "identity", Processes())
    assert ledger.resumed == sum(calls[:3])  # the base's rows of a batch are kept together
    assert ask(ledger) == expected
    batches = -(-len(evaluated_student.questions()) // 9)
    assert len(calls) == 3 * batches + 2  # nothing but what was interrupted was asked twice
    ledger.close()
    assert not list(tmp_path.iterdir())


def test_answers_of_another_evaluation_are_thrown_away(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "unfinished.jsonl", {"policy": 1}, Processes())
    ask(first)
    assert Ledger(tmp_path / "unfinished.jsonl", {"policy": 1}, Processes()).resumed == 3 * len(
        evaluated_student.questions()
    )
    assert Ledger(tmp_path / "unfinished.jsonl", {"policy": 2}, Processes()).resumed == 0


def test_processes_share_the_questions(tmp_path: Path) -> None:
    """The second process answers its half; the first waits for it there and has all of them."""
    other = Ledger(
        tmp_path / "unfinished.jsonl", "identity", Processes(rank=0, count=2)
    )  # the main one makes the folder
    halves: list[int] = []

    def second_process() -> None:
        if not halves:
            halves.append(0)
            second = Ledger(tmp_path / "unfinished.jsonl", "identity", Processes(rank=1, count=2))
            assert ask(second) == expected_answers()

    other.processes = Processes(rank=0, count=2, wait=second_process)  # type: ignore[misc]
    assert ask(other) == expected_answers()
    files = (tmp_path / "unfinished.jsonl", tmp_path / "unfinished.1.jsonl")
    lines = [len(file.read_text().splitlines()) for file in files]
    assert min(lines) > 0.3 * max(lines)


def test_a_stored_reference_has_to_be_reproduced(tmp_path: Path) -> None:
    _, stored = evaluated_student.full_run()
    results = evaluated_student.evaluate(tmp_path / "same", stored=stored)
    assert results is not None and results["settings"]["reference_reproduced"]
    other = copy.deepcopy(stored)
    other["systems"]["dense"]["accuracy"]["overall"]["value"] -= 0.01
    with pytest.raises(ValueError, match=r"does not reproduce .*\(at most 0\.5 points"):
        evaluated_student.evaluate(tmp_path / "drift", stored=other)
    assert not (tmp_path / "drift/report.json").exists()
    kept = (tmp_path / "drift/unfinished.jsonl").read_text().splitlines()[1:]
    assert {json.loads(line)["value"]["system"] for line in kept} == {"dense"}  # nobody else was asked
    other["data"]["fingerprint"] = "0"
    with pytest.raises(ValueError, match="has other questions"):
        evaluated_student.evaluate(tmp_path / "data", stored=other)
    assert not (tmp_path / "data").exists()


def test_a_reference_of_another_model_or_processor_is_refused(tmp_path: Path) -> None:
    _, stored = evaluated_student.full_run()
    for name in ("weights", "processor", "generation settings", "dtype"):
        other = copy.deepcopy(stored)
        other["model"]["identity"][name] = "other"
        with pytest.raises(ValueError, match=f"dense base has other {name};"):
            evaluated_student.evaluate(tmp_path, stored=other)


def colour_task(folder: Path, colours: Sequence[str]) -> Task:
    """Questions about one picture each; the file of the questions never changes."""
    lines = []
    for i, colour in enumerate(colours):
        Image.new("RGB", (96, 96), colour).save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": "is it red ?", "answers": ["yes"]})
    (folder / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return questions_of_file(str(folder / "my.jsonl"))


@pytest.mark.slow
def test_swapped_images_start_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after every answer; then each file holds another picture."""
    colours = ("red", "green", "blue", "black", "white", "yellow")

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as stop:
        stop.setattr(run, "measure_costs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluated_student.evaluate(tmp_path / "out", tasks=[colour_task(tmp_path, colours)])
    assert (tmp_path / "out/unfinished.jsonl").read_text().count("\n") > len(colours)
    swapped = colour_task(tmp_path, colours[::-1])
    evaluated_student.evaluate(tmp_path / "out", tasks=[swapped])
    evaluated_student.evaluate(tmp_path / "fresh", tasks=[swapped])
    kept, fresh = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("out", "fresh"))
    assert kept == fresh
    same = results.describe_data([swapped])["fingerprint"]
    assert results.describe_data([colour_task(tmp_path, colours)])["fingerprint"] != same


def test_other_generation_settings_and_processors_start_over() -> None:
    settings = evaluated_student.settings(Path("unused"))
    first = results.describe_identity(settings)
    model, processor = copy.copy(settings.model), copy.deepcopy(settings.processor)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.suppress_tokens = [5]
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    changed = results.describe_identity(replace(settings, model=model, processor=processor))
    assert [name for name in first if first[name] != changed[name]] == ["processor", "generation settings"]


def test_questions_about_one_image_are_one_cluster_in_all_tasks(tmp_path: Path) -> None:
    """Whatever the image is called there, and also where a task does not say that questions share one."""
    for name, colour in (("a", "red"), ("b", "green"), ("copy_of_a", "red")):
        Image.new("RGB", (24, 24), colour).save(tmp_path / f"{name}.png")
    common = {"question": "q", "prompt": "q", "answer": "yes", "answers": ["yes"], "type": "t"}
    first = [
        {**common, "id": str(i), "scene": str(i), "images": [tmp_path / f"{n}.png"]}
        for i, n in enumerate("aba")
    ]
    second = [{**common, "id": "0", "scene": "0", "images": [(tmp_path / "copy_of_a.png").read_bytes()]}]
    second += [{**common, "id": "1", "scene": "1", "images": []}]
    tasks = [evaluated_student.task(rows_of(rows), name=name) for name, rows in (("x", first), ("y", second))]
    clustered = with_clusters(tasks)
    assert [list(task.clusters) for task in clustered] == [["x/0", "x/1", "x/0"], ["x/0", "y/1"]]
    assert results.describe_data(clustered)["scenes"] == 3


def test_several_tasks_count_alike_and_reading_stands_apart(tmp_path: Path) -> None:
    rows = evaluated_student.questions()
    common = {"question": "is it red ?", "prompt": "is it red ?", "answer": "yes", "type": "a", "images": []}
    bare = [{**common, "id": f"{q}-{turn}", "scene": q} for q in "xy" for turn in (0, 1)]
    right = [float(i % 2) for i in range(4)]
    rotated = evaluated_student.task(
        rows_of(bare),
        name="circles",
        score=lambda answer, row: float(row["id"].endswith("-1")),  # one rotation of each is right
        units=circular,
        measures=lambda answers: {"half": Measure(terms=[(right, [1.0] * len(answers))])},
        max_new_tokens=2,
    )
    always = evaluated_student.task(
        rows.select(range(3)), name="signs", ocr=True, score=lambda answer, row: 0.6
    )
    results = evaluated_student.evaluate(tmp_path, tasks=[rotated, always])
    assert results is not None
    student = results["systems"]["student"]
    assert student["tasks"]["circles"]["score"]["overall"]["value"] == 0
    assert student["tasks"]["circles"]["score"]["overall"]["n"] == 2  # questions, not rotations
    assert student["tasks"]["circles"]["measures"]["half"]["value"] == 50
    assert student["accuracy"]["overall"]["value"] == pytest.approx((0 + 0.6) / 2)
    assert list(student["accuracy"]["types"]) == ["circles", "signs"] == list(results["data"]["types"])
    page = (tmp_path / "report.html").read_text()
    assert "Accuracy on text in images, %" in page and "circles, its own figures" in page


def test_images_may_be_in_some_rows_only(tmp_path: Path) -> None:
    """Rows without an image share no batch with the others."""
    with_image = evaluated_student.questions()[0]
    with_image["image"].save(tmp_path / "a.png")
    common = {"question": with_image["question"], "answer": "no", "type": "a"}
    rows: Dataset = rows_of(
        [
            {**common, "id": "0", "prompt": common["question"], "scene": "0", "images": []},
            {**common, "id": "1", "prompt": common["question"], "scene": "1", "images": [tmp_path / "a.png"]},
        ]
    )
    student = evaluated_student.student()
    student.model.eval()
    answers = answer_questions(
        model=student.model,
        processor=evaluated_student.processor(),
        attachment=student.attachment,
        systems={"dense": evaluated_student.SYSTEMS["dense"]},
        task=evaluated_student.task(rows, max_new_tokens=6),
        batch_size=4,
    )["dense"]
    assert [answer.vision_tokens for answer in answers] == [[0] * 4, [16] * 4]
    assert answers[1].prediction == evaluated_student.naive()["dense"][0][0]


def test_policies_by_name_and_with_other_arguments() -> None:
    chosen = ["fastv", {"fastv": {"keep_ratio": 0.25}}, {"pyramiddrop": {"keep_ratios": {2: 0.5}}}]
    policies = policies_of([*chosen, {"pyramiddrop": {"keep_ratios": {3: 0.5}}}], {})
    assert {key: system.name for key, system in policies.items()} == {
        "fastv": "FastV",
        "fastv_2": "FastV (keep_ratio=0.25)",
        "pyramiddrop": "PyramidDrop",
        "pyramiddrop_4": "PyramidDrop no. 2",
    }
    assert vars(policies["fastv_2"].policy)["keep_ratio"] == 0.25


def test_visipruner_begins_from_the_thresholds_of_the_model() -> None:
    policies = policies_of(
        ["visipruner", {"visipruner": {"boundary": 9}}], {"boundary": 7, "exit_patience": 5}
    )
    assert [(p.policy.boundary, p.policy.exit_patience) for p in policies.values()] == [(7, 5), (9, 5)]  # type: ignore[attr-defined]


def test_energy_of_a_cpu_is_the_sum_of_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, used in (("intel-rapl:0", 900_000), ("intel-rapl:1", 100_000), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(str(used))
        (tmp_path / name / "max_energy_range_uj").write_text("1000000")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    joules = energy.joules_of(torch.device("cpu"))
    assert joules is not None
    before = joules()
    (tmp_path / "intel-rapl:0/energy_uj").write_text("150000")  # wrapped around: 0.25 J more
    (tmp_path / "intel-rapl:1/energy_uj").write_text("400000")  # 0.3 J more
    assert joules() - before == pytest.approx(0.55)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nothing")
    assert energy.joules_of(torch.device("cpu")) is None


def test_energy_of_a_gpu_is_nvml_s_counter_in_joules() -> None:
    class Refused(Exception):
        pass

    def handle(uuid: bytes) -> int:
        if uuid != b"GPU-1234":
            raise Refused
        return 7

    nvml: Any = SimpleNamespace(
        NVMLError=Refused,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda at: 5000 + at,
    )
    joules = energy._nvml_counter(nvml, "1234")
    assert joules is not None and joules() == pytest.approx(5.007)
    assert energy._nvml_counter(nvml, "other") is None


TIMED = {"ttft", "tpot", "joules", "peak_bytes", "vision_seconds", "seconds", "command", "date"}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMED}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_the_process_that_measures_costs_has_the_threads_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.get_num_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with run.threads_of_all():
        assert torch.get_num_threads() == 3 * own
    assert torch.get_num_threads() == own


@pytest.mark.slow
def test_killed_and_started_again_it_reports_the_same(tmp_path: Path) -> None:
    """`kill -9` in the middle of the questions."""
    base = save_tiny_base(tmp_path / "base")
    command = [
        sys.executable,
        str(ROOT / "eval/evaluate.py"),
        f"model={base}",
        "policies=[{vtw: {layer: 3}}]",
    ]
    command += ["samples=120", "batch_size=3", "controls=false", "batches=[]", "lengths=[]"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    whole = subprocess.run([*command, f"output={tmp_path / 'whole'}"], timeout=900, **quiet)
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = subprocess.Popen([*command, f"output={tmp_path / 'killed'}"], **quiet)
    kept = tmp_path / "killed/unfinished.jsonl"
    while not kept.is_file() or kept.read_text().count("\n") < 40:
        assert killed.poll() is None, "it finished before it could be killed"
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    before = kept.read_text().count("\n") - 1
    again = subprocess.run(
        [*command, f"output={tmp_path / 'killed'}"], timeout=900, **{**quiet, "stdout": subprocess.PIPE}
    )
    assert again.returncode == 0 and "answers of an interrupted run" in again.stdout, again.stderr[-3000:]
    assert 20 <= before < 2 * 120
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "killed")]
    assert without_times(reports[0]) == without_times(reports[1])
    predictions = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("whole", "killed")]
    assert predictions[0] == predictions[1]


@pytest.mark.slow
def test_two_processes_answer_as_one_does(tmp_path: Path) -> None:
    words = ["model=embedded", "policies=[visipruner]", "samples=12", "batch_size=3", "controls=false"]
    words += ["batches=[]", "lengths=[]"]
    script = str(ROOT / "eval/evaluate.py")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += [f"--main_process_port={free_port()}", script]
    predictions = []
    for name, command in (("one", [sys.executable, script]), ("two", launch)):
        done = subprocess.run(
            [*command, *words, f"output={tmp_path / name}"], capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        predictions.append([(a["system"], a["id"], a["prediction"]) for a in map(json.loads, lines)])
    assert predictions[0] == predictions[1] and len(predictions[0]) == 24
    environment = json.loads((tmp_path / "two/report.json").read_text())["environment"]
    assert environment["processes"] == 2
    assert environment["threads"] == 2 * int(os.environ.get("OMP_NUM_THREADS", 1))  # of the one that times
