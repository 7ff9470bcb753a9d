"""From a run to a folder that others load: merged or as adapters, with its card, published or not."""

import json
import os
import shutil

import pytest
import torch
import yaml
from helpers.tiny_base import BAND, SMALL, configured, save_tiny_base, shake, student_inputs, student_logits
from huggingface_hub import HfApi
from transformers import AutoModelForImageTextToText

from latefusion.data import sources
from latefusion.models.locate import BASE
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.restore import load
from latefusion.models.student.save import merge, save_student
from latefusion.training import assemble, export
from latefusion.training.model_card import Form, model_card, without_schedule


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A trained student, with the configuration and the metrics of its run beside it."""
    folder = tmp_path_factory.mktemp("run")
    base = save_tiny_base(folder / "base")
    options = ("model.attention=sdpa", "entry.init=identity", "lora.train_projector=true")
    student = assemble.student_of(configured(*BAND, *SMALL, f"model.path={base}", *options))
    shake(student, 0.1)
    save_student(student, folder / "student")
    (folder / "student" / "config.yaml").write_text(
        f"name: late_fusion\nmodel: {{path: {base}}}\ndata: {{source: scenes, path: null}}\n"
        "teacher: visipruner\ntune: lora\nlora: {r: 4}\ntrain: {steps: 90, seed: 0}\n"
    )
    accuracy = {"overall": {"value": 0.981, "low": 0.97, "high": 0.99}}
    results = {
        "systems": {"student": {"name": "late_fusion", "accuracy": accuracy, "flops": {"ratio": 0.34}}}
    }
    (folder / "student" / "report.json").write_text(json.dumps(results))
    rows = sources.scenes("validation", n_scenes=1)
    inputs = student_inputs(student, [rows[i] for i in range(3)])
    return folder / "student", inputs, student_logits(student.model, inputs)


@pytest.mark.parametrize("merged", ["true", "false"])
def test_an_exported_student_gives_the_same_logits_and_has_a_card(checkpoint, tmp_path, merged, capsys):
    source, inputs, expected = checkpoint
    target = tmp_path / "out"
    dtype = ["dtype=float32"] if merged == "true" else []
    export.main([f"checkpoint={source}", f"output={target}", f"merge={merged}", *dtype])
    model, processor = load(target, dtype=torch.float32)
    torch.testing.assert_close(student_logits(model, inputs), expected, rtol=1e-3, atol=1e-3)
    assert processor.chat_template
    card = (target / "README.md").read_text()
    for line in (
        'base_model: "',
        "from layer 2 to layer 4 only",
        '"keep": {\n    "4": 2',
        "| teacher | visipruner |",
        "| data | scenes |",
        "| late_fusion | 98.1% (97.0% to 99.0%) | 34% |",
        f'lf.load("{target}")',
    ):
        assert line in card, line
    assert ("Programs that do not know the type refuse it" in card) == (merged == "true")
    printed = capsys.readouterr().out
    assert f"{target} is written." in printed
    if merged == "false":
        weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (source, target)]
        assert weights[0] == weights[1]  # also of a projector that trained, whatever this machine computes in
        names = [
            json.loads((folder / "adapter_config.json").read_text())[BASE] for folder in (source, target)
        ]
        assert names[0] == names[1] == str(source.parent / "base")  # what the run was given, and a folder
    if merged == "true":
        assert "tensors of the base have changed" in printed
        auto = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32)
        assert torch.equal(student_logits(auto, inputs), student_logits(model, inputs))


def test_a_plain_export_is_a_stock_checkpoint_that_says_what_it_lacks(checkpoint, tmp_path, capsys):
    source, inputs, expected = checkpoint
    target = tmp_path / "out"
    export.main([f"checkpoint={source}", f"output={target}", "merge=plain", "dtype=float32"])
    assert "Its accuracy without the schedule was not measured: `python eval" in capsys.readouterr().out
    assert not {"latefusion_type.py", "vision_schedule.json"} & {file.name for file in target.iterdir()}
    values = json.loads((target / "config.json").read_text())
    assert (
        values["model_type"] == "llava"
        and not {"vision_schedule", "vision_entry", "auto_map"} & values.keys()
    )
    stock, info = AutoModelForImageTextToText.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not torch.allclose(student_logits(stock, inputs), expected, rtol=1e-2)  # dense, as the card says
    card = (target / "README.md").read_text()
    assert "**Every program runs it dense**" in card and "was not measured" in card and "lf.load" not in card
    with pytest.raises(FileNotFoundError, match="has no vision schedule"):
        load(target)


def test_a_plain_export_names_the_accuracy_that_its_run_measured_without_the_schedule(checkpoint, tmp_path):
    report = json.loads((checkpoint[0] / "report.json").read_text())
    overall = {"value": 0.25, "low": 0.2, "high": 0.3}
    dense = {"type": "VisionSchedule", "enter": 0, "exit": None, "keep": {}}
    system = {"name": "x", "policy": dense, "adapters": True, "accuracy": {"overall": overall}}
    for changed, expected in (
        ({}, "is 25.0% (20.0% to 30.0%)"),
        ({"adapters": False}, "was not measured"),
        ({"policy": {**dense, "enter": 2}}, "was not measured"),
        ({"policy": None}, "was not measured"),
    ):
        report["systems"]["x"] = {**system, **changed}
        (tmp_path / "report.json").write_text(json.dumps(report))
        assert expected in without_schedule(tmp_path, "out")


def test_a_card_holds_what_a_foreign_folder_says_as_text(checkpoint, tmp_path, monkeypatch):
    """No environment variable, no HTML, no further row, no further key of the card's header."""
    monkeypatch.setenv("SECRET", "hidden-key")
    source = shutil.copytree(checkpoint[0], tmp_path / "student")
    (source / "config.yaml").write_text(
        "name: '<img src=x>'\nmodel: {path: \"a\\nlicense: mit\"}\nteacher: '${oc.env:SECRET}'\n"
        "data: {source: 'a | b', path: '[click](http://x)'}\ntrain: {seed: '${train.steps}', steps: 3}\n"
    )
    card = model_card(source, folder="me/student", form=Form.merged, entry=True)
    assert "hidden-key" not in card and "| teacher | ${oc.env:SECRET} |" in card
    assert "| seed | ${train.steps} |" in card and "| data | a \\| b |" in card
    assert "<img" not in card and r"| \[click\](http" in card
    assert "http://x" not in card  # which a page makes a link of, also without brackets
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "a\nlicense: mit"


def test_publishing_makes_the_repository_and_uploads_the_folder(checkpoint, tmp_path, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **how: done.append((name, how["private"])))
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, **what: done.append(what) or "https://hub/me/student"
    )
    arguments = [f"checkpoint={checkpoint[0]}", f"output={tmp_path / 'out'}", "push_to_hub=me/student"]
    export.main(arguments)
    assert done[0] == ("me/student", True) and done[1]["repo_id"] == "me/student"
    assert "Published: https://hub/me/student" in capsys.readouterr().out
    assert 'lf.load("me/student")' in (tmp_path / "out" / "README.md").read_text()


def test_what_the_hub_refuses_is_a_sentence(checkpoint, tmp_path, monkeypatch):
    """Before the work if the repository cannot be made; after it the folder stays."""

    def unreachable(self, *args, **kwargs):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(HfApi, "create_repo", unreachable)
    arguments = [f"checkpoint={checkpoint[0]}", f"output={tmp_path / 'out'}", "push_to_hub=me/student"]
    with pytest.raises(
        SystemExit, match=r"^error: me/student cannot be published to, .* \(no network\); see to"
    ):
        export.main(arguments)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **how: None)
    monkeypatch.setattr(HfApi, "upload_folder", unreachable)
    with pytest.raises(
        SystemExit, match=r"^error: .*out is written, but was not published to me/student \(no net"
    ):
        export.main(arguments)
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_a_repository_that_nothing_goes_to_is_not_public(checkpoint, tmp_path):
    with pytest.raises(
        SystemExit, match=r"^error: private=false would not be read: .*; add push_to_hub=NAME\.$"
    ):
        export.main([f"checkpoint={checkpoint[0]}", f"output={tmp_path / 'out'}", "private=false"])


def test_a_whole_student_has_no_adapters_to_merge_or_to_keep_apart(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "latefusion"}')
    with pytest.raises(ValueError, match="is a whole checkpoint already"):
        merge(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="is whole, without adapters to keep apart"):
        load(tmp_path, merge=False)


def test_a_student_of_frozen_tokens_goes_the_same_way(tmp_path):
    """Saved, loaded, merged, loaded: the same logits, and not those of a band."""
    base = save_tiny_base(tmp_path / "base")
    options = ("recipe=cross_only", "model.cross=[2,4]", f"model.path={base}", "model.attention=sdpa")
    student = assemble.student_of(configured(*SMALL, *options))
    shake(student, 0.1)
    rows = sources.scenes("validation", n_scenes=1)
    inputs = student_inputs(student, [rows[i] for i in range(3)])
    expected = student_logits(student.model, inputs)
    save_student(student, tmp_path / "student")
    export.main(
        [f"checkpoint={tmp_path / 'student'}", f"output={tmp_path / 'out'}", "merge=true", "dtype=float32"]
    )
    for folder in ("student", "out"):
        model, _ = load(tmp_path / folder, dtype=torch.float32)
        torch.testing.assert_close(student_logits(model, inputs), expected, rtol=1e-3, atol=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "text reads them in the layers 2, 4 only" in card and "No layer computes vision tokens" in card
    with student.attachment.using(VisionSchedule(enter=2, exit=5)):
        assert not torch.allclose(student_logits(student.model, inputs), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["checkpoint=nowhere", "output=x"], "error: no student at nowhere"),
        (["checkpoint=nowhere"], "error: output is not set; add output=VALUE"),
        (
            ["checkpoint=x", "output=y", "merg=true"],
            "error: merg does not exist (did you mean merge?); the keys are checkpoint",
        ),
        (
            ["checkpoint=x", "output=y", "merge=ture"],
            "error: merge=ture does not exist; choose one of true, plain",
        ),
        ([], "error: checkpoint is not set; add checkpoint=VALUE"),
    ],
)
def test_what_cannot_work_is_a_sentence(arguments, sentence):
    with pytest.raises(SystemExit) as end:
        export.main(arguments)
    assert sentence in str(end.value.code)


def test_a_folder_that_holds_a_model_is_not_overwritten(checkpoint):
    with pytest.raises(SystemExit, match="holds a model already; choose another output=FOLDER"):
        export.main([f"checkpoint={checkpoint[0]}", f"output={checkpoint[0]}", "merge=true"])


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("teacher.json", "a teacher's answers"),
        ("teacher-00000-of-00002.part", "a teacher's answers"),  # which is being written
        ("config.yaml", "a run"),
        ("profile.json", "a profile"),
        ("policy.yaml", "calibrated thresholds"),
    ],
)
def test_nothing_is_exported_into_what_another_command_wrote(checkpoint, tmp_path, file, what):
    (tmp_path / file).write_text("{}")
    for merging in ("true", "false"):
        with pytest.raises(
            SystemExit, match=rf"^error: {tmp_path} holds {what} already; choose another output="
        ):
            export.main([f"checkpoint={checkpoint[0]}", f"output={tmp_path}", f"merge={merging}"])
    with pytest.raises(ValueError, match=f"holds {what} already; choose another folder to merge into"):
        merge(checkpoint[0], tmp_path)


def test_a_setting_that_would_not_be_read_is_refused(checkpoint, tmp_path):
    """Adapters alone stay float32, and the base that they need is not written."""
    words = [f"checkpoint={checkpoint[0]}", f"output={tmp_path / 'out'}"]
    with pytest.raises(
        SystemExit, match=r"^error: dtype=bfloat16 would not be read: .*; add merge=true, or leave"
    ):
        export.main([*words, "dtype=bfloat16"])
    with pytest.raises(
        ValueError, match=r"^merge='plain' must be True or False; latefusion\.merge\(\.\.\., plain=T"
    ):
        load(checkpoint[0], merge="plain")
    with pytest.raises(ValueError, match=r"^plain='false' must be True or False"):
        merge(checkpoint[0], tmp_path / "out", plain="false")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layers", [5, 7])
def test_adapters_of_another_base_are_refused(checkpoint, tmp_path, layers):
    """Of other widths, PEFT says so; of another depth it puts on what fits."""
    shutil.copytree(checkpoint[0], tmp_path / "student")
    save_tiny_base(tmp_path / "base", layers=layers)
    named(tmp_path / "student", tmp_path / "base")
    with pytest.raises(
        ValueError, match=rf"is of another base than .*base: .*layers\.{min(layers, 6)}\..* is in one"
    ):
        load(tmp_path / "student")


def test_adapters_without_their_base_and_plain_checkpoints_are_refused_before_torch(checkpoint, tmp_path):
    shutil.copytree(checkpoint[0], tmp_path / "student")
    named(tmp_path / "student", "/gone/base")
    for source, message in (
        (
            tmp_path / "student",
            r"no model at /gone/base: .*, as base_model_name_or_path in .*adapter_config\.json",
        ),
        (checkpoint[0].parent / "base", "base is a whole checkpoint already"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            export.check(export.Arguments(checkpoint=str(source), output=str(tmp_path / "out"), merge=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output=.*file cannot be written \(Not a directory\)"):
        export.check(export.Arguments(checkpoint=str(checkpoint[0]), output=str(tmp_path / "file")))


def test_damaged_adapters_are_named(checkpoint, tmp_path):
    shutil.copytree(checkpoint[0], tmp_path / "student")
    os.truncate(tmp_path / "student" / "adapter_model.safetensors", 1000)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged \("):
        load(tmp_path / "student")


def named(student, base):
    file = student / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(base)}))


def test_merging_does_not_have_deepspeed_guess_the_accelerator(checkpoint, tmp_path, monkeypatch):
    """transformers imports it as it saves, where it is installed; it warned of its guess amid the output."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    export.main([f"checkpoint={checkpoint[0]}", f"output={tmp_path}", "merge=true", "dtype=float32"])
    assert os.environ["DS_ACCELERATOR"] == "cpu"
