"""A row as the model is asked it: the conversation up to where the answer begins, its text and its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
from PIL import Image

from latefusion.data.images import BadImage, load_image
from latefusion.data.processor import called
from latefusion.data.videos import MAX_FRAMES, TIMES, BadVideo, Video, load_video, unreadable


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


def videos_of(row: dict[str, Any]) -> list[Video]:
    """The videos of a row, opened: of its column `videos`, as `load_video` takes them, at most its `max_frames` each.

    Raises:
        BadVideo: one of them cannot be used.
        NoDecoder: one is a file, and what decodes it is not installed.
    """
    videos, n = row.get("videos") or [], row.get("max_frames") or MAX_FRAMES
    try:
        return [video if isinstance(video, Video) else load_video(video, max_frames=n) for video in videos]
    except BadVideo as error:
        raise BadVideo(f"question {row.get('id', '')} has a bad video: {error}.") from None


def prompt_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a row up to where the answer begins."""
    if row.get("messages") is not None:
        messages = row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
        # Arrow gives every part every key; a template that asks whether a part has text must not find None
        return [
            {**m, "content": [{k: v for k, v in part.items() if v is not None} for part in m["content"]]}
            for m in messages
        ]
    parts = [{"type": "image"} for _ in _sources(row)] + [{"type": "video"} for _ in row.get("videos") or []]
    text = {"type": "text", "text": row.get("prompt") or row["question"]}
    return [{"role": "user", "content": [*parts, text]}]


def without_image(row: dict[str, Any]) -> dict[str, Any]:
    """A copy of a question without its images and videos."""
    messages = [
        {**message, "content": [part for part in message["content"] if part["type"] == "text"]}
        for message in prompt_of(row)
    ]
    return {**row, "messages": messages, "images": [], "videos": []}


def prompt_text(processor: Any, row: dict[str, Any]) -> str:
    """A question exactly as it is put to the model."""
    return processor.apply_chat_template(prompt_of(row), add_generation_prompt=True, tokenize=False)


def prompt_inputs(model: Any, processor: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tensors of several prompts, padded on the left: `input_ids` `[B, T]`, `pixel_values`, ...

    Raises:
        ValueError: an image or a video cannot be used, or a text has a token written in it that would be read as one.
    """
    texts = [prompt_text(processor, row) for row in rows]
    images, videos = [images_of(row) for row in rows], [videos_of(row) for row in rows]
    for row, text, *shown in zip(rows, texts, images, videos, strict=True):
        check_placeholders(processor, f"question {row.get('id', '')}", text, *shown)
    return processed(model, processor, texts, images, [video for of_row in videos for video in of_row])


def check_placeholders(
    processor: Any, name: str, text: str, images: Sequence[Any], videos: Sequence[Any]
) -> None:
    """Raise ValueError if a rendered text does not have a placeholder for each image and video that it shows."""
    for kind, media in (("image", images), ("video", videos)):
        token = getattr(processor, f"{kind}_token", None)
        count = text.count(token) if isinstance(token, str) else 0
        if kind == "video" and (token is None or not media):
            continue  # the processor's own check says so, or `processed` that the model reads none
        if count != len(media):
            raise ValueError(f"{name} has {len(media)} {kind}(s) but {count} times {token} in its text.")


def processed(
    model: Any, processor: Any, texts: Sequence[str], images: Sequence[Sequence[Any]], videos: Sequence[Video]
) -> dict[str, Any]:
    """Tensors of prompts on the model's device, padded on the left.

    Args:
        images: of each text.
        videos: of all texts, one after another.

    Raises:
        ValueError: the model is not known to read videos, or its processor refuses a text and what it shows.
    """
    family = model.config.model_type
    if videos and (reason := unreadable(family)):
        raise ValueError(f"{reason}.")
    inputs = called(
        processor,
        family,
        texts,
        images,
        videos,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    times = inputs.get(TIMES)
    moved = dict(inputs.to(model.device, dtype=model.dtype))
    return moved if times is None else {**moved, TIMES: times.to(model.device)}


def check_fit(config: Any, rows: Sequence[dict[str, Any]], inputs: dict[str, Any], new_tokens: int) -> None:
    """Raise ValueError if one of these prompts, with its answer, has more tokens than the model has positions.

    Args:
        inputs: the tensors of the rows (`prompt_inputs`).
    """
    for row, length in zip(rows, inputs["attention_mask"].sum(1).tolist(), strict=True):
        check_positions(config, f"question {row.get('id', '')}".strip(), length, new_tokens)


def check_positions(config: Any, name: str, length: int, new_tokens: int) -> None:
    """Raise ValueError if a prompt and its answer have more tokens than the model has positions.

    Args:
        config: of the model.
        name: of the prompt, as the sentence begins.
        length: tokens of the prompt, vision included; new_tokens: the most of its answer.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and length + new_tokens > limit:
        answer = f", and its answer may take {new_tokens} more" if new_tokens else ""
        both, shorter = (" for both", ", or allow a shorter answer") if new_tokens else ("", "")
        raise ValueError(
            f"{name} has {length} tokens, images included{answer}; the model has {limit} positions{both}: shorten the "
            f"text, show smaller or fewer images{shorter}."
        )


def _sources(row: dict[str, Any]) -> list[Any]:
    if "images" in row:
        return row["images"] or []
    return [row["image"]] if "image" in row else []
