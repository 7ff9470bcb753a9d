"""The prompts that `eval/calibrate.py` asks: of `scenes`, or of any data with `messages` and `images`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from latefusion.data.draw import opened, prompts_of, said_of, with_images
from latefusion.data.samples import first_exchange
from latefusion.data.scenes import load_scenes
from latefusion.recipes.schema import DataConfig, Source

if TYPE_CHECKING:
    from latefusion.eval.calibrate import Arguments


@dataclass(frozen=True)
class Questions:
    """Prompts by number.

    Attributes:
        rows: by index, with their images; at: which of them are asked.
        known: of each prompt what is known without its images: what is asked, `scene` (the same for prompts about the
            same images), and `answer`, if it has one.
        source: what else tells these prompts from others.
        remarks: what should be known of them, in sentences.
    """

    rows: Any
    at: Sequence[int]
    known: Sequence[dict[str, Any]]
    source: str
    remarks: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[self.at[i]]
        return {**(first_exchange(row) if "messages" in row else row), **self.known[i]}

    @property
    def labelled(self) -> bool:
        return all("answer" in row for row in self.known)


def read(asked: Arguments) -> Questions:
    """The prompts: rows of `scenes`, or of any data set with `messages` and `images`, in the order of `seed`.

    Raises:
        FileNotFoundError, ValueError: the data are not there, or none has an image.
    """
    if asked.data == "scenes":
        rows = load_scenes(asked.split)
        if asked.samples is not None and asked.samples < len(rows):
            rows = rows.shuffle(seed=asked.seed).select(range(asked.samples))
        return of_scenes(rows)
    data = DataConfig(source=Source.dataset, path=asked.data, split=asked.split)
    rows = prompts_of(data, None, 0)
    found, bad = with_images(rows, wanted=asked.samples, seed=asked.seed)
    if not found:
        raise ValueError(f"no prompt of {asked.data} has an image; VisiPruner has nothing to prune there.")
    taken = found[: asked.samples]
    known = []
    for at, row in zip(taken, opened(rows, taken), strict=True):
        last = row["messages"][-1]
        answer = {"answer": _text(last)} if last["role"] == "assistant" else {}
        known.append({"messages": row["messages"], "scene": " ".join(sorted(map(str, at.images))), **answer})
    return Questions(rows, [at.row for at in taken], known, asked.data, said_of(bad))


def of_scenes(rows: Dataset) -> Questions:
    """All of these rows of `load_scenes`."""
    plain = rows.with_format(None).remove_columns([c for c in rows.column_names if c.startswith("image")])
    return Questions(rows, range(len(rows)), list(plain), rows._fingerprint)


def _text(message: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")
