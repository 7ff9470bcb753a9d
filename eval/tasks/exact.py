"""Exact match: GQA, the sets of questions that need no file, and questions that a user brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from latefusion.data.question_file import question_rows, rows_of
from latefusion.data.question_sets import MADE_FROM, load_questions
from latefusion.data.videos import MAX_FRAMES
from latefusion.eval.tasks.base import SHORT, Files, Task, mapped, read_config
from latefusion.recipes.schema import Source


def question_set(name: str, where: str, split: str) -> Task:
    """A set that needs no file (`data/question_sets.py`); `where` is not used."""
    source = Source(name)
    return Task(name=name, rows=load_questions(source, split), split=split, source=MADE_FROM[source])


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
        instructions = read_config(files.where, f"{part}_balanced_instructions", part)
        pictures = read_config(files.where, f"{part}_balanced_images", part)
        at = {name: i for i, name in enumerate(pictures["id"])}
        images = pictures.select_columns(["image"]).select([at[name] for name in instructions["imageId"]])
        rows = mapped(
            datasets.concatenate_datasets([instructions, images], axis=1), lambda r: question(str(r["id"]), r)
        )
    return Task(name="gqa", rows=rows, max_new_tokens=16, split=part, source=files.where)


def questions_of_file(path: str, key: str = "data", *, max_frames: int = MAX_FRAMES) -> Task:
    """Questions of a user's file, as `data/question_file.py` reads them; `key` names the file in errors."""
    file = Path(path)
    return Task(
        name=file.stem,
        rows=question_rows(path, key, max_frames=max_frames),
        split=file.name,
        source=path,
        max_new_tokens=None,
    )
