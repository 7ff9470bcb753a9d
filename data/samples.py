"""A record of any supported layout -> a sample `{"messages", "images"}`, or the reason why it cannot be used.

`messages` is a conversation in the Hugging Face convention, whose contents are lists of
`{"type": "text", "text": ...}` and `{"type": "image"}`; `images` holds one RGB picture for each image part, in order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latefusion.data.images import ADDRESS, BadImage, is_data_url, load_image
from latefusion.data.printing import printable, short

RECORD = "latefusion_record"  # column of a row of a JSON file, as JSON; a text in it is the reason why the row is bad
PLACEHOLDER = "<image>"
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
ROLES = ("system", "user", "assistant")
IMAGE_TYPES = ("image", "image_url")
IMAGE_KEYS = ("image", "path", "url", "image_url", "base64")  # where a part of a message keeps its own image
UNSUPPORTED = {  # columns that hold more than images: video, videos, video_url, audio_path, ...
    kind: re.compile(rf"{kind}s?(_?(url|uri|path|file|name|filename|byte|frame)s?)?", re.IGNORECASE)
    for kind in ("video", "audio")
}


class BadSample(ValueError):
    """A row that cannot be trained on; the message is the reason, in one line without the row's name."""

    def __init__(self, reason: str):
        super().__init__(printable(reason))


class Refused(ValueError):
    """The data end the run: they cannot be read, or a row of them must not be left out."""


class TooLong(BadSample):
    """More tokens than `data.max_length`."""


def sentence(error: Exception) -> str:
    """An error's message, also out of a loader worker: torch puts the worker's traceback before it."""
    last = str(error).strip().splitlines()[-1]
    return last.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def sample_of(record: dict[str, Any], folder: Path | None, *, answered: bool = True) -> dict[str, Any]:
    """The sample of a record, with its images opened.

    Args:
        folder: image paths are relative to it.
        answered: the conversation must end with an answer.

    Raises:
        BadSample: the record cannot be used.
    """
    name = record_name(record.get("id"))
    if RECORD in record:
        record = json.loads(record[RECORD])
        if isinstance(record, str):
            raise BadSample(record)
    messages, sources = conversation_of(record, answered=answered)
    if folder is None and (path := next(filter(_is_path, sources), None)) is not None:
        raise BadSample(
            f"names the file {short(path)}, but data of the hub have no folder; name one: data.images=FOLDER"
        )
    try:
        images = [load_image(source, folder) for source in sources]
    except BadImage as error:
        raise BadSample(f"has a bad image: {error}") from None
    return {**({} if name is None else {"id": name}), "messages": messages, "images": images}


def conversation_of(
    record: dict[str, Any], *, answered: bool = True
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The checked conversation of a record, and the sources of its images in the order of their parts.

    A record has `messages` (TRL's convention, and Qwen's, whose image parts hold their images) or `conversations`
    (LLaVA's). In `messages`, contents are lists of parts, or strings: with `<image>` where an image stands, or, if no
    content names any, with all images before the first user's text (as TRL does).

    Raises:
        BadSample: there is no such conversation, its images do not fit its image parts, or it has video or audio.
    """
    refuse_unsupported(record)
    column_images = images_in_column(record)
    if record.get("conversations") is not None:
        messages = [_llava_turn(turn) for turn in _list(record["conversations"], "conversations")]
    elif record.get("messages") is not None:
        messages = [_message(message) for message in _list(record["messages"], "messages")]
        if not any(isinstance(message["content"], list) for message in record["messages"]):
            _place_images(messages, len(column_images))
    else:
        raise BadSample(f"has neither messages nor conversations (it has {', '.join(sorted(record))})")
    sources = _take_sources(messages, column_images)
    check_conversation(messages, len(sources), answered=answered)
    return messages, sources


def refuse_unsupported(record: dict[str, Any]) -> None:
    """Raise BadSample if a record has video or audio."""
    for kind, names in UNSUPPORTED.items():
        if column := next((name for name in record if names.fullmatch(str(name)) and record[name]), None):
            raise BadSample(f"has {kind} in its column {column!r}; only text and images can be learnt")


def check_conversation(messages: list[dict[str, Any]], n_images: int, *, answered: bool = True) -> None:
    """Raise BadSample if these messages cannot be trained on (`answered=False`: cannot be asked)."""
    if not messages:
        raise BadSample("has no messages")
    for k, message in enumerate(messages):
        role, parts = message["role"], message["content"]
        if role == "assistant" and any(p["type"] == "image" for p in parts):
            raise BadSample(f"has an image in the answer of turn {k}")
        if not any(p["type"] == "image" or p["text"].strip() for p in parts):
            raise BadSample(f"has an empty {'answer in ' if role == 'assistant' else ''}turn {k}")
        for text in (part["text"] for part in parts if part["type"] == "text"):
            if not is_utf8(text):
                raise BadSample(f"has broken UTF-8 in turn {k}")
            for kind in UNSUPPORTED:
                if role != "assistant" and f"<{kind}>" in text:
                    raise BadSample(
                        f"has a placeholder <{kind}> in turn {k}; only text and images can be learnt"
                    )
    first = next((m["role"] for m in messages if m["role"] != "system"), None)
    if first != "user":
        raise BadSample("begins with the assistant" if first else "has nothing but a system prompt")
    if answered and messages[-1]["role"] != "assistant":
        raise BadSample(f"ends with the {messages[-1]['role']}, so that there is no last answer to learn")
    shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    if shown != n_images:
        raise BadSample(f"has {n_images} image(s) but {shown} placeholder(s)")


def first_exchange(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample up to its first answer, or all of it if there is none, with the images shown until then."""
    messages = sample["messages"]
    roles = [message["role"] for message in messages]
    kept = messages[: roles.index("assistant") + 1] if "assistant" in roles else messages
    shown = sum(part["type"] == "image" for message in kept for part in message["content"])
    return {**sample, "messages": list(kept), "images": sample["images"][:shown]}


def record_name(name: Any) -> str | None:
    """A record's `id` as a line can hold it; None if it has none."""
    return None if name is None or name == "" else printable(str(name))


def images_in_column(record: Any) -> list[Any]:
    """The images in a record's column `images` or `image`: a list, a single one, or none."""
    if not isinstance(record, dict):
        return []
    images = record.get("images")
    if images is None:
        images = record.get("image")
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def image_sources(record: Any) -> list[Any]:
    """All images of any record, usable or not: those of its column, then those that its message parts hold."""
    parts = [part for _, parts in _turns(record) for part in parts if part.get("type") in IMAGE_TYPES]
    return images_in_column(record) + [
        source for part in parts if (source := _part(part).get("source")) is not None
    ]


def size_of(record: Any) -> tuple[int, int]:
    """Characters of text and number of images of any record, usable or not."""
    characters = pictured = 0
    for text, parts in _turns(record):
        texts = [text, *(part.get("text") for part in parts)]
        characters += sum(len(text) for text in texts if isinstance(text, str))
        pictured += sum(part.get("type") in IMAGE_TYPES for part in parts)
    return characters, max(pictured, len(images_in_column(record)))


def _turns(record: Any) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """The text or the parts of each turn of any record, whatever is broken in it."""
    turns = record.get("messages") or record.get("conversations") if isinstance(record, dict) else None
    for turn in turns if isinstance(turns, list) else []:
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        parts = content if isinstance(content, list) else []
        yield content, [part for part in parts if isinstance(part, dict)]


def split_placeholders(text: str) -> list[dict[str, str]]:
    """`"a\\n<image>b"` as a text, an image and a text part; line breaks beside an image go."""
    parts: list[dict[str, str]] = []
    for k, piece in enumerate(text.split(PLACEHOLDER)):
        if k > 0:
            parts.append({"type": "image"})
        if piece := piece.strip("\n"):
            parts.append({"type": "text", "text": piece})
    return parts


def _is_path(source: Any) -> bool:
    """Whether a row names a file, other than one that `datasets` has put into its cache."""
    if isinstance(source, dict):
        path = source.get("path") if source.get("bytes") is None else None
        return isinstance(path, str) and not is_data_url(path) and not Path(path).is_absolute()
    return isinstance(source, str) and not is_data_url(source) and not ADDRESS.match(source)


def is_utf8(text: str) -> bool:
    """False for a text with lone surrogates, as which bytes that are not UTF-8 are kept."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadSample(f"has {name} that are {type(value).__name__}, not a list")
    return value


def _llava_turn(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise BadSample("has a turn without a text 'value'")
    if turn.get("from") not in list(LLAVA_ROLES):  # a list: what is compared need not be hashable
        raise BadSample(f"has a turn from {turn.get('from')!r}; it can be from {', '.join(LLAVA_ROLES)}")
    return {"role": LLAVA_ROLES[turn["from"]], "content": split_placeholders(turn["value"])}


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise BadSample(f"has a message of role {role!r}; it can be {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        parts: list[dict[str, Any]] = split_placeholders(content)
    else:
        # Arrow gives every part every key; a template that asks whether a part has text must not find None
        parts = [_part(part) for part in _list(content, "a message's contents")]
    return {"role": message["role"], "content": parts}


def _part(part: Any) -> dict[str, Any]:
    """A part as templates take it; an image part that holds its image keeps it under `source` for now."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in IMAGE_TYPES:
        source = next((part[key] for key in IMAGE_KEYS if _is_image(part.get(key))), None)
        if isinstance(source, dict) and "url" in source:  # OpenAI's {"image_url": {"url": ...}}
            source = source["url"]
        elif source is not None and source is part.get("base64"):
            source = f"data:image;base64,{source}"
        return {"type": "image"} if source is None else {"type": "image", "source": source}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise BadSample(f"has a message part {short(part)[:60]}; parts are texts and images")


def _is_image(value: Any) -> bool:
    """Whether a part's key holds an image; Arrow fills the keys of other parts with None, or a struct of None."""
    return any(v is not None for v in value.values()) if isinstance(value, dict) else value is not None


def _take_sources(messages: list[dict[str, Any]], column_images: list[Any]) -> list[Any]:
    """The sources of all image parts, in order: a part's own, else the next image of the record's column.

    Raises:
        BadSample: parts hold images, and the column does not hold those of the others.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    sources = [part.pop("source", None) for part in parts]
    if all(source is None for source in sources) or column_images == sources:
        return column_images
    n_missing = sum(source is None for source in sources)
    if n_missing != len(column_images):
        raise BadSample(
            f"has {len(column_images)} image(s) in its column but {n_missing} image part(s) without an image"
        )
    waiting = iter(column_images)
    return [next(waiting) if source is None else source for source in sources]


def _place_images(messages: list[dict[str, Any]], n_images: int) -> None:
    """Put all images before the first user's text, if nothing says where they stand."""
    user = next((m for m in messages if m["role"] == "user"), None)
    if user is not None and not any(p["type"] == "image" for m in messages for p in m["content"]):
        user["content"] = [{"type": "image"}] * n_images + user["content"]
