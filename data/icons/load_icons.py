"""`icons` as rows: one a question, built once and cached by `datasets`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import datasets

from latefusion.data.icons.board_questions import board_questions
from latefusion.data.icons.boards import SPLITS, VERSION, make_board, render

N_BOARDS = {"train": 1000, "validation": 150, "test": 300, "new_drawings": 300}


def load_icons(split: str, n_boards: int | None = None, seed: int = 0) -> datasets.Dataset:
    """The first `n_boards` boards of a split, one row a question.

    Columns: `id`, `image` (PIL), `question`, `answer`, `type` (see `board_questions.TYPES`), `scene` (equal for the
    questions of one board). Without `n_boards`: see N_BOARDS.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; choose one of {', '.join(SPLITS)}")
    n_boards = N_BOARDS[split] if n_boards is None else n_boards
    if n_boards < 1:
        raise ValueError(f"n_boards={n_boards} leaves no board; give 1 or more")
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("id", "question", "answer", "type", "scene")}
        | {"image": datasets.Image()}
    )
    return datasets.Dataset.from_generator(
        _rows,
        features=features,
        gen_kwargs={"split": split, "n_boards": n_boards, "seed": seed},
        fingerprint=f"latefusion-icons-{VERSION}-{split}-{n_boards}-{seed}",
        split=datasets.NamedSplit(split),
    )


def _rows(split: str, n_boards: int, seed: int) -> Iterator[dict[str, Any]]:
    for index in range(n_boards):
        png = io.BytesIO()
        render(make_board(split, index, seed=seed)).save(png, format="PNG", compress_level=1)
        name = f"{split}-{seed}-{index:05d}"
        for k, question in enumerate(board_questions(split, index, seed)):
            yield {
                "id": f"{name}-{k:02d}",
                "image": {"bytes": png.getvalue(), "path": None},
                "question": question.question,
                "answer": question.answer,
                "type": question.type,
                "scene": name,
            }
