"""`easy_vqa`: the pictures and questions of the PyPI package `easy-vqa` (Victor Zhou, MIT), a set nobody here wrote.

5,000 pictures of one coloured shape (64 x 64 pixels) with about 10 questions each. `test` is the package's own split;
`validation` is an eighth of the pictures that it trains on, the same for every seed.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

PACKAGE = "easy-vqa==1.0"
SPLITS = ("train", "validation", "test")
VALIDATION = 8  # one in eight of the package's training pictures
SHAPES = ("circle", "rectangle", "triangle")


def package_folder() -> Path:
    """Where the package keeps its pictures; raises FileNotFoundError with the command that installs it."""
    spec = find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"easy_vqa comes from a package that is not installed; run `pip install --no-deps {PACKAGE}`."
        )
    return Path(spec.origin).parent / "data"


def question_type(answer: str) -> str:
    """What a question asks for: `yes_no`, `shape` or `color`."""
    return "yes_no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"


def load_easy_vqa(
    split: str, n_images: int | None = None, seed: int = 0, per_image: int | None = None
) -> datasets.Dataset:
    """Some images of a split, drawn by `seed`, one row a question.

    Columns: `id`, `image` (PIL), `question`, `answer`, `type`, `scene` (equal for the questions of one image).
    Without `n_images`: all. `per_image` limits the questions of an image.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; choose one of {', '.join(SPLITS)}")
    import datasets  # lazy: a missing package is reported without it

    folder = package_folder() / ("test" if split == "test" else "train")
    questions = defaultdict(list)
    for question, answer, image in json.loads((folder / "questions.json").read_text()):
        if split == "test" or (image % VALIDATION == 0) == (split == "validation"):
            questions[image].append((question, answer))
    rng = random.Random(f"easy_vqa/{seed}/{split}")
    images = sorted(questions)
    rng.shuffle(images)
    columns: dict[str, list[str]] = {
        name: [] for name in ("id", "question", "answer", "type", "scene", "image")
    }
    for image in images[:n_images]:
        chosen = questions[image]
        if per_image is not None:
            chosen = rng.sample(chosen, min(per_image, len(chosen)))
        for k, (question, answer) in enumerate(chosen):
            row = (
                f"{split}-{image:05d}-{k:02d}",
                question,
                answer,
                question_type(answer),
                f"{split}-{image:05d}",
            )
            for name, value in zip(columns, (*row, str(folder / "images" / f"{image}.png")), strict=True):
                columns[name].append(value)
    return datasets.Dataset.from_dict(columns, split=datasets.NamedSplit(split)).cast_column(
        "image", datasets.Image()
    )
