"""What the command line can say: typos and bad values are one sentence, named, with the fix."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.tiny_base import composed, configured

from latefusion.recipes.check import check_config
from latefusion.recipes.compose import compose_tree, print_configuration
from latefusion.recipes.schema import RECIPES
from latefusion.training import preflight
from latefusion.training.teacher_cache import facts_of

TRAIN = Path(preflight.__file__).with_name("train.py")
EVAL = TRAIN.parents[1] / "eval"


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
            r"recipe=late_fuson does not exist \(did you mean late_fusion\?\); recipe can be align, .*late_fusion, ",
        ),
        ("train=5", "train=5 does not exist; train can be epochs, quick"),
        ("train={steps: 5}", "train={steps: 5} does not exist; train can be"),
        ("data=[scenes]", r"data=\[scenes\] does not exist \(did you mean scenes\?\); data can be dataset"),
        ("schedule=true", "schedule=true does not exist; schedule can be auto, given"),
        ("model=gpt", "model=gpt does not exist; model can be embedded, gemma3_4b, "),
        ("train.steps=many", r"train.steps=many must be a whole number\.$"),
        ("train.learning_rate=fast", r"train.learning_rate=fast must be a number\.$"),
        ("data.isolate=maybe", r"data.isolate=maybe must be true or false\.$"),
        ("lora.targets=q_proj", r"lora.targets=q_proj must be a list: KEY=\[A,B\]\.$"),
        ("engine.fsdp=yes", r"engine.fsdp=yes must be a dictionary: KEY={NAME: VALUE}\.$"),
        (
            "resume=outputs/x",
            r"resume=outputs/x must be true, .*, or the step of one; .* output_dir=FOLDER\.$",
        ),
        (
            "train.scheduler=cosin",
            r"train.scheduler=cosin: Invalid value 'cosin', expected one of \[linear, cosine, ",
        ),
        (
            "schedule.keep={4:",
            "schedule.keep={4: is not read as key=value; in a shell, quote what has brackets",
        ),
        ("engine.deepspeed.x=1", "one of engine.deepspeed.x=1 sets a key inside one that holds nothing"),
        ("teacher=me", r"teacher=me: Invalid value 'me', expected one of \[visipruner, dense, none\]"),
    ],
)
def test_a_typo_is_a_sentence_that_lists_what_exists(override, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        compose_tree([override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["train.steps=5", "train.epochs=2"],
            r"train.steps=5 and train.epochs=2.0 both say .*; leave one out",
        ),
        (["train.steps=null"], "neither train.steps nor train.epochs says how long to train"),
        (["train.steps=0"], "train.steps=0 must be at least 1"),
        (["train.learning_rate=-1"], "train.learning_rate=-1.0 must be positive"),
        (
            ["data=mixture", "data.parts=[{path: a, weight: 0}]"],
            r"data\.parts\[0\]\.weight=0\.0 must be positive",
        ),
        (
            ["data=mixture", "data.parts=[{path: a, weight: -1}]"],
            r"parts\[0\]\.weight=-1\.0 must be positive",
        ),
        (["data=mixture", "data.parts=[{path: a, weight: inf}]"], r"weight=inf must be positive and finite"),
        (["train.learning_rate=inf"], "train.learning_rate=inf must be positive and finite"),
        (["kl.weight=nan"], "kl.weight=nan must be finite and not negative"),
        (["train.threads=0"], "train.threads=0 must be at least 1"),
        (["train.seed=-1"], "train.seed=-1 must be finite and not negative"),
        (["schedule.budget=3"], "schedule.budget=3.0 is a fraction of dense FLOPs"),
        (["lora.targets=[]"], r"lora.targets=\[\] names no layer"),
        (["output_dir="], "output_dir is empty; name a folder"),
        (["lora.dropout=1.5"], r"lora.dropout=1.5 must lie in \[0, 1\)"),
        (["kl.weight=-0.1"], "kl.weight=-0.1 must be finite and not negative"),
        (["kl.temperature=0"], "kl.temperature=0.0 must be positive"),
        (["resume=true", "overwrite=true"], "contradict each other"),
        (["data=dataset"], "data.path is not set; name the dataset data with data.path=PATH"),
        (["model=other"], "model.path is not set; model=other needs model.path=HUB_ID_OR_FOLDER"),
        (["output_dir=???"], "output_dir is not set; add output_dir=VALUE"),
        (["+train.lr=1"], "train.lr does not exist; there are accumulation, "),
        (["engine=deepspeed_zero2", "engine.trainer=lightning"], "needs engine.trainer=accelerate"),
        (["engine=fsdp2", "engine.trainer=lightning"], "engine.fsdp needs engine.trainer=accelerate"),
        (
            ["engine=lightning", "train.trackers=[trackio]"],
            "trackio is not known to Lightning; use tensorboard",
        ),
        (["lora.train_projector=true", "model.projector=null"], "needs model.projector=NAME"),
        (
            ["schedule.cross=[2]", "train.narrow=0.5"],
            "schedule.cross leaves no band that train.narrow could narrow",
        ),
    ],
)
def test_a_bad_value_is_a_sentence(overrides, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        check_config(composed(*overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["name="], "name is empty; give one, such as name=late_fusion."),
        (["schedule.enter=10", "schedule.exit=4", "schedule.keep={}"], "enter=10 must be below exit=4"),
        (["schedule.keep=5"], "schedule.keep=5 must say how many tokens stay from which layer on"),
        (["schedule.keep={3: many}"], "schedule.keep={3: 'many'} must say how many tokens stay"),
        (["schedule.cross=[a]", "schedule.keep=null"], r"schedule.cross=\['a'\] must be a list of layers"),
        (["schedule.keep={3: 4, 5: 6}", "schedule.enter=1", "schedule.exit=9"], "grows from 4"),
        (["model.path=./nowhere"], r"no model at ./nowhere: there is no such folder; name one, or a hub id"),
        (["model.path=recipes"], r"no model at recipes: it has no config.json"),
        (["kl.model=/no/teacher"], "no model at /no/teacher"),
        (["data=llava_mix665k", "data.path=missing.json"], "no conversation file at missing.json"),
        (
            ["data=dataset", "data.path=missing.jsonl"],
            "no file or folder at missing.jsonl; name the data with data.p",
        ),
        (["data=mixture", "data.parts=[{path: ./a}]"], "no file or folder at ./a"),
        (
            ["data.eval_path=/no/questions"],
            "no file or folder at /no/questions; name the data with data.eval_path=",
        ),
        (["data=dataset", "data.path=some/hub_id", "data.images=nowhere"], "no image folder at nowhere"),
        (["init=nowhere"], "no student at nowhere: it has no adapter_config.json"),
        (["schedule.profile=nowhere"], "no profile at nowhere"),
        (["recipe=cross_only", "schedule.profile=docs/nowhere"], "no profile at docs/nowhere"),
        (["schedule.profile=docs"], r"no profile at docs: it has no schedule\.yaml; name the folder"),
        (
            ["kl.cache=nowhere"],
            r"no teacher's answers in kl\.cache=nowhere; write it with python training/teach",
        ),
        (["model=other", "model.path=./nowhere"], "no model at ./nowhere"),
        (["model.visipruner.stages=[deep]"], "'deep' without 'middle'"),
        (["model.visipruner.layer_threshold=2"], r"layer_threshold=2\.0 is a cosine"),
        (
            ["model.visipruner.boundary=15"],
            "boundary=15 leaves no layer to fuse in of a decoder with layers 0 to 15",
        ),
        (
            ["teacher=none", "model.visipruner.boundary=15"],
            "boundary=15 leaves no layer",
        ),  # the evaluation prunes
        (
            ["kl.model=embedded", "kl.visipruner.boundary=15"],
            "kl.model=embedded cannot run under its policy: bound",
        ),
        (["schedule.exit=17"], "the schedule of model.path=embedded does not fit: exit names layer 17"),
        (
            ["schedule.enter=99"],
            "enter names layer 99, but the decoder has layers 0 to 15; choose at most 15",
        ),
        (["output_dir=README.md/run"], r"output_dir=README.md/run cannot be written \(Not a directory\)"),
        (["resume=true", "output_dir=nowhere"], "resume=true finds no checkpoint in nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(overrides, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        preflight.check(configured(*overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "files", "sentence"),
    [
        (
            "cross_only",
            {"schedule.yaml": "enter: 2"},
            r"^the profile in .* did not look for the layers .* cross=true, or",
        ),
        ("cross_only", {"cross.yaml": "cross: [2]"}, r"^no profile at .*: it has no schedule\.yaml"),
        (
            "cross_only",
            {"cross.yaml": "cross: [2, 3"},
            r"cross\.yaml is not a schedule in YAML .* profile the",
        ),
        (
            "cross_only",
            {"cross.yaml": "cross: [2, x]"},
            r"cross\.yaml holds no schedule: cross has 'x' where a whole",
        ),
        (
            "cross_only",
            {"cross.yaml": "cross: []"},
            r"cross\.yaml names no layer that reads \(cross\); make the profile",
        ),
        ("cross_only", {"cross.yaml": "enter: 2"}, r"cross\.yaml names no layer that reads \(cross\)"),
        (
            "cross_only",
            {"cross.yaml": "cross: [2, 3]\nkeep: {3: 8}"},
            r"cross\.yaml has keep, .*; leave keep out\.$",
        ),
        (
            "cross_only",
            {"cross.yaml": "cross: [2, 99]"},
            r"^the profile in .* is not of model\.path=embedded: cross names layer 99, but the decoder",
        ),
        (
            "late_fusion",
            {"schedule.yaml": "enter: 2\nexit: 40"},
            r"^the profile in .* is not of model\.path=embedded: exit",
        ),
        (
            "late_fusion",
            {"schedule.yaml": "enter: 9\nexit: 4"},
            r"schedule\.yaml holds no schedule: enter=9 must",
        ),
        (
            "late_fusion",
            {"schedule.yaml": "cross: [2, 3]"},
            r"schedule\.yaml names layers that read frozen .* recipe=cross_only",
        ),
    ],
)
def test_a_profile_that_cannot_be_used_is_refused_before_anything_is_loaded(
    tmp_path, recipe, files, sentence
):
    if "frozen" not in sentence and "no profile" not in sentence:
        (tmp_path / "schedule.yaml").write_text("enter: 2\nexit: 9\n")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for auto in ((), ("schedule=auto",)):  # which reads a profile that is named
        words = (f"recipe={recipe}", f"schedule.profile={tmp_path}", f"output_dir={tmp_path / 'out'}", *auto)
        with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
            preflight.check(configured(*words))
        assert "\n" not in str(error.value)


def test_a_profile_s_file_of_frozen_tokens_is_no_band(tmp_path):
    """Its first and last layer would otherwise train as one."""
    (tmp_path / "cross.yaml").write_text("enter: 2\nexit: 5\nkeep: {}\ncross: [2, 4]\n")
    with pytest.raises(
        ValueError, match=r"cross\.yaml names layers that read frozen vision tokens \(cross\)"
    ):
        preflight.check(configured(f"schedule.profile={tmp_path / 'cross.yaml'}"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.noise=0.2"], r"data\.noise=0\.0, but this run has 0\.2"),
        (["data.seed=4"], r"data\.seed=0, but this run has 4"),
        (["data.turns=2"], r"data\.turns=1, but this run has 2"),
        (["data=icons"], r"data\.source=scenes, but this run has icons"),
        (["teacher=dense"], r"teacher=visipruner, but this run has dense"),
        (["model.visipruner.boundary=6"], r"visipruner\.boundary=7, but this run has 6"),
        (["kl.temperature=2"], r"kl\.temperature=1\.0, but this run has 2\.0"),
        (["kl.model=embedded"], None),  # the same weights teach
    ],
)
def test_answers_of_another_teacher_or_to_other_rows_are_refused_before_anything_is_loaded(
    tmp_path, words, sentence
):
    """Rows of other noise have the same ids, and most of them the same answers."""
    facts = facts_of(configured("data.turns=1", "data.isolate=false"))
    (tmp_path / "teacher.json").write_text(json.dumps({**facts, "files": 1}))
    run = (f"kl.cache={tmp_path}", f"output_dir={tmp_path / 'out'}", "data.turns=1", "data.isolate=false")
    preflight.check(configured(*run))
    config = configured(*run, *words)
    if sentence is None:
        config.kl.visipruner = config.model.visipruner
        preflight.check(config)
        return
    with pytest.raises(
        ValueError, match=rf"^the teacher's answers in .* written with {sentence}; write it with"
    ):
        preflight.check(config)


WITHOUT_TORCH = """
import runpy, sys
for sys.argv in {runs!r}:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        assert str(error).startswith("error: "), error
    heavy = [name for name in ("torch", "transformers", "datasets") if name in sys.modules]
    assert not heavy, (sys.argv, heavy)
print("light")
"""


def test_a_refusal_does_not_wait_for_torch(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    both = [
        ["train.stps=3"],
        ["train.steps=0"],
        ["schedule.enter=99"],
        ["model=other"],
        ["model.path=/no/such/model"],
        ["model.visipruner.tokens_threshold=-1"],
        ["model.visipruner.boundary=15"],
        ["data=llava_mix665k", "data.path=missing.json"],
    ]
    (tmp_path / "schedule.yaml").write_text("enter: 2\n")
    train = [[f"output_dir={tmp_path}"], [f"output_dir={tmp_path}", "resume=true"]]
    (tmp_path / "teacher.json").write_text('{"files": 1, "model": "embedded", "teacher": "dense"}')
    train += [[f"kl.cache={tmp_path}", f"output_dir={tmp_path / 'out'}"]]
    train += [["recipe=cross_only", f"schedule.profile={tmp_path}", f"output_dir={tmp_path / 'out'}"]]
    teach = [[], ["kl.cache=x", "data=dataset", "data.path=x", "data.streaming=true"], ["kl.cache=README.md"]]
    export = [["checkpoint=x"], ["checkpoint=x", "output=y"], ["chekpoint=x"]]
    image = tmp_path / "broken.png"
    image.write_text("not a picture")
    generate = [["model=nonsense"], [f"image={image}", "prompt=x"]]
    runs = [
        *([str(TRAIN), *words] for words in [*both, *train]),
        *(
            [str(TRAIN.with_name("teach.py")), *words]
            for words in [*([*w, "kl.cache=x"] for w in both[4:7]), *teach]
        ),
        *([str(TRAIN.with_name("export.py")), *words] for words in export),
        *([str(EVAL / "generate.py"), *words] for words in generate),
        [str(EVAL / "calibrate.py")],
        [str(EVAL / "evaluate.py"), "model=embedded", "policies=[fastv]", "data=no/such/questions.jsonl"],
    ]
    code = WITHOUT_TORCH.format(runs=runs)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert ran.stdout == "light\n", ran.stderr


def test_a_folder_without_a_model_is_no_model(tmp_path):
    """Before anything else: the sentence about a missing schedule would send its user the wrong way."""

    def refused(sentence):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            preflight.check(configured("model=other", f"model.path={tmp_path}"))

    settings = tmp_path / "config.json"
    settings.write_text('{"name": "a project of another kind"}')
    refused(
        rf"^no model at {tmp_path}: its config\.json names no model_type, so it is not a model's; name the folder"
    )
    settings.write_text('{"model_type": "llava"}')
    refused(
        rf"^no model at {tmp_path}: it has a config\.json but no weights \(\*\.safetensors\); download them"
    )
    (tmp_path / "model.safetensors").touch()
    refused(r"^no recipe says where model\.path=.* fuses: set schedule\.enter=N")
    settings.unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(rf"^{tmp_path} is a trained student, not a base: load it with latefusion\.load")


def test_a_finished_run_is_not_overwritten_by_accident(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    here = f"output_dir={tmp_path}"
    with pytest.raises(
        ValueError, match=r"holds a run already; continue it with resume=true, replace it with"
    ):
        preflight.check(configured(here))
    preflight.check(configured(here, "overwrite=true"))
    whole = tmp_path / "tune_full"
    whole.mkdir()
    (whole / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="tune_full holds a run already"):
        preflight.check(configured(f"output_dir={whole}"))
    with pytest.raises(ValueError, match=r"checkpoint-5 is damaged: it has no readable files\.json"):
        preflight.check(configured(here, "resume=true"))


@pytest.mark.parametrize(
    ("file", "what"), [("teacher.json", "a teacher's answers"), ("profile.json", "a profile")]
)
def test_a_run_is_not_written_into_what_another_command_wrote(tmp_path, file, what):
    (tmp_path / file).write_text("{}")
    for words in ((), ("overwrite=true",)):
        with pytest.raises(ValueError, match=rf"{tmp_path} holds {what} already; choose another output_dir="):
            preflight.check(configured(f"output_dir={tmp_path}", *words))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("profile_model", ["model=embedded", "data=scenes"]),
        ("evaluate", ["model=embedded", "policies=[fastv]"]),
        ("calibrate", ["model=embedded", "data=scenes"]),
    ],
)
def test_no_report_is_written_into_what_another_command_wrote(script, words, tmp_path, monkeypatch):
    """A profile and an evaluation both write report.html."""
    other = {"evaluate": "profile.json", "calibrate": "report.json", "profile_model": "report.json"}[script]
    (tmp_path / other).write_text("{}")
    arguments = [f"{script}.py", *words, f"output={tmp_path}", "overwrite=true"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"error: .* holds an? \w+ already; choose another output=FOLDER"):
        runpy.run_path(str(EVAL / f"{script}.py"), run_name="__main__")


def test_recipes_take_the_model_s_schedule_and_a_command_line_wins():
    def band(*overrides):
        schedule = configured("model=llava_1_5_7b", *overrides).schedule
        return schedule.enter, schedule.exit, schedule.keep

    assert band() == (8, 24, None)
    assert band("recipe=late_fusion_pyramid") == (8, 24, {10: 215, 14: 10, 16: 5, 18: 1})
    assert band("schedule.keep={12: 7}", "schedule.enter=9") == (9, 24, {12: 7})
    assert band("recipe=dense") == (0, None, None)
    assert configured("model=llava_1_5_7b", "recipe=dense").output_dir == "outputs/dense"


@pytest.mark.parametrize(
    ("words", "steps", "epochs"),
    [
        ([], 90, None),
        (["train=epochs"], None, 1),
        (["model=llava_1_5_7b", "data=llava_mix665k"], None, 1),
        (["model=llava_1_5_7b"], None, 1),
        (["train=epochs", "train.steps=7"], 7, None),
        (["train.epochs=2"], None, 2),
        (["++train.epochs=2"], None, 2),
    ],
)
def test_the_length_of_a_run_is_its_steps_or_its_epochs(words, steps, epochs):
    """One pass is written as 1, and what the command line says puts the recipe's other number aside."""
    train = compose_tree(words).train
    assert (train.steps, train.epochs) == (steps, epochs)


def test_what_the_data_are_says_nothing_about_the_evaluation():
    assert compose_tree(["train=epochs"]).eval == compose_tree(["train=epochs", "data=dataset"]).eval


def test_settings_of_the_processor_are_added_to_the_model_s():
    settings = configured(
        "model=qwen3_vl_4b", "model.processor={do_resize: false}", "model.processor.min_pixels=9"
    )
    assert settings.model.processor == {"max_pixels": 1310720, "do_resize": False, "min_pixels": 9}
    with pytest.raises(ValueError, match=r"train\.min_pixels does not exist"):
        compose_tree(["train.min_pixels=9"])


def test_every_recipe_file_starts_with_its_own_launch_command(monkeypatch):
    """One that the recipe's own settings let begin, where data and weights are."""
    for name in ("check_local_files", "check_base", "check_output"):
        monkeypatch.setattr(preflight, name, lambda *_: None)
    monkeypatch.setattr("latefusion.models.locate.find_spec", lambda name: name)  # bitsandbytes
    for path in (RECIPES / "recipe").glob("*.yaml"):
        first, second = path.read_text().splitlines()[:2]
        command, *options = second.removeprefix("# accelerate launch ").split(" ")
        assert (first, command) == ("# @package _global_", "training/train.py")
        assert options[0] == f"recipe={path.stem}"
        preflight.check(configured(*options))


def test_the_entry_point_explains_and_exits(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(TRAIN), "train.step=3"])
    with pytest.raises(SystemExit, match=r"error: train.step does not exist \(did you mean steps\?\)"):
        runpy.run_path(str(TRAIN), run_name="__main__")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "4"], "--steps is no option; settings are KEY=VALUE without dashes"),
        (["train.steps", "4"], "train.steps is no setting; settings are KEY=VALUE, such as train.steps=4"),
    ],
)
def test_words_of_other_command_lines_are_one_sentence(monkeypatch, words, sentence):
    monkeypatch.setattr(sys, "argv", [str(TRAIN), "recipe=late_fusion", *words])
    with pytest.raises(SystemExit, match=f"^error: {sentence}"):
        runpy.run_path(str(TRAIN), run_name="__main__")


def test_cfg_job_prints_the_values_that_the_run_uses(capsys):
    with pytest.raises(SystemExit) as end:
        print_configuration(["--cfg", "job", "recipe=late_fusion", "model=embedded", "train.steps=7"])
    printed = capsys.readouterr().out
    tree = yaml.safe_load(printed)
    assert not end.value.code and "${" not in printed
    assert tree["schedule"]["enter"] == 2 and tree["output_dir"] == "outputs/late_fusion"
    assert (tree["train"]["steps"], tree["train"]["epochs"]) == (7, None)
    assert not {"schedule", "pyramid", "cross", "teacher"} & tree["model"].keys()  # offers, not settings
