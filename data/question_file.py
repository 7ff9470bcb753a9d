"""Questions in a file: rows of image, question and right answers, or conversations whose last answer is right.

`eval/evaluate.py data=FILE` and `data.eval_path=FILE` of training read them here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from latefusion.data.images import data_url_bytes, is_data_url, load_image
from latefusion.data.json_file import Broken
from latefusion.data.local_files import check_questions_file
from latefusion.data.printing import short
from latefusion.data.samples import (
    COLUMNS,
    MEDIA,
    SETTINGS,
    BadSample,
    Sources,
    conversation_of,
    in_column,
    is_utf8,
    record_name,
    refuse_unsupported,
)
from latefusion.data.sources import CONVERSATIONS, records
from latefusion.data.videos import MAX_FRAMES, inside, load_video
from latefusion.models.fingerprint import image_fingerprint, local_path

SHOWN_IN = [name for kind in MEDIA for name in COLUMNS[kind]]
SHOWN = 5  # bad rows named in an error


def question_rows(path: str, key: str = "data", *, max_frames: int = MAX_FRAMES) -> datasets.Dataset:
    """The questions of a file (JSON lines, JSON, parquet, arrow, CSV), read as training reads its rows.

    A row is `{"image", "question", "answers"}`: `image` is a file's name, relative to the file, a data URL, a list of
    these, or null; `answers` a list of right answers (or one, also as `answer`). A row may have a `video` in place of
    its image, or beside it (`videos`: a list of them), of which the model is shown `max_frames` frames. Optional: `id`,
    `type` (groups the figures), `prompt` (the text that is put to the model). Or a row is a conversation as training
    takes it (`messages` and `images`, or `conversations` and `image`): its last answer is the right one, and the turns
    before it are asked with it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the rows that cannot be used, with the reason.
    """
    check_questions_file(path, key)
    file = Path(path)
    questions, bad = [], []
    opened: set[str] = set()
    for place, record in records(path):
        try:
            if isinstance(record, Broken):
                raise BadSample(record)
            questions.append(_question_of_row(record, place, file.parent, opened, max_frames))
        except ValueError as error:
            bad.append(f"{place} ({error})")
    names = [q["id"] for q in questions]
    bad += [f"id {name!r} twice" for name, count in Counter(names).items() if count > 1][:SHOWN]
    if bad:
        more = f", and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(f"{path} has {len(bad)} rows that cannot be used: {'; '.join(bad[:SHOWN])}{more}.")
    if not questions:
        raise ValueError(f'{path} holds no question; write lines of {{"image", "question", "answers"}}.')
    for question in questions if not any(question["videos"] for question in questions) else ():
        question.pop("max_frames")
    for name in ("messages", "videos"):
        if not any(question[name] for question in questions):
            questions = [{k: v for k, v in question.items() if k != name} for question in questions]
    return rows_of(questions)


def rows_of(questions: Sequence[dict[str, Any]]) -> datasets.Dataset:
    """Questions whose `images` are paths, bytes or pictures, as a data set that opens them when asked.

    Every question has `id`, `question`, `prompt`, `answer`, `answers`, `type`, `scene`, `images`; some have `videos`,
    each as `load_video` takes it, and `max_frames`, the most frames that any of them shows.
    """
    rows = datasets.Dataset.from_list(
        [{**q, "images": [_field(image) for image in q["images"]]} for q in questions]
    )
    return rows.cast_column("images", datasets.List(datasets.Image(decode=False)))


def _question_of_row(
    record: dict[str, Any], place: str, folder: Path, opened: set[str], max_frames: int
) -> dict[str, Any]:
    """A question; `opened` collects the names of the images and videos that were opened, which is done once each."""
    conversation = any(record.get(name) is not None for name in CONVERSATIONS)
    fields, sources = (_from_conversation if conversation else _from_question)(record)
    kind = str(record.get("type") or "all")
    for text in (kind, fields["question"], fields["prompt"], *fields["answers"]):
        if not is_utf8(text):
            raise ValueError("has broken UTF-8; save the file as UTF-8")
    every = [(kind, source) for kind in MEDIA for source in sources[kind]]
    for medium, source in every:  # a bad image ends the evaluation before it begins
        if isinstance(source, str) and source in opened:
            continue
        if medium == "image":
            load_image(source, folder)
        else:
            load_video(source, folder, max_frames=max_frames)
        if isinstance(source, str):
            opened.add(source)
    names = [source if isinstance(source, str) else image_fingerprint(source, folder) for _, source in every]
    return {
        **fields,
        "id": record_name(record.get("id")) or place.rpartition(" ")[2],
        "answer": fields["answers"][0],
        "type": kind,
        "scene": " ".join(short(name) for name in names) or place,
        "images": [_stored(source, folder) for source in sources["image"]],
        "videos": [_stored_video(source, folder) for source in sources["video"]],
        "max_frames": max_frames,
    }


def _from_question(record: dict[str, Any]) -> tuple[dict[str, Any], Sources]:
    """Texts and sources of a row `{"image", "question", "answers"}`, or with a `video`."""
    refuse_unsupported(record)
    if record.get("answers") is None and "answer" in record:
        record = {**record, "answers": record["answer"]}
    for name in ("image", "question", "answers"):
        if name not in record and not (name == "image" and any(other in record for other in SHOWN_IN)):
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
    return fields, {kind: in_column(record, kind) for kind in MEDIA}


def _from_conversation(record: dict[str, Any]) -> tuple[dict[str, Any], Sources]:
    """Texts and sources of a conversation whose last answer is the right one."""
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
    path = local_path(source, folder)
    return (
        path if is_utf8(str(path)) else path.read_bytes()
    )  # a table's text is UTF-8, a file's name may not be


def _stored_video(source: Any, folder: Path) -> dict[str, Any]:
    """A video as a row keeps it, all keys in every row: where it is, independent of the folder, and what is shown."""
    settings = source if isinstance(source, dict) else {}
    held = inside(source) if isinstance(source, dict) else source
    path = frames = None
    if isinstance(held, list | tuple):
        frames = [_field(_stored(frame, folder)) for frame in held]
    elif not isinstance(held, bytes):
        path = held if is_data_url(held) else str(local_path(held, folder).absolute())
    return {
        "path": path,
        "bytes": held if isinstance(held, bytes) else None,
        "frames": frames,
        **{name: None if settings.get(name) is None else float(settings[name]) for name in SETTINGS},
    }


def _field(image: Any) -> dict[str, Any]:
    """A stored image as a column of images holds it."""
    return {"path": None, "bytes": image} if isinstance(image, bytes) else {"path": str(image), "bytes": None}
