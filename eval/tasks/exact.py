"""Exact match: GQA, the sets of questions that need no file, and questions that a user brings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets

from latefusion.data.images import data_url_bytes, is_data_url, load_image
from latefusion.data.json_file import Broken
from latefusion.data.printing import short
from latefusion.data.question_sets import MADE_FROM, load_questions
from latefusion.data.samples import (
    BadSample,
    conversation_of,
    images_in_column,
    is_utf8,
    record_name,
    refuse_unsupported,
)
from latefusion.data.sources import CONVERSATIONS, records
from latefusion.eval.tasks.base import SHORT, Files, Task, mapped, read_config, rows_of
from latefusion.models.fingerprint import image_fingerprint
from latefusion.recipes.schema import Source

SHOWN = 5  # bad rows named in an error


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


def questions_of_file(path: str) -> Task:
    """Questions of a user's file (JSON lines, JSON, parquet, arrow, CSV), read as training reads its rows.

    A row is `{"image", "question", "answers"}`: `image` is a file's name, relative to the file, a data URL, a list of
    these, or null; `answers` a list of right answers (or one). Optional: `id`, `type` (groups the figures), `prompt`
    (the text that is put to the model). Or a row is a conversation as training takes it (`messages` and `images`, or
    `conversations` and `image`): its last answer is the right one, and the turns before it are asked with it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the rows that cannot be used, with the reason.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no questions at {path}; name a JSONL file with data=FILE.")
    questions, bad = [], []
    opened: set[str] = set()
    for place, record in records(path):
        try:
            if isinstance(record, Broken):
                raise BadSample(record)
            questions.append(_question_of_row(record, place, file.parent, opened))
        except ValueError as error:
            bad.append(f"{place} ({error})")
    names = [q["id"] for q in questions]
    bad += [f"id {name!r} twice" for name, count in Counter(names).items() if count > 1][:SHOWN]
    if bad:
        more = f", and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(f"{path} has {len(bad)} rows that cannot be used: {'; '.join(bad[:SHOWN])}{more}.")
    if not questions:
        raise ValueError(f'{path} holds no question; write lines of {{"image", "question", "answers"}}.')
    if all(question["messages"] is None for question in questions):
        questions = [{k: v for k, v in question.items() if k != "messages"} for question in questions]
    return Task(name=file.stem, rows=rows_of(questions), split=file.name, source=path, max_new_tokens=None)


def _question_of_row(record: dict[str, Any], place: str, folder: Path, opened: set[str]) -> dict[str, Any]:
    """A question; `opened` collects the names of the images that were opened, which is done once each."""
    conversation = any(record.get(name) is not None for name in CONVERSATIONS)
    fields, sources = (_from_conversation if conversation else _from_question)(record)
    kind = str(record.get("type") or "all")
    for text in (kind, fields["question"], fields["prompt"], *fields["answers"]):
        if not is_utf8(text):
            raise ValueError("has broken UTF-8; save the file as UTF-8")
    for source in sources:  # a bad image ends the evaluation before it begins
        if not isinstance(source, str) or source not in opened:
            load_image(source, folder)
        if isinstance(source, str):
            opened.add(source)
    names = [source if isinstance(source, str) else image_fingerprint(source) for source in sources]
    return {
        **fields,
        "id": record_name(record.get("id")) or place.rpartition(" ")[2],
        "answer": fields["answers"][0],
        "type": kind,
        "scene": " ".join(short(name) for name in names) or place,
        "images": [_stored(source, folder) for source in sources],
    }


def _from_question(record: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Texts and image sources of a row `{"image", "question", "answers"}`."""
    refuse_unsupported(record)
    for name in ("image", "question", "answers"):
        if name not in record and not (name == "image" and "images" in record):
            raise ValueError(f"no {name!r}")
    question, answers = record["question"], record["answers"]
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(question, str) or not question.strip():
        raise ValueError("its question is empty")
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(a, str) and a.strip() for a in answers)
    ):
        raise ValueError("answers must be a list of texts")
    prompt = str(record.get("prompt") or question)
    fields = {"question": question, "prompt": prompt, "answers": answers, "messages": None}
    return fields, images_in_column(record)


def _from_conversation(record: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Texts and image sources of a conversation whose last answer is the right one."""
    messages, sources = conversation_of(record)
    question, answer = (
        " ".join(part["text"] for part in message["content"] if part["type"] == "text")
        for message in messages[-2:]
    )
    return {"question": question, "prompt": question, "answers": [answer], "messages": messages[:-1]}, sources


def _stored(source: Any, folder: Path) -> Any:
    """An image as a row keeps it: its bytes, or a path that does not depend on the folder."""
    if isinstance(source, dict) and source.get("bytes") is None:
        source = source.get("path")
    elif isinstance(source, dict):
        source = source["bytes"]
    if is_data_url(source):
        return data_url_bytes(source)
    if isinstance(source, bytes):
        return source
    path = folder / source
    return (
        path if is_utf8(str(path)) else path.read_bytes()
    )  # a table's text is UTF-8, a file's name may not be
