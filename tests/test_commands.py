"""What every command does with `--help`, with `--cfg job`, without words and with a word that is not `key=value`."""

import subprocess
import sys
from importlib import import_module

import pytest

from latefusion.__main__ import COMMANDS, main

NEEDS = {"export": "checkpoint is not set", "import-llava": "is not set", "evaluate": "checkpoint="}
NEEDS |= {"compare": "required: before, after", "profile": "name the model", "calibrate": "name the model"}
NEEDS |= {"validate": "data.path=PATH"}
HYDRA = ("train", "teach")  # tests/test_package.py runs them as a user does
SHOWN = {"compare": ["--cfg", "job", "before", "after"]}


def ended(command, words):
    """The exit code, or the sentence, that a command ends with."""
    main = import_module(f"latefusion.{COMMANDS[command][0]}").main
    try:
        main(words)
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in HYDRA])
def test_help_is_not_an_error(command, flag, capsys):
    assert not ended(command, [flag])
    assert len(capsys.readouterr().out.splitlines()) > 5


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in HYDRA])
def test_a_configuration_is_printed_and_nothing_runs(command, capsys):
    assert not ended(command, SHOWN.get(command, ["--cfg", "job"]))
    assert ":" in capsys.readouterr().out


@pytest.mark.parametrize("command", NEEDS)
def test_without_words_a_sentence_says_what_is_needed(command):
    sentence = ended(command, [])
    assert sentence.startswith("error: ") and "\n" not in sentence and NEEDS[command] in sentence


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in (*HYDRA, "compare")])
def test_a_word_that_is_no_key_is_refused_in_a_sentence(command):
    sentence = ended(command, ["nonsense"])
    assert sentence.startswith("error: nonsense is not") and "\n" not in sentence


@pytest.mark.parametrize(
    "target", ["x.\\e[2JY", "x.\\u202eY", "x.\\nerror: Y"], ids=["clears", "turns", "two lines"]
)
def test_a_file_cannot_reach_the_terminal_through_a_message(target, tmp_path):
    """A policy file that clears the screen, turns the line around or adds a line of its own is quoted as text."""
    file = tmp_path / "policy.yaml"
    file.write_text(f'_target_: "{target}"\n')
    sentence = ended("generate", [f"policy={file}"])
    assert sentence.startswith("error: policy ") and sentence.isprintable() and "\\" in sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("export", "checkpoint=none", "output=none"), "error: no student at none"),
        (("evaluate", "checkpoint=none"), "error: no folder none"),
        (
            ("evaluate", "model=embeded", "policies=[fastv]"),
            "model=embeded does not exist (did you mean embedded?)",
        ),
        (("profile", "model=embedded", "samples=0"), "error: samples=0 must be at least 1."),
        (("generate", "image=none.png", "prompt=hi"), "error: no image at none.png"),
    ],
)
def test_the_installed_command_reads_its_words_as_the_file_does(words, sentence):
    """Their settings are dataclasses, whose types are looked up in the module that runs as `__main__`."""
    run = subprocess.run([sys.executable, "-m", "latefusion", *words], capture_output=True, text=True)
    assert run.returncode and sentence in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("installed", [(), ("vllm",), ("datasets",)], ids=str)
def test_a_command_that_lacks_a_package_does_not_send_its_user_to_break_vllm(installed, monkeypatch):
    """What trains needs a later transformers than vLLM does. Hydra would end `train` with a traceback."""

    def run_module(*args, **settings):
        assert "datasets" in installed
        raise ModuleNotFoundError(name="peft")

    monkeypatch.setattr("runpy.run_module", run_module)
    monkeypatch.setattr("latefusion.__main__.find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr(sys, "argv", ["latefusion", "train"])
    with pytest.raises(SystemExit) as end:
        main()
    package, apart = "peft" if "datasets" in installed else "datasets", ""
    if "vllm" in installed:
        apart = " apart from vLLM, which needs an older transformers"
    assert end.value.code == (
        f"error: latefusion train needs {package}, which is not installed: pip install 'latefusion[all]'{apart}."
    )
