"""Batches for training the base: all questions of a scene in one row, under a block mask.

A row is `<bos>`, vision, then one block a question. A block sees `<bos>`, vision and itself, and its
positions begin where a single question's would, so that the base trains on exactly what the processor
renders, at a fraction of the cost.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latefusion.data.scene_questions import Question, Scene, ask_counting
from latefusion.data.scenes import make_scene, render
from latefusion.models.executor.prompt import IGNORE
from latefusion.training.embedded.grounding import grounded_phrases
from latefusion.training.embedded.vocabulary import ASSISTANT, EOS, PAD, USER, encode, split_words

PADDED_LENGTHS = (176, 192, 208, 224)  # few shapes, so that few kernels are compiled
CROWD = 4  # objects of one colour or shape; such scenes are rare, and counting learns them last
MASKED = -30000.0  # finite, so that a padded row's softmax stays finite in bfloat16


@dataclass(frozen=True)
class Packed:
    """Text of B scenes, padded to T tokens; a question's answer ends with `<eos>`."""

    input_ids: Tensor  # [B, T]
    blocks: Tensor  # [B, T] question number from 1; -1 is padding
    position_ids: Tensor  # [B, T]
    labels: Tensor  # [B, T] the next token where an answer is predicted, else IGNORE
    spans: list[
        list[tuple[str, int, int]]
    ]  # for each scene its questions: (type, first and last + 1 answer position)
    phrases: Tensor  # [N, 2] row and column of the word that ends a phrase
    cells: Tensor  # [N, 9] the cells it speaks of


def draw(
    seed: int, indices: range, *, split: str = "train", more_counting: bool = True, crowd_every: int = 0
) -> list[tuple[Scene, list[Question]]]:
    """Scenes with their questions; training asks each scene two more counting questions, the hardest type.

    Each `crowd_every`-th scene has CROWD or more of a colour or a shape, and is asked for their number.
    """
    drawn = []
    for index in indices:
        crowded = crowd_every > 0 and index % crowd_every == 0
        scene, questions = _crowded(split, index, seed) if crowded else make_scene(split, index, seed=seed)
        if more_counting:
            texts = {question.question for question in questions}
            more = ask_counting(scene, random.Random(f"more counting/{seed}/{index}"))
            more += [count_most(scene)] if crowded else []
            questions = questions + [question for question in more if question.question not in texts]
        drawn.append((scene, questions))
    return drawn


def _crowded(split: str, index: int, seed: int) -> tuple[Scene, list[Question]]:
    while True:
        scene, questions = make_scene(split, index, seed=seed)
        if int(count_most(scene).answer) >= CROWD:
            return scene, questions
        index += 10**7  # beyond the indices of any stage


def count_most(scene: Scene) -> Question:
    """A question for the number of objects of the most frequent colour or shape."""
    kinds = Counter(kind for item in scene.items for kind in (item.color, item.shape))
    kind, count = max(kinds.items(), key=lambda counted: (counted[1], counted[0]))
    return Question("counting", f"how many {kind} objects?", str(count))


def caption(scene: Scene) -> Question:
    """A question for everything in the image, cell by cell: it gives stage `decoder` many answer tokens."""
    what = {(i.row, i.column): f"{i.color} {i.shape}" for i in scene.items}
    what[scene.sign.row, scene.sign.column] = "sign"
    names = [what.get((row, column), "nothing") for row in range(3) for column in range(3)]
    return Question("caption", "what is in the image?", " ".join(names))


def pack(drawn: list[tuple[Scene, list[Question]]], *, vision_tokens: int, padded: bool = True) -> Packed:
    """Pack scenes and their questions; `vision_tokens` is how many positions vision takes after `<bos>`."""
    first_position = 1 + vision_tokens
    rows: list[tuple[list[int], ...]] = []
    spans: list[list[tuple[str, int, int]]] = []
    phrases: list[tuple[int, int]] = []
    cells: list[list[float]] = []
    for row, (scene, questions) in enumerate(drawn):
        ids: list[int] = []
        blocks: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        spans.append([])
        for block, question in enumerate(questions, start=1):
            prompt = [USER, *encode(question.question), ASSISTANT]
            answer = [*encode(question.answer), EOS]
            start, length = len(ids), len(prompt) + len(answer) - 1
            for index, where in grounded_phrases(scene, split_words(question.question)):
                phrases.append((row, start + 1 + index))
                cells.append(where)
            ids += [*prompt, *answer[:-1]]
            blocks += [block] * length
            positions += range(first_position, first_position + length)
            labels += [IGNORE] * (len(prompt) - 1) + answer
            spans[-1].append((question.type, start + len(prompt) - 1, start + length))
        rows.append((ids, blocks, positions, labels))

    longest = max(len(ids) for ids, *_ in rows)
    length = next(n for n in PADDED_LENGTHS if n >= longest) if padded else longest

    def tensor(column: int, fill: int) -> Tensor:
        return torch.tensor([row[column] + [fill] * (length - len(row[column])) for row in rows])

    return Packed(
        input_ids=tensor(0, PAD),
        blocks=tensor(1, -1),
        position_ids=tensor(2, first_position),
        labels=tensor(3, IGNORE),
        spans=spans,
        phrases=torch.tensor(phrases),
        cells=torch.tensor(cells),
    )


def block_mask(blocks: Tensor, vision_tokens: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, L, L] over `<bos>`, vision and text, L = 1 + vision_tokens + T."""
    prefix = blocks.new_zeros(len(blocks), 1 + vision_tokens)
    blocks = torch.cat([prefix, blocks], 1)  # [B, L]
    seen = (blocks[:, :, None] == blocks[:, None, :]) | (blocks[:, None, :] == 0)
    seen &= torch.ones(blocks.shape[1], blocks.shape[1], dtype=torch.bool).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, MASKED)[:, None]


def pixels(images: list[Image.Image], dtype: torch.dtype) -> Tensor:
    """[B, 3, H, W], the same numbers as the processor's."""
    array = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return ((array.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25).to(dtype)


def rendered(drawn: list[tuple[Scene, list[Question]]], dtype: torch.dtype) -> Tensor:
    return pixels([render(scene) for scene, _ in drawn], dtype)
