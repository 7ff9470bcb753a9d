"""Rows of chat data as users write them: messages, LLaVA conversations, and files of them."""

from __future__ import annotations

import json

from PIL import Image

IMAGE_PART = {"type": "image"}


def text_part(value: str) -> dict:
    return {"type": "text", "text": value}


def turn(role: str, *parts) -> dict:
    """A message; a string is a part of text."""
    return {"role": role, "content": [text_part(p) if isinstance(p, str) else p for p in parts]}


def grey_image(value: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (value, value, value))


def llava_turns(*values: str) -> list[dict]:
    """`conversations` as LLaVA's JSON has them: a question, its answer, and so on."""
    return [{"from": who, "value": v} for who, v in zip(["human", "gpt"] * 3, values, strict=False)]


QUESTION, ANSWER = {"role": "user", "content": "how many?"}, {"role": "assistant", "content": "2"}


def write_rows(folder, *records, name="chat.json") -> str:
    """Write records as a JSON list, or one a line if the name ends in jsonl; the path."""
    path = folder / name
    lines = name.endswith("l")
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(list(records)))
    return str(path)


def write_numbered_rows(folder, name: str, n: int) -> str:
    """Write n rows of text with the ids name0, name1, ...; the path."""
    rows = [{"id": f"{name}{i}", "messages": [QUESTION, ANSWER]} for i in range(n)]
    return write_rows(folder, *rows, name=f"{name}.jsonl")
