"""One evaluation of a tiny random model: its answers, its costs, its complaints."""

import json
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import evaluated_student
from helpers.evaluated_student import HEADS, MLP, SYSTEMS, VISION, WIDTH, tiny_model

from latefusion.data.prompts import prompt_inputs
from latefusion.data.scenes import load_scenes
from latefusion.data.sources import scenes as scene_samples
from latefusion.eval import calibrate, profile_model
from latefusion.eval.comparison import cost
from latefusion.eval.comparison.answers import answer_questions, check_longest
from latefusion.eval.comparison.systems import System, running
from latefusion.eval.evaluate import Arguments, check, config_of, main
from latefusion.eval.tasks.base import Task
from latefusion.models.attach import attach
from latefusion.models.inputs import encode_images
from latefusion.models.schedule import VisionSchedule


@pytest.fixture(scope="module")
def processor():
    return evaluated_student.processor()


@pytest.fixture(scope="module")
def student():
    return evaluated_student.student()


@pytest.fixture(scope="module")
def naive():
    return evaluated_student.naive()


@pytest.fixture(scope="module")
def questions():
    return evaluated_student.questions()


@pytest.fixture(scope="module")
def run():
    return evaluated_student.full_run()


def test_batched_answers_equal_asking_one_by_one(run, naive, questions):
    folder, results = run
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    for key, expected in naive.items():
        answered = [line for line in lines if line["system"] == key]
        assert [line["prediction"] for line in answered] == [text for text, _ in expected]
        assert [line["text_tokens"] for line in answered] == [n for _, n in expected]
        assert [line["id"] for line in answered] == list(questions["id"])
        right = [text == answer for (text, _), answer in zip(expected, questions["answer"], strict=True)]
        assert [line["correct"] for line in answered] == right
        overall = results["systems"][key]["accuracy"]["overall"]
        assert overall["value"] == pytest.approx(np.mean(right)) and overall["n"] == len(right)
    texts = {key: [text for text, _ in expected] for key, expected in naive.items()}
    assert len(set(texts["dense"])) > 3 and all(a != b for a, b in pairwise(texts.values()))  # else it tests
    assert results["systems"]["dense"]["accuracy"]["overall"]["value"] > 0.3  # little


def test_rows_of_the_training_sources_get_the_same_prompts(student, processor):
    options = {"model": student.model.eval(), "processor": processor, "attachment": student.attachment}
    options |= {"systems": {"dense": SYSTEMS["dense"]}, "batch_size": 7}
    plain = answer_questions(**options, task=evaluated_student.task(load_scenes("test", 1)))["dense"]
    samples = evaluated_student.task(scene_samples("test", n_scenes=1))
    assert answer_questions(**options, task=samples)["dense"] == plain


def by_hand(n_text: int, vision: list[int]) -> int:
    """FLOPs of a prefill: two a multiply-add of q, k, v, o, scores, weighted sum, gate, up, down."""
    head, total = WIDTH // HEADS, 0
    for n in (n_text + v for v in vision):
        q_and_o, k_and_v = 2 * (2 * n * WIDTH * WIDTH), 2 * (2 * n * WIDTH * head)
        total += q_and_o + k_and_v + 2 * (2 * n * n * WIDTH) + 3 * (2 * n * WIDTH * MLP)
    return total


TOKENS = {"dense": [16, 16, 16, 16], "pruned": [16, 16, 3, 3], "student": [0, 16, 5, 0]}
TOKENS |= {"blind": [0] * 4, "random_0.594": [10] * 4, "random_0.328": [5] * 4}


@pytest.mark.parametrize("key", SYSTEMS)
def test_flops_and_vision_tokens_equal_the_count_by_hand(run, naive, key):
    system = run[1]["systems"][key]
    lengths = [n_text for _, n_text in naive[key]]
    assert system["vision_tokens"]["per_layer"] == TOKENS[key]
    looked = {"dense": 0, "pruned": 2, "student": 1}[key]  # layers from enter up to the keep of layer 2
    chosen = [looked * 2 * n * VISION * WIDTH for n in lengths]  # scores of the text's rows over vision
    entry = 2 * VISION * WIDTH * 2 * 2 if key == "student" else 0  # down and up, rank 2
    rows = zip(lengths, chosen, strict=True)
    expected = np.mean([by_hand(n, TOKENS[key]) + more + entry for n, more in rows])
    assert system["flops"]["mean"] == pytest.approx(expected)
    dense = np.mean([by_hand(n, TOKENS["dense"]) for n in lengths])
    assert system["flops"]["ratio"] == pytest.approx(system["flops"]["mean"] / dense)


def test_whole_prefill_is_decoder_tower_projector_and_head(run, student):
    """Counted by hand: patches, q, k, v, o, scores, weighted sum and MLP of the tower, two layers of projector."""
    _, results = run
    tower, model = student.model.config.vision_config, student.model
    n, d, m = 1 + 16, tower.hidden_size, tower.intermediate_size
    layer = 4 * 2 * n * d * d + 2 * 2 * n * n * d + 2 * 2 * n * d * m
    patches = 2 * 16 * 3 * tower.patch_size**2 * d
    projector = 2 * 16 * (d * WIDTH + WIDTH * WIDTH)
    head = 2 * WIDTH * model.config.get_text_config().vocab_size
    vision = tower.num_hidden_layers * layer + patches + projector
    assert results["model"]["vision_flops"] == vision
    for key in ("dense", "student"):
        system = results["systems"][key]
        assert system["prefill_flops"]["mean"] == pytest.approx(system["flops"]["mean"] + vision + head)
        assert system["prefill_flops"]["ratio"] >= system["flops"]["ratio"]
    blind = results["systems"]["blind"]
    assert blind["prefill_flops"]["mean"] == pytest.approx(blind["flops"]["mean"] + head)


@pytest.mark.parametrize("key", SYSTEMS)
def test_kv_bytes_equal_the_count_by_hand(run, naive, questions, key):
    lengths = [naive[key][i][1] for i in (0, len(questions) // 2)]  # the two prompts of the latency
    per_token = 2 * (WIDTH // HEADS) * 4  # one key and one value of one head, float32
    expected = np.mean([sum(n + v for v in TOKENS[key]) * per_token for n in lengths])
    assert run[1]["systems"][key]["kv_bytes"]["mean"] == expected


def test_encoded_images_leave_what_positions_are_made_of():
    """Qwen's M-RoPE reads the grids of images that are encoded already."""

    class Tower:
        def get_image_features(self, pixel_values, image_grid_thw=None, **options):
            return pixel_values + image_grid_thw.sum()

    tower = Tower()
    tower.base_model = tower  # as of a model without a head
    model = SimpleNamespace(base_model=tower)
    inputs = {"input_ids": 1, "pixel_values": torch.ones(2), "image_grid_thw": torch.ones(1, 3)}
    encoded = encode_images(model, inputs)
    assert sorted(encoded) == ["image_grid_thw", "input_ids", "mm_encoder_outputs"]
    assert encoded["mm_encoder_outputs"]["image"].tolist() == [4, 4]


def test_time_of_an_answer_separates_the_first_token(monkeypatch):
    clock = iter([0.0, 1.0, 8.0, 10.0, 12.0, 15.0])  # start, prompt, then four tokens
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))

    def generate(model, inputs, new_tokens, *, streamer):
        for _ in range(1 + new_tokens):
            streamer.put(None)

    monkeypatch.setattr(cost, "generate", generate)
    assert cost.time_answer(SimpleNamespace(device=torch.device("cpu")), {}, 4) == (8.0, 2.0)


def test_rounds_are_interleaved_and_ratios_are_of_the_same_round(monkeypatch, student, processor):
    order, seconds = [], {None: 1.0, 3: 0.5}

    def timed(model, inputs, new_tokens):
        keep = student.attachment.policy.keep.get(2)
        order.append(keep)
        drift = 1.0 if len(order) <= 4 else 3.0  # the machine gets slower
        return drift * seconds[keep], drift

    monkeypatch.setattr(cost, "time_answer", timed)
    two = {key: SYSTEMS[key] for key in ("dense", "pruned")}
    prompts = [prompt_inputs(student.model, processor, [load_scenes("test", 1)[i]]) for i in (0, 1)]
    costs = cost.measure(
        model=student.model.eval(),
        attachment=student.attachment,
        systems=two,
        prompts=prompts,
        reference="dense",
        repeats=2,
        new_tokens=2,
    )
    assert order == [None, 3, 3, None, 3, None, None, 3]
    assert costs["pruned"].ttft.ratio == costs["pruned"].ttft.ratio_q75 == 0.5
    assert costs["dense"].ttft.median == 2.0 and costs["dense"].tpot.ratio == 1.0


def test_images_are_encoded_once_for_all_systems_of_the_same_weights(student, processor):
    inputs = prompt_inputs(student.model, processor, [load_scenes("test", 1)[0]])
    with running(student.model.eval(), student.attachment, SYSTEMS["dense"]):
        encoded = encode_images(student.model, inputs)
        assert "pixel_values" not in encoded
        assert torch.equal(student.model(**inputs).logits, student.model(**encoded).logits)


def test_one_question_is_enough_for_a_report(student, questions, tmp_path):
    student.model.train()
    results = evaluated_student.evaluate(
        tmp_path, tasks=[evaluated_student.task(questions.select([1]))], latency_prompts=5
    )
    assert student.model.training  # given back as it came
    assert results["paired"]["dense"]["difference"]["high"] > 0.9  # of one question nothing is known
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["settings"]["latency_prompts"] == 1 and stored["data"]["split"] == "test"
    assert (tmp_path / "report.html").is_file() and not (tmp_path / "unfinished.jsonl").exists()


def refused(folder, **changes):
    with pytest.raises(ValueError) as error:
        evaluated_student.evaluate(folder, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input_is_one_sentence_before_any_compute(questions, tmp_path):
    folder = tmp_path / "report"
    assert "column 'type'" in refused(
        folder, tasks=[evaluated_student.task(questions.remove_columns("type"))]
    )
    assert "no question" in refused(folder, tasks=[evaluated_student.task(questions.select([]))])
    assert "'oracle'" in refused(folder, candidate="oracle")
    late = {**SYSTEMS, "late": System(name="", policy=VisionSchedule(enter=9))}
    assert "late: enter names layer 9" in refused(folder, systems=late)
    plain = tiny_model()
    attach(plain, VisionSchedule())
    assert "adapters" in refused(folder, model=plain)
    assert not folder.exists()


FOREIGN = r"""
name: 'run of ${oc.env:SECRET} \${oc.env:SECRET}'
model: {path: embedded, visipruner: {boundary: 1}}
data: {source: scenes}
engine: {trainer: accelerate}
train: {learning_rate: 0.1, batch_size: 1}
output_dir: '${oc.env:SECRET}'
"""


def test_a_foreign_configuration_resolves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "config.yaml").write_text(FOREIGN)
    config = config_of(tmp_path)
    assert "hunter2" not in repr(config) and config.output_dir == "${oc.env:SECRET}"
    assert config.name == r"run of ${oc.env:SECRET} \${oc.env:SECRET}"


def test_an_exported_student_is_told_how_to_be_compared(tmp_path):
    (tmp_path / "vision_schedule.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"has no config.yaml.*; compare .* by model=BASE checkpoints=\["):
        main([f"checkpoint={tmp_path}"])


def test_a_broken_configuration_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\nmodel: {path: embedded, colour: red}\n")
    with pytest.raises(SystemExit, match="is not a training configuration") as error:
        main([f"checkpoint={tmp_path}"])
    assert "colour" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["checkpoint=outputs/nowhere"], "outputs/nowhere"),
        (["checkpoint=."], "config.yaml"),
        (["split=test"], "checkpoint"),
        (["model=embedded"], "policies=[visipruner]"),
        (["model=embedded", "policies=[dense]"], "alone, which is the dense row, has nothing"),
        (["model=embedded", "policies=[fastvv]"], "did you mean fastv"),
        (["model=embedded", "policies=[{fastv: {kep: 1}}]"], "'kep'"),
        (["model=embedded", "policies=[fastv]", "tasks=[gqa]"], "images there"),
        (["model=embedded", "policies=[fastv]", "data=my.jsonl"], "data=FILE"),
        (["model=embedded", "policies=[fastv]", "data=scenes"], "ask it with tasks=[scenes]"),
        (["model=embedded", "policies=[fastv]", "tasks=[gqa]", "data=my.jsonl"], "exclude each other"),
        (["model=embedded", "policies=[{fastv: 3}]"], "policies={'fastv': 3} is neither a name nor"),
        (["model=embedded", "policies=[3]"], "policies=3 is neither a name nor {NAME: {ARGUMENT: VALUE}}"),
        (
            ["model=embedded", "policies=[fastv]", "data=a.jsonl", "split=test"],
            "split=test would not be read",
        ),
        (["model=embedded", "policies=[fastv]", "max_frames=4"], "max_frames=4 would not be read"),
        (
            ["model=embedded", "policies=[fastv]", "sources.pope=a/b"],
            "sources.pope would not be read: add tasks=[pope]",
        ),
        (
            ["model=embedded", "policies=[fastv]", "output=file"],
            "output=file cannot be written (Not a directory)",
        ),
        (["--reference=before.json", "checkpoint=.", "policies=[fastv]"], "config.yaml"),
        (["model=embedded", "policies=[fastv]", "reference=before.json"], "before.json"),
        (["checkpont=outputs/late_fusion"], "checkpont"),
        (["samples=many", "checkpoint=x"], "many"),
    ],
)
def test_command_line_says_what_is_wrong(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "neither adapter_config.json nor config.json"),
        ({"adapter_config.json": '{"base_model_name_or_path": "/nowhere"}'}, "no model at /nowhere"),
        ({"config.json": '{"model_type": "llava"}'}, "has no vision schedule"),
        ({"config.json": "{"}, "is not a model configuration"),
    ],
)
def test_a_further_checkpoint_that_is_none_is_refused_before_anything_is_loaded(files, says, tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        check(Arguments(model="embedded", checkpoints=[str(folder)], output=str(tmp_path / "report")))


def test_a_question_that_is_longer_than_the_model_has_positions_is_refused_before_any_is_asked(
    student, processor, questions, monkeypatch
):
    """Whatever its text is; the one whose image makes it longer than the longest text, when its batch is made."""
    long = Task(
        name="long", rows=questions.map(lambda row: {"question": row["question"] * 100}, remove_columns=[])
    )
    limit = student.model.config.get_text_config().max_position_embeddings
    says = rf"^question \S+ has \d+ tokens, .* may take \d+ more; the model has {limit} positions for both"
    with pytest.raises(ValueError, match=says):
        check_longest(student.model, processor, long)
    calls = []
    monkeypatch.setattr(student.model, "generate", lambda **kwargs: calls.append(kwargs))
    with pytest.raises(ValueError, match=says):
        answer_questions(
            model=student.model,
            processor=processor,
            attachment=student.attachment,
            systems=SYSTEMS,
            task=long,
            batch_size=4,
        )
    assert not calls
    check_longest(student.model, processor, evaluated_student.task())


@pytest.mark.parametrize(
    ("command", "words", "result"),
    [
        (main, ["policies=[fastv]"], "report.json"),
        (calibrate.main, [], "policy.yaml"),
        (profile_model.main, [], "profile.json"),
    ],
)
def test_a_finished_result_is_replaced_only_with_overwrite(command, words, result, tmp_path, monkeypatch):
    (tmp_path / result).touch()
    monkeypatch.setattr(sys.modules[command.__module__], "claimed", began)
    words = [*words, "model=embedded", f"output={tmp_path}"]
    with pytest.raises(
        SystemExit, match=rf"{result} is there already; replace it with overwrite=true, or choose"
    ):
        command(words)
    with pytest.raises(Began):
        command([*words, "overwrite=true"])
    (tmp_path / result).unlink()  # an interrupted one goes on
    with pytest.raises(Began):
        command(words)


class Began(Exception):
    """All checks before the work have passed."""


def began(*_, **__):
    raise Began


def test_two_evaluations_do_not_write_into_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "from latefusion.training.run_folder import claimed\nwith claimed('out'): print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "1\n"
        with pytest.raises(SystemExit, match=r"out is in use by another run .* choose another output=FOLDER"):
            main(["model=embedded", "policies=[fastv]", "output=out"])
    finally:
        holder.kill()
        holder.wait()
