"""Questions that a user brings: used, or listed with what is wrong; never silent."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers.benchmark_files import picture, write
from helpers.pictures import JPEG, encode
from PIL import Image

from latefusion.data.images import BadImage
from latefusion.data.prompts import images_of, prompt_of, undecoded
from latefusion.eval.tasks.exact import questions_of_file


def test_own_questions(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "question": "What?", "answers": ["x", "y"], "type": "easy"},
        {"image": None, "question": "Why?", "answers": "z"},
    ]
    write(tmp_path / "my.jsonl", "\n".join(map(json.dumps, lines)))
    task = questions_of_file(str(tmp_path / "my.jsonl"))
    assert [(r["answer"], r["answers"], r["type"], len(r["images"])) for r in task.rows] == [
        ("x", ["x", "y"], "easy", 1),
        ("z", ["z"], "all", 0),
    ]
    assert task.score("Y.", task.rows[0]) == 1


def test_a_path_behind_file_is_that_file(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    write(
        tmp_path / "my.jsonl",
        json.dumps({"image": f"file://{tmp_path}/a.png", "question": "What?", "answers": "x"}),
    )
    (row,) = questions_of_file(str(tmp_path / "my.jsonl")).rows
    assert images_of(row)[0].tobytes() == Image.open(tmp_path / "a.png").convert("RGB").tobytes()


def test_bad_rows_are_listed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path / "broken.png", "no picture")
    good = {"image": "a.png", "question": "What?", "answers": ["x"]}
    bad: list[Any] = ["{", [1], {"image": "a.png", "question": "What?"}, {**good, "answers": []}]
    bad += [{**good, "question": " "}, {**good, "image": "b.png"}, {**good, "image": "broken.png"}]
    lines = [good, *bad]
    write(tmp_path / "my.jsonl", "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    with pytest.raises(ValueError) as error:
        questions_of_file(str(tmp_path / "my.jsonl"))
    text = str(error.value)
    assert (
        "7 rows" in text
        and "line 2 (is not JSON (" in text
        and "line 4 (no 'answers')" in text
        and "2 more" in text
    )
    write(tmp_path / "my.jsonl", "\n".join(json.dumps({**good, "id": 1}) for _ in range(2)))
    with pytest.raises(ValueError, match="id '1' twice"):
        questions_of_file(str(tmp_path / "my.jsonl"))
    write(tmp_path / "my.jsonl", json.dumps({**good, "image": "broken.png"}))
    with pytest.raises(ValueError, match=r"line 1 \(broken\.png is not an image"):
        questions_of_file(str(tmp_path / "my.jsonl"))


QUESTION = {"image": "a.png", "question": "What\u2028is it?", "answers": ["x"]}
PIXEL = encode(Image.new("RGB", (4, 4), "red"), "PNG")
URL = f"data:image/png;base64,{b64encode(PIXEL).decode()}"


def file_of(folder: Path, *rows: Any, name: str = "my.jsonl", bom: bytes = b"") -> str:
    (folder / "a.png").write_bytes(PIXEL)
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    (folder / name).write_bytes(bom + b"\n".join(lines))
    return str(folder / name)


def test_a_byte_order_mark_and_line_separators_inside_texts_are_read(tmp_path: Path) -> None:
    task = questions_of_file(file_of(tmp_path, QUESTION, QUESTION, bom=b"\xef\xbb\xbf"))
    assert task.rows["question"] == ["What\u2028is it?"] * 2


def test_a_json_list_and_a_table_are_read_like_lines(tmp_path: Path) -> None:
    lines = questions_of_file(file_of(tmp_path, QUESTION, {**QUESTION, "id": "7"})).rows
    (tmp_path / "list.json").write_text(json.dumps([QUESTION, {**QUESTION, "id": "7"}]))
    rows = [{**QUESTION, "id": "1"}, {**QUESTION, "id": "7"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    for name in ("list.json", "table.parquet"):
        rows = questions_of_file(str(tmp_path / name)).rows
        assert [{**row, "id": 0} for row in rows] == [{**row, "id": 0} for row in lines]


def test_a_question_about_a_video_is_not_asked_without_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1 \(a\.mp4 cannot be read"):
        questions_of_file(file_of(tmp_path, {**QUESTION, "image": None, "video": "a.mp4"}))


def test_a_byte_that_is_not_utf8_is_named_with_file_and_line(tmp_path: Path) -> None:
    latin = json.dumps({**QUESTION, "question": "caf\xe9?"}, ensure_ascii=False).encode("latin-1")
    path = file_of(tmp_path, QUESTION, latin)
    with pytest.raises(ValueError, match=r"my\.jsonl has 1 rows .* line 2 \(has broken UTF-8"):
        questions_of_file(path)
    (tmp_path / "wide.jsonl").write_text(json.dumps(QUESTION), encoding="utf-16")
    with pytest.raises(ValueError, match=r"wide\.jsonl is UTF-16; save it as UTF-8"):
        questions_of_file(str(tmp_path / "wide.jsonl"))


@pytest.mark.parametrize("image", ["a.png", URL])
def test_conversations_are_asked_up_to_their_last_answer(tmp_path: Path, image: str) -> None:
    """As training takes them: Qwen's image parts, TRL's column, LLaVA's turns."""
    part, text = {"type": "image", "image": image}, {"type": "text", "text": "and now?"}
    first = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "2"}]
    qwen = {
        "messages": [*first, {"role": "user", "content": [part, text]}, {"role": "assistant", "content": "3"}]
    }
    trl = {
        "images": [image],
        "messages": [{"role": "user", "content": "and now?"}, {"role": "assistant", "content": "3"}],
    }
    turns = [{"from": "human", "value": "<image>\nand now?"}, {"from": "gpt", "value": "3"}]
    task = questions_of_file(
        file_of(tmp_path, qwen, trl, {"image": image, "conversations": turns}, {**QUESTION, "image": image})
    )
    for row in list(task.rows)[:3]:
        assert (row["question"], row["answers"]) == ("and now?", ["3"])
        assert prompt_of(row)[-1] == {"role": "user", "content": [{"type": "image"}, text]}
    assert [len(prompt_of(row)) for row in task.rows] == [3, 1, 1, 1]
    assert all(np.asarray(images_of(row)[0]).tolist() == [[[255, 0, 0]] * 4] * 4 for row in task.rows)


@pytest.mark.parametrize("kind", ["a table", "own"])
def test_what_the_model_sees_is_what_training_sees(tmp_path: Path, kind: str) -> None:
    """Transparency on white, EXIF applied, 16 bits scaled; a truncated file is a sentence before anything is asked."""
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    deep = Image.fromarray(np.full((4, 4), 256 * 100, np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (8, 4))
    pictures = {
        "clear.png": (encode(clear, "PNG"), (4, 4), 255),
        "deep.png": (encode(deep, "PNG"), (4, 4), 100),
        "turned.png": (encode(wide, "PNG", exif=exif), (4, 8), 0),
    }
    for file, (data, _, _) in pictures.items():
        (tmp_path / file).write_bytes(data)
    rows = [{"id": file, "image": file, "question": "?", "answers": ["x"]} for file in pictures]
    if kind == "own":
        seen = questions_of_file(file_of(tmp_path, *rows)).rows
    else:
        table = [{**row, "image": {"bytes": pictures[row["image"]][0], "path": None}} for row in rows]
        stored = datasets.Dataset.from_list(table).cast_column("image", datasets.Image())
        seen = undecoded(stored)
    for row in seen:
        (image,) = images_of(row)
        _, size, grey = pictures[row["id"]]
        assert image.mode == "RGB" and image.size == size and image.getpixel((1, 1)) == (grey,) * 3
    (tmp_path / "cut.png").write_bytes(JPEG[: len(JPEG) // 2])
    with pytest.raises(ValueError, match=r"line 1 \(cut\.png cannot be decoded \(.*truncated"):
        questions_of_file(file_of(tmp_path, {**QUESTION, "image": "cut.png"}))
    with pytest.raises(
        BadImage, match=r"^question 9 has a bad image: an image cannot be decoded \(.*truncated"
    ):
        images_of({"id": 9, "image": {"bytes": JPEG[: len(JPEG) // 2], "path": None}})
