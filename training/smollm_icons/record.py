"""What the trained base can do: measured on test, written to `record.json` and the model card that ship.

python -m latefusion.training.smollm_icons.record --folder FOLDER [--blind-folder OTHER]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from scipy.stats import binomtest

from latefusion.data.icons.questions import TYPES
from latefusion.models.smollm_icons import WEIGHTS
from latefusion.models.smollm_icons.packages import PACKAGES
from latefusion.training.smollm_icons.card import model_card
from latefusion.training.smollm_icons.features import board_features
from latefusion.training.smollm_icons.learner import Learner
from latefusion.training.smollm_icons.measure import Outcomes, answer_boards
from latefusion.training.smollm_icons.projector import Projector

DATA_SEEDS = (0, 1, 2)
BOARDS, CURVE_BOARDS = 60, 40  # of each split and data seed; of the curve
KEEPS = (1, 2, 4, 8, 18, 36, 72, 108, 144)


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


def measure_base(learner: Learner, features: Path, seeds: tuple[int, ...], n_boards: int) -> dict[str, Any]:
    """Tables of both test splits, of another board's picture, and the curve of random tokens."""
    tables: dict[str, Any] = {}
    for split in ("test", "new_drawings"):
        by_seed = []
        for seed in seeds:
            boards = board_features(features, split, n_boards, seed)
            by_seed.append(answer_boards(learner, boards, split, seed=seed))
        tables[split] = summary(pooled(by_seed))
        tables[f"{split}_by_seed"] = {
            seed: summary(one)["all"] for seed, one in zip(seeds, by_seed, strict=True)
        }
        print(split, {kind: row["accuracy"] for kind, row in tables[split].items()}, flush=True)
    boards = board_features(features, "test", n_boards)
    tables["other_picture"] = summary(answer_boards(learner, boards, "test", other_picture=True))
    print("other picture", tables["other_picture"]["all"], flush=True)
    boards = boards[:CURVE_BOARDS]
    tables["random_tokens"] = {
        k: summary(answer_boards(learner, boards, "test", keep=k))["all"] for k in KEEPS
    }
    print("random tokens", {k: row["accuracy"] for k, row in tables["random_tokens"].items()}, flush=True)
    return tables


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
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    features, seeds = options.features or options.folder / "features", tuple(options.seeds)
    began = time.process_time()
    learner, record = load_learner(options.folder)
    save_weights(learner, options.output)
    record["measured"] = measure_base(learner, features, seeds, options.boards)
    if options.blind_folder:
        blind, blind_record = load_learner(options.blind_folder)
        boards = board_features(features, "test", options.boards)
        record["measured"]["blind"] = summary(answer_boards(blind, boards, "test"))
        record["blind_steps"] = blind_record["steps_done"]
    record["versions"] = versions()
    record["cpu_seconds"]["record"] = time.process_time() - began
    (options.output / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.output / "README.md").write_text(model_card(record))


if __name__ == "__main__":
    main()
