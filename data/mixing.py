"""Several sources as one, by weight."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch.utils.data import Dataset


class Mixture(Dataset):
    """An epoch of several sources, as long as all of them together, in which each has its weight's share of rows.

    A source that is short of its share is repeated (whole, and then a random part of it), one that has more is
    drawn from without repetition. Weights are relative; weights proportional to the sources' sizes give them all once.

    Args:
        parts: the sources.
        weights: one each.
        seed: of the draws.

    Raises:
        ValueError: a weight is so small that its source has no row.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float], seed: int):
        self.parts = parts
        total = sum(map(len, parts))
        shares = [weight / sum(weights) for weight in weights]
        ends = [round(total * share) for share in accumulate(shares)]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        if 0 in counts:
            k = counts.index(0)
            raise ValueError(
                f"data.parts[{k}].weight={weights[k]} is less than one row of {total}; raise it, or leave it out."
            )
        self.ends = list(accumulate(counts))
        self.rows: list[list[int]] = []  # of each part
        for k, (part, count) in enumerate(zip(parts, counts, strict=True)):
            whole, rest = divmod(count, len(part))
            drawn = random.Random(f"{seed} {k}").sample(range(len(part)), rest)
            self.rows.append(list(range(len(part))) * whole + sorted(drawn))

    def __len__(self) -> int:
        return self.ends[-1]

    def place(self, index: int) -> str:
        """Where the row stands in the data."""
        part, row = self.drawn(index)
        return f"{part}:{row}"

    def drawn(self, index: int) -> tuple[int, int]:
        """Which part, and which of its rows."""
        part = bisect_right(self.ends, index)
        start = self.ends[part - 1] if part else 0
        return part, self.rows[part][index - start]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, row = self.drawn(index)
        sample = self.parts[part][row]
        return {**sample, "id": f"{part}:{sample['id']}"} if "id" in sample else sample

    def identity(self, index: int) -> str:
        part, row = self.drawn(index)
        return f"{part}:{self.parts[part].identity(row)}"

    def sizes(self) -> list[tuple[int, int]]:
        """Characters of text and number of images of every row."""
        sizes = [part.sizes() for part in self.parts]
        return [sizes[part][row] for part, row in map(self.drawn, range(len(self)))]
