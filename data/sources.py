"""Where rows come from: every source gives samples `{"id", "messages", "images"}`, made when a row is asked for.

A row that cannot be used raises `BadSample` when it is asked for, not before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from latefusion.data.json_file import Broken, json_records, read_json
from latefusion.data.local_files import FORMATS, JSON, check_conversations, check_images
from latefusion.data.printing import first_line, short
from latefusion.data.samples import (
    COLUMNS,
    MEDIA,
    RECORD,
    BadSample,
    is_path,
    record_name,
    sample_of,
    size_of,
    sources_of,
)
from latefusion.data.scenes import load_scenes
from latefusion.data.videos import MAX_FRAMES
from latefusion.models.fingerprint import file_hash, fingerprint, local_path, rows_fingerprint

CONVERSATIONS = ("messages", "conversations")
PROBED = 20  # images whose absence, all of them, means that the folder is wrong


def scenes(split: str, *, n_scenes: int | None = None, seed: int = 0) -> datasets.Dataset:
    """The procedural set: a row is one question about one image."""
    return load_scenes(split, n_scenes, seed).with_transform(question_samples)


class Rows(Dataset):
    """Rows of an Arrow table, made into samples one at a time.

    Args:
        table: in Arrow format, with the columns `RECORD` and `id`, or `messages` and
            `images` (or `image`).
        images: the folder that image paths are relative to.
        answered: a conversation without a last answer is a bad row.
        max_frames: of a video, the most frames that are shown.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        images: Path | None,
        *,
        answered: bool = True,
        max_frames: int = MAX_FRAMES,
    ):
        self.table, self.images, self.answered, self.max_frames = table, images, answered, max_frames

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample.

        Raises:
            BadSample: the row cannot be used.
        """
        return sample_of(
            python_row(self.table[index : index + 1]),
            self.images,
            answered=self.answered,
            max_frames=self.max_frames,
        )

    def identity(self, index: int) -> str:
        """The row's name in the data, or its number if it has none."""
        return name_of(self.table[index : index + 1]) or str(index)

    def place(self, index: int) -> int:
        """The row's number in the data."""
        return index

    def sizes(self) -> list[tuple[int, int]]:
        """Characters of text and number of images of every row (see `size_of`), without opening any."""
        if RECORD in self.table.column_names:
            records = self.table.select_columns([RECORD]).with_format(None)
            return [size_of(json.loads(row[RECORD]), self.max_frames) for row in records]
        images, videos = (_counts(self.table, COLUMNS[kind]) for kind in MEDIA)
        texts = self.table.select_columns([n for n in CONVERSATIONS if n in self.table.column_names])
        sizes = [size_of(_readable(text), self.max_frames) for text in texts]
        return [
            (characters, max(in_parts, image + self.max_frames * video))
            for (characters, in_parts), image, video in zip(sizes, images, videos, strict=True)
        ]

    def fingerprint(self) -> str:
        """Hash of the rows in their order and of the contents of their images and videos (see `rows_fingerprint`)."""
        rows = self._rows_fingerprint()
        return rows if self.max_frames == MAX_FRAMES else fingerprint(rows, self.max_frames)

    def _rows_fingerprint(self) -> str:
        if RECORD not in self.table.column_names:
            return rows_fingerprint(self.table, self.images, whole=False)
        texts = (row[RECORD] for row in self.table.with_format(None))
        rows = (
            {
                RECORD: text,
                "images": [source for kind in MEDIA for source in sources_of(json.loads(text), kind)],
            }
            for text in texts
        )
        return rows_fingerprint(rows, self.images, whole=False)


def llava(path: str, images: str | None) -> Rows:
    """A LLaVA conversation file: a JSON list of `{"id", "image", "conversations": [{"from", "value"}]}`.

    Args:
        path: the file.
        images: the folder that the `image` entries (a name, or a list of names, or none) are relative to.

    Raises:
        FileNotFoundError: the file, the folder or its first images are not there.
        ValueError: the file is not a JSON list.
    """
    check_conversations(path)
    return json_rows(path, images)


def json_rows(path: str, images: str | None) -> Rows:
    """A JSON list or a file of JSON lines, each `{"messages", "images"}` or `{"conversations", "image"}`."""
    file = Path(path)
    if images is not None:
        check_images(images)
    try:
        table = datasets.Dataset.from_generator(
            json_records,
            gen_kwargs={"path": str(file.resolve()), "version": file_hash(file)},
            features=datasets.Features({"id": datasets.Value("string"), RECORD: datasets.Value("string")}),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(str(error.__cause__)) from error
    except ValueError:  # of `datasets`, where nothing was generated
        raise ValueError(f"the data at {path} have no rows; name others with data.path=PATH.") from None
    folder = Path(images) if images is not None else file.parent
    first = table.select(range(min(PROBED, len(table))))
    for kind in MEDIA:
        sources = [source for row in first for source in sources_of(json.loads(row[RECORD]), kind)]
        names = [name for name in sources if isinstance(name, str) and is_path(name)]
        if names and all(_lost(local_path(name, folder)) for name in names):
            raise FileNotFoundError(
                f"no {kind} {short(names[0])} in {folder}; download the {kind}s there, or name yours: "
                "data.images=FOLDER."
            )
    return Rows(table.with_format("arrow"), folder)


def dataset(path: str, *, split: str, images: str | None = None) -> Rows:
    """Any data set with the columns `messages` and `images` (TRL's convention).

    Args:
        path: a hub id, a folder, or a file (parquet, arrow, JSON, JSON lines).
        split: of the data set; a single file is `train`.
        images: the folder that image paths are relative to; None: the data's own.

    Raises:
        FileNotFoundError: the data are not there, or cannot be reached.
        ValueError: a column is missing.
    """
    if Path(path).is_file() and Path(path).suffix in JSON:
        return json_rows(path, images)
    table = read(path, split=split)
    return Rows(_checked(table, path), _folder(path, images))


def stream(
    path: str, *, split: str, images: str | None = None
) -> tuple[datasets.IterableDataset, Path | None]:
    """Open a source as a stream: its undecoded rows, and the folder for `sample_of` (see `dataset`)."""
    file = Path(path)
    if file.is_file() and file.suffix in JSON:
        rows = json_rows(path, images)
        return rows.table.to_iterable_dataset(), rows.images
    return _checked(read(path, split=split, streaming=True), path), _folder(path, images)


def records(path: str) -> Iterator[tuple[str, Any]]:
    """Every row of a file (JSON, JSON lines, parquet, arrow, CSV) as it is stored, with its place in the file.

    A row that cannot be read is `Broken`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not one of these.
    """
    if Path(path).suffix not in FORMATS:
        yield from read_json(path)
        return
    table = read(path, split="train").with_format("arrow")
    for number in range(len(table)):
        try:
            row: Any = python_row(table[number : number + 1])
        except BadSample as error:
            row = Broken(error)
        yield f"row {number}", row


def read(path: str, *, split: str, streaming: bool = False) -> Any:
    """A data set saved to disk, in a folder or file, or on the hub.

    Raises:
        FileNotFoundError: the data are not there, or cannot be reached.
        ValueError: it is damaged.
    """
    try:
        if (Path(path) / "dataset_dict.json").is_file() or (Path(path) / "state.json").is_file():
            saved = datasets.load_from_disk(path)
            saved = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
            return saved.to_iterable_dataset() if streaming else saved
        kind = FORMATS.get(Path(path).suffix) if Path(path).is_file() else None
        if kind is not None:
            return datasets.load_dataset(
                kind, data_files=path, split="train", streaming=streaming, cache_dir=cache_folder(path)
            )
        return datasets.load_dataset(path, split=split, streaming=streaming, cache_dir=cache_folder(path))
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ValueError(f"the data at {path} cannot be read: {_reason(cause, path)}") from error
    except (
        FileNotFoundError,
        ConnectionError,
        KeyError,
        ValueError,
        datasets.exceptions.DatasetNotFoundError,
    ) as error:
        if Path(path).is_file():
            raise ValueError(f"the data at {path} cannot be read: {first_line(error)}") from error
        raise FileNotFoundError(
            f"no data set with a split {split!r} at {path} that can be read from here; name a file, a folder or "
            f"a hub id ({first_line(error)})."
        ) from error


def cache_folder(path: str) -> str | None:
    """Where `datasets` keeps the rows of a local file or folder, by its contents; None: where it keeps the hub's.

    `datasets` knows a local file again by its path and its time of change, which other rows may have, too: `cp -p`,
    rsync and archives keep it.
    """
    place = Path(path)
    if place.is_file():
        contents = file_hash(place)
    elif place.is_dir():  # perhaps of many images: what no copying tool can set tells of a change
        stats = ((file, file.stat()) for file in sorted(place.rglob("*")) if file.is_file())
        contents = fingerprint([[str(file), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for file, s in stats])
    else:
        return None
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "latefusion" / contents[:16])


def _reason(error: BaseException, path: str) -> str:
    """Why a file cannot be read; where its text is not UTF-8, the line."""
    if not isinstance(error, UnicodeDecodeError) or not Path(path).is_file():
        return first_line(error)
    with Path(path).open("rb") as file:
        number = next((n for n, line in enumerate(file, 1) if not _utf8(line)), None)
    return first_line(error) if number is None else f"line {number} is not UTF-8; save the file as UTF-8"


def _utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def python_row(table: Any) -> dict[str, Any]:
    """The one row of an Arrow table.

    Raises:
        BadSample: its text is not UTF-8 (which Arrow does not check).
    """
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise BadSample(f"has broken UTF-8 ({error.reason} in byte {error.start})") from None


def name_of(table: Any) -> str | None:
    """The name (`id`) of the one row of an Arrow table; None if it has none that can be read."""
    try:
        return record_name(table["id"][0].as_py()) if "id" in table.column_names else None
    except UnicodeDecodeError:
        return None


def _checked(table: Any, path: str) -> Any:
    """The table, as undecoded Arrow rows: one bad image costs one row.

    Raises:
        ValueError: a column is missing.
    """
    names = table.column_names or list(next(iter(table)))
    if not any(name in names for name in CONVERSATIONS):
        raise ValueError(
            f"the data set {path} has no column 'messages' (it has {', '.join(names)}); "
            "rename its columns to messages and images."
        )
    return table.with_format("arrow")


def _folder(path: str, images: str | None) -> Path | None:
    if images is not None:
        return Path(images)
    here = Path(path)
    return here if here.is_dir() else here.parent if here.is_file() else None


def _lost(file: Path) -> bool:
    try:
        return not file.exists()
    except OSError:  # not a path, but base64, say
        return False


def _readable(table: Any) -> dict[str, Any]:
    try:
        return python_row(table)
    except BadSample:
        return {}


def _counts(table: datasets.Dataset, names: tuple[str, ...]) -> list[int]:
    """Number of images (or videos) in a column of every row; the column may be a list of any Arrow kind, or no list."""
    name = next((n for n in names if n in table.column_names), None)
    if name is None:
        return [0] * len(table)
    column = table.select_columns([name])[:][name]
    if any(
        kind(column.type) for kind in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    ):
        return [n or 0 for n in pc.list_value_length(column).to_pylist()]
    return pc.cast(pc.is_valid(column), "int64").to_pylist()


def question_samples(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Rows of a question and an answer as samples, with their columns."""
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
