"""Questions that a user brings: used, or listed with what is wrong; never silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.benchmark_files import picture, write

from latefusion.eval.tasks.exact import own


def test_own_questions(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "question": "What?", "answers": ["x", "y"], "type": "easy"},
        {"image": None, "question": "Why?", "answers": "z"},
    ]
    write(tmp_path / "my.jsonl", "\n".join(map(json.dumps, lines)))
    task = own(str(tmp_path / "my.jsonl"))
    assert [(r["answer"], r["answers"], r["type"], len(r["images"])) for r in task.rows] == [
        ("x", ["x", "y"], "easy", 1),
        ("z", ["z"], "all", 0),
    ]
    assert task.score("Y.", task.rows[0]) == 1


def test_bad_rows_are_listed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path / "broken.png", "no picture")
    good = {"image": "a.png", "question": "What?", "answers": ["x"]}
    bad: list[Any] = ["{", [1], {"image": "a.png", "question": "What?"}, {**good, "answers": []}]
    bad += [{**good, "question": " "}, {**good, "image": "b.png"}, {**good, "image": "broken.png"}]
    lines = [good, *bad]
    write(tmp_path / "my.jsonl", "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    with pytest.raises(ValueError) as error:
        own(str(tmp_path / "my.jsonl"))
    text = str(error.value)
    assert (
        "7 rows" in text
        and "line 2 (not JSON)" in text
        and "line 4 (no 'answers')" in text
        and "2 more" in text
    )
    write(tmp_path / "my.jsonl", "\n".join(json.dumps({**good, "id": 1}) for _ in range(2)))
    with pytest.raises(ValueError, match="id '1' twice"):
        own(str(tmp_path / "my.jsonl"))
    write(tmp_path / "my.jsonl", json.dumps({**good, "image": "broken.png"}))
    with pytest.raises(ValueError, match="no image that can be read"):
        own(str(tmp_path / "my.jsonl"))
