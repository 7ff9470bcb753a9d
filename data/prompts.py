"""A row as the model is asked it: the conversation up to where the answer begins, its text and its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image


def images_of(row: dict[str, Any]) -> list[Image.Image]:
    """The images of a row of `load_scenes` (one) or of a source in `data/sources.py` (any number)."""
    return row["images"] if "images" in row else [row["image"]]


def prompt_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a row up to where the answer begins."""
    if "messages" in row:
        return row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
    parts = [{"type": "image"} for _ in images_of(row)]
    text = {"type": "text", "text": row.get("prompt") or row["question"]}
    return [{"role": "user", "content": [*parts, text]}]


def without_image(row: dict[str, Any]) -> dict[str, Any]:
    """The same question, asked blindly."""
    messages = [
        {**message, "content": [part for part in message["content"] if part["type"] != "image"]}
        for message in prompt_of(row)
    ]
    return {**row, "messages": messages, "images": []}


def prompt_text(processor: Any, row: dict[str, Any]) -> str:
    """A question exactly as it is put to the model."""
    return processor.apply_chat_template(prompt_of(row), add_generation_prompt=True, tokenize=False)


def prompt_inputs(model: Any, processor: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tensors of several prompts, padded on the left: `input_ids` `[B, T]`, `pixel_values`, ..."""
    texts = [prompt_text(processor, row) for row in rows]
    images = [images_of(row) for row in rows] if any(images_of(row) for row in rows) else None
    inputs = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    return dict(inputs.to(model.device, dtype=model.dtype))
