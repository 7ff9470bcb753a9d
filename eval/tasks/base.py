"""What a benchmark is to the evaluation: its questions, a system's answer to one of them, how its files are found."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets

from latefusion.data.json_file import Broken, read_json
from latefusion.data.prompts import undecoded
from latefusion.data.sources import cache_folder, read
from latefusion.eval.metrics import Measure, normalise

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
Score = Callable[[str, dict[str, Any]], float]  # of (prediction, row), from 0 to 1


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One system's answer to one question.

    Attributes:
        system: key of the system; task, id, type, scene: of the question.
        cluster: shared by the questions about one image, also across tasks (`tasks/clusters.py`); empty: the scene.
        answer: the right one, or the first of several.
        prediction: decoded text; score: what the task's scorer gives it, from 0 to 1.
        text_tokens: prompt tokens that are neither vision nor padding.
        tokens: tokens that entered each decoder layer in the prefill, from `Attachment.trace`.
        fusion_layer, exit_layer, frozen, reads: as the trace has them.
    """

    system: str
    task: str
    id: str
    type: str
    scene: str
    cluster: str = ""
    question: str
    answer: str
    prediction: str
    score: float
    text_tokens: int
    tokens: list[int] = field(repr=False)
    fusion_layer: int | None
    exit_layer: int | None
    frozen: list[int] = field(default_factory=list, repr=False)
    reads: list[int] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not self.cluster:
            object.__setattr__(self, "cluster", self.scene)

    @property
    def correct(self) -> bool:
        return self.score >= 0.5

    @property
    def vision_tokens(self) -> list[int]:
        return [n - self.text_tokens for n in self.tokens]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "correct": self.correct}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Answer:
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})


def exact_match(prediction: str, row: dict[str, Any]) -> float:
    """1 if the prediction equals one of the row's `answers` (or its `answer`) after `normalise`."""
    right = row["answers"] if row.get("answers") else [row["answer"]]
    return float(normalise(prediction) in [normalise(answer) for answer in right])


def _same(answers: list[Answer]) -> list[Answer]:
    return answers


def _none(answers: list[Answer]) -> dict[str, Measure]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions with their benchmark's own scoring.

    Attributes:
        name: what tables call it.
        rows: the columns of `data.load.QUESTION_COLUMNS`, `images` and `prompt` (the question as it is put to the
            model), and what `score` reads.
        metric: what the mean of the scores is called.
        score: of `(prediction, row)`, from 0 to 1.
        units: turns answers into the units that count as one question (MMBench's rotations).
        measures: the benchmark's further figures, by name.
        max_new_tokens: None: as the longest answer needs.
        ocr: its answers are read from the image.
        split, source: of the data.
        clusters: of each row, as `tasks/clusters.py` finds them; empty: a row's scene is its cluster.
    """

    name: str
    rows: datasets.Dataset
    metric: str = "exact match"
    score: Score = field(default=exact_match, repr=False)
    units: Callable[[list[Answer]], list[Answer]] = field(default=_same, repr=False)
    measures: Callable[[list[Answer]], dict[str, Measure]] = field(default=_none, repr=False)
    max_new_tokens: int | None = None
    ocr: bool = False
    split: str = ""
    source: str = ""
    clusters: Sequence[str] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a benchmark's data are: its files as it distributes them, or a data set of the hub.

    Args:
        task: its name; where: a folder, or a hub id; split: of the hub's data set.
        needs: what the folder has to hold, with `|` between alternatives.
        come_from: where to get them.
        hub: a hub id with the same questions.
    """

    task: str
    where: str
    needs: Sequence[str]
    come_from: str
    hub: str = ""

    @property
    def local(self) -> bool:
        """The files are in a folder as the benchmark distributes them (else: on the hub, or a copy of that)."""
        folder = Path(self.where)
        saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
        return folder.is_dir() and not saved and next(folder.rglob("*.parquet"), None) is None

    def check(self) -> None:
        """Raise FileNotFoundError, in one sentence, if a folder lacks a file or does not exist."""
        folder = Path(self.where)
        looks_local = (
            folder.is_dir() or not self.hub or self.where.count("/") != 1 or self.where.startswith(".")
        )
        missing = [name for name in self.needs if self._first(name) is None]
        if looks_local and (not folder.is_dir() or (self.local and missing)):
            files = ", ".join(
                name.replace("|", " or ") for name in (missing if folder.is_dir() else self.needs)
            )
            hub = (
                f", or name a hub id or a copy of it with sources.{self.task}={self.hub}" if self.hub else ""
            )
            raise FileNotFoundError(
                f"no data for task {self.task} in {self.where}: put {files} there (from {self.come_from}){hub}."
            )

    def path(self, name: str) -> Path:
        """The first of the alternatives in `name` that is there."""
        path = self._first(name)
        assert path is not None, "check() was not called"
        return path

    def json(self, name: str) -> Any:
        """The contents of a JSON file.

        Raises:
            ValueError: it is not JSON, or not UTF-8.
        """
        path = self.path(name)
        try:
            return json.loads(path.read_text("utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON in UTF-8 ({error}).") from None

    def lines(self, name: str) -> list[Any]:
        """The rows of a file of JSON lines.

        Raises:
            ValueError: a line is not a JSON object.
        """
        path = self.path(name)
        rows = list(read_json(path))
        for place, row in rows:
            if isinstance(row, Broken):
                raise ValueError(f"{path}: {place} {row}.")
        return [row for _, row in rows]

    def hub_rows(self, split: str, config: str | None = None) -> datasets.Dataset:
        """The hub's data set, its files in a folder, or one saved to disk; read lazily."""
        return read(self.where, split=split) if config is None else read_config(self.where, config, split)

    def _first(self, name: str) -> Path | None:
        paths = [Path(self.where) / choice for choice in name.split("|")]
        return next((path for path in paths if path.exists()), None)


def read_config(where: str, config: str, split: str) -> datasets.Dataset:
    """Read one configuration of a hub data set.

    Raises:
        FileNotFoundError: it does not exist or cannot be reached.
    """
    try:
        return datasets.load_dataset(where, config, split=split, cache_dir=cache_folder(where))
    except (
        FileNotFoundError,
        ConnectionError,
        ValueError,
        datasets.exceptions.DatasetNotFoundError,
    ) as error:
        raise FileNotFoundError(
            f"no data set {where} with configuration {config!r} and split {split!r} can be read from here ({error})."
        ) from error


def mapped(rows: datasets.Dataset, question: Callable[[dict[str, Any]], dict[str, Any]]) -> datasets.Dataset:
    """A hub data set whose column `image` holds the picture, or a list of pictures, in the form of `rows_of`.

    Pictures are not decoded.
    """
    kept = undecoded(rows).select_columns(["image"])  # in this order: datasets cannot join the other
    if isinstance(rows.features["image"], datasets.List):
        kept = kept.rename_column("image", "images")
    plain = rows.remove_columns(["image"])
    fields: dict[str, list[Any]] = {}
    for number, row in enumerate(plain):
        for name, value in question({"row": number, **row}).items():
            fields.setdefault(name, []).append(value)
    return datasets.concatenate_datasets([datasets.Dataset.from_dict(fields), kept], axis=1)
