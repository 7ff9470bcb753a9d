"""Exact match: GQA, the built-in scenes, and questions that a user brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError

from latefusion.data.scenes import load_scenes
from latefusion.eval.tasks.base import SHORT, Files, Task, mapped, read_config, rows_of

SHOWN = 5  # bad rows named in an error


def scenes(where: str, split: str) -> Task:
    """The procedural set; `where` is not used."""
    return Task(name="scenes", rows=load_scenes(split), split=split, source="data/scenes.py")


def gqa(where: str, split: str) -> Task:
    """GQA (Hudson and Manning 2019): exact match, case and full stop apart; as a rule on its `testdev` split."""
    part = {"validation": "val", "test": "testdev"}.get(split, split)
    files = Files(
        task="gqa",
        where=where,
        needs=(f"{part}_balanced_questions.json|questions/{part}_balanced_questions.json", "images"),
        come_from="https://cs.stanford.edu/people/dorarad/gqa/download.html",
        hub="lmms-lab/GQA",
    )
    files.check()

    def question(name: str, row: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": name,
            "question": row["question"],
            "prompt": row["question"] + SHORT,
            "answer": row["answer"],
            "type": row["types"]["structural"],
            "scene": row["imageId"],
        }

    if files.local:
        folder = files.path("images")
        rows = rows_of(
            [
                {**question(name, r), "images": [folder / f"{r['imageId']}.jpg"]}
                for name, r in files.json(files.needs[0]).items()
            ]
        )
    else:  # the hub's copy keeps its pictures in a table of their own
        asked = read_config(files.where, f"{part}_balanced_instructions", part)
        pictures = read_config(files.where, f"{part}_balanced_images", part)
        at = {name: i for i, name in enumerate(pictures["id"])}
        seen = pictures.select_columns(["image"]).select([at[name] for name in asked["imageId"]])
        rows = mapped(
            datasets.concatenate_datasets([asked, seen], axis=1), lambda r: question(str(r["id"]), r)
        )
    return Task(name="gqa", rows=rows, max_new_tokens=16, split=part, source=files.where)


def own(path: str) -> Task:
    """Questions of a user: a line each of `{"image", "question", "answers"}`.

    `image` is a file's name, relative to the JSONL file, a list of names, or null; `answers` a list of right answers
    (or one). Optional: `id`, `type` (groups the figures), `prompt` (what is really asked).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the rows that cannot be used, and why.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no questions at {path}; name a JSONL file with data=FILE.")
    questions, bad = [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip():
            try:
                questions.append(_own_question(line, number, file.parent))
            except (ValueError, OSError) as error:
                bad.append(f"line {number} ({error})")
    names = [q["id"] for q in questions]
    bad += [f"id {name!r} twice" for name in dict.fromkeys(names) if names.count(name) > 1][:SHOWN]
    if bad:
        more = f", and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(f"{path} has {len(bad)} rows that cannot be used: {'; '.join(bad[:SHOWN])}{more}.")
    if not questions:
        raise ValueError(f'{path} holds no question; write lines of {{"image", "question", "answers"}}.')
    return Task(name=file.stem, rows=rows_of(questions), split=file.name, source=path, max_new_tokens=None)


def _own_question(line: str, number: int, folder: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        raise ValueError("not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("not an object")
    for name in ("image", "question", "answers"):
        if name not in row:
            raise ValueError(f"no {name!r}")
    answers = [row["answers"]] if isinstance(row["answers"], str) else row["answers"]
    if not isinstance(row["question"], str) or not row["question"].strip():
        raise ValueError("its question is empty")
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(a, str) and a.strip() for a in answers)
    ):
        raise ValueError("answers must be a list of texts")
    images = [row["image"]] if isinstance(row["image"], str) else row["image"] or []
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise ValueError("image must be a file's name, a list of them or null")
    paths = [folder / name for name in images]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"no image {path}")
        try:
            with Image.open(path) as picture:
                picture.verify()
        except (UnidentifiedImageError, SyntaxError, OSError):
            raise ValueError(f"{path} is no image that can be read") from None
    return {
        "id": str(row.get("id", number)),
        "question": row["question"],
        "prompt": str(row.get("prompt") or row["question"]),
        "answer": answers[0],
        "answers": answers,
        "type": str(row.get("type", "all")),
        "scene": " ".join(images) or f"line {number}",
        "images": paths,
    }
