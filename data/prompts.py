"""A row as the model is asked it: the conversation up to where the answer begins, its text and its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
from PIL import Image

from latefusion.data.images import BadImage, load_image


def undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with their images as they are stored: `images_of` opens them, as every command does."""
    stored = datasets.Image(decode=False)
    for name in ("image", "images"):
        feature = rows.features.get(name)
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, stored)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):  # a list of them
            rows = rows.cast_column(name, datasets.List(stored))
    return rows


def images_of(row: dict[str, Any]) -> list[Image.Image]:
    """The images of a row, opened: of its column `images`, or the one in its column `image`.

    Raises:
        BadImage: one of them cannot be used.
    """
    try:
        return [load_image(source) for source in _sources(row)]
    except BadImage as error:
        raise BadImage(f"question {row.get('id', '')} has a bad image: {error}.") from None


def prompt_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a row up to where the answer begins."""
    if row.get("messages") is not None:
        messages = row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
        # Arrow gives every part every key; a template that asks whether a part has text must not find None
        return [
            {**m, "content": [{k: v for k, v in part.items() if v is not None} for part in m["content"]]}
            for m in messages
        ]
    parts = [{"type": "image"} for _ in _sources(row)]
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
    """Tensors of several prompts, padded on the left: `input_ids` `[B, T]`, `pixel_values`, ...

    Raises:
        ValueError: an image cannot be used, or a text has a token written in it that would be read as an image.
    """
    texts = [prompt_text(processor, row) for row in rows]
    images = [images_of(row) for row in rows]
    for row, text, shown in zip(rows, texts, images, strict=True):
        if (count := text.count(processor.image_token)) != len(shown):
            raise ValueError(
                f"question {row.get('id', '')} has {len(shown)} image(s) but {count} times "
                f"{processor.image_token} in its text."
            )
    inputs = processor(
        text=texts,
        images=images if any(images) else None,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return dict(inputs.to(model.device, dtype=model.dtype))


def _sources(row: dict[str, Any]) -> list[Any]:
    return (row["images"] or []) if "images" in row else [row["image"]]
