"""A record of a data set made into a sample, its images opened; and what can be said of it without that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latefusion.data.images import BadImage, load_image
from latefusion.data.samples import BadSample, messages_of, printable

RECORD = "latefusion_record"  # column of a row of a JSON file, as JSON; a text in it says why the row is none


def sample_of(record: dict[str, Any], folder: Path | None, *, answered: bool = True) -> dict[str, Any]:
    """The sample of a record, its images opened; `answered`: it must end with an answer.

    Raises:
        BadSample: it cannot be used.
    """
    kept = {}
    if RECORD in record:
        kept["id"] = record["id"]
        record = json.loads(record[RECORD])
        if isinstance(record, str):
            raise BadSample(record)
    elif (name := named(record.get("id"))) is not None:
        kept["id"] = name
    given = images_of(record)
    messages = messages_of(record, len(given), answered=answered)
    try:
        images = [load_image(image, folder) for image in given]
    except BadImage as error:
        raise BadSample(f"has a bad image: {error}") from None
    return {**kept, "messages": messages, "images": images}


def named(name: Any) -> str | None:
    """What a record's `id` calls it; None: nothing."""
    return None if name is None or name == "" else printable(str(name))


def images_of(record: Any) -> list[Any]:
    """What stands for the record's images, in its column `images` or `image`: a list, one, or none."""
    if not isinstance(record, dict):
        return []
    given = record.get("images")
    if given is None:
        given = record.get("image")
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def size_of(record: Any) -> tuple[int, int]:
    """Characters of text and number of images, of any record, whole or broken."""
    if not isinstance(record, dict):
        return 0, 0
    turns = record.get("messages") or record.get("conversations") or []
    characters = 0
    for turn in turns if isinstance(turns, list) else []:
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        characters += sum(len(text) for text in texts if isinstance(text, str))
    return characters, len(images_of(record))
