"""The training data, and the questions to evaluate on, that a configuration names."""

from __future__ import annotations

from functools import partial
from typing import Any

from latefusion.data import sources
from latefusion.data.bad_rows import Checked
from latefusion.data.mixing import Mixture
from latefusion.data.packing import Conversations
from latefusion.data.scenes import load_scenes
from latefusion.data.streaming import Stream
from latefusion.recipes.schema import Config, DataConfig, PartConfig, Source

QUESTION_COLUMNS = ("id", "question", "answer", "type", "scene")


def training_data(data: DataConfig) -> Any:
    """Samples by index (`Checked`; of `scenes`, a `datasets.Dataset` or `Conversations`), or a `Stream` of them.

    Raises:
        FileNotFoundError, ValueError: what is named is not there, or is no such thing.
    """
    if data.source is Source.scenes:
        rows = sources.scenes(data.split, n_scenes=data.scenes, seed=data.seed)
        return rows if data.turns == 1 else Conversations(rows, rows.with_format(None)["scene"], data.turns)
    parts = parts_of(data)
    weights = [part.weight for part in parts]
    if data.streaming:
        streams = [streamed(part) for part in parts]
        tables = [table for table, _ in streams]
        make = [partial(_row, folder=folder) for _, folder in streams]
        return Stream(
            tables, make, weights=weights, seed=data.seed, buffer=data.shuffle_buffer, name=repr(parts)
        )
    rows = [rows_of(part) for part in parts]
    return Checked(rows[0] if len(rows) == 1 else Mixture(rows, weights, data.seed), data.group)


def parts_of(data: DataConfig) -> list[PartConfig]:
    """The sources of a mixture, or the one source there is."""
    if data.source is Source.mixture:
        return data.parts
    return [PartConfig(source=data.source, path=data.path or "", images=data.images, split=data.split)]


def rows_of(part: PartConfig) -> sources.Rows:
    """The rows of a source.

    Raises:
        FileNotFoundError, ValueError: there are none.
    """
    if part.source is Source.llava:
        rows = sources.llava(part.path, part.images)
    else:
        rows = sources.dataset(part.path, split=part.split, images=part.images)
    if len(rows) == 0:
        raise ValueError(f"the data at {part.path} have no rows; name others with data.path=PATH.")
    return rows


def streamed(part: PartConfig) -> Any:
    return sources.stream(part.path, split=part.split, images=part.images)


def _row(table: Any, folder: Any) -> dict[str, Any]:
    """A sample of a one-row Arrow table; text that is no UTF-8 shows only when it is read."""
    return sources.sample_of(sources.python_row(table), folder)


def evaluation_questions(config: Config) -> Any:
    """The questions that a run is evaluated on, a row each with its image; None if the configuration names none."""
    data, options = config.data, config.eval
    if data.eval_path is not None:
        questions = sources.read(data.eval_path, split=options.split)
    elif data.source is Source.scenes:
        questions = load_scenes(options.split, seed=data.seed)
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
