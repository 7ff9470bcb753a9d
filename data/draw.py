"""Draw rows to measure on: rows with images or videos, cut after the first answer, different images first."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from latefusion.data.bad_rows import Bad, Checked, usable
from latefusion.data.load import Mixture, parts_of, rows_of, training_data
from latefusion.data.samples import BadSample, first_exchange, videos_of_sample
from latefusion.data.sources import Rows
from latefusion.data.streaming import Lazy
from latefusion.models.fingerprint import image_fingerprint
from latefusion.recipes.schema import DataConfig, Source

OPENED = 20  # rows with images that are opened at most for each image that is needed


@dataclass(frozen=True)
class ImageRow:
    """A row with images or videos: its number, a key of these, and how many rows before it have the same."""

    row: int
    images: frozenset[Hashable]
    times: int


class StreamStart(Sequence[Any]):
    """The first rows of a stream, opened one by one."""

    def __init__(self, rows: Sequence[Lazy]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: Any) -> Any:
        return usable(self.rows[at])


def prompt_rows(data: DataConfig, split: str | None, needed: int) -> Any:
    """Samples by index, `Bad` where a row cannot be used; a row needs no answer, unless it comes from a stream.

    Args:
        split: replaces the data's own.
        needed: how many rows of a stream are needed.

    Raises:
        FileNotFoundError, ValueError: the data are not there, or cannot be read.
    """
    if split is not None:
        if data.source is not Source.dataset:
            raise ValueError(
                f"split={split} is for a data set; data of source={data.source.value} have no splits of that kind."
            )
        data = replace(data, split=split)
    if data.streaming:
        return StreamStart(training_data(data).first(2 * needed))
    parts = [rows_of(part) for part in parts_of(data)]
    rows = [Rows(p.table, p.images, answered=False, max_frames=p.max_frames) for p in parts]
    weights = [part.weight for part in parts_of(data)]
    return Checked(rows[0] if len(rows) == 1 else Mixture(rows, weights, data.seed))


def with_images(
    rows: Any, *, needed: int | None, seed: int, no_videos: str = ""
) -> tuple[list[ImageRow], list[Bad]]:
    """Rows that have images or videos before their first answer, new images first, and rows that cannot be used.

    Rows are opened in an order drawn by `seed`, until there are `needed` different images; None: all rows.

    Args:
        no_videos: why a row with a video cannot be used (`videos.unreadable`); empty: it can.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    times: Counter[frozenset[Hashable]] = Counter()
    image_rows: list[ImageRow] = []
    bad: list[Bad] = []
    for i in order:
        row = rows[i]
        if isinstance(row, Bad):
            bad.append(row)
            continue
        sample = first_exchange(row)
        if not shows(sample):
            continue
        if no_videos and videos_of_sample(sample):
            bad.append(Bad(i, str(sample.get("id", i)), BadSample(f"has a video: {no_videos}")))
            continue
        images = images_key(sample)
        image_rows.append(ImageRow(i, images, times[images]))
        times[images] += 1
        if needed is not None and (len(times) == needed or len(image_rows) == OPENED * needed):
            break
    return sorted(image_rows, key=lambda row: row.times), bad


def images_key(row: dict[str, Any]) -> frozenset[Hashable]:
    """A key that rows about the same images and videos share: their pixels, or the scene that they show."""
    if "scene" in row:
        return frozenset([row["scene"]])
    videos = (video.fingerprint() for video in videos_of_sample(row))
    return frozenset([*(image_fingerprint(image) for image in row["images"]), *videos])


def shows(sample: dict[str, Any]) -> bool:
    """Whether a sample has an image or a video."""
    return bool(sample["images"] or videos_of_sample(sample))


def opened(rows: Any, image_rows: Sequence[ImageRow]) -> list[dict[str, Any]]:
    """The samples of these rows, each up to its first answer."""
    return [first_exchange(rows[row.row]) for row in image_rows]


def with_other_images(image_rows: Sequence[ImageRow], used: Sequence[ImageRow], n: int) -> list[ImageRow]:
    """At most `n` of the rows, which share no image with the rows `used`, nor with each other."""
    taken = {image for row in used for image in row.images}
    chosen: list[ImageRow] = []
    for row in image_rows:
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
    """The first `n` rows with images or videos, each up to its first answer, no image (`scene`, if rows have it) twice.

    Args:
        fits: whether a row, which may be `Bad`, can be used; it may raise.

    Raises:
        NoImages: no row that can be used has one.
    """
    chosen: list[dict[str, Any]] = []
    seen: set[Any] = set()
    for i in range(len(rows)):
        row = rows[i]
        sample = None if isinstance(row, Bad) else first_exchange(row)
        if sample is not None and (not shows(sample) or ("scene" in sample and sample["scene"] in seen)):
            continue
        if not fits(row) or sample is None:
            continue
        seen.add(sample.get("scene"))
        chosen.append(sample)
        if len(chosen) == n:
            break
    if not chosen:
        raise NoImages("the data has no sample with an image; name data with images.")
    return chosen


def left_out(bad: Sequence[Bad]) -> list[str]:
    """A sentence about the rows that were left out; none if there were none."""
    if not bad:
        return []
    first = f"row {bad[0].id} {bad[0].error}"
    if len(bad) == 1:
        return [f"A row that cannot be used was left out: {first}."]
    return [f"{len(bad)} rows that cannot be used were left out; the first: {first}."]
