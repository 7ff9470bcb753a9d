"""The sets of questions that need no file: one interface, wrong answers by share, refusals in a sentence."""

import shutil
from collections import Counter

import datasets
import pytest

from latefusion.data import easy_vqa
from latefusion.data.icons import pictures
from latefusion.data.local_files import check_local_files
from latefusion.data.question_sets import LOAD, is_question_set, load_questions, usual_set, with_wrong_answers
from latefusion.eval.tasks import TASKS
from latefusion.recipes.compose import compose_config
from latefusion.recipes.schema import QUESTION_SETS, DataConfig, Source


def test_every_set_is_loaded_and_is_a_task_and_a_recipe():
    assert set(LOAD) == set(QUESTION_SETS)
    for source in QUESTION_SETS:
        assert is_question_set(source.value)
        assert source.value in TASKS
        assert compose_config([f"data={source.value}"]).data.source is source
    assert not is_question_set("dataset")


def test_a_set_is_loaded_by_name():
    rows = load_questions("scenes", "validation", 2)
    assert rows["question"] == load_questions(Source.scenes, "validation", 2)["question"]
    assert len(set(rows["scene"])) == 2


def test_the_base_of_icons_is_trained_on_icons_unless_the_user_says_otherwise():
    config = compose_config(["model=smollm_icons"])
    assert (config.model.path, config.data.source, config.train.steps) == ("smollm_icons", Source.icons, 120)
    assert compose_config(["model=smollm_icons", "data=easy_vqa"]).data.source is Source.easy_vqa
    assert compose_config([]).data.source is Source.scenes
    assert (usual_set("smollm_icons"), usual_set("embedded")) == ("icons", "scenes")


@pytest.fixture
def rows():
    kinds = ["color"] * 60 + ["where"] * 40
    answers = [
        ("red", "blue", "green")[i % 3] if kind == "color" else f"A{i % 4}" for i, kind in enumerate(kinds)
    ]
    return datasets.Dataset.from_dict({"id": [str(i) for i in range(100)], "type": kinds, "answer": answers})


@pytest.mark.parametrize("share", [0.0, 0.2, 0.99])
def test_a_share_of_the_answers_is_wrong_and_of_the_same_type(rows, share):
    noisy = with_wrong_answers(rows, share, seed=3)
    changed = [i for i in range(100) if noisy[i]["answer"] != rows[i]["answer"]]
    assert len(changed) == round(100 * share)
    answers = {kind: {r["answer"] for r in rows if r["type"] == kind} for kind in ("color", "where")}
    assert all(noisy[i]["answer"] in answers[noisy[i]["type"]] for i in range(100))
    assert noisy["answer"] == with_wrong_answers(rows, share, seed=3)["answer"]
    if 0 < share < 0.9:
        assert noisy["answer"] != with_wrong_answers(rows, share, seed=4)["answer"]
        assert Counter(noisy["type"]) == Counter(rows["type"])


def test_noise_is_in_training_alone():
    from latefusion.data.load import evaluation_questions, training_data

    clean, noisy = (compose_config(["data.scenes=6", "data.turns=1", f"data.noise={n}"]) for n in (0, 0.5))
    answers = [
        [row["messages"][-1]["content"][0]["text"] for row in training_data(config.data)]
        for config in (clean, noisy)
    ]
    changed = sum(a != b for a, b in zip(*answers, strict=True))
    assert changed == round(0.5 * len(answers[0]))
    noisy.eval.samples = 20
    right = {row["id"]: row["answer"] for row in load_questions("scenes", "test")}
    assert all(row["answer"] == right[row["id"]] for row in evaluation_questions(noisy))


def test_noise_in_a_users_data_is_refused():
    with pytest.raises(
        ValueError, match=r"data\.noise=0\.2 would not be read: it is for data=scenes, icons or easy_vqa"
    ):
        compose_config(["data=dataset", "data.path=x.parquet", "data.noise=0.2"])


def test_drawings_that_cannot_be_had_are_one_sentence_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("LATEFUSION_ICONS", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match=r"npm is not installed; install Node\.js, or unpack emoji-datasource"
    ):
        check_local_files(DataConfig(source=Source.icons))
    for package in pictures.PACKAGES:
        folder = tmp_path / "node_modules" / package.rpartition("@")[0]
        folder.mkdir(parents=True)
        (folder / "package.json").write_text("{}")
    check_local_files(DataConfig(source=Source.icons))


def test_a_missing_easy_vqa_is_one_sentence_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(easy_vqa, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps easy-vqa"):
        check_local_files(DataConfig(source=Source.easy_vqa))
