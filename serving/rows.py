"""Which rows of a vLLM step are text, and where their keys lie: numpy, without vLLM.

A step holds a chunk of each scheduled request, one after the other. A chunk is `scheduled` tokens long and begins
behind the `computed` tokens that earlier steps have done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sequences:
    """Queries as attention kernels take them: `m` sequences, each over all keys of its request up to its last query.

    Attributes:
        requests: int64 `[m]`, the request in the step (row of the block table) of each.
        starts: int32 `[m + 1]`, where each begins among the queries, and where the last one ends.
        lengths: int32 `[m]`, the keys that its last query reads.
    """

    requests: Array
    starts: Array
    lengths: Array

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def longest(self) -> int:
        """Queries of the longest one."""
        return int(np.diff(self.starts).max())


@dataclass(frozen=True)
class StepRows:
    """The rows of one step.

    Attributes:
        text: int64 `[n]`, rows that are text, in order.
        request: int64 `[n]`, the request of each.
        place: int64 `[n]`, its number among the text tokens of its request: where its key lies in layers without
            vision tokens.
        vision: int64 `[k]`, rows that are vision tokens, in order.
        order: int64 `[k]`, the number of each among the vision tokens of its request.
        compact: the text rows as sequences over the text keys of their requests.
        runs: the text rows as sequences over all keys of their requests: one for each run without a vision token in
            between, so that a kernel's causal mask over the last keys of a sequence is right.
    """

    text: Array
    request: Array
    place: Array
    vision: Array
    order: Array
    compact: Sequences
    runs: Sequences

    @property
    def all_text(self) -> bool:
        return len(self.vision) == 0


def step_rows(
    starts: Sequence[int] | Array,
    computed: Sequence[int] | Array,
    scheduled: Sequence[int] | Array,
    ranges: Sequence[Sequence[tuple[int, int]]],
) -> StepRows:
    """Sort the rows of a step.

    Args:
        starts: the row at which each request's chunk begins.
        computed: tokens of each request that are done.
        scheduled: the length of each chunk.
        ranges: for each request the first and last position (inclusive) of every stretch of vision tokens, ascending.
    """
    text, request, place, vision, order = _Column(), _Column(), _Column(), _Column(), _Column()
    compact, runs = _Builder(), _Builder()
    for i, (start, done, new) in enumerate(zip(starts, computed, scheduled, strict=True)):
        done, new = int(done), int(new)
        is_vision = np.zeros(new, bool)  # [new]
        seen = 0  # vision tokens that are done
        for first, last in ranges[i]:
            seen += max(0, min(last + 1, done) - first)
            is_vision[max(first - done, 0) : max(last + 1 - done, 0)] = True
        at, images = np.flatnonzero(~is_vision), np.flatnonzero(is_vision)
        vision.append(start + images)
        order.append(seen + np.arange(len(images)))
        if len(at) == 0:
            continue
        text.append(start + at)
        request.append(np.full(len(at), i))
        place.append(done - seen + np.arange(len(at)))
        compact.add(i, len(at), done - seen + len(at))
        for run in np.split(at, np.flatnonzero(np.diff(at) != 1) + 1):
            runs.add(i, len(run), done + int(run[-1]) + 1)
    return StepRows(
        text=text.array(),
        request=request.array(),
        place=place.array(),
        vision=vision.array(),
        order=order.array(),
        compact=compact.sequences(),
        runs=runs.sequences(),
    )


class _Column(list[Array]):
    """Pieces of an int64 array."""

    def array(self) -> Array:
        return np.concatenate([np.zeros(0, np.int64), *self]).astype(np.int64)


class _Builder:
    """Collects `Sequences`."""

    def __init__(self) -> None:
        self.requests: list[int] = []
        self.ends: list[int] = [0]
        self.lengths: list[int] = []

    def add(self, request: int, queries: int, keys: int) -> None:
        self.requests.append(request)
        self.ends.append(self.ends[-1] + queries)
        self.lengths.append(keys)

    def sequences(self) -> Sequences:
        return Sequences(
            np.array(self.requests, np.int64), np.array(self.ends, np.int32), np.array(self.lengths, np.int32)
        )
