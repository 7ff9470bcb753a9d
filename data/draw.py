"""Which rows of any data something is measured on: those with images, up to their first answer, spread over images."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from latefusion.data.bad_rows import Bad, Checked, usable
from latefusion.data.load import parts_of, rows_of, training_data
from latefusion.data.mixing import Mixture
from latefusion.data.samples import first_exchange
from latefusion.data.sources import Rows
from latefusion.data.streaming import Lazy
from latefusion.recipes.schema import DataConfig, Source

LOOKED = 20  # rows with images opened, at most, for each that is wanted


@dataclass(frozen=True)
class Found:
    """A row with images: its number, what tells its images from others, and how many rows before it have the same."""

    row: int
    images: frozenset[Hashable]
    times: int


class Opened(Sequence[Any]):
    """The beginning of a stream, opened row by row."""

    def __init__(self, rows: Sequence[Lazy]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: Any) -> Any:
        return usable(self.rows[at])


def prompts_of(data: DataConfig, split: str | None, wanted: int) -> Any:
    """Samples by index, `Bad` where a row cannot be used; a row needs no answer, unless it comes from a stream.

    Args:
        split: in the place of the data's own.
        wanted: of a stream, how many rows are of use.

    Raises:
        FileNotFoundError, ValueError: what is named is not there, or is no such thing.
    """
    if split is not None:
        if data.source is not Source.dataset:
            raise ValueError(
                f"split={split} is for a data set; data of source={data.source.value} have no splits of that kind."
            )
        data = replace(data, split=split)
    if data.streaming:
        return Opened(training_data(data).first(2 * wanted))
    parts = [rows_of(part) for part in parts_of(data)]
    rows = [Rows(part.table, part.images, answered=False) for part in parts]
    weights = [part.weight for part in parts_of(data)]
    return Checked(rows[0] if len(rows) == 1 else Mixture(rows, weights, data.seed))


def with_images(rows: Any, *, wanted: int | None, seed: int) -> tuple[list[Found], list[Bad]]:
    """Rows that have images before their first answer, new images first, and rows that cannot be used.

    Rows are looked at in an order of `seed`, until `wanted` different images are found; None: all.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    times: Counter[frozenset[Hashable]] = Counter()
    found: list[Found] = []
    bad: list[Bad] = []
    for i in order:
        given = rows[i]
        if isinstance(given, Bad):
            bad.append(given)
            continue
        row = first_exchange(given)
        if not row["images"]:
            continue
        images = images_key(row)
        found.append(Found(i, images, times[images]))
        times[images] += 1
        if wanted is not None and (len(times) == wanted or len(found) == LOOKED * wanted):
            break
    return sorted(found, key=lambda row: row.times), bad


def images_key(row: dict[str, Any]) -> frozenset[Hashable]:
    """The same for rows about the same images: their pixels, or the scene that they show."""
    if "scene" in row:
        return frozenset([row["scene"]])
    return frozenset(
        hashlib.blake2b(f"{image.mode}{image.size}".encode() + image.tobytes(), digest_size=12).hexdigest()
        for image in row["images"]
    )


def opened(rows: Any, found: Sequence[Found]) -> list[dict[str, Any]]:
    """These rows, each up to its first answer."""
    return [first_exchange(rows[at.row]) for at in found]


def apart(found: Sequence[Found], measured: Sequence[Found], n: int) -> list[Found]:
    """At most `n` of `found` that share no image with `measured`, nor with each other."""
    taken = {image for row in measured for image in row.images}
    chosen: list[Found] = []
    for row in found:
        if len(chosen) == n:
            break
        if not row.images & taken:
            chosen.append(row)
            taken |= row.images
    return chosen


class NoImages(ValueError):
    """No row has an image."""


def distinct_images(
    rows: Sequence[dict[str, Any]], n: int, fits: Callable[[Any], bool] = lambda row: not isinstance(row, Bad)
) -> list[dict[str, Any]]:
    """The first `n` rows with images, each up to its first answer, no image (`scene`, if rows have it) twice.

    Args:
        fits: whether a row, which may be `Bad`, can be used; it may raise.

    Raises:
        NoImages: no row that can be used has one.
    """
    found: list[dict[str, Any]] = []
    seen: set[Any] = set()
    for i in range(len(rows)):
        given = rows[i]
        row = None if isinstance(given, Bad) else first_exchange(given)
        if row is not None and (not row["images"] or ("scene" in row and row["scene"] in seen)):
            continue
        if not fits(given) or row is None:
            continue
        seen.add(row.get("scene"))
        found.append(row)
        if len(found) == n:
            break
    if not found:
        raise NoImages("the data has no sample with an image; name data with images.")
    return found


def said_of(bad: Sequence[Bad]) -> list[str]:
    """In a sentence, that rows were left out."""
    if not bad:
        return []
    first = f"row {bad[0].id} {bad[0].error}"
    if len(bad) == 1:
        return [f"A row that cannot be used was left out: {first}."]
    return [f"{len(bad)} rows that cannot be used were left out; the first: {first}."]
