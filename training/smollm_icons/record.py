"""What the trained base can do: measured on test, written to `record.json` and the model card that ship.

python -m latefusion.training.smollm_icons.record --folder FOLDER [--blind-folder OTHER]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from scipy.stats import binomtest

from latefusion.data.icons.board_questions import TYPES
from latefusion.data.icons.boards import SPLITS
from latefusion.models.smollm_icons import WEIGHTS
from latefusion.models.smollm_icons.packages import PACKAGES
from latefusion.training.smollm_icons.accuracy import Outcomes, answer_boards
from latefusion.training.smollm_icons.card import model_card
from latefusion.training.smollm_icons.features import board_features
from latefusion.training.smollm_icons.learner import Learner
from latefusion.training.smollm_icons.projector import Projector

DATA_SEEDS = (0, 1, 2)
BOARDS, CURVE_BOARDS = 60, 30  # of each split and data seed; of the curve
KEEPS = (4, 18, 36, 72, 108, 144)


def load_learner(folder: Path) -> tuple[Learner, dict[str, Any]]:
    """The learner of a run's checkpoint, and the run's record."""
    state = torch.load(folder / "checkpoint.pt", weights_only=False)
    record = state["record"]
    width = state["learner"]["projector"]["linear_2.weight"].shape[0]
    learner = Learner(Projector(width), blind=record["recipe"]["blind"], seed=record["recipe"]["seed"])
    learner.load_state(state["learner"])
    return learner, record | {"steps_done": state["step"]}


def summary(outcomes: Outcomes) -> dict[str, dict[str, float]]:
    """Accuracy in percent by type and over all, with its 95% interval (Wilson, questions as independent)."""
    table = {}
    for kind in (*TYPES, "all"):
        rights = [r for values in outcomes.values() for r in values] if kind == "all" else outcomes[kind]
        interval = binomtest(sum(rights), len(rights)).proportion_ci(method="wilson")
        table[kind] = {
            "questions": len(rights),
            "accuracy": round(100 * sum(rights) / len(rights), 1),
            "low": round(100 * float(interval.low), 1),
            "high": round(100 * float(interval.high), 1),
        }
    return table


def pooled(parts: list[Outcomes]) -> Outcomes:
    """The outcomes of several measurements together."""
    together: Outcomes = defaultdict(list)
    for part in parts:
        for kind, rights in part.items():
            together[kind] += rights
    return together


def answers(learner: Learner, part: str, features: Path, n_boards: int) -> Outcomes:
    """Outcomes of one part: `SPLIT/SEED`, `other_picture/SEED`, `blind/SEED` or `random_tokens/K`."""
    kind, number = part.split("/")
    split = kind if kind in SPLITS else "test"
    if kind == "random_tokens":
        boards = board_features(features, split, min(n_boards, CURVE_BOARDS))
        return answer_boards(learner, boards, split, keep=int(number))
    boards = board_features(features, split, n_boards, int(number))
    return answer_boards(learner, boards, split, other_picture=kind == "other_picture", seed=int(number))


def measure_part(folder: Path, part: str, load: Any, features: Path, n_boards: int) -> Outcomes:
    """`answers` of the learner that `load` gives, kept in the run's folder until it trains on."""
    learner, record = load(folder)
    path = folder / "measured" / f"{part.replace('/', '-')}-step{record['steps_done']}-{n_boards}.json"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(answers(learner, part, features, n_boards)))
    outcomes: Outcomes = json.loads(path.read_text())
    print(part, {kind: row["accuracy"] for kind, row in summary(outcomes).items()}, flush=True)
    return outcomes


def tables(measured: dict[str, Outcomes]) -> dict[str, Any]:
    """The parts as the card shows them: accuracy with intervals, pooled over seeds."""
    by_kind: dict[str, dict[str, Outcomes]] = defaultdict(dict)
    for part, outcomes in measured.items():
        kind, number = part.split("/")
        by_kind[kind][number] = outcomes
    result: dict[str, Any] = {}
    for kind, parts in by_kind.items():
        each = {number: summary(outcomes)["all"] for number, outcomes in parts.items()}
        if kind == "random_tokens":
            result[kind] = each
        else:
            result[kind], result[f"{kind}_by_seed"] = summary(pooled(list(parts.values()))), each
    return result


def save_weights(learner: Learner, folder: Path) -> None:
    """Write LoRA and projector in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"lora.{name}": p for name, p in learner.masters.items()}
    tensors |= {f"projector.{name}": p for name, p in learner.projector.state_dict().items()}
    tensors = {name: p.detach().bfloat16().contiguous() for name, p in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ["torch", "transformers", "numpy", "pillow", *(r.partition("==")[0] for r in PACKAGES.values())]
    return {name: version(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="of the run")
    parser.add_argument("--blind-folder", type=Path, help="of the blind control's run")
    parser.add_argument("--features", type=Path, help="cached features; default: FOLDER/features")
    parser.add_argument("--seeds", type=int, nargs="+", default=DATA_SEEDS)
    parser.add_argument("--boards", type=int, default=BOARDS)
    parser.add_argument("--parts", nargs="+", help="measure these alone, for a later call; write no card")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    features = options.features or options.folder / "features"
    load = cache(load_learner)
    parts = options.parts or [
        *(f"{split}/{seed}" for split in ("test", "new_drawings", "other_picture") for seed in options.seeds),
        *(f"random_tokens/{keep}" for keep in KEEPS),
    ]
    measured = {part: measure_part(options.folder, part, load, features, options.boards) for part in parts}
    if options.parts:
        return
    learner, record = load(options.folder)
    if options.blind_folder:
        for seed in options.seeds:
            part = f"blind/{seed}"
            measured[part] = measure_part(options.blind_folder, part, load, features, options.boards)
        record["blind_steps"] = load(options.blind_folder)[1]["steps_done"]
    record["measured"], record["versions"] = tables(measured), versions()
    save_weights(learner, options.output)
    (options.output / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.output / "README.md").write_text(model_card(record))


if __name__ == "__main__":
    main()
