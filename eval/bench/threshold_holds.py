"""What every setting of VisiPruner costs on validation questions of the embedded base: a table to choose from.

    python eval/bench/threshold_holds.py --table outputs/thresholds.npz

Runs the default grid of `eval/calibrate.py`; on a CPU an hour. `--part 0/8` does an eighth of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from latefusion.data.scenes import load_scenes
from latefusion.eval.thresholds import replay
from latefusion.eval.thresholds.prefills import Prompts
from latefusion.eval.thresholds.questions import of_rows
from latefusion.eval.thresholds.search import scale
from latefusion.eval.thresholds.settings import Arguments, grid
from latefusion.models.attach import attach
from latefusion.models.base_model import load_base
from latefusion.models.schedule import VisionSchedule

BATCH = 64


def measure(path: Path, scenes: int, part: int, parts: int, device: str, most: int | None) -> None:
    """KL and FLOPs of every setting on a part of the questions of `data.seed` 0 to `scenes` - 1, saved as they come."""
    model, processor = load_base("embedded", dtype=torch.float32)
    model.to(device)
    arguments = Arguments(batch_size=BATCH)
    columns: dict[str, list[NDArray]] = {"kl": [], "flops": [], "seed": []}
    with attach(model, VisionSchedule()) as attachment:
        settings = None
        for seed in range(scenes):
            rows = load_scenes("validation", seed=seed)
            questions = of_rows(rows if most is None else rows.select(range(most)))
            prompts = Prompts(arguments, attachment, processor, questions)
            if (
                settings is None
            ):  # the same for all parts: the thresholds of the first batch of the first seed
                batch, _ = prompts.dense_batch(prompts.batches[0])
                recorded = replay.record(batch, attachment, 0, arguments.sink_rule)
                settings = grid(arguments, range(len(attachment.layers) - 1), scale(recorded))
            for at in track(prompts.batches[part::parts], console=Console(stderr=True)):
                batch, _ = prompts.dense_batch(at)
                dense = replay.record(batch, attachment, 0, arguments.sink_rule)
                whole = replay.judge(batch, attachment, dense.logits, dense.logits).flops
                outcomes = prompts.outcomes(batch, dense, settings)
                columns["kl"].append(np.stack([outcome.kl for outcome in outcomes]))
                columns["flops"].append(np.stack([outcome.flops for outcome in outcomes]) / whole)
                columns["seed"].append(np.full((1, len(at)), seed))
                path.parent.mkdir(parents=True, exist_ok=True)
                arrays = {
                    name: np.concatenate(parts, 1).astype(np.float16) for name, parts in columns.items()
                }
                np.savez_compressed(path, settings=json.dumps(settings), **arrays)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, nargs="+", required=True)
    parser.add_argument("--scenes", type=int, default=3, help="seeds of scenes, about 2,000 questions each")
    parser.add_argument("--part", default="0/1", help="of the questions, that is measured")
    parser.add_argument("--questions", type=int, help="of each seed at most")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    measure(options.table[0], options.scenes, part, parts, options.device, options.questions)


if __name__ == "__main__":
    main()
