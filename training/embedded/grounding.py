"""The grounding loss: while training, a linear head reads from layer 6 which cells a phrase speaks of.

It makes the decoder bind the words of a phrase and look them up by layer 6, and is dropped afterwards. So
it shapes where the base fuses vision into text; the model card says so.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from latefusion.data.scene_questions import CELLS, COLORS, SHAPES, STEPS, Scene

GROUNDED_LAYER = 6
_CELL_NAMES = [name for row in CELLS for name in row]
_STEP_WORDS = {name.split()[0]: step for name, step in STEPS.items()}


def grounded_phrases(scene: Scene, words: list[str]) -> list[tuple[int, list[float]]]:
    """(index of the word that ends a phrase, 9 zeros and ones: the cells it speaks of), for a question's
    words.
    """
    phrases: list[tuple[int, list[float]]] = []
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else ""
        if word in COLORS:
            shape = following if following in SHAPES else None
            phrases.append((index + 1, _cells_of(scene, word, shape)))
        elif word in SHAPES and (index == 0 or words[index - 1] not in COLORS):
            phrases.append((index, _cells_of(scene, None, word)))

    last = len(words) - 1  # the question mark
    if words[:4] == ["what", "is", "at", "the"]:
        phrases.append((last, _one_cell(_CELL_NAMES.index(" ".join(words[4:last])))))
    elif "just" in words:
        down, right = _STEP_WORDS[words[words.index("just") + 1]]
        anchor = phrases[-1][1].index(1.0)
        phrases.append((last, _one_cell((anchor // 3 + down) * 3 + anchor % 3 + right)))
    elif "sign" in words:
        phrases.append((last, _one_cell(scene.sign.row * 3 + scene.sign.column)))
    return phrases


def _cells_of(scene: Scene, color: str | None, shape: str | None) -> list[float]:
    cells = [0.0] * 9
    for item in scene.items:
        if color in (None, item.color) and shape in (None, item.shape):
            cells[item.row * 3 + item.column] = 1.0
    return cells


def _one_cell(cell: int) -> list[float]:
    return [float(cell == k) for k in range(9)]


class GroundingHead(nn.Module):
    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, 9)

    def forward(self, hidden_states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and the share of phrases with all 9 cells right; hidden_states [N, D] of N phrases,
        targets [N, 9].
        """
        logits = self.linear(self.norm(hidden_states)).float()
        right = ((logits > 0) == (targets > 0)).all(-1).float().mean()
        return 9 * F.binary_cross_entropy_with_logits(logits, targets), right
