"""Rows that cannot be used: an error, or left out, counted and written down; their places are taken by others."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from latefusion.data.collate import BadRow, Collator
from latefusion.data.samples import BadSample, Refused, TooLong
from latefusion.data.streaming import Lazy, Stream
from latefusion.recipes.schema import Group, OnError

SKIPPED_FILE = "skipped_rows.jsonl"
TRIES = 1000  # rows drawn for one that is bad


@dataclass(frozen=True)
class Bad:
    """In a sample's place: which row it is, what the data call it, and why it cannot be used."""

    row: int | None  # of a stream its position
    id: str
    error: BadSample
    place: int | str | None = None  # in the data, wherever it comes up in an epoch; None: as `id` says

    @classmethod
    def of(cls, sample: dict[str, Any], found: BadRow) -> Bad:
        """The sample of a batch that the collator did not take."""
        name = str(sample.get("id", found.at))
        return cls(sample.get("row"), name, found.reason, sample.get("place"))


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


class Guard:
    """A collator that answers for bad rows: raises, or puts others in their places.

    A batch keeps its size, so no process runs out of step with the others. Rows of a set are replaced by rows that
    the bad one's number draws, rows of a stream by those that follow: a run repeats itself, however it is divided.

    Args:
        collator: raises `BadRow` for what only it can find: too long, or nothing that the model's processor takes.
        on_error: of every bad row but those that are too long.
        too_long: of those.
        dataset: whose rows they are.
        folder: where `skipped_rows.jsonl` is written, a line a row and its reason; None: nowhere.
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
        """A sample for a bad row's place, another one in each attempt.

        Raises:
            Refused: it must not be left out, or there is no other.
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
        key, wanted = "on_error", self.on_error
        if isinstance(bad.error, TooLong):
            key, wanted = "too_long", self.too_long
        if wanted is OnError["raise"]:
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
