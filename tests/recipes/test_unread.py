"""Two words of a command line that contradict each other: what the run would not read is refused, with the reason."""

import re

import pytest
from helpers.tiny_base import composed

from latefusion.recipes.compose import compose_tree, refuse_typos


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["schedule=auto", "schedule.enter=3"],
            "schedule=auto takes the schedule from a profile; leave one of",
        ),
        (
            ["schedule.profile=p", "schedule.keep={4: 3}"],
            "schedule.profile=p takes the schedule from a profile",
        ),
        (["schedule.budget=0.3"], "no profile is made; add schedule=auto, or leave it out"),
        (
            ["schedule=auto", "schedule.profile=p", "schedule.bound=1"],
            "the profile in schedule.profile=p was made",
        ),
        (
            ["recipe=dense", "train.narrow=0.5"],
            "the schedule is dense from the first step on; set schedule.enter",
        ),
        (["model.cross=[2]"], "this recipe takes nothing from model.cross; set schedule itself"),
        (
            ["recipe=cross_only", "schedule=auto", "model.cross=[2,4]"],
            "schedule=auto takes the schedule from a profile",
        ),
        (
            ["schedule.profile=p", "schedule.cross=[2]"],
            "schedule.profile=p takes the schedule from a profile",
        ),
        (["recipe=cross_only", "model.schedule.enter=3"], "this recipe takes nothing from model.schedule"),
        (
            ["teacher=none", "model.teacher=dense"],
            "this recipe takes nothing from model.teacher; set teacher",
        ),
        (["data.path=my.jsonl"], "data=scenes reads no file; add data=dataset"),
        (["data=mixture", "data.path=my.jsonl"], "data=mixture reads data.parts; put it there"),
        (["data.parts=[{path: a}]"], "only a mixture has parts; add data=mixture"),
        (
            ["data=dataset", "data.path=a", "data.scenes=9"],
            "it is for data=scenes, icons or easy_vqa; leave it out",
        ),
        (["data=dataset", "data.path=a", "data.shuffle_buffer=9"], "it is for data.streaming=true"),
        (["recipe=late_fusion_no_teacher", "kl.weight=2"], "teacher=none has no answers to learn from"),
        (["kl.revision=v2"], "it is about another model as the teacher; add kl.model=PATH"),
        (["kl.top_k=9"], "it is for answers that are written before; add kl.cache=FOLDER"),
        (["tune=full", "teacher=none", "lora.r=4"], "tune=full trains no LoRA; leave one of the two out"),
        (
            ["entry.kind=none", "entry.init=calibrated"],
            "entry.kind=none has no entry adapter; leave one of the",
        ),
        (["entry.kind=scale", "entry.rank=4"], "entry.kind=scale has no rank; leave one of the two out"),
        (["recipe=dense", "entry.init=calibrated"], "vision tokens enter at layer 0, where no entry adapter"),
        (["recipe=dense", "entry.rank=8"], "vision tokens enter at layer 0"),
        (["recipe=dense", "entry.images=8"], "vision tokens enter at layer 0"),
        (["recipe=dense", "entry.kind=scale"], "vision tokens enter at layer 0"),
        (
            ["data=mixture", "data.parts=[{path: a}]", "data.split=b"],
            "each part of a mixture has its own; put",
        ),
        (
            ["data=dataset", "data.path=a", "data.seed=3"],
            "it draws question sets, mixtures and streams, which",
        ),
        (["data.max_frames=3"], "data=scenes has no videos; leave it out"),
        (
            ["eval.enabled=false", "eval.samples=3"],
            "eval.enabled=false asks no questions; leave one of the two",
        ),
        (["tune=full", "teacher=none", "eval.split=validation"], "tune=full leaves no base to compare with"),
        (["data=dataset", "data.path=a", "eval.samples=3"], "these data have no questions of their own; add"),
        (["recipe=late_fusion_no_teacher", "kl.trust=all"], "teacher=none has no answers to learn from"),
        (["kl.weight=0", "kl.temperature=2"], "kl.weight=0 leaves the teacher out; leave one of the two"),
        (["kl.weight=0", "kl.trust=all"], "kl.weight=0 leaves the teacher out; leave one of the two"),
        (["recipe=align", "lora.train_projector=true"], "tune=align trains the projector in any case; leave"),
        (["recipe=cross_only", "schedule.cross=[0,5]", "entry.later=true"], "vision tokens enter at layer 0"),
        (["recipe=cross_only", "schedule.cross=5", "entry.later=true"], "it is for frozen tokens"),  # no list
        (
            ["recipe=cross_only", "schedule.cross=[0,5]", "entry.later_rank=4"],
            "vision tokens enter at layer 0",
        ),
        (["entry.init=identity", "entry.images=8"], "entry.init=identity calibrates nothing"),
        (["train.scheduler=constant", "train.warmup=0.1"], "train.scheduler=constant has no warm-up; use"),
        (["train.workers=0", "train.prefetch=4"], "it is for workers that load ahead; add train.workers=N"),
        (["data.too_long=raise"], "no sample is too long without data.max_length=N; add it"),
        (
            ["schedule.keep={}", "schedule.ranking=reading"],
            "the schedule ranks no tokens; add schedule.keep=",
        ),
        (["entry.later_rank=4"], "it is of the maps of frozen vision tokens; choose recipe=cross_only"),
        (["recipe=cross_only", "entry.later=false", "entry.later_rank=4"], "it is of the maps of frozen"),
        (["entry.later=true"], r"it is for frozen tokens that several layers read \(schedule\.cross\)"),
        (["recipe=cross_only", "schedule.cross=[4]", "entry.later=true"], "it is for frozen tokens"),
        (["recipe=cross_only", "entry.init=identity", "entry.later=true"], "entry.init=identity calibrates"),
        (
            ["recipe=cross_only", "entry.kind=none", "entry.later=true"],
            "entry.kind=none has no entry adapter",
        ),
    ],
)
def test_what_a_run_would_not_read_is_refused(words, reason):
    with pytest.raises(ValueError, match=rf"^{re.escape(words[-1])} would not be read: {reason}") as error:
        compose_tree(words)
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match=r"^error: .* would not be read: "):
        refuse_typos(["--cfg", "job", *words])


@pytest.mark.parametrize(
    "words",
    [
        ["schedule=auto", "schedule.budget=0.3", "model.schedule.enter=3"],  # measured beside the profile's
        ["schedule=auto", "schedule.profile=p", "schedule.keep=null"],
        [
            "recipe=late_fusion_pyramid",
            "model.schedule.enter=3",
        ],  # the shipped model's pyramid is its schedule
        ["recipe=cross_only", "model.cross=[2]"],
        ["recipe=cross_only", "model.cross=[]", "schedule=auto", "entry.later=true"],
        ["recipe=cross_only", "entry.later=true", "entry.later_rank=4"],
        ["data=dataset", "data.path=a", "data.turns=1", "data.noise=0"],
        ["teacher=none", "kl.weight=0", "kl.trust=auto"],
        ["kl.model=embedded", "kl.visipruner.boundary=2"],
        ["entry.kind=none", "entry.init=identity"],
        ["train.narrow=0.5"],
        ["schedule.ranking=reading"],  # the recipe keeps some
        ["train.scheduler=constant", "train.warmup=0"],
        ["train.workers=2", "train.prefetch=4"],
        ["data.max_length=90", "data.too_long=raise"],
        ["recipe=dense", "schedule=auto", "entry.init=calibrated"],
        ["recipe=dense", "entry.kind=none"],
        [
            "data.seed=3",
            "data.split=validation",
            "eval.split=validation",
            "eval.samples=3",
            "eval.batch_size=2",
        ],
        ["data=dataset", "data.path=a", "data.streaming=true", "data.seed=3", "train.steps=3"],
        [
            "data=dataset",
            "data.path=a",
            "data.split=b",
            "data.max_frames=3",
            "data.eval_path=b",
            "eval.samples=3",
        ],
        ["data.eval_path=b", "data.max_frames=3"],
    ],
)
def test_what_a_run_reads_is_not(words):
    assert compose_tree(words) == composed(*words)
