"""The prompts that `eval/calibrate.py` asks: of a question set, or of any data with `messages` and `images`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from latefusion.data.draw import left_out, opened, prompt_rows, with_images
from latefusion.data.question_sets import is_question_set, load_questions
from latefusion.data.samples import first_exchange
from latefusion.data.videos import unreadable_by
from latefusion.eval.thresholds.settings import Arguments
from latefusion.recipes.schema import DataConfig, Source

ENOUGH = 192  # confirming prompts whose choices held on new prompts: docs/results/threshold_holds.json


@dataclass(frozen=True)
class Questions:
    """Prompts by number.

    Attributes:
        rows: by index, with their images; at: the numbers of those that are used.
        records: each prompt without its images: the question, `scene` (the same for prompts about the same images),
            and `answer`, if it has one.
        remarks: for the user to read, in sentences.
    """

    rows: Any
    at: Sequence[int]
    records: Sequence[dict[str, Any]]
    remarks: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[self.at[i]]
        return {**(first_exchange(row) if "messages" in row else row), **self.records[i]}

    @property
    def labelled(self) -> bool:
        return all("answer" in row for row in self.records)


def read(arguments: Arguments) -> tuple[Questions, Questions | None]:
    """The prompts to search on, and others to confirm on: of a question set, or of any data set with `messages` and
    `images`, in the order of `seed`.

    Raises:
        FileNotFoundError, ValueError: the data are not there, or none has an image.
    """
    if is_question_set(arguments.data):
        rows = load_questions(arguments.data, arguments.split)
        needed = arguments.samples + arguments.confirm
        return split(
            of_rows(rows.shuffle(seed=arguments.seed).select(range(min(needed, len(rows))))), arguments
        )
    data = DataConfig(source=Source.dataset, path=arguments.data, split=arguments.split)
    rows = prompt_rows(data, None, 0)
    drawn, bad = with_images(
        rows,
        needed=arguments.samples + arguments.confirm,
        seed=arguments.seed,
        no_videos=unreadable_by(arguments.model),
    )
    if not drawn:
        raise ValueError(
            " ".join([f"no prompt of {arguments.data} has an image: name others.", *left_out(bad)])
        )
    taken = drawn[: arguments.samples + arguments.confirm]
    records = []
    for at, row in zip(taken, opened(rows, taken), strict=True):
        last = row["messages"][-1]
        answer = {"answer": _text(last)} if last["role"] == "assistant" else {}
        records.append(
            {"messages": row["messages"], "scene": " ".join(sorted(map(str, at.images))), **answer}
        )
    return split(Questions(rows, [at.row for at in taken], records, left_out(bad)), arguments)


def split(prompts: Questions, arguments: Arguments) -> tuple[Questions, Questions | None]:
    """The first `samples` prompts to search on, at most half of those there are, and the rest to confirm on."""
    n, remarks = len(prompts), list(prompts.remarks)
    searched = arguments.samples
    if n < arguments.samples + arguments.confirm:
        searched = min(arguments.samples, n if arguments.confirm == 0 else max(1, n // 2))
    if searched == n and arguments.confirm > 0:
        remarks.append("The data have one prompt, so no other confirms the setting.")
    elif searched < min(arguments.samples, n):
        remarks.append(
            f"The data have {n} prompts, so {searched} search and {n - searched} confirm the setting: more prompts "
            "narrow its upper limit, and a cheaper setting may do."
        )
    if 0 < n - searched < ENOUGH:
        remarks.append(
            f"Only {n - searched} other prompts confirm the setting: so few may miss the ones that it costs most; "
            f"{ENOUGH} or more held on the embedded base (docs/inference.md)."
        )

    def part(numbers: range) -> Questions:
        at, records = [prompts.at[i] for i in numbers], [prompts.records[i] for i in numbers]
        return Questions(prompts.rows, at, records, remarks if numbers.start == 0 else ())

    return part(range(searched)), part(range(searched, n)) if searched < n else None


def of_rows(rows: Dataset) -> Questions:
    """All of these rows of `load_questions`."""
    plain = rows.with_format(None).remove_columns([c for c in rows.column_names if c.startswith("image")])
    return Questions(rows, range(len(rows)), list(plain))


def _text(message: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")
