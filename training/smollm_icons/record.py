"""What the trained base can do: measured on test, written to `record.json` and the model card that ship.

python -m latefusion.training.smollm_icons.record --folder FOLDER [--blind-folder OTHER]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from latefusion.models.smollm_icons import WEIGHTS
from latefusion.models.smollm_icons.packages import PACKAGES
from latefusion.training.outcomes import Outcomes, pooled
from latefusion.training.smollm_icons.card import model_card
from latefusion.training.smollm_icons.features import Features
from latefusion.training.smollm_icons.learner import Learner, language_model
from latefusion.training.smollm_icons.measured import (
    BOARDS,
    DATA_SEEDS,
    accuracies,
    measure_part,
    parts_of,
)
from latefusion.training.smollm_icons.projector import Projector
from latefusion.training.smollm_icons.weights import read_weights, save_weights


def load_learner(folder: Path, device: str = "cpu") -> tuple[Learner, dict[str, Any]]:
    """The learner of a run, from its checkpoint or its weights, and the run's record."""
    record = json.loads((folder / "run.json").read_text())
    recipe = record["recipe"]
    if (folder / "checkpoint.pt").is_file():
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        learnt, record = state["learner"], state["record"] | {"steps_done": state["step"]}
    else:
        learnt = read_weights(folder)
    learner = Learner(
        language_model(recipe.get("untrained", False), recipe["seed"], device),
        Projector(learnt["projector"]["linear_2.weight"].shape[0]),
        **{name: recipe.get(name, False) for name in ("blind", "freeze_language", "untrained")},
        seed=recipe["seed"],
    )
    learner.load_state(learnt)
    return learner, record


def tables(measured: dict[str, Outcomes]) -> dict[str, Any]:
    """The parts as the card shows them: accuracy with intervals, pooled over seeds."""
    by_kind: dict[str, dict[str, Outcomes]] = defaultdict(dict)
    for part, outcomes in measured.items():
        kind, number = part.split("/")
        by_kind[kind][number] = outcomes
    result: dict[str, Any] = {}
    for kind, parts in by_kind.items():
        each = {number: accuracies(outcomes)["all"] for number, outcomes in parts.items()}
        if kind == "random_tokens":
            result[kind] = each
        else:
            result[kind], result[f"{kind}_by_seed"] = accuracies(pooled(list(parts.values()))), each
    return result


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
    parser.add_argument("--others", nargs="+", help="NAME=FOLDER of runs to tell of beside it")
    parser.add_argument("--features", type=Path, help="cached features; default: FOLDER/features")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=DATA_SEEDS)
    parser.add_argument("--boards", type=int, default=BOARDS)
    parser.add_argument("--parts", nargs="+", help="measure these alone, for a later call; write no card")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    features = Features(options.features or options.folder / "features")

    def measure(folder: Path, part: str) -> Outcomes:
        step = json.loads((folder / "run.json").read_text())["steps_done"]
        return measure_part(folder, step, part, lambda: load(folder)[0], features, options.boards)

    load = cache(partial(load_learner, device=options.device))
    measured = {part: measure(options.folder, part) for part in options.parts or parts_of(options.seeds)}
    if options.parts:
        return
    learner, record = load(options.folder)
    if options.blind_folder:
        measured |= {f"blind/{k}": measure(options.blind_folder, f"test/{k}") for k in options.seeds}
        record["blind_steps"] = json.loads((options.blind_folder / "run.json").read_text())["steps_done"]
    others = {}
    for argument in options.others or []:
        name, _, other = argument.partition("=")
        others[name] = {"steps": json.loads((Path(other) / "run.json").read_text())["steps_done"]}
        for split in ("test", "new_drawings"):
            parts = [measure(Path(other), f"{split}/{seed}") for seed in options.seeds]
            others[name][split] = accuracies(pooled(parts))
    record["others"] = others
    record["measured"], record["versions"] = tables(measured), versions()
    save_weights(learner, options.output)
    (options.output / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.output / "README.md").write_text(model_card(record))


if __name__ == "__main__":
    main()
