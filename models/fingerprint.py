"""Fingerprints of a model, a processor and data, so that stored results are reused only with the same three.

Everything that is stored and used again (an evaluation's answers, a profile's measurements, a teacher's answers, a
fitted entry, a run to resume) keeps the fingerprints of what it was made from. Nothing here needs torch.

    model_identity(path, ...)        model, processor and dtype, as a dictionary to store
    model_fingerprint(path)          weights, configuration, generation settings, schedule; of adapters also the base
    processor_fingerprint(processor) image settings, chat template, tokenizer
    rows_fingerprint(rows)           every row in order, the contents of its images included
    image_fingerprint(image)         one image or video, in any form a data set stores it in
    fingerprint(value, ...)          settings: plain values, dataclasses, enums

Contents are what counts: a file that is copied, moved or touched keeps its fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

import huggingface_hub
from PIL import Image

from latefusion.models.locate import ADAPTER_CONFIG, BASE, adapter_settings, readable

MODEL_FILES = (
    *("*.safetensors", "*.bin", "*.index.json", "*.py"),
    *("config.json", "generation_config.json", ADAPTER_CONFIG, "vision_schedule.json"),
)
LONG = 2**26  # bytes; the hash of a longer file is remembered
SETTLED = (
    2.0  # seconds after a change from which on the clock of the file system tells a later change from it
)
MEMORY = Path(
    os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "latefusion", "fingerprints"
)
IMAGE_COLUMNS = ("image", "images", "video", "videos")
PART_TYPES = ("image", "image_url", "video", "video_url")
PART_KEYS = ("image", "video", "frames", "path", "url", "image_url", "video_url")
FILE_URL = "file://"
HELD = ("bytes", "frames", "video", "path", "url")  # where a mapping keeps an image or a video
BLOCK = 128  # rows
READ_BLOCKS = 80  # `whole=False` reads the images of the first 10,240 rows ...
EVERY = 64  # ... and of every 64th block after them
DIGITS = re.compile(r"(\d+)")
NOT_COMPARED = (
    "processor_class",
    "auto_map",
    "transformers_version",
    "name_or_path",
)  # change nothing that is computed


def fingerprint(*values: Any) -> str:
    """Hash of plain values: None, bool, numbers, str, bytes, enums, mappings, sequences, sets, dataclasses, images.

    Mappings and sets count without their order. A `Path` counts as its text, not as the file's contents, a dataclass
    with a method `fingerprint` as what that returns.

    Raises:
        TypeError: a value has another type.
    """
    digest = hashlib.sha256()
    for value in values:
        _add(digest, value)
    return _short(digest)


def model_fingerprint(path: str | Path, revision: str | None = None) -> str:
    """Hash of the model at `path`: weights, configuration, generation settings, a student's schedule, its own code.

    Weights are read whole, at more than 1 GB/s; the hash of a long file is remembered in `MEMORY` for as long as the
    file system says that the file is unchanged. Adapters count with their base, wherever that lies. A hub id has the
    name of its commit.

    Args:
        path: `embedded`, `smollm_icons`, a folder, or a hub id.
        revision: branch, tag or commit of a hub id; None: its main branch.

    Raises:
        FileNotFoundError: there is no such model.
    """
    folder = Path(readable(str(path)))
    if not folder.is_dir():
        return _commit(str(path), revision)
    digest = hashlib.sha256()
    for file in sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)}):
        if file.name == ADAPTER_CONFIG:
            adapter = adapter_settings(folder)
            base = model_fingerprint(adapter.pop(BASE), adapter.get("revision"))
            _add(digest, [file.name, adapter, base])
        else:
            _add(digest, [file.name, file_hash(file)])
    return _short(digest)


def model_identity(
    path: str | Path, revision: str | None = None, *, processor: Any, dtype: Any
) -> dict[str, str]:
    """All that an answer of a model depends on, but for the question: `weights`, `processor` and `dtype`.

    Store it beside what the model gave, compare key by key, and name in the message the keys that differ.

    Args:
        dtype: of the weights in memory, or another name for how they are held ("nf4").
    """
    return {
        "weights": model_fingerprint(path, revision),
        "processor": processor_fingerprint(processor),
        "dtype": str(dtype).removeprefix("torch."),
    }


def processor_fingerprint(processor: Any) -> str:
    """Hash of all that turns messages and images into model inputs: image settings, chat template, tokenizer."""
    tokenizer = processor.tokenizer
    if hasattr(tokenizer, "backend_tokenizer"):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # left over from the last call
            rules.pop(state, None)
    else:
        rules = tokenizer.get_vocab()
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return fingerprint(_comparable(processor.to_dict()), template, special, rules)


def image_fingerprint(image: Any, folder: Path | None = None) -> str:
    """Hash of an image or a video as it is stored: encoded contents, the same in a file as in bytes; or pixels.

    Args:
        image: a picture, bytes, a path, base64 text, or `{"bytes", "path"}` as `datasets` stores images; also a folder
            or a list of a video's frames, and what else `data.videos.load_video` takes.
        folder: that paths are relative to.
    """
    settings = _settings(image)
    source = _source(image, folder)
    if isinstance(source, list | tuple):
        frames = [image_fingerprint(frame, folder) for frame in source]
        return fingerprint(frames, settings) if settings else fingerprint(frames)
    if settings:
        return fingerprint(image_fingerprint(source, folder), settings)
    if isinstance(source, Path):
        return file_hash(source)
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else fingerprint(source)


def rows_fingerprint(rows: Any, folder: Path | None = None, *, whole: bool = True) -> str:
    """Hash of rows, in their order; images and videos count by their contents, in columns and parts of `messages`.

    Rows that were lost, added, changed or reordered, and swapped images, all give another hash.

    Args:
        rows: a `datasets.Dataset`, whose images are not decoded, or mappings of plain values.
        folder: that paths of images are relative to.
        whole: read every image. False is for training sets whose images would take minutes to read: all text counts,
            and the number of bytes of every image, but contents only of the images in the first 10,240 rows and in
            128 of every 8,192 rows after those. What it can miss: later images replaced by others of exactly the same
            number of bytes each.
    """

    def read(block: int) -> bool:
        return whole or block < READ_BLOCKS or block % EVERY == 0

    digest = hashlib.sha256()
    stored = hasattr(rows, "cast_column")
    for number, block in enumerate(_table_blocks(rows, read) if stored else batched(rows, BLOCK)):
        content = image_fingerprint if read(number) else _size
        for row in block:
            images = [image for name in IMAGE_COLUMNS for image in _listed(row.get(name))]
            images += _inside(row.get("messages"))
            _add(digest, _text({name: value for name, value in row.items() if name not in IMAGE_COLUMNS}))
            _add(digest, [content(image, folder) for image in images])
    return _short(digest)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's contents; "missing" if it cannot be read."""
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            if about.st_size < LONG:
                return hashlib.file_digest(file, "sha256").hexdigest()
            key = MEMORY / fingerprint(
                [about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]
            )
            with suppress(OSError):
                return key.read_text()
            settled = time.time() - max(about.st_mtime, about.st_ctime) > SETTLED
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return "missing"
    if settled:
        with suppress(OSError):  # nothing is remembered where nothing can be written
            key.parent.mkdir(parents=True, exist_ok=True)
            part = key.with_suffix(f".{os.getpid()}")
            part.write_text(content)
            part.replace(key)
    return content


def _add(digest: hashlib._Hash, value: Any) -> None:
    """Feed a value with its kind and length, so that no two values feed the same bytes."""
    if isinstance(value, Enum):
        value = value.value
    if is_dataclass(value) and not isinstance(value, type):
        own = getattr(value, "fingerprint", None)  # an opened video's
        value = {field.name: getattr(value, field.name) for field in fields(value)} if own is None else own()
    if value is None or isinstance(value, bool | int | float):
        digest.update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, str | Path):
        text = str(value).encode(errors="surrogatepass")
        digest.update(b"str %d;" % len(text) + text)
    elif isinstance(value, bytes | bytearray | memoryview):
        digest.update(b"bytes %d;" % len(value))
        digest.update(value)
    elif isinstance(value, Image.Image):
        _add(digest, [value.mode, *value.size, value.tobytes()])
    elif isinstance(value, Mapping):
        digest.update(b"mapping %d;" % len(value))
        for key in sorted(value, key=str):
            _add(digest, key)
            _add(digest, value[key])
    elif isinstance(value, set | frozenset):
        _add(digest, ["set", *sorted(fingerprint(item) for item in value)])
    elif isinstance(value, list | tuple | range):
        digest.update(b"list %d;" % len(value))
        for item in value:
            _add(digest, item)
    elif hasattr(value, "isoformat"):  # dates and times, in rows of a data set
        _add(digest, value.isoformat())
    else:
        raise TypeError(f"a {type(value).__name__} has no fingerprint; give plain values.")


def _text(row: dict[str, Any]) -> Any:
    """A row as one text, ten times as fast to add as its values; the row itself if JSON does not hold one of them."""
    try:
        return json.dumps(row, sort_keys=True)
    except (TypeError, ValueError):
        return row


def _short(digest: hashlib._Hash) -> str:
    return digest.hexdigest()[:16]


def _comparable(settings: Any) -> Any:
    """Settings without what names a class, a place or a version, and without arrays that are derived from others."""
    if isinstance(settings, Mapping):
        return {name: _comparable(value) for name, value in settings.items() if name not in NOT_COMPARED}
    if isinstance(settings, list | tuple):
        return [_comparable(value) for value in settings]
    return settings.tolist() if hasattr(settings, "tolist") else settings


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` rows, the last one perhaps shorter."""
    remaining = iter(rows)
    while block := list(islice(remaining, size)):
        yield block


def _table_blocks(rows: Any, read: Callable[[int], bool]) -> Iterator[list[dict[str, Any]]]:
    """Rows of a `datasets.Dataset` in lists of `BLOCK`, images as they are stored.

    Args:
        read: of a block's number: whether the bytes of its images are needed, or their number alone.
    """
    table = rows.with_format("arrow")
    for number, start in enumerate(range(0, len(rows), BLOCK)):
        block = table[start : start + BLOCK]
        columns = {
            name: _without_bytes(column) if name in IMAGE_COLUMNS and not read(number) else column.to_pylist()
            for name, column in zip(block.column_names, block.columns, strict=True)
        }
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _without_bytes(column: Any) -> list[Any]:
    """An Arrow column of images, or of lists of them, with the number of bytes in the place of the bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    images = column.combine_chunks()
    if pa.types.is_list(images.type) or pa.types.is_large_list(images.type):
        flat = iter(_without_bytes(pa.chunked_array([pc.list_flatten(images)])))
        return [list(islice(flat, count or 0)) for count in pc.list_value_length(images).to_pylist()]
    if not pa.types.is_struct(images.type) or "bytes" not in images.type.names:
        return images.to_pylist()
    lengths = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
    paths = (
        pc.struct_field(images, "path").to_pylist() if "path" in images.type.names else [None] * len(lengths)
    )
    return [{"bytes": length, "path": path} for length, path in zip(lengths, paths, strict=True)]


def _listed(images: Any) -> Iterable[Any]:
    if images is None:
        return []
    return images if isinstance(images, list | tuple) else [images]


def _inside(messages: Any) -> Iterator[Any]:
    """The images and videos that parts of messages hold themselves: `{"type": "image", "image": "a.png"}`."""
    if isinstance(messages, list | tuple):
        for item in messages:
            yield from _inside(item)
    elif isinstance(messages, Mapping):
        if messages.get("type") in PART_TYPES:
            yield from (messages[key] for key in PART_KEYS if messages.get(key) is not None)
        else:
            yield from _inside(messages.get("content"))


def _source(image: Any, folder: Path | None) -> Any:
    """What holds an image's contents: bytes, a picture, or the path of a file that is there; else what it says.

    Of a folder of frames: their paths.
    """
    if isinstance(image, Mapping):
        held = next((image[name] for name in HELD if image.get(name) is not None), None)
        return held if isinstance(held, bytes) else _source(held, folder)
    if isinstance(image, str | Path):
        path = local_path(image, folder)
        with suppress(OSError, ValueError):  # base64 text is too long for a path
            if path.is_file():
                return path
            if path.is_dir():
                return frames_of_folder(path)
    return image


def local_path(source: str | Path, folder: Path | None) -> Path:
    """The path that a row names, relative to `folder`; behind `file://` too, where nothing is decoded."""
    text = str(source)
    return (folder or Path()) / (text[len(FILE_URL) :] if text.lower().startswith(FILE_URL) else source)


def frames_of_folder(folder: Path) -> list[Path]:
    """The images in a folder that is a video, in the order of their names, numbers by value: `f2.png`, `f10.png`."""
    suffixes = Image.registered_extensions()
    files = [file for file in folder.absolute().iterdir() if file.suffix.lower() in suffixes]
    shown = [file for file in files if not file.name.startswith(".")]
    return sorted(
        shown, key=lambda file: [(int(t), "") if t.isdecimal() else (-1, t) for t in DIGITS.split(file.name)]
    )


def _settings(image: Any) -> dict[str, Any]:
    """What a row says of its video beside where it lies: frames a second, how many are shown."""
    if not isinstance(image, Mapping):
        return {}
    return {name: image[name] for name in ("fps", "max_frames") if image.get(name) is not None}


def _size(image: Any, folder: Path | None) -> Any:
    """Number of bytes that an image is stored in; a picture's fingerprint. Of a video's frames, that of each."""
    source = _source(image, folder)
    if isinstance(source, list | tuple):
        return [_size(frame, folder) for frame in source]
    if isinstance(source, Path):
        with suppress(OSError):
            return source.stat().st_size
        return None
    if isinstance(source, bytes | str):
        return len(source)
    return source if isinstance(source, int) else fingerprint(source)


def _commit(name: str, revision: str | None) -> str:
    held = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(held, str):
        return Path(held).parent.name
    try:
        return str(huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10).sha)
    except Exception as error:  # every way a network, a hub or a name can fail
        raise FileNotFoundError(
            f"no model at {name} ({str(error).strip().splitlines()[0]}); name a folder or a hub id."
        ) from None
