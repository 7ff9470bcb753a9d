"""The sets of questions that need no file of a user's: `scenes`, `icons` and `easy_vqa`.

Each row is one question about one image, with the columns `id`, `image`, `question`, `answer`, `type` and `scene`
(equal for the questions of one image). Splits are fixed, by seed where they are drawn.
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import datasets

from latefusion.data.easy_vqa import load_easy_vqa
from latefusion.data.icons.load_icons import load_icons
from latefusion.data.scenes import load_scenes
from latefusion.data.sources import question_samples
from latefusion.recipes.schema import QUESTION_SETS, Source

LOAD = {Source.scenes: load_scenes, Source.icons: load_icons, Source.easy_vqa: load_easy_vqa}
MADE_FROM = {
    Source.scenes: "data/scenes.py",
    Source.icons: "data/icons",
    Source.easy_vqa: "the package easy-vqa",
}


def load_questions(
    source: Source | str, split: str, n_images: int | None = None, seed: int = 0
) -> datasets.Dataset:
    """The questions about the first `n_images` images of a split; None: the set's usual number.

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: the package that the set is made from is not here.
    """
    return LOAD[Source(source)](split, n_images, seed)


def is_question_set(name: str) -> bool:
    """Whether `name` is one of these sets."""
    return name in [source.value for source in QUESTION_SETS]


def usual_set(model: str) -> str:
    """The set that a model is asked from, by name, where the user names none."""
    return "icons" if model == "smollm_icons" else "scenes"


def samples(
    source: Source, split: str, *, n_images: int | None = None, seed: int = 0, noise: float = 0.0
) -> Any:
    """A split as samples `{"id", "messages", "images", ...}`, made when a row is asked for.

    Args:
        noise: share of the rows whose answer is another row's of the same type.
    """
    rows = load_questions(source, split, n_images, seed)
    if noise:
        rows = with_wrong_answers(rows, noise, seed)
    return rows.with_transform(question_samples)


def with_wrong_answers(rows: datasets.Dataset, share: float, seed: int) -> datasets.Dataset:
    """The rows, a share of them, drawn by `seed`, with a wrong answer: one that another question of the type has."""
    plain = rows.select_columns(["answer", "type"]).with_format(None)
    answers, types = list(plain["answer"]), list(plain["type"])
    of_type = defaultdict(set)
    for answer, kind in zip(answers, types, strict=True):
        of_type[kind].add(answer)
    rng = random.Random(f"noise/{seed}")
    for i in rng.sample(range(len(answers)), round(share * len(answers))):
        others = sorted(of_type[types[i]] - {answers[i]})
        if others:
            answers[i] = rng.choice(others)
    return rows.remove_columns("answer").add_column("answer", answers)  # type: ignore[call-arg]
