"""Rows that are read as they are used: sources without an index as one endless stream, taken by position."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import Dataset, get_worker_info

from latefusion.data.samples import BadSample, Refused
from latefusion.data.sources import name_of, python_row
from latefusion.models.fingerprint import file_hash, fingerprint
from latefusion.recipes.launcher import rank

MARKS = "stream.jsonl"
EVERY = 1000  # rows between two marks
OPEN = 10  # shards that a block is read from
DRAWS = 1000  # rows whose sources are drawn together
HASHED = 256  # rows at the beginning that a stream's fingerprint reads


class Lazy:
    """A row of a stream that has not been made into a sample yet.

    Args:
        position: in the stream.
        place: in the data.
        name: the row's, for messages.
        make: gives the sample, or raises `BadSample`.
        record: the row as it is stored, an Arrow table.
    """

    def __init__(
        self, position: int, place: str, name: str, make: Callable[[], dict[str, Any]], record: Any = None
    ):
        self.position, self.place, self.name, self.make, self.record = position, place, name, make, record


class Stream(Dataset):
    """Endless rows of one or several iterable sources, by position, the source of each drawn by weight.

    The row at a position is a function of the data and the seed alone, so loader workers, processes and resumed runs
    each take their positions. Reading goes forwards: rows are read up to the position that is asked for, and neither
    opened nor decoded before they are used. For a row that has been let go, reading begins again.

    Args:
        sources: `datasets.IterableDataset`s in Arrow format.
        make: for each source, what makes a sample of a row.
        weights: one a source.
        seed: of draws and of shuffling.
        buffer: rows among which each source is shuffled.
        name: of the sources; marks of a stream of another name are not used.
        paths: of the sources, for the fingerprint.

    Attributes:
        marks: a file that the first process of a run writes and all read: where the sources stood, every `EVERY`
            rows, so that a resumed run reads from there; None: no file.
    """

    marks: Path | None = None

    def __init__(
        self,
        sources: Sequence[Any],
        make: Sequence[Callable[[dict[str, Any]], dict[str, Any]]],
        *,
        weights: Sequence[float],
        seed: int,
        buffer: int,
        name: str = "",
        paths: Sequence[str] = (),
    ):
        self.sources, self.make, self.weights, self.paths = sources, make, weights, paths
        self.seed, self.buffer = seed, buffer
        key = f"{name} {weights} {seed} {buffer} {datasets.__version__}"
        self.key = sha256(key.encode()).hexdigest()[:16]
        self._reader: Reader | None = None

    def __getitem__(self, position: int) -> Lazy:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Lazy]:
        """The rows at these positions; rows before the first of them are let go."""
        first = min(positions)
        reader = self._at(first)
        reader.forget(first)
        return [reader.row(position) for position in positions]

    def fingerprint(self) -> str:
        """Hash of how rows are drawn, of local files and of the first `HASHED` rows.

        A file's contents count; of a folder's files the names and sizes.
        """
        apart = copy.copy(self)  # with a reader of its own: what this stream has read, it does not mark later
        rows = [[row.place, _stored(row.record)] for row in apart.first(HASHED)]
        return fingerprint(
            list(self.weights), self.seed, self.buffer, [_content(Path(path)) for path in self.paths], rows
        )

    def first(self, n: int) -> list[Lazy]:
        return self.__getitems__(range(n))

    def after(self, position: int) -> Lazy:
        """The row after one that is held; nothing is let go."""
        return self._at(position).row(position + 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None}

    def _at(self, position: int) -> Reader:
        """A reader that holds this row or will come to it, from the nearest mark before it."""
        reader = self._reader
        if reader is not None and (reader.process != os.getpid() or position < reader.lowest):
            reader = None  # a loader worker must not read its parent's files, and nothing is read backwards
        if reader is not None and position <= reader.position + EVERY:
            return reader
        marked = self._marked()
        mark = max((row for row in marked if row <= position), default=0)
        if reader is None or reader.position < mark:
            if position and self.marks is not None and writes():
                print(
                    f"The stream goes on at row {position}: reading from row {mark} up to it, opening none.",
                    flush=True,
                )
            reader = self._reader = Reader(self, mark, marked)
        return reader

    def _marked(self) -> dict[int, Any]:
        """Where the sources stood at each marked row; leaves out lines that a kill cut off or another stream wrote."""
        if self.marks is None or not self.marks.is_file():
            return {}
        marked = {}
        for line in self.marks.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["of"] == self.key:
                marked[entry["row"]] = entry["feeds"]
        return marked


class Reader:
    """Reads a stream forwards from a row that was marked, or from the first.

    Attributes:
        position: of the next row to read.
        lowest: of those that are held or will be; rows before it are only passed.
        process: that reads.
    """

    def __init__(self, stream: Stream, position: int, marked: dict[int, Any]):
        self.stream, self.position, self.lowest = stream, position, position
        self.process = os.getpid()
        self.held: dict[int, Lazy] = {}
        self.marked = set(marked)
        states = marked.get(position) or [None] * len(stream.sources)
        self.feeds = [
            Feed(source, seed=f"{stream.seed} {k}", buffer=stream.buffer, state=state)
            for k, (source, state) in enumerate(zip(stream.sources, states, strict=True))
        ]
        self.drawn = -1
        self.draws: list[int] = []

    def forget(self, before: int) -> None:
        self.lowest = before
        for position in [p for p in self.held if p < before]:
            del self.held[position]

    def row(self, position: int) -> Lazy:
        while self.position <= position:
            self._read()
        return self.held[position]

    def _read(self) -> None:
        stream, position = self.stream, self.position
        if stream.marks is not None and position % EVERY == 0 and position not in self.marked and writes():
            feeds = [feed.state() for feed in self.feeds]
            entry = json.dumps({"of": stream.key, "row": position, "feeds": feeds})
            with suppress(OSError), stream.marks.open("a") as file:  # without it, more is read again
                file.write(f"\n{entry}\n")  # a line may have been cut off before it
            self.marked.add(position)
        k = self._source(position)
        place, table, row = self.feeds[k].next()
        if position >= self.lowest:
            record = table.slice(row, 1)
            of = f"{k}:" if len(self.feeds) > 1 else ""
            name = of + (name_of(record) or place)
            self.held[position] = Lazy(position, of + place, name, partial(stream.make[k], record), record)
        self.position += 1

    def _source(self, position: int) -> int:
        if len(self.feeds) == 1:
            return 0
        number, place = divmod(position, DRAWS)
        if number != self.drawn:
            draw = random.Random(f"{self.stream.seed} {number}")
            self.draws = draw.choices(range(len(self.feeds)), self.stream.weights, k=DRAWS)
            self.drawn = number
        return self.draws[place]


class Feed:
    """One source's rows again and again, in shuffled blocks, each time its shards in another order.

    `datasets` shuffles in a buffer whose contents its state leaves out, so a stream could not go on exactly where it
    stood. A block is known by where reading it began.

    Args:
        buffer: rows of a block, from up to `OPEN` shards.
        state: where to begin, from `state()`; None: at the first row.
    """

    def __init__(self, source: Any, *, seed: str, buffer: int, state: dict[str, Any] | None):
        self.source, self.seed = source, seed
        self.size = max(1, buffer // min(OPEN, source.num_shards))
        self.epoch, self.blocks = -1, 0
        self.waiting: list[int] = []
        self.open: list[Shard] = []
        self.empty = False  # the epoch so far
        self.rows: list[tuple[str, Any, int]] = []
        self.taken = 0
        self.begun = self._state()
        if state is not None:
            self.epoch, self.blocks, self.empty = state["epoch"], state["blocks"], state["empty"]
            self.waiting = list(state["waiting"])
            self.open = [Shard(source, self.size, *shard) for shard in state["open"]]
            self._block()
            self.taken = state["taken"]

    def next(self) -> tuple[str, Any, int]:
        """The next row: its place in the data, a table, and its number in the table."""
        if self.taken == len(self.rows):
            self._block()
        self.taken += 1
        return self.rows[self.taken - 1]

    def state(self) -> dict[str, Any]:
        """From what to come to the next row again."""
        return {**self.begun, "taken": self.taken}

    def _block(self) -> None:
        self.begun, self.rows, self.taken = self._state(), [], 0
        while not self.rows:
            if not self.waiting and not self.open:
                if self.empty:
                    raise Refused("the stream has no rows; name others with data.path=PATH.")
                self.epoch, self.blocks, self.empty = self.epoch + 1, 0, True
                shards = range(self.source.num_shards)
                self.waiting = random.Random(f"{self.seed} {self.epoch}").sample(shards, len(shards))
            while self.waiting and len(self.open) < OPEN:
                self.open.append(Shard(self.source, self.size, self.waiting.pop(0)))
            read = {shard.number: shard.next() for shard in self.open}
            self.open = [shard for shard in self.open if read[shard.number]]
            self.rows = [row for rows in read.values() for row in rows]
        self.blocks, self.empty = self.blocks + 1, False
        random.Random(f"{self.seed} {self.epoch} {self.blocks}").shuffle(self.rows)

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "blocks": self.blocks,
            "empty": self.empty,
            "waiting": list(self.waiting),
            "open": [[shard.number, shard.read, shard.state] for shard in self.open],
        }


class Shard:
    """What is left of one shard of a source, in Arrow tables.

    Args:
        size: rows of a table.
        read: how many rows have been read.
        state: of the `datasets.IterableDataset` after them; None: nothing has been read.
    """

    def __init__(self, source: Any, size: int, number: int, read: int = 0, state: Any = None):
        self.number, self.read, self.state = number, read, state
        self.prefix = f"{number}/" if source.num_shards > 1 else ""
        self.table = source.shard(num_shards=source.num_shards, index=number)
        if state is not None:
            self.table.load_state_dict(state)
        self.tables: Iterator[Any] = self.table.iter(
            batch_size=size
        )  # a plain iteration shares out to workers

    def next(self) -> list[tuple[str, Any, int]]:
        """The next rows (place in the data, table, number in the table); an empty list at the end.

        Raises:
            Refused: the file is damaged.
        """
        try:
            table = next(self.tables, None)
        except (OSError, ValueError) as error:
            raise Refused(
                f"the data cannot be read beyond row {self.read} of shard {self.number}: {error}"
            ) from error
        if table is None:
            return []
        rows = [(f"{self.prefix}{self.read + i}", table, i) for i in range(len(table))]
        self.read += len(table)
        self.state = self.table.state_dict()
        return rows


def writes() -> bool:
    """Whether this is the first process of the run, or its first loader worker: the one that writes and prints."""
    worker = get_worker_info()
    return rank() == 0 and (worker is None or worker.id == 0)


def _stored(record: Any) -> Any:
    """A row as plain values; the reason why it cannot be read if its text is broken."""
    try:
        return python_row(record)
    except BadSample as error:
        return str(error)


def _content(path: Path) -> Any:
    """What a local file holds, or the names and sizes of a folder's files; nothing of a hub id."""
    if path.is_file():
        return file_hash(path)
    return [
        [str(file.relative_to(path)), file.stat().st_size]
        for file in sorted(path.rglob("*"))
        if file.is_file()
    ]
