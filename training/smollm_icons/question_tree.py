"""All questions of a board in one forward pass: a tree of tokens behind one picture.

Questions that begin alike share their beginning. A token sees the picture and the tokens on its own path, at
the position that it would have alone, so every answer is what it would be alone; a board's 40 questions cost about
160 tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latefusion.data.icons.board_questions import Question
from latefusion.models.executor.prompt import IGNORE
from latefusion.models.smollm_icons.tower import SIDE

VISION = SIDE * SIDE
OPENING = "Image:"


class Tree(NamedTuple):
    """Tokens with the depth and label (IGNORE: none) of each, who sees whom, and where each answer lies."""

    ids: list[int]
    depths: list[int]
    labels: list[int]
    sees: Tensor  # [T, T], bool
    answers: list[list[int]]  # of each question, the tokens that must predict its answer


@lru_cache(maxsize=20_000)
def _token_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def question_tree(questions: list[Question], tokenizer) -> Tree:
    """The questions and answers of a board as one tree; each path is `\\n`, the question, a space, the answer."""
    ids: list[int] = []
    depths: list[int] = []
    labels: list[int] = []
    parents: list[int] = []
    children: dict[tuple[int, int], int] = {}
    answers = []
    for question in questions:
        question_ids = _token_ids(tokenizer, f"\n{question.question}")
        answer = _token_ids(tokenizer, f" {question.answer}")
        node, path = -1, []
        for token in question_ids + answer:
            child = children.get((node, token))
            if child is None:
                child = children[node, token] = len(ids)
                ids.append(token)
                parents.append(node)
                depths.append(depths[node] + 1 if node >= 0 else 0)
                labels.append(IGNORE)
            node = child
            path.append(node)
        ends = path[len(question_ids) - 1 :]
        for end, label in zip(ends, [*answer, tokenizer.eos_token_id], strict=True):
            labels[end] = label
        answers.append(ends)
    sees = np.eye(len(ids), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return Tree(ids, depths, labels, torch.from_numpy(sees), answers)
