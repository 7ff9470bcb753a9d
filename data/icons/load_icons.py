"""`icons` as rows: one a question; each board is drawn once, into a file of the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
from rich.progress import track

from latefusion.data.icons.board_questions import board_questions
from latefusion.data.icons.boards import SPLITS, VERSION, make_board, render
from latefusion.data.icons.pictures import cache_folder

N_BOARDS = {"train": 400, "validation": 150, "test": 300, "new_drawings": 300}


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
    files = draw_boards(split, n_boards, seed)
    columns: dict[str, list[str]] = {
        name: [] for name in ("id", "question", "answer", "type", "scene", "image")
    }
    for index, file in enumerate(files):
        for k, question in enumerate(board_questions(split, index, seed)):
            row = (
                f"{file.stem}-{k:02d}",
                question.question,
                question.answer,
                question.type,
                file.stem,
                str(file),
            )
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value)
    table = datasets.Dataset.from_dict(columns, split=datasets.NamedSplit(split))
    return table.cast_column("image", datasets.Image())


def draw_boards(split: str, n_boards: int, seed: int) -> list[Path]:
    """The pictures of the first boards of a split, drawn where they are not there yet (90 kB each)."""
    folder = cache_folder() / f"boards_{VERSION}"
    files = [folder / f"{split}-{seed}-{index:05d}.png" for index in range(n_boards)]
    missing = [index for index, file in enumerate(files) if not file.is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    for index in track(missing, f"Drawing boards of {split}", disable=len(missing) < 50):
        part = files[index].with_suffix(f".{os.getpid()}")
        render(make_board(split, index, seed=seed)).save(part, format="PNG", compress_level=1)
        part.replace(files[index])
    return files
