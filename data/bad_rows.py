"""Rows that cannot be used: `Guard` raises or puts other rows in their places, `findings` lists them beforehand."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latefusion.data.collate import BadRow, Collator
from latefusion.data.samples import BadSample, Refused, TooLong, sample_of
from latefusion.data.sources import name_of, python_row
from latefusion.data.streaming import Lazy, Shard, Stream
from latefusion.recipes.schema import Group, OnError

SKIPPED_FILE = "skipped_rows.jsonl"
TRIES = 1000  # rows drawn for one that is bad
BLOCK = 100  # rows of a stream that are read together
ROW_ONLY = (  # what in a reason belongs to one row, and what stands for it in the summary
    (re.compile(r" \(.*\)$"), ""),
    (re.compile(r"(?<=bad image: |bad video: ).*?(?= (?:cannot|is|has) )"), "FILE"),
    (re.compile(r"(?<=message part ).*(?=; parts)"), "…"),
    (re.compile(r"(?<![\w=./'-])\d[\d,]*(?!\w)"), "N"),
)


@dataclass(frozen=True)
class Bad:
    """Stands for a sample that cannot be used: its row, its name in the data, and the reason."""

    row: int | None  # of a stream its position
    id: str
    error: BadSample
    place: int | str | None = None  # in the data, wherever it comes up in an epoch; None: as `id` says

    @classmethod
    def of(cls, sample: dict[str, Any], error: BadRow) -> Bad:
        """The sample of a batch that the collator did not take."""
        name = str(sample.get("id", error.at))
        return cls(sample.get("row"), name, error.reason, sample.get("place"))


class Checked(Dataset):
    """Samples by index, or `Bad`; each knows its `row` and its `id`.

    Args:
        rows: `__getitem__` gives a sample or raises `BadSample`; `identity` names a row, `place` says where it stands
            in the data, `sizes` measures all.
        group: what the samples of a step are to have in common.
    """

    def __init__(self, rows: Any, group: Group = Group.none):
        self.rows, self.group = rows, group

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any] | Bad:
        place = self.rows.place(row)
        try:
            sample = self.rows[row]
        except BadSample as error:
            return Bad(row, self.rows.identity(row), error, place)
        name = sample["id"] if "id" in sample else self.rows.identity(row)
        return {**sample, "id": name, "row": row, "place": place}

    def fingerprint(self) -> str:
        """Hash of the rows, in their order."""
        return self.rows.fingerprint()


class Guard:
    """A collator that raises on bad rows, or puts other rows in their places.

    A batch keeps its size, so no process runs out of step with the others. The bad row's number draws a replacement
    from a set; in a stream the next usable row takes its place: a run repeats itself, however it is divided.

    Args:
        collator: raises `BadRow` for what only it can find: too long, or refused by the model's processor.
        on_error: what every bad row means, except those that are too long.
        too_long: what a row that is too long means.
        dataset: the rows' data set.
        folder: where `skipped_rows.jsonl` is written, a line a row with its reason; None: nowhere.
    """

    def __init__(
        self,
        collator: Collator,
        *,
        on_error: OnError,
        too_long: OnError,
        dataset: Checked | Stream,
        folder: str | Path | None,
    ):
        self.collator, self.dataset = collator, dataset
        self.on_error, self.too_long = on_error, too_long
        self.folder = Path(folder) if folder is not None else None
        self.seen: set[int | str] = set()

    def __call__(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        opened = [usable(s) if isinstance(s, Lazy) else s for s in samples]
        batch: list[Any] = [self.another(s, 0) if isinstance(s, Bad) else s for s in opened]
        for attempt in range(1, TRIES):
            try:
                return self.collator(batch)
            except BadRow as error:
                bad = Bad.of(batch[error.at], error)
                batch[error.at] = self.another(bad, attempt)
        raise Refused(f"{TRIES} rows in a row cannot be used, the last {bad.id}; run data/validate.py.")

    def another(self, bad: Bad, attempt: int) -> dict[str, Any]:
        """A sample to take a bad row's place, a different one in each attempt.

        Raises:
            Refused: the row must not be left out, or no other can be used.
        """
        self.note(bad)
        draw = random.Random(f"{bad.row} {bad.id} {attempt}")
        drawn: Any = bad
        for _ in range(TRIES):
            if isinstance(self.dataset, Stream):
                drawn = usable(self.dataset.after(drawn.row))
            else:
                drawn = self.dataset[draw.randrange(len(self.dataset))]
            if not isinstance(drawn, Bad):
                return drawn
            self.note(drawn)
        raise Refused(f"{TRIES} rows drawn in place of row {bad.id} are all bad; run data/validate.py.")

    def fits(self, row: dict[str, Any] | Bad) -> bool:
        """Whether a row can be used; raises as `note` does where it cannot."""
        if isinstance(row, Bad):
            self.note(row)
            return False
        try:
            self.collator([row])
        except BadRow as error:
            self.note(Bad.of(row, error))
            return False
        return True

    def note(self, bad: Bad) -> None:
        """Count the row, or raise, as the user chose."""
        key, choice = "on_error", self.on_error
        if isinstance(bad.error, TooLong):
            key, choice = "too_long", self.too_long
        if choice is OnError["raise"]:
            raise Refused(f"row {bad.id} {bad.error}; leave such rows out with data.{key}=skip.")
        place = bad.id if bad.place is None else bad.place
        if place in self.seen:
            return
        self.seen.add(place)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"row": bad.place, "id": bad.id, "reason": str(bad.error)})
            with (self.folder / SKIPPED_FILE).open("a") as file:  # one write: workers and processes append
                file.write(line + "\n")


def usable(row: Lazy) -> dict[str, Any] | Bad:
    """A stream's row, opened."""
    try:
        return {**row.make(), "id": row.name, "row": row.position, "place": row.place}
    except BadSample as error:
        return Bad(row.position, row.name, error, row.place)


def skipped(folder: str | Path) -> int:
    """How many different rows of a run have been left out so far."""
    file = Path(folder) / SKIPPED_FILE
    return len(set(file.read_text().splitlines())) if file.is_file() else 0


@dataclass(frozen=True)
class Finding:
    """A row that was checked; `reason` None: it can be used."""

    id: str
    reason: str | None


class Findings(Dataset):
    """The `Finding` of each row, made when it is read."""

    def __init__(self, rows: Checked, collator: Collator | None):
        self.rows, self.collator = rows, collator

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Finding:
        sample = self.rows[index]
        if isinstance(sample, Bad):
            return Finding(sample.id, str(sample.error))
        return Finding(sample["id"], rejected(sample, self.collator))


def rejected(sample: dict[str, Any], collator: Collator | None) -> str | None:
    """The collator's reason to refuse a sample; None if it takes it."""
    if collator is not None:
        try:
            collator([sample])
        except BadRow as error:
            return str(error.reason)
    return None


def findings(rows: Checked, collator: Collator | None, *, workers: int) -> Iterator[Finding]:
    """One finding a row, in order."""
    yield from DataLoader(Findings(rows, collator), batch_size=None, num_workers=workers)


def stream_findings(
    table: Any, folder: Path | None, collator: Collator | None, *, max_frames: int
) -> Iterator[Finding]:
    """One finding a row of a stream (as `sources.stream` gives it), in order."""
    for number in range(table.num_shards):
        shard = Shard(table, BLOCK, number)
        while rows := shard.next():
            for place, records, at in rows:
                row = records.slice(at, 1)
                name = name_of(row) or place
                try:
                    sample = sample_of(python_row(row), folder, max_frames=max_frames)
                    yield Finding(name, rejected(sample, collator))
                except BadSample as error:
                    yield Finding(name, str(error))


def kind(reason: str) -> str:
    """A reason without the row's file, numbers and library messages, so that rows of one kind are counted together."""
    for pattern, stands in ROW_ONLY:
        reason = pattern.sub(stands, reason)
    return reason
