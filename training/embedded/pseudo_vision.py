"""Pseudo-vision: what the decoder reads instead of images before it has eyes (stands in for a pre-trained
language model), and what the tower and the projector then learn to produce.

A patch becomes a sum of the decoder's own word embeddings, E[colour] + E[shape or word], and of small
tables for the cell, the row and the column.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from latefusion.data.scene_questions import COLORS, SHAPES, WORDS, Item, Scene, Sign
from latefusion.data.scenes import CELL, SIZE
from latefusion.training.embedded.architecture import EMBEDDING_STD
from latefusion.training.embedded.vocabulary import TOKEN_ID

PATCH = 8
SIDE = SIZE // PATCH
N_COLORS = 2 + len(COLORS)  # nothing, the colours, sign
N_KINDS = 1 + len(SHAPES) + len(WORDS) + 90  # nothing, the shapes, the words, the numbers 10-99
FIRST_WORD = 1 + len(SHAPES)
FIRST_NUMBER = FIRST_WORD + len(WORDS)
_COLOR_NAMES, _WORDS = list(COLORS), list(WORDS)


def patch_labels(scene: Scene) -> Tensor:
    """What each patch shows, [SIDE * SIDE, 2] in raster order: colour and kind, 0 where there is nothing."""
    labels = torch.zeros(SIDE, SIDE, 2, dtype=torch.long)
    for item in scene.items:
        rows, columns = _patches(item, 0.8 * item.radius, 0.8 * item.radius)
        labels[rows, columns] = torch.tensor(
            [_COLOR_NAMES.index(item.color) + 1, SHAPES.index(item.shape) + 1]
        )
    text = scene.sign.text
    kind = FIRST_NUMBER + int(text) - 10 if scene.sign.kind == "number" else FIRST_WORD + _WORDS.index(text)
    rows, columns = _patches(scene.sign, 13, 6)
    labels[rows, columns] = torch.tensor([N_COLORS - 1, kind])
    return labels.reshape(SIDE * SIDE, 2)


def _patches(thing: Item | Sign, half_width: float, half_height: float) -> tuple[slice, slice]:
    x = thing.column * CELL + CELL / 2 + thing.dx
    y = thing.row * CELL + CELL / 2 + thing.dy
    rows = slice(max(0, int((y - half_height) // PATCH)), int((y + half_height) // PATCH) + 1)
    return rows, slice(max(0, int((x - half_width) // PATCH)), int((x + half_width) // PATCH) + 1)


def sample_patches(scenes: list[Scene], n: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """`n` of the patches of each scene, at least one of every item: labels [B, n, 2], raster positions
    [B, n].

    Fewer vision tokens make a step cheaper; most of those left show something.
    """
    per_cell = CELL // PATCH
    labels, positions = [], []
    for scene in scenes:
        label = patch_labels(scene)
        shown = [p for p in range(len(label)) if label[p, 1] > 0]
        kept = set()
        for thing in (*scene.items, scene.sign):
            cell = [
                p for p in shown if (p // SIDE // per_cell, p % SIDE // per_cell) == (thing.row, thing.column)
            ]
            kept.add(rng.choice(cell))
        rest = [p for p in shown if p not in kept]
        rng.shuffle(rest)
        kept.update(rest[: max(0, n * 3 // 4 - len(kept))])
        empty = [p for p in range(len(label)) if label[p, 1] == 0]
        rng.shuffle(empty)
        chosen = sorted([*kept, *empty[: n - len(kept)]])
        labels.append(label[chosen])
        positions.append(chosen)
    return torch.stack(labels), torch.tensor(positions)


class PseudoVision(nn.Module):
    """The tables; `embed_tokens` stays the decoder's."""

    def __init__(self, *, width: int) -> None:
        super().__init__()

        def table(n: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(n, width) * EMBEDDING_STD)

        self.color_ids: Tensor
        self.kind_ids: Tensor
        self.rows, self.columns, self.cells = table(SIDE), table(SIDE), table(9)
        self.tens, self.ones = table(10), table(10)
        words = ["nothing", *COLORS, "sign"]
        self.register_buffer("color_ids", torch.tensor([TOKEN_ID[word] for word in words]), persistent=False)
        words = ["nothing", *SHAPES, *WORDS]
        self.register_buffer("kind_ids", torch.tensor([TOKEN_ID[word] for word in words]), persistent=False)

    def forward(self, embed_tokens: nn.Embedding, labels: Tensor, positions: Tensor) -> Tensor:
        """[B, N, D] of patch labels [B, N, 2] at raster positions [B, N]."""
        color, kind = labels.unbind(-1)
        number = (kind - FIRST_NUMBER).clamp(min=0) + 10
        spelled = self.tens[number // 10] + self.ones[number % 10]
        named = embed_tokens(self.kind_ids[kind.clamp(max=FIRST_NUMBER - 1)])
        what = torch.where((kind >= FIRST_NUMBER)[..., None], spelled, named)
        what = torch.where((kind == 0)[..., None], torch.zeros_like(what), what)
        row, column = positions // SIDE, positions % SIDE
        per_cell = CELL // PATCH
        cell = self.cells[row // per_cell * 3 + column // per_cell]
        return (
            embed_tokens(self.color_ids[color]) + what + cell + 0.5 * (self.rows[row] + self.columns[column])
        )
