"""The training data, and the questions to evaluate on, that a configuration names."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import Dataset

from latefusion.data import sources
from latefusion.data.bad_rows import Checked
from latefusion.data.prompts import undecoded
from latefusion.data.question_file import question_rows
from latefusion.data.question_sets import load_questions, samples
from latefusion.data.samples import sample_of
from latefusion.data.streaming import Stream
from latefusion.data.turns import Conversations
from latefusion.models.fingerprint import fingerprint, rows_fingerprint
from latefusion.recipes.schema import QUESTION_SETS, Config, DataConfig, PartConfig, Source

QUESTION_COLUMNS = ("id", "question", "answer", "type", "scene")


def training_data(data: DataConfig) -> Any:
    """Samples by index (`Checked`; of a question set, a `datasets.Dataset` or `Conversations`), or a `Stream` of them.

    Raises:
        FileNotFoundError, ValueError: the data are not there, or cannot be read.
    """
    if data.source in QUESTION_SETS:
        rows = samples(data.source, data.split, n_images=data.scenes, seed=data.seed, noise=data.noise)
        return rows if data.turns == 1 else Conversations(rows, rows.with_format(None)["scene"], data.turns)
    parts = parts_of(data)
    weights = [part.weight for part in parts]
    if data.streaming:
        streams = [streamed(part) for part in parts]
        tables = [table for table, _ in streams]
        make = [
            partial(_row, folder=folder, max_frames=part.max_frames)
            for part, (_, folder) in zip(parts, streams, strict=True)
        ]
        return Stream(
            tables,
            make,
            weights=weights,
            seed=data.seed,
            buffer=data.shuffle_buffer,
            name=repr(parts),
            paths=[part.path for part in parts],
        )
    rows = [rows_of(part) for part in parts]
    return Checked(rows[0] if len(rows) == 1 else Mixture(rows, weights, data.seed), data.group)


def data_fingerprint(dataset: Any) -> str:
    """Hash of a training set: its rows in their order and their images' contents; of a stream, the first rows."""
    if isinstance(dataset, datasets.Dataset):
        return rows_fingerprint(dataset, whole=False)
    return dataset.fingerprint()


def parts_of(data: DataConfig) -> list[PartConfig]:
    """The sources of a mixture, or the one source, each with its number of frames."""
    if data.source is Source.mixture:
        return [replace(part, max_frames=part.max_frames or data.max_frames) for part in data.parts]
    one = PartConfig(source=data.source, path=data.path or "", images=data.images, split=data.split)
    return [replace(one, max_frames=data.max_frames)]


def rows_of(part: PartConfig) -> sources.Rows:
    """The rows of a source.

    Raises:
        FileNotFoundError, ValueError: there are none.
    """
    if part.source is Source.llava:
        rows = sources.llava(part.path, part.images)
    else:
        rows = sources.dataset(part.path, split=part.split, images=part.images)
    rows.max_frames = part.max_frames or rows.max_frames
    if len(rows) == 0:
        raise ValueError(f"the data at {part.path} have no rows; name others with data.path=PATH.")
    return rows


def streamed(part: PartConfig) -> Any:
    return sources.stream(part.path, split=part.split, images=part.images)


def _row(table: Any, folder: Any, max_frames: int) -> dict[str, Any]:
    """A sample of a one-row Arrow table; text that is not UTF-8 shows only when it is read."""
    return sample_of(sources.python_row(table), folder, max_frames=max_frames)


class Mixture(Dataset):
    """Several sources as one, by weight: an epoch is as long as all together, and each has its weight's share of rows.

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
        """The row's part and its number there."""
        part, row = self.drawn(index)
        return f"{part}:{row}"

    def drawn(self, index: int) -> tuple[int, int]:
        """The part that a row comes from, and its number there."""
        part = bisect_right(self.ends, index)
        start = self.ends[part - 1] if part else 0
        return part, self.rows[part][index - start]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, row = self.drawn(index)
        sample = self.parts[part][row]
        return {**sample, "id": f"{part}:{sample['id']}"} if "id" in sample else sample

    def identity(self, index: int) -> str:
        """The row's part and its name there."""
        part, row = self.drawn(index)
        return f"{part}:{self.parts[part].identity(row)}"

    def sizes(self) -> list[tuple[int, int]]:
        """Characters of text and number of images of every row."""
        sizes = [part.sizes() for part in self.parts]
        return [sizes[part][row] for part, row in map(self.drawn, range(len(self)))]

    def fingerprint(self) -> str:
        """Hash of the parts' rows and of which of them are drawn."""
        return fingerprint([part.fingerprint() for part in self.parts], self.rows)


def evaluation_questions(config: Config) -> Any:
    """The questions that a run is evaluated on, a row each with its image; None if the configuration names none."""
    data, options = config.data, config.eval
    if data.eval_path is not None:
        if Path(data.eval_path).is_file():
            questions = question_rows(data.eval_path, key="data.eval_path", max_frames=data.max_frames)
        else:
            questions = undecoded(sources.read(data.eval_path, split=options.split))
    elif data.source in QUESTION_SETS:
        questions = load_questions(data.source, options.split, seed=data.seed)
    else:
        return None
    if options.samples is not None and options.samples < len(questions):
        questions = questions.shuffle(seed=0).select(range(options.samples))
    return questions


def check_questions(questions: Any) -> None:
    """Raise ValueError unless these rows can be evaluated on."""
    missing = [name for name in QUESTION_COLUMNS if name not in questions.column_names]
    if missing:
        raise ValueError(
            f"the dataset has no column {missing[0]!r}; evaluation needs {', '.join(QUESTION_COLUMNS)}."
        )
    if len(questions) == 0:
        raise ValueError("the dataset holds no question; ask for at least one scene.")
