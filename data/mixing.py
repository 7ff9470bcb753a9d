"""Several sources as one: by weight, as a whole that can be indexed or as a stream."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from latefusion.data.messages import BadSample
from latefusion.data.sources import name_of


class Mixture(Dataset):
    """An epoch of several sources, as long as all of them together, in which each has its weight's share of rows.

    A source that is short of its share is repeated (whole, and then a random part of it), one that has more is
    drawn from without repetition. Weights are relative; weights proportional to the sources' sizes give them all once.

    Args:
        parts: the sources.
        weights: one each.
        seed: of the draws.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float], seed: int):
        self.parts = parts
        total = sum(map(len, parts))
        shares = [weight / sum(weights) for weight in weights]
        ends = [round(total * share) for share in accumulate(shares)]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self.ends = list(accumulate(counts))
        self.rows: list[list[int]] = []  # of each part
        for k, (part, count) in enumerate(zip(parts, counts, strict=True)):
            whole, rest = divmod(count, len(part))
            drawn = random.Random(f"{seed} {k}").sample(range(len(part)), rest)
            self.rows.append(list(range(len(part))) * whole + sorted(drawn))

    def __len__(self) -> int:
        return self.ends[-1]

    def place(self, index: int) -> tuple[int, int]:
        """Which part, and which of its rows."""
        part = bisect_right(self.ends, index)
        start = self.ends[part - 1] if part else 0
        return part, self.rows[part][index - start]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, row = self.place(index)
        sample = self.parts[part][row]
        return {**sample, "id": f"{part}:{sample['id']}"} if "id" in sample else sample

    def identity(self, index: int) -> str:
        part, row = self.place(index)
        return f"{part}:{self.parts[part].identity(row)}"

    def sizes(self) -> list[tuple[int, int]]:
        """Characters of text and number of images of every row."""
        sizes = [part.sizes() for part in self.parts]
        return [sizes[part][row] for part, row in map(self.place, range(len(self)))]


class Lazy:
    """A row of a stream that has not been made into a sample yet.

    Args:
        name: the row's, for messages.
        make: gives the sample, or raises `BadSample`.
    """

    def __init__(self, name: str, make: Callable[[], dict[str, Any]]):
        self.name, self.make = name, make


class Stream(IterableDataset):
    """Endless rows of one or several iterable sources, the next one's source drawn by weight.

    Loader workers share the rows out among them by number. Rows are not opened here, so that a process only opens
    those it trains on.

    Args:
        sources: `datasets.IterableDataset`s in Arrow format.
        make: for each source, what makes a sample of a row.
        weights: one a source.
        seed: of draws and of shuffling.
        buffer: rows among which each source is shuffled.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        make: Sequence[Callable[[dict[str, Any]], dict[str, Any]]],
        *,
        weights: Sequence[float],
        seed: int,
        buffer: int,
    ):
        self.sources, self.make, self.weights = sources, make, weights
        self.seed, self.buffer = seed, buffer

    def __iter__(self) -> Iterator[Lazy]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        draw = random.Random(self.seed)
        feeds = [self.feed(k) for k in range(len(self.sources))]
        number = 0
        while True:
            k = draw.choices(range(len(feeds)), self.weights)[0] if len(feeds) > 1 else 0
            row, record = next(feeds[k])
            if number % workers == mine:
                own = name_of(record) or str(row)
                yield Lazy(f"{k}:{own}" if len(feeds) > 1 else own, partial(self.make[k], record))
            number += 1

    def feed(self, k: int) -> Iterator[tuple[int, Any]]:
        """One source's rows, again and again, each time in another order."""
        for epoch in range(10**9):
            empty = True
            source = self.sources[k].shuffle(seed=self.seed + epoch, buffer_size=self.buffer)
            for row, record in enumerate(
                source.iter(batch_size=1)
            ):  # iterated plainly, it would share out itself
                empty = False
                yield row, record
            if empty:
                raise BadSample("the stream has no rows")
