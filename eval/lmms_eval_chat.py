"""What a task of lmms-eval asks, as a chat template and a processor take it.

Pictures and videos stay as the task gives them, unopened, until their batch is run: the frames of all videos of a
benchmark would not fit into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.protocol import ChatMessages

from latefusion.data.samples import PLACEHOLDER, split_placeholders

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp"}  # what lmms-eval takes for images
KINDS = ("image", "video")
CLIP = {"start_time": "video_start", "end_time": "video_end"}  # of a video's part, in seconds


@dataclass
class Chat:
    """A conversation up to where the answer begins.

    Attributes:
        messages: as chat templates take them, parts of images and videos without what they show.
        images, videos: what they show, in the order of the text, as `load_image` and `load_video` take it.
        name: of the document, for messages about it.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    videos: list[Any]
    name: str = ""


def one_question(text: str, shown: Sequence[Any], name: str = "") -> Chat:
    """A question of lmms-eval's older interface: what is shown stands before the text, or where the text marks it."""
    return _chat([("user", [*map(_part, shown), {"type": "text", "text": text}])], name)


def chat_of(messages: list[Any], name: str = "") -> Chat:
    """A conversation of lmms-eval's chat interface.

    Raises:
        ValueError: it has sound.
    """
    turns = []
    for message in ChatMessages(messages=messages).messages:
        parts: list[dict[str, Any]] = []
        for part in message.content:
            film = str(getattr(part, "url", "")).endswith(".webm")  # which lmms-eval takes for sound
            if part.type == "text":
                parts.append({"type": "text", "text": part.text})
            elif part.type == "audio" and not film:
                raise ValueError(
                    "this task has sound, which latefusion cannot read; choose tasks of images and videos."
                )
            else:
                kind = "image" if part.type == "image" else "video"
                source = part.url
                given = {to: getattr(part, of, None) for of, to in CLIP.items()}
                if between := {name: second for name, second in given.items() if second is not None}:
                    source = {**(source if isinstance(source, dict) else {"path": source}), **between}
                parts.append({"type": kind, "source": source})
        turns.append((message.role, parts))
    return _chat(turns, name)


def _part(shown: Any) -> dict[str, Any]:
    """What a document shows: a picture, a file by its name's ending, or a mapping that says its `type`."""
    if isinstance(shown, dict):
        kind, source = shown.get("type", "video"), {k: v for k, v in shown.items() if k != "type"}
        if kind == "image":
            source = shown.get("url") or shown.get("path") or shown
        return {"type": kind, "source": source}
    film = isinstance(shown, str) and Path(shown).suffix.lower() not in PICTURES
    return {"type": "video" if film else "image", "source": shown}


def _chat(turns: Sequence[tuple[str, list[dict[str, Any]]]], name: str) -> Chat:
    chat = Chat([], [], [], name)
    for role, parts in turns:
        content = _placed(parts)
        for part in content:
            if part["type"] in KINDS:
                (chat.images if part["type"] == "image" else chat.videos).append(part.pop("source"))
        chat.messages.append({"role": role, "content": content})
    return chat


def _placed(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of a message, each image where the text says `<image>` if it says so once an image; videos likewise."""
    texts = [part["text"] for part in parts if part["type"] == "text"]
    written = [kind for text in texts for kind in PLACEHOLDER.findall(text)]
    moved = {}
    for kind in KINDS:
        sources = [part for part in parts if part["type"] == kind]
        if sources and written.count(kind) == len(sources):
            moved[kind] = iter(sources)
    if not moved or len(moved) < len(set(written)):
        return parts
    placed: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "text":
            pieces = split_placeholders(part["text"], "user")
            placed += [piece if piece["type"] == "text" else next(moved[piece["type"]]) for piece in pieces]
        elif part["type"] not in moved:
            placed.append(part)
    return placed
