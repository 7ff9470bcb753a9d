"""A record of any supported layout -> a sample `{"messages", "images"}`, or the reason why it cannot be used.

`messages` is a conversation in the Hugging Face convention, whose contents are lists of
`{"type": "text", "text": ...}`, `{"type": "image"}` and `{"type": "video"}`; `images` holds one RGB picture for each
image part, in order. A sample with videos also has `videos`, one `Video` for each video part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latefusion.data.images import ADDRESS, BadImage, is_data_url, load_image
from latefusion.data.printing import short
from latefusion.data.videos import MAX_FRAMES, BadVideo, NoDecoder, Video, inside, load_video
from latefusion.recipes.printable import printable

RECORD = "latefusion_record"  # column of a row of a JSON file, as JSON; a text in it is the reason why the row is bad
PLACEHOLDER = re.compile("<(image|video)>")
IN_ANSWERS = re.compile("<(image)>")
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
ROLES = ("system", "user", "assistant")
MEDIA = ("image", "video")
TYPES = {"image": ("image", "image_url"), "video": ("video", "video_url")}  # of message parts
KEYS = {  # where a part of a message keeps its own image or video
    "image": ("image", "path", "url", "image_url", "base64"),
    "video": ("video", "frames", "path", "url", "video_url"),
}
COLUMNS = {"image": ("images", "image"), "video": ("videos", "video")}
# which a part of a message may have beside its video
SETTINGS = ("fps", "max_frames", "video_start", "video_end")
SIZES = (  # Qwen's settings of one image or video, which only its own loader reads
    *("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"),
    *("nframes", "min_frames"),
)
UNSUPPORTED = {  # columns that hold what is not read: video_url, frames, audio, audio_path, ...
    kind: re.compile(rf"{kind}s?(_?(url|uri|path|file|name|filename|byte|frame)s?)?{more}", re.IGNORECASE)
    for kind, more in (("video", "|frames"), ("audio", ""))
}

Sources = dict[str, list[Any]]  # of images and videos, by kind


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


def sample_of(
    record: dict[str, Any], folder: Path | None, *, answered: bool = True, max_frames: int = MAX_FRAMES
) -> dict[str, Any]:
    """The sample of a record, with its images and videos opened.

    Args:
        folder: paths of images and videos are relative to it.
        answered: the conversation must end with an answer.
        max_frames: of a video, the most frames that are shown.

    Raises:
        BadSample: the record cannot be used.
        Refused: it has a video file, and what decodes it is not installed.
    """
    name = record_name(record.get("id"))
    if RECORD in record:
        record = json.loads(record[RECORD])
        if isinstance(record, str):
            raise BadSample(record)
    messages, sources = conversation_of(record, answered=answered)
    paths = filter(is_path, [*sources["image"], *sources["video"]])
    if folder is None and (path := next(paths, None)) is not None:
        raise BadSample(
            f"names the file {short(path)}, but data of the hub have no folder; name one: data.images=FOLDER"
        )
    try:
        images = [load_image(source, folder) for source in sources["image"]]
        videos = [load_video(source, folder, max_frames=max_frames) for source in sources["video"]]
    except BadImage as error:
        raise BadSample(f"has a bad image: {error}") from None
    except BadVideo as error:
        raise BadSample(f"has a bad video: {error}") from None
    except NoDecoder as error:
        raise Refused(f"{error}.") from None
    named = {} if name is None else {"id": name}
    return {**named, "messages": messages, "images": images, **({"videos": videos} if videos else {})}


def conversation_of(record: dict[str, Any], *, answered: bool = True) -> tuple[list[dict[str, Any]], Sources]:
    """The checked conversation of a record, and the sources of its images and videos in the order of their parts.

    A record has `messages` (TRL's convention, and Qwen's, whose image parts hold their images) or `conversations`
    (LLaVA's). In `messages`, contents are lists of parts, or strings: with `<image>` where an image stands and
    `<video>` where a video does, or, if no content names any, with all of them before the first user's text (as TRL
    does).

    Raises:
        BadSample: there is no such conversation, its images or videos do not fit its parts, or it has audio.
    """
    refuse_unsupported(record)
    columns = {kind: in_column(record, kind) for kind in MEDIA}
    if record.get("conversations") is not None:
        messages = [_llava_turn(turn) for turn in _list(record["conversations"], "conversations")]
    elif record.get("messages") is not None:
        messages = [_message(message) for message in _list(record["messages"], "messages")]
        if not any(isinstance(message["content"], list) for message in record["messages"]):
            for kind in reversed(MEDIA):  # images come first
                _place(messages, kind, len(columns[kind]))
    else:
        raise BadSample(f"has neither messages nor conversations (it has {', '.join(sorted(record))})")
    sources = {kind: _take_sources(messages, kind, columns[kind]) for kind in MEDIA}
    check_conversation(messages, sources, answered=answered)
    return messages, sources


def refuse_unsupported(record: dict[str, Any]) -> None:
    """Raise BadSample if a record has audio, or video in a column that is not read."""
    for kind, names in UNSUPPORTED.items():
        hidden = (
            name
            for name, value in record.items()
            if names.fullmatch(str(name))
            and value
            and not isinstance(value, (int, float))  # a number of frames
        )
        if column := next((name for name in hidden if name not in COLUMNS.get(kind, ())), None):
            fix = "name it videos" if kind == "video" else "only text, images and videos can be learnt"
            raise BadSample(f"has {kind} in its column {column!r}; {fix}")


def check_conversation(messages: list[dict[str, Any]], sources: Sources, *, answered: bool = True) -> None:
    """Raise BadSample if these messages cannot be trained on (`answered=False`: cannot be asked)."""
    if not messages:
        raise BadSample("has no messages")
    for k, message in enumerate(messages):
        role, parts = message["role"], message["content"]
        if role == "assistant" and (medium := next((p["type"] for p in parts if p["type"] in MEDIA), None)):
            raise BadSample(f"has {'an' if medium == 'image' else 'a'} {medium} in the answer of turn {k}")
        if not any(p["type"] in MEDIA or p["text"].strip() for p in parts):
            raise BadSample(f"has an empty {'answer in ' if role == 'assistant' else ''}turn {k}")
        for text in (part["text"] for part in parts if part["type"] == "text"):
            if not is_utf8(text):
                raise BadSample(f"has broken UTF-8 in turn {k}")
            if role != "assistant" and "<audio>" in text:
                raise BadSample(
                    f"has a placeholder <audio> in turn {k}; only text, images and videos can be learnt"
                )
            if role != "assistant" and "<video>" in text:
                raise BadSample(f"has <video> in a text part of turn {k}; give the video a part of its own")
    first = next((m["role"] for m in messages if m["role"] != "system"), None)
    if first != "user":
        raise BadSample("begins with the assistant" if first else "has nothing but a system prompt")
    if answered and messages[-1]["role"] != "assistant":
        raise BadSample(f"ends with the {messages[-1]['role']}, so that there is no last answer to learn")
    for kind, of_kind in sources.items():
        if (shown := number_of(kind, messages)) != len(of_kind):
            raise BadSample(f"has {len(of_kind)} {kind}(s) but {shown} placeholder(s)")


def number_of(kind: str, messages: list[dict[str, Any]]) -> int:
    """How many parts of these messages are of a kind."""
    return sum(part["type"] == kind for message in messages for part in message["content"])


def first_exchange(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample up to its first answer, with the images and videos shown until then; without an answer, all of it."""
    messages = sample["messages"]
    roles = [message["role"] for message in messages]
    kept = messages[: roles.index("assistant") + 1] if "assistant" in roles else messages
    cut = {**sample, "messages": list(kept), "images": sample["images"][: number_of("image", kept)]}
    if "videos" in sample:
        cut["videos"] = sample["videos"][: number_of("video", kept)]
    return cut


def videos_of_sample(sample: dict[str, Any]) -> list[Video]:
    """The videos of a sample; most have none, and no key for them."""
    return list(sample.get("videos") or [])


def record_name(name: Any) -> str | None:
    """A record's `id` as a line can hold it; None if it has none."""
    return None if name is None or name == "" else printable(str(name))


def in_column(record: Any, kind: str) -> list[Any]:
    """The images in a record's column `images` or `image`, or videos in `videos` or `video`: a list, one, or none."""
    if not isinstance(record, dict):
        return []
    values = next((record[name] for name in COLUMNS[kind] if record.get(name) is not None), None)
    if values is None:
        return []
    return list(values) if isinstance(values, (list, tuple)) else [values]


def sources_of(record: Any, kind: str) -> list[Any]:
    """All images or videos of any record, usable or not: of its column, then those that its message parts hold."""
    parts = [part for _, parts in _turns(record) for part in parts if part.get("type") in TYPES[kind]]
    return in_column(record, kind) + [
        source for part in parts if (source := _part(part).get("source")) is not None
    ]


def size_of(record: Any, max_frames: int = MAX_FRAMES) -> tuple[int, int]:
    """Characters of text and number of images of any record, usable or not; a video counts as `max_frames` images."""
    characters = 0
    shown = dict.fromkeys(MEDIA, 0)
    for text, parts in _turns(record):
        texts = [text, *(part.get("text") for part in parts)]
        characters += sum(len(text) for text in texts if isinstance(text, str))
        for kind in MEDIA:
            shown[kind] += sum(part.get("type") in TYPES[kind] for part in parts)
    images, videos = (max(shown[kind], len(in_column(record, kind))) for kind in MEDIA)
    return characters, images + max_frames * videos


def _turns(record: Any) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """The text or the parts of each turn of any record, whatever is broken in it."""
    turns = record.get("messages") or record.get("conversations") if isinstance(record, dict) else None
    for turn in turns if isinstance(turns, list) else []:
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        parts = content if isinstance(content, list) else []
        yield content, [part for part in parts if isinstance(part, dict)]


def split_placeholders(text: str, role: str) -> list[dict[str, str]]:
    """`"a\\n<image>b"` as a text, an image and a text part; line breaks beside an image or a video go.

    An answer may speak of the tag `<video>`.
    """
    parts: list[dict[str, str]] = []
    for k, piece in enumerate((IN_ANSWERS if role == "assistant" else PLACEHOLDER).split(text)):
        if k % 2:
            parts.append({"type": piece})
        elif piece := piece.strip("\n"):
            parts.append({"type": "text", "text": piece})
    return parts


def is_path(source: Any) -> bool:
    """Whether a row names a file, other than one that `datasets` has put into its cache."""
    if isinstance(source, (list, tuple)):  # the frames of a video
        return any(map(is_path, source))
    if isinstance(source, dict):
        held = inside(source)
        if held is not source.get("path"):
            return is_path(held)
        return isinstance(held, str) and not is_data_url(held) and not Path(held).is_absolute()
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
    role = LLAVA_ROLES[turn["from"]]
    return {"role": role, "content": split_placeholders(turn["value"], role)}


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise BadSample(f"has a message of role {role!r}; it can be {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        parts: list[dict[str, Any]] = split_placeholders(content, message["role"])
    else:
        # Arrow gives every part every key; a template that asks whether a part has text must not find None
        parts = [_part(part) for part in _list(content, "a message's contents")]
    return {"role": message["role"], "content": parts}


def _part(part: Any) -> dict[str, Any]:
    """A part as templates take it; one that holds its image or video keeps it under `source` for now."""
    kind = part.get("type") if isinstance(part, dict) else None
    for medium in MEDIA:
        if kind not in TYPES[medium]:
            continue
        if size := next((name for name in SIZES if part.get(name) is not None), None):
            pixels = "pixels" in size or "resized" in size
            fix = "model.processor={max_pixels: ...}" if pixels else "data.max_frames"
            raise BadSample(
                f"has {size}={short(part[size])} beside one {medium} of a message, which is not read; take it out of "
                f"the rows, and set {fix} for all"
            )
        source = next((part[key] for key in KEYS[medium] if _is_image(part.get(key))), None)
        if isinstance(source, dict) and "url" in source:  # OpenAI's {"image_url": {"url": ...}}
            source = source["url"]
        elif source is not None and source is part.get("base64"):
            source = f"data:image;base64,{source}"
        settings = {name: part[name] for name in SETTINGS if part.get(name) is not None}
        if medium == "image" or not settings:
            return {"type": medium} if source is None else {"type": medium, "source": source}
        if source is None:
            return {"type": medium, "settings": settings}
        return {"type": medium, "source": _with_settings(source, settings)}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise BadSample(f"has a message part {short(part)[:60]}; parts are texts, images and videos")


def _with_settings(source: Any, settings: dict[str, Any]) -> dict[str, Any]:
    return {**(source if isinstance(source, dict) else {"video": source}), **settings}


def _is_image(value: Any) -> bool:
    """Whether a part's key holds an image; Arrow fills the keys of other parts with None, or a struct of None."""
    return any(v is not None for v in value.values()) if isinstance(value, dict) else value is not None


def _take_sources(messages: list[dict[str, Any]], kind: str, in_column: list[Any]) -> list[Any]:
    """The sources of all parts of a kind, in order: a part's own, else the next of the record's column.

    Raises:
        BadSample: parts hold images or videos, and the column does not hold those of the others.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == kind]
    sources = [part.pop("source", None) for part in parts]
    settings = [part.pop("settings", None) for part in parts]
    if not any(settings) and (all(source is None for source in sources) or in_column == sources):
        return in_column
    n_missing = sum(source is None for source in sources)
    if n_missing != len(in_column):
        article = "an" if kind == "image" else "a"
        raise BadSample(
            f"has {len(in_column)} {kind}(s) in its column but {n_missing} {kind} part(s) without {article} {kind}"
        )
    waiting = iter(in_column)
    every = [next(waiting) if source is None else source for source in sources]
    return [_with_settings(one, more) if more else one for one, more in zip(every, settings, strict=True)]


def _place(messages: list[dict[str, Any]], kind: str, n: int) -> None:
    """Put all images, or videos, before the first user's text, if nothing says where they stand."""
    user = next((m for m in messages if m["role"] == "user"), None)
    if user is not None and number_of(kind, messages) == 0:
        user["content"] = [{"type": kind}] * n + user["content"]
