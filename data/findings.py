"""What is wrong with each row of a data set, found as training would find it; behind `data/validate.py`."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from latefusion.data.bad_rows import Bad, Checked
from latefusion.data.collate import BadRow, Collator, collator_without_weights
from latefusion.data.load import parts_of, rows_of, streamed
from latefusion.data.records import sample_of
from latefusion.data.samples import BadSample
from latefusion.data.sources import name_of, python_row
from latefusion.data.streaming import Shard
from latefusion.recipes.schema import Config, PartConfig

BLOCK = 100  # rows of a stream that are read together
OWN = (  # of a row, in the words of a reason: what is its own, and what stands for it in the summary
    (re.compile(r" \(.*\)$"), ""),
    (re.compile(r"(?<=bad image: ).*?(?= (?:cannot|is|has) )"), "FILE"),
    (re.compile(r"(?<=message part ).*(?=; parts)"), "…"),
    (re.compile(r"(?<![\w=./'-])\d[\d,]*(?!\w)"), "N"),
)


@dataclass(frozen=True)
class Finding:
    """A row that was checked; `reason` None: it can be used."""

    id: str
    reason: str | None


class Findings(Dataset):
    """The findings on rows, each made when it is asked for."""

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
    """Why the collator does not take a sample; None: it does."""
    if collator is not None:
        try:
            collator([sample])
        except BadRow as error:
            return str(error.reason)
    return None


def findings(
    part: PartConfig, collator: Collator | None, *, workers: int, streaming: bool
) -> Iterator[Finding]:
    """One finding a row, in order."""
    if streaming:
        yield from _streamed(part, collator)
        return
    rows = Findings(Checked(rows_of(part)), collator)
    yield from DataLoader(rows, batch_size=None, num_workers=workers)


def _streamed(part: PartConfig, collator: Collator | None) -> Iterator[Finding]:
    table, folder = streamed(part)
    for number in range(table.num_shards):
        shard = Shard(table, BLOCK, number)
        while rows := shard.next():
            for place, records, at in rows:
                row = records.slice(at, 1)
                name = name_of(row) or place
                try:
                    yield Finding(name, rejected(sample_of(python_row(row), folder), collator))
                except BadSample as error:
                    yield Finding(name, str(error))


def validate(config: Config, *, console: Console) -> int:
    """Check every row and print the bad ones, with a summary at the end; how many there are."""
    try:
        collator = collator_without_weights(config)
    except OSError as error:
        collator = None
        reason = str(error).strip().splitlines()[0]
        console.print(f"Neither lengths nor chat template are checked: {reason}", markup=False)
    parts = parts_of(config.data)
    reasons: Counter[str] = Counter()
    total = 0
    for number, part in enumerate(parts):
        found: Iterable[Finding] = findings(
            part, collator, workers=config.train.workers, streaming=config.data.streaming
        )
        listed = sys.stdout.isatty()  # else a file or a pipe, which the bar must not take the rows from
        with Progress(console=console, transient=True, redirect_stdout=listed) as progress:
            for finding in progress.track(found, description=f"Checking {part.path}"):
                total += 1
                if finding.reason is not None:
                    prefix = f"{number}:" if len(parts) > 1 else ""
                    print(f"{prefix}{finding.id}\t{finding.reason}")
                    reasons[kind(finding.reason)] += 1
    if not total:
        raise ValueError("the data have no rows; name others with data.path=PATH.")
    bad = sum(reasons.values())
    if bad:
        table = Table("reason", "rows", title=f"{bad} of {total} rows cannot be used")
        for reason, rows in reasons.most_common():
            table.add_row(reason, str(rows))
        console.print(table)
    else:
        console.print(f"All {total} rows can be used.")
    return bad


def kind(reason: str) -> str:
    """A reason without what is the row's own: its file, its numbers, what a library said of it."""
    for own, stands in OWN:
        reason = own.sub(stands, reason)
    return reason
