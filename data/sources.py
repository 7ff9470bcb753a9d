"""Where samples come from: every source yields `{"messages", "images"}`, lazily, as a `datasets.Dataset`.

`messages` is a conversation in the Hugging Face convention, whose contents are lists of
`{"type": "text", "text": ...}` and `{"type": "image"}`; `images` holds one PIL image for each image part,
in order. A source's other columns (`id`, `question`, `answer`, `type`) stay beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from latefusion.data.scenes import load_scenes

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def scenes(split: str, *, n_scenes: int | None = None, seed: int = 0) -> datasets.Dataset:
    """The procedural set: a row is one question about one image."""
    return load_scenes(split, n_scenes, seed).with_transform(_scene_samples)


def llava(path: str, images: str | None) -> datasets.Dataset:
    """A LLaVA conversation file: a JSON list of `{"id", "image", "conversations": [{"from", "value"}]}`.

    Args:
        path: the file.
        images: the folder that the `image` entries (a name, or a list of names, or none) are relative to.

    Raises:
        FileNotFoundError: the file, the folder or its first image is not there.
        ValueError: a conversation does not name as many images as it has.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"no conversation file at {path}; download it there, or name yours: data.path=FILE."
        )
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(
            f"no image folder at {images}; download the images there, or name yours: data.images=FOLDER."
        )
    stat = file.stat()
    try:
        rows = datasets.Dataset.from_generator(
            _llava_rows,
            gen_kwargs={"path": str(file.resolve()), "version": (stat.st_size, stat.st_mtime_ns)},
            features=datasets.Features(
                {
                    "id": datasets.Value("string"),
                    "image": datasets.List(datasets.Value("string")),
                    "conversations": datasets.Value("string"),
                }
            ),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(str(error.__cause__)) from error
    folder = Path(images) if images is not None else file.parent
    first = next((name for names in rows["image"] for name in names), None)
    if first is not None and not (folder / first).is_file():
        raise FileNotFoundError(
            f"no image {first} in {folder}; download the images there, or name yours: data.images=FOLDER."
        )

    def samples(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            "id": batch["id"],
            "messages": [llava_messages(json.loads(turns)) for turns in batch["conversations"]],
            "images": [[_open(folder / name) for name in names] for names in batch["image"]],
        }

    return rows.with_transform(samples)


def dataset(path: str, *, split: str) -> datasets.Dataset:
    """Any data set with the columns `messages` and `images`.

    Raises:
        FileNotFoundError: there is none, or it cannot be reached.
        ValueError: a column is missing.
    """
    rows = read(path, split=split)
    for column in ("messages", "images"):
        if column not in rows.column_names:
            raise ValueError(
                f"the data set {path} has no column {column!r} (it has {', '.join(rows.column_names)}); "
                "rename its columns to messages and images."
            )
    return rows.with_transform(_dataset_samples)


def read(path: str, *, split: str) -> datasets.Dataset:
    """A data set saved to disk, in a folder, or on the hub.

    Raises:
        FileNotFoundError: there is none, or it cannot be reached.
    """
    try:
        if (Path(path) / "dataset_dict.json").is_file() or (Path(path) / "state.json").is_file():
            found = datasets.load_from_disk(path)
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(path, split=split)
    except (FileNotFoundError, ConnectionError, KeyError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"no data set with a split {split!r} at {path} that can be read from here; name a folder or "
            f"a hub id ({error})."
        ) from error


def llava_messages(turns: list[dict[str, str]]) -> list[dict[str, Any]]:
    """LLaVA turns as messages: `<image>` becomes an image part where it stands; line breaks beside it go."""
    messages = []
    for turn in turns:
        parts: list[dict[str, str]] = []
        for k, text in enumerate(turn["value"].split(PLACEHOLDER)):
            if k > 0:
                parts.append({"type": "image"})
            if text := text.strip("\n"):
                parts.append({"type": "text", "text": text})
        messages.append({"role": ROLES[turn["from"]], "content": parts})
    return messages


def _scene_samples(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    messages = [
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        for question, answer in zip(batch["question"], batch["answer"], strict=True)
    ]
    images = [[image] for image in batch["image"]]
    kept = {name: batch[name] for name in ("id", "scene", "type", "question", "answer")}
    return {"messages": messages, "images": images, **kept}


def _dataset_samples(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {**batch, "messages": [[_plain(message) for message in m] for m in batch["messages"]]}


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    # Arrow gives every part every key; a template that asks whether a part has text must not find None
    parts = [{key: value for key, value in part.items() if value is not None} for part in content]
    return {"role": message["role"], "content": parts}


def _llava_rows(path: str, version: tuple[int, int]) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(json.loads(Path(path).read_text())):
        image = record.get("image") or []
        names = [image] if isinstance(image, str) else image
        turns = record["conversations"]
        placeholders = sum(turn["value"].count(PLACEHOLDER) for turn in turns)
        name = str(record.get("id", number))
        if placeholders != len(names):
            raise ValueError(
                f"conversation {name} (entry {number} of {path}) has {len(names)} images but {placeholders} "
                f"{PLACEHOLDER} placeholders; write one for each image."
            )
        unknown = next((turn["from"] for turn in turns if turn["from"] not in ROLES), None)
        if unknown is not None:
            raise ValueError(
                f"conversation {name} (entry {number} of {path}) has a turn from {unknown!r}; it can be from "
                f"{', '.join(ROLES)}."
            )
        yield {"id": name, "image": names, "conversations": json.dumps(turns)}


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no image at {path}; download it there, or leave its conversation out."
        ) from None
