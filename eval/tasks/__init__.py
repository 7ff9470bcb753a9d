"""Benchmarks with their own published scoring; one module a family of scoring."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from latefusion.eval.tasks import choice, documents, exact, vqa, yes_no
from latefusion.eval.tasks.base import Task
from latefusion.recipes.compose import did_you_mean
from latefusion.recipes.schema import QUESTION_SETS

# name: how to load it from (a folder or hub id, a split), and the split that is usually reported
TASKS: dict[str, tuple[Callable[[str, str], Task], str]] = {
    **{source.value: (partial(exact.question_set, source.value), "test") for source in QUESTION_SETS},
    "vqav2": (vqa.vqav2, "validation"),
    "gqa": (exact.gqa, "test"),
    "textvqa": (vqa.textvqa, "validation"),
    "textvqa_ocr": (partial(vqa.textvqa, hints=True), "validation"),
    "pope": (yes_no.pope, "test"),
    "mme": (yes_no.mme, "test"),
    "mmbench": (choice.mmbench, "validation"),
    "scienceqa_img": (choice.scienceqa, "test"),
    "seed_image": (choice.seed_image, "test"),
    "vizwiz": (vqa.vizwiz, "validation"),
    "chartqa": (documents.chartqa, "test"),
    "docvqa": (documents.docvqa, "validation"),
}


def load_task(name: str, where: str, split: str | None = None) -> Task:
    """A benchmark's questions.

    Args:
        where: folder with its files as they are distributed, or a hub id; split: None: the one usually reported.

    Raises:
        ValueError: there is no such task.
        FileNotFoundError: its data are not there.
    """
    if name not in TASKS:
        hint = did_you_mean(name, TASKS)
        raise ValueError(f"task {name!r} does not exist{hint}; tasks can be {', '.join(TASKS)}.")
    load, usual = TASKS[name]
    return load(where, split or usual)
