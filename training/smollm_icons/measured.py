"""What a learner can do, part by part, kept in its run's folder.

A part is `SPLIT/SEED`, `other_picture/SEED` or `random_tokens/K`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from latefusion.data.icons.board_questions import TYPES
from latefusion.data.icons.boards import SPLITS
from latefusion.training.outcomes import Outcomes, summary
from latefusion.training.smollm_icons.accuracy import answer_boards
from latefusion.training.smollm_icons.features import Features
from latefusion.training.smollm_icons.learner import Learner

DATA_SEEDS = (0, 1, 2)
BOARDS = 60  # of each split and data seed
KEEPS = (4, 18, 36, 72, 108, 144)


def parts_of(seeds: Sequence[int] = DATA_SEEDS) -> list[str]:
    """All parts of a base that sees."""
    return [
        *(f"{split}/{seed}" for split in ("test", "new_drawings", "other_picture") for seed in seeds),
        *(f"random_tokens/{keep}" for keep in KEEPS),
    ]


def answers(learner: Learner, part: str, features: Features, n_boards: int) -> Outcomes:
    """Outcomes of one part."""
    kind, number = part.split("/")
    split = kind if kind in SPLITS else "test"
    if kind == "random_tokens":
        return answer_boards(learner, features.boards(split, n_boards), split, keep=int(number))
    boards = features.boards(split, n_boards, int(number))
    return answer_boards(learner, boards, split, other_picture=kind == "other_picture", seed=int(number))


def measure_part(
    folder: Path, step: int, part: str, learner: Callable[[], Learner], features: Features, n_boards: int
) -> Outcomes:
    """`answers` after `step` steps, measured once; `learner` is called if they are not there yet."""
    path = folder / "measured" / f"{part.replace('/', '-')}-step{step}-{n_boards}.json"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(answers(learner(), part, features, n_boards)))
    outcomes: Outcomes = json.loads(path.read_text())
    print(part, {kind: row["accuracy"] for kind, row in accuracies(outcomes).items()}, flush=True)
    return outcomes


def accuracies(outcomes: Outcomes) -> dict[str, dict[str, float]]:
    """`summary` over the questions about boards."""
    return summary(outcomes, TYPES, digits=1)
