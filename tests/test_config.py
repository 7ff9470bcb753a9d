"""What the command line can say: typos and bad values are one sentence, named, with the fix."""

import runpy
import sys
from pathlib import Path

import pytest
from tiny import composed, configured

from latefusion.training import run
from latefusion.training.checks import explain, read
from latefusion.training.config import RECIPES

TRAIN = Path(run.__file__).with_name("train.py")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "train.learning_rat=1",
            r"train.learning_rat does not exist \(did you mean learning_rate\?\); train has accumulation, ",
        ),
        ("recip=dense", r"recip does not exist \(did you mean recipe\?\); the top level has data, "),
        (
            "recipe=late_fuson",
            "recipe=late_fuson does not exist; recipe can be align, cross_only, dense, late_fusion, ",
        ),
        ("model=gpt", "model=gpt does not exist; model can be embedded, gemma3_4b, "),
        (
            "train.steps=many",
            "train.steps=many: Value 'many' of type 'str' could not be converted to Integer",
        ),
        ("teacher=me", r"teacher=me: Invalid value 'me', expected one of \[visipruner, dense, none\]"),
    ],
)
def test_a_typo_is_a_sentence_that_lists_what_exists(override, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        explain([override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.steps=0"], "train.steps=0 must be at least 1"),
        (["train.learning_rate=-1"], "train.learning_rate=-1.0 must be positive"),
        (["lora.dropout=1.5"], r"lora.dropout=1.5 must lie in \[0, 1\)"),
        (["kl.weight=-0.1"], "kl.weight=-0.1 must not be negative"),
        (["kl.temperature=0"], "kl.temperature=0.0 must be positive"),
        (["resume=true", "overwrite=true"], "contradict each other"),
        (["data=dataset"], "data.path is not set; name the dataset data with data.path=PATH"),
        (["model.path=???"], "model.path is not set; add model.path=VALUE"),
        (["+train.lr=1"], "train.lr does not exist; there are accumulation, "),
        (["engine=deepspeed_zero2", "engine.trainer=lightning"], "needs engine.trainer=accelerate"),
        (["lora.train_projector=true", "model.projector=null"], "needs model.projector=NAME"),
        (
            ["schedule.cross=[2]", "train.narrow=0.5"],
            "schedule.cross leaves no band for train.narrow to narrow",
        ),
        (["recipe=cross_only", "schedule.profile=x"], "or a profile to choose: use train.narrow=0 and sched"),
    ],
)
def test_a_bad_value_is_a_sentence(overrides, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        read(composed(*overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["schedule.enter=10", "schedule.exit=4", "schedule.keep={}"], "enter=10 must be below exit=4"),
        (["schedule.keep={3: 4, 5: 6}", "schedule.enter=1", "schedule.exit=9"], "grows from 4"),
        (["model.visipruner.stages=[deep]"], "deep"),
        (["model.path=./nowhere"], "no model at ./nowhere"),
        (["resume=true", "output_dir=nowhere"], "resume=true finds no checkpoint in nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(overrides, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        run.check(configured(*overrides))


def test_a_finished_run_is_not_overwritten_by_accident(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    here = f"output_dir={tmp_path}"
    with pytest.raises(
        ValueError, match=r"holds a run already; continue it with resume=true, replace it with"
    ):
        run.check(configured(here))
    run.check(configured(here, "overwrite=true"))
    with pytest.raises(ValueError, match=r"checkpoint-5 is damaged: it has no readable files\.json"):
        run.check(configured(here, "resume=true"))


def test_recipes_take_the_model_s_schedule_and_a_command_line_wins():
    def band(*overrides):
        schedule = configured("model=llava_1_5_7b", *overrides).schedule
        return schedule.enter, schedule.exit, schedule.keep

    assert band() == (8, 24, None)
    assert band("recipe=late_fusion_pyramid") == (8, 24, {10: 215, 14: 10, 16: 5, 18: 1})
    assert band("schedule.keep={12: 7}", "schedule.enter=9") == (9, 24, {12: 7})
    assert band("recipe=dense") == (0, None, None)
    assert configured("model=llava_1_5_7b", "recipe=dense").output_dir == "outputs/dense"


def test_every_recipe_file_starts_with_its_own_launch_command():
    for path in (RECIPES / "recipe").glob("*.yaml"):
        lines = path.read_text().splitlines()
        assert lines[:2] == [
            "# @package _global_",
            f"# accelerate launch training/train.py recipe={path.stem}",
        ]


def test_the_entry_point_explains_and_exits(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(TRAIN), "train.step=3"])
    with pytest.raises(SystemExit, match=r"error: train.step does not exist \(did you mean steps\?\)"):
        runpy.run_path(str(TRAIN), run_name="__main__")
