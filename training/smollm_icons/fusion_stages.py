"""Where a base fuses: what it loses when text cannot see the picture in some layers.

    python -m latefusion.training.smollm_icons.fusion_stages --folder FOLDER

Hides the picture in layers [0, a) and in layers [b, end) for every a and b, on boards of test, and keeps for each
board the KL divergence to the whole model (nats an answer token) and how many questions it answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from latefusion.data.icons.board_questions import board_questions
from latefusion.training.smollm_icons.batch import Sample, collate
from latefusion.training.smollm_icons.features import Features
from latefusion.training.smollm_icons.learner import Learner, verdicts
from latefusion.training.smollm_icons.question_tree import VISION, question_tree

BOARDS, AT_ONCE = 48, 16


@torch.no_grad()
def stage_profile(learner: Learner, features: Features, n_boards: int = BOARDS) -> dict[str, Any]:
    """For each hidden range of layers `a-b`: KL and right answers of each board, beside those of the whole model."""
    boards = features.boards("test", n_boards)
    layers = learner.model.config.num_hidden_layers
    ranges = [(0, 0), *((0, a) for a in range(1, layers + 1)), *((b, layers) for b in range(1, layers))]
    profile: dict[str, Any] = {"layers": layers, "boards": n_boards, "questions": [], "ranges": {}}
    for start in range(0, n_boards, AT_ONCE):
        samples = []
        for index in range(start, min(start + AT_ONCE, n_boards)):
            questions = board_questions("test", index)
            tree = question_tree(questions, learner.tokenizer)
            samples.append(Sample(tree, list(range(VISION)), features=boards[index][1]))
            profile["questions"].append(len(questions))
        batch = collate(samples).to(learner.device)
        whole = F.log_softmax(learner.logits(batch), -1)
        for first, last in ranges:
            logits = learner.logits(batch, unseen_in=range(first, last))
            divergence = F.kl_div(F.log_softmax(logits, -1), whole, log_target=True, reduction="none").sum(-1)
            owner = batch.learnt // batch.ids.shape[1]  # board of each label
            by_board = torch.zeros(len(samples), device=logits.device).index_add_(
                0, owner, divergence * batch.weights * len(samples)
            )
            entry = profile["ranges"].setdefault(f"{first}-{last}", {"kl": [], "right": []})
            entry["kl"] += [round(value, 5) for value in by_board.tolist()]
            entry["right"] += [sum(rights) for rights in verdicts(samples, batch, logits)]
    return profile


def main() -> None:
    from latefusion.training.smollm_icons.record import load_learner

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="of the run")
    parser.add_argument("--features", type=Path, help="cached features; default: FOLDER/features")
    parser.add_argument("--boards", type=int, default=BOARDS)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    learner, _ = load_learner(options.folder, options.device)
    profile = stage_profile(
        learner, Features(options.features or options.folder / "features"), options.boards
    )
    (options.folder / "stages.json").write_text(json.dumps(profile) + "\n")


if __name__ == "__main__":
    main()
