"""A record of any supported layout -> a conversation `messages`, checked; and why it is none.

`messages` is a conversation in the Hugging Face convention, whose contents are lists of
`{"type": "text", "text": ...}` and `{"type": "image"}`.
"""

from __future__ import annotations

from typing import Any
from unicodedata import category

PLACEHOLDER = "<image>"
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
ROLES = ("system", "user", "assistant")


class BadSample(ValueError):
    """A row that cannot be trained on; the message says why, in one line without the row's name."""

    def __init__(self, reason: str):
        super().__init__(printable(reason))


class Refused(ValueError):
    """The data end the run: they cannot be read, or a row of them must not be left out."""


class TooLong(BadSample):
    """More tokens than `data.max_length`."""


def sentence(error: Exception) -> str:
    """What an error says, also out of a loader worker: torch puts the worker's traceback before it."""
    last = str(error).strip().splitlines()[-1]
    return last.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def printable(text: str) -> str:
    """What a line of a terminal or a file can hold: control characters and what is no UTF-8 as their escapes."""
    return "".join(
        c.encode("unicode_escape").decode() if category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text
    )


def messages_of(record: dict[str, Any], n_images: int, *, answered: bool = True) -> list[dict[str, Any]]:
    """The checked conversation of a record with `messages` (TRL's convention) or `conversations` (LLaVA's).

    In `messages`, contents are lists of parts, or strings: with `<image>` where an image stands, or, if no content
    names any, with all images before the first user's text (as TRL does).

    Args:
        answered: it must end with an answer.

    Raises:
        BadSample: there is no such conversation, or it does not show `n_images` images.
    """
    if record.get("conversations") is not None:
        messages = [_llava_turn(turn) for turn in _list(record["conversations"], "conversations")]
    elif record.get("messages") is not None:
        messages = [_plain(message) for message in _list(record["messages"], "messages")]
        if not any(isinstance(m["content"], list) for m in record["messages"]):
            _place(messages, n_images)
    else:
        raise BadSample(f"has neither messages nor conversations (it has {', '.join(sorted(record))})")
    check(messages, n_images, answered=answered)
    return messages


def check(messages: list[dict[str, Any]], n_images: int, *, answered: bool = True) -> None:
    """Raise BadSample if these messages cannot be trained on; `answered` False: if nothing can be asked by them."""
    if not messages:
        raise BadSample("has no messages")
    for k, message in enumerate(messages):
        role, parts = message["role"], message["content"]
        if role == "assistant" and any(p["type"] == "image" for p in parts):
            raise BadSample(f"has an image in the answer of turn {k}")
        if not any(p["type"] == "image" or p["text"].strip() for p in parts):
            raise BadSample(f"has an empty {'answer in ' if role == 'assistant' else ''}turn {k}")
        for part in parts:
            if part["type"] == "text" and not _is_utf8(part["text"]):
                raise BadSample(f"has broken UTF-8 in turn {k}")
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


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadSample(f"has {name} that are {type(value).__name__}, not a list")
    return value


def _llava_turn(turn: Any) -> dict[str, Any]:
    """`<image>` becomes an image part where it stands; line breaks beside it go."""
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise BadSample("has a turn without a text 'value'")
    if turn.get("from") not in list(LLAVA_ROLES):  # which asks for no hash
        raise BadSample(f"has a turn from {turn.get('from')!r}; it can be from {', '.join(LLAVA_ROLES)}")
    return {"role": LLAVA_ROLES[turn["from"]], "content": split_placeholders(turn["value"])}


def split_placeholders(text: str) -> list[dict[str, str]]:
    """`"a\\n<image>b"` as a text, an image and a text part."""
    parts: list[dict[str, str]] = []
    for k, piece in enumerate(text.split(PLACEHOLDER)):
        if k > 0:
            parts.append({"type": "image"})
        if piece := piece.strip("\n"):
            parts.append({"type": "text", "text": piece})
    return parts


def _plain(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise BadSample(f"has a message of role {role!r}; it can be {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        parts = split_placeholders(content)
    else:
        # Arrow gives every part every key; a template that asks whether a part has text must not find None
        parts = [_part(part) for part in _list(content, "a message's contents")]
    return {"role": message["role"], "content": parts}


def _part(part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise BadSample(f"has a message part {str(part)[:60]}; parts are texts and images")


def _place(messages: list[dict[str, Any]], n_images: int) -> None:
    """All images before the first user's text, if nothing says where they stand."""
    user = next((m for m in messages if m["role"] == "user"), None)
    if user is not None and not any(p["type"] == "image" for m in messages for p in m["content"]):
        user["content"] = [{"type": "image"}] * n_images + user["content"]


def _is_utf8(text: str) -> bool:
    """False where bytes that are no UTF-8 were kept as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
