"""Accuracy of a learner by question type, with its controls, and against the number of random tokens kept."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from latefusion.data.icons.board_questions import TYPES, board_questions
from latefusion.data.icons.boards import Board
from latefusion.training.outcomes import Outcomes
from latefusion.training.smollm_icons.batch import Sample
from latefusion.training.smollm_icons.learner import Learner
from latefusion.training.smollm_icons.question_tree import VISION, question_tree


@torch.no_grad()
def answer_boards(
    learner: Learner,
    boards: Sequence[tuple[Board, Tensor]],
    split: str,
    *,
    other_picture: bool = False,
    keep: int | None = None,
    seed: int = 0,
) -> Outcomes:
    """Outcomes by question type on the first boards of a split, given with their features.

    Args:
        other_picture: show the next board's picture instead.
        keep: how many vision tokens, drawn at random for each board, the model sees; None: all.
    """
    outcomes: Outcomes = defaultdict(list)
    at_once = 1 if learner.device.type == "cpu" else 16
    for start in range(0, len(boards), at_once):
        numbered = [
            (k, board_questions(split, k, seed)) for k in range(start, min(start + at_once, len(boards)))
        ]
        samples = []
        for index, questions in numbered:
            features = boards[(index + other_picture) % len(boards)][1]
            places = list(range(VISION)) if keep is None else _some(keep, f"{split}/{index}")
            tree = question_tree(questions, learner.tokenizer)
            samples.append(Sample(tree, places, features=features[places]))
        for (_, questions), rights in zip(numbered, learner.right(samples), strict=True):
            for question, right in zip(questions, rights, strict=True):
                outcomes[question.type].append(right)
    return outcomes


def _some(keep: int, seed: str) -> list[int]:
    return sorted(random.Random(f"icons/keep/{seed}").sample(range(VISION), keep))


def percent(outcomes: Outcomes) -> dict[str, float]:
    """Accuracy in percent by type and over all, and the number of questions."""
    rights = [right for values in outcomes.values() for right in values]
    table = {
        kind: round(100 * sum(outcomes[kind]) / len(outcomes[kind]), 1) for kind in TYPES if kind in outcomes
    }
    return {**table, "all": round(100 * sum(rights) / len(rights), 1), "questions": len(rights)}
