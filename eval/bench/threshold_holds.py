"""Whether the setting that `eval/calibrate.py` accepts holds its bound on new prompts: the choice on random subsets.

    python eval/bench/threshold_holds.py --measure 0/1 --table outputs/thresholds.npz
    python eval/bench/threshold_holds.py --table outputs/thresholds.npz --json outputs/threshold_holds.json

The first command runs every setting of VisiPruner of the default grid on validation questions of the embedded base (a
minute on a GPU, an hour on a CPU; `--measure 0/8` does an eighth). The second chooses on random subsets of them, as the
command does, and judges each choice by questions about other scenes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from latefusion.data.scenes import load_scenes
from latefusion.eval.bench.schedule_holds import described, summary
from latefusion.eval.thresholds import replay
from latefusion.eval.thresholds.accept import accept
from latefusion.eval.thresholds.choose import cheapest
from latefusion.eval.thresholds.prefills import Prompts
from latefusion.eval.thresholds.questions import of_rows
from latefusion.eval.thresholds.search import scale
from latefusion.eval.thresholds.settings import Arguments, grid
from latefusion.eval.thresholds.tried import Tried
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
                tried = Tried(lambda batch=batch: batch, attachment, arguments)  # type: ignore[misc]
                outcomes = tried.outcomes(settings)
                whole = tried.unpruned[0].flops
                columns["kl"].append(np.stack([outcome.kl for outcome in outcomes]))
                columns["flops"].append(np.stack([outcome.flops for outcome in outcomes]) / whole)
                columns["seed"].append(np.full((1, len(at)), seed))
                path.parent.mkdir(parents=True, exist_ok=True)
                arrays = {
                    name: np.concatenate(parts, 1).astype(np.float16) for name, parts in columns.items()
                }
                np.savez_compressed(path, settings=json.dumps(settings), **arrays)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Settings:
    """KL and FLOPs of every setting, float `[settings, N]`, and whether each question is about new scenes, `[N]`."""

    names: list[dict[str, Any]]
    kl: NDArray[np.float64]
    flops: NDArray[np.float64]
    new: NDArray[np.bool_]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Settings:
        """Read the settings of several tables; the last seed's scenes are new."""
        tables = [np.load(path) for path in paths]
        kl, flops, seed = (
            np.concatenate([t[name] for t in tables], 1, dtype=float) for name in ("kl", "flops", "seed")
        )
        return cls(json.loads(str(tables[0]["settings"])), kl, flops, seed[0] == seed.max())

    def choose(self, number: int, samples: int, confirm: int, bound: float, fresh: int) -> dict[str, Any]:
        """Choose on a random subset, and say what the setting costs on `fresh` new questions and on all of them."""
        random = np.random.default_rng(number)
        drawn, new = (random.permutation(np.flatnonzero(which)) for which in (~self.new, self.new))
        search, others = drawn[:samples], drawn[samples : samples + confirm]
        kl, flops = self.kl[:, search].mean(1), self.flops[:, search].mean(1)
        accepted = accept(
            lambda most, least: cheapest(np.where(flops >= least, kl, np.inf), flops, most),
            lambda setting: self.kl[setting, others],
            lambda setting: float(flops[setting]),
            bound,
        )
        at = accepted.setting
        if at is None:
            return {"subset": number, "setting": None, "limits": list(accepted.limits.values())}
        return {
            "subset": number,
            "setting": self.names[at],
            "flops": float(self.flops[at, others].mean()),
            "search_kl": float(kl[at]),
            "confirm": {
                "prompts": len(others),
                "kl": float(self.kl[at, others].mean()),
                "limit": accepted.limits[at],
            },
            "new": described(self.kl[at, new[:fresh]].tolist()),
            "all_new": described(self.kl[at, new].tolist()),
            "measured": len(accepted.limits),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--measure", metavar="I/N", help="measure this part of the questions, into the first table"
    )
    parser.add_argument("--scenes", type=int, default=3, help="seeds of scenes, about 2,000 questions each")
    parser.add_argument("--questions", type=int, help="of each seed at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--subsets", type=int, default=20)
    parser.add_argument("--samples", type=int, default=Arguments.samples)
    parser.add_argument("--confirm", type=int, default=Arguments.confirm)
    parser.add_argument("--bound", type=float, default=Arguments.kl)
    parser.add_argument("--fresh", type=int, default=600, help="new questions that a subset is judged on")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.measure:
        part, parts = map(int, options.measure.split("/"))
        measure(options.table[0], options.scenes, part, parts, options.device, options.questions)
        return
    settings = Settings.read(options.table)
    subsets = [
        settings.choose(number, options.samples, options.confirm, options.bound, options.fresh)
        for number in range(options.subsets)
    ]
    out = {
        "settings": {
            name: vars(options)[name] for name in ("samples", "confirm", "bound", "scenes", "fresh")
        },
        "summary": summary(subsets, options.bound),
        "subsets": subsets,
    }
    print(json.dumps(out["summary"], indent=1))
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
