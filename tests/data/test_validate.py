"""Reports of bad rows: the list, its summary, and how early a run refuses them."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.data_rows import IMAGE_PART, turn, write_rows
from helpers.quick_runs import run_config
from helpers.tiny_base import composed

from latefusion.data import validate
from latefusion.data.bad_rows import kind
from latefusion.training import run

ANSWER = turn("assistant", "red.")


@pytest.mark.parametrize(
    ("reasons", "summary"),
    [
        (
            [
                "has a bad image: a 1.png cannot be read (No such file or directory: /data/a 1.png)",
                "has a bad image: b/c.png cannot be read (No such file or directory: /data/b/c.png)",
            ],
            "has a bad image: FILE cannot be read",
        ),
        (
            ["has 1 image(s) but 2 placeholder(s)", "has 3 image(s) but 0 placeholder(s)"],
            "has N image(s) but N placeholder(s)",
        ),
        (
            [
                "has 246 tokens, more than data.max_length=200",
                "has 9,246 tokens, more than data.max_length=200",
            ],
            "has N tokens, more than data.max_length=200",
        ),
        (["has broken UTF-8 in turn 0", "has broken UTF-8 in turn 12"], "has broken UTF-8 in turn N"),
        (["has a bad image: x.png has 90000 x 90000 pixels"], "has a bad image: FILE has N x N pixels"),
        (
            ["ends with the user, so that there is no last answer to learn"],
            "ends with the user, so that there is no last answer to learn",
        ),
    ],
)
def test_the_summary_counts_reasons_without_what_is_the_row_s_own(reasons, summary):
    assert {kind(reason) for reason in reasons} == {summary}


@pytest.fixture
def broken(tmp_path) -> str:
    rows = [{"id": f"ends{i}", "messages": [turn("user", "is it red?")]} for i in range(3)]
    lost = {"id": "lost", "messages": [turn("user", IMAGE_PART, "what?"), ANSWER], "images": ["lost.png"]}
    (tmp_path / "here.png").touch()
    empty = {**lost, "id": "empty", "images": ["here.png"]}
    return write_rows(tmp_path, empty, lost, *rows, name="broken.jsonl")


@pytest.mark.slow
def test_the_list_goes_to_its_file_while_the_bar_is_on_the_terminal(broken, tmp_path):
    """rich sends what is printed below a progress bar to the bar's console by default."""
    terminal, end = pty.openpty()
    command = [sys.executable, validate.__file__, "data=dataset", f"data.path={broken}"]
    with (tmp_path / "list").open("w") as file:
        ran = subprocess.run(
            command, stdout=file, stderr=end, env={**os.environ, "TERM": "xterm"}, timeout=240
        )
    os.close(end)
    os.close(terminal)
    listed = [line.split("\t")[0] for line in (tmp_path / "list").read_text().splitlines()]
    assert ran.returncode == 1 and listed == ["empty", "lost", "ends0", "ends1", "ends2"]


def test_bad_rows_that_must_not_be_stop_a_run_before_a_model_is_loaded(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "base_of", lambda *_: pytest.fail("a model was loaded"))
    out = f"output_dir={tmp_path / 'out'}"
    with pytest.raises(SystemExit, match=r"^error: row empty has a bad image: .* with data.on_error=skip"):
        run_config(composed("data=dataset", f"data.path={broken}", out))
    monkeypatch.setattr(run, "base_of", lambda *_: sys.exit("went on"))
    with pytest.raises(SystemExit, match="rows drawn in place of row empty are all bad; run data/validate"):
        run_config(composed("data=dataset", f"data.path={broken}", out, "data.on_error=skip"))
    with Path(broken).open("a") as file:
        file.write("\n" + json.dumps({"messages": [turn("user", "is it red?"), ANSWER]}))
    with pytest.raises(SystemExit, match="went on"):
        run_config(composed("data=dataset", f"data.path={broken}", out, "data.on_error=skip"))
    assert not Path(tmp_path / "out" / "adapter_config.json").exists()


def test_a_reason_is_no_markup_of_the_terminal(tmp_path, capsys):
    rows = [{"conversations": [{"from": "[/red]", "value": "x"}]}, {"messages": [turn("user", "?"), ANSWER]}]
    path = write_rows(tmp_path, *rows, name="rows.jsonl")
    with pytest.raises(SystemExit) as ended:
        validate.main(["data=dataset", f"data.path={path}"])
    assert ended.value.code == 1 and "0\thas a turn from '[/red]'" in capsys.readouterr().out
