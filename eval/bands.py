"""Where does a base need its vision tokens? Its answers, untrained, when they enter late or leave early.

    python eval/bands.py --model embedded --questions 300 --output docs/results/bands.json

For every layer, accuracy on validation under `VisionSchedule(enter=layer)` and `VisionSchedule(exit=layer)`.
A band for `recipe=late_fusion` starts from where they fall: training repairs the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from rich.console import Console
from rich.table import Table

from latefusion.data.scenes import load_scenes
from latefusion.eval.metrics import accuracy
from latefusion.eval.predict import System, answer_questions
from latefusion.models.attach import attach
from latefusion.models.build import check_base, compute_dtype, load_base
from latefusion.models.schedule import VisionSchedule


def measure(path: str, questions: int, batch_size: int) -> dict[str, list[dict[str, float]]]:
    """Accuracy with its 95% interval for every `enter` (from layer 0) and every `exit` (from layer 1)."""
    check_base(path)
    model, processor = load_base(path, dtype=compute_dtype())
    layers = model.config.get_text_config().num_hidden_layers
    schedules = {f"enter {a}": VisionSchedule(enter=a) for a in range(layers)}
    schedules |= {f"exit {b}": VisionSchedule(exit=b) for b in range(1, layers + 1)}
    rows = load_scenes("validation")
    rows = rows.shuffle(seed=0).select(range(min(questions, len(rows))))
    with attach(model, VisionSchedule()) as attachment:
        answers = answer_questions(
            model=model,
            processor=processor,
            attachment=attachment,
            systems={key: System(name=key, policy=policy) for key, policy in schedules.items()},
            dataset=rows,
            batch_size=batch_size,
        )
    found: dict[str, list[dict[str, float]]] = {"enter": [], "exit": []}
    for key, given in answers.items():
        side, _, layer = key.partition(" ")
        score = accuracy([a.correct for a in given], [a.scene for a in given])
        found[side].append(
            {"layer": int(layer), "accuracy": score.value, "low": score.low, "high": score.high}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded", help="embedded, a folder or a hub id")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--output", type=Path, help="JSON file to write the numbers to")
    chosen = parser.parse_args()
    if chosen.questions < 1:
        sys.exit(f"error: --questions {chosen.questions} must be at least 1.")
    try:
        found = measure(chosen.model, chosen.questions, chosen.batch_size)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    if chosen.output:
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps({"questions": chosen.questions, **found}, indent=1) + "\n")
    table = Table(title=f"{chosen.model}: accuracy on {chosen.questions} validation questions, untrained, %")
    for name in ("layer", "enter at it", "exit at it"):
        table.add_column(name, justify="right")
    exits = {row["layer"]: row for row in found["exit"]}
    for row in found["enter"]:
        other = exits.get(row["layer"])
        table.add_row(str(row["layer"]), _cell(row), _cell(other) if other else "")
    Console().print(table)


def _cell(row: dict[str, float]) -> str:
    return f"{100 * row['accuracy']:.1f} [dim]({100 * row['low']:.1f} to {100 * row['high']:.1f})[/dim]"


if __name__ == "__main__":
    main()
