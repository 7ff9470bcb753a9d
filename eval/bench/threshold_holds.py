"""Whether the setting that `eval/calibrate.py` accepts holds its bound on new prompts: the choice on random subsets.

    python eval/bench/threshold_holds.py --measure --table outputs/thresholds.npz
    python eval/bench/threshold_holds.py --table outputs/thresholds.npz --sizes 256:768 64:96 --json outputs/holds.json

The first command runs VisiPruner's settings of the default grid on validation questions of the embedded base, in a
quarter of an hour of one CPU thread: all of them on the first questions, then those that a calibration could choose
(`possible`). The second chooses on random subsets, as the command does, and judges each choice by questions about other
scenes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from latefusion.data.scenes import load_scenes
from latefusion.eval.bench.schedule_holds import described, summary
from latefusion.eval.thresholds import replay
from latefusion.eval.thresholds.accept import accept
from latefusion.eval.thresholds.choose import nearly_cheapest
from latefusion.eval.thresholds.prefills import Prompts
from latefusion.eval.thresholds.questions import of_rows
from latefusion.eval.thresholds.search import scale
from latefusion.eval.thresholds.settings import Arguments, grid
from latefusion.eval.thresholds.tried import Tried
from latefusion.models.attach import attach
from latefusion.models.base_model import compute_dtype, load_base
from latefusion.models.schedule import VisionSchedule

BATCH = 64
FAR = {128: 5.0, 256: 2.5}  # after so many questions: settings whose KL is beyond so many bounds are left out
SURE = 0.2  # of the bound: settings that cost less are surely accepted
DEARER = 1.1  # times the FLOPs of the cheapest of those: the first tries of `accept`


@dataclass
class Table:
    """What settings do to questions, grown batch by batch.

    Attributes:
        kl, flops: float `[settings, N]`, FLOPs as a share of dense; NaN where a setting did not run.
        seed, scene: what each question is about, `[N]`.
    """

    kl: list[NDArray[Any]]
    flops: list[NDArray[Any]]
    seed: list[int]
    scene: list[str]

    def add(self, tried: Tried, settings: Sequence[dict[str, Any]], which: NDArray[np.bool_]) -> None:
        """Run the settings of `which` on a batch."""
        outcomes = tried.outcomes([setting for setting, runs in zip(settings, which, strict=True) if runs])
        dense = tried.unpruned[0].flops
        for column, values in (
            (self.kl, [outcome.kl for outcome in outcomes]),
            (self.flops, [outcome.flops / dense for outcome in outcomes]),
        ):
            block = np.full((len(settings), len(dense)), np.nan)
            block[which] = values
            column.append(block)

    def means(self, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean KL and FLOPs of each setting on the first `n` questions; NaN where it did not run on all of them."""
        kl, flops = (np.concatenate(column, 1)[:, :n].mean(1) for column in (self.kl, self.flops))
        return kl, flops

    @classmethod
    def load(cls, path: Path) -> tuple[Table, list[dict[str, Any]]]:
        """What an earlier start has left, and its settings."""
        with np.load(path) as arrays:
            settings = json.loads(str(arrays["settings"]))
            table = cls([arrays["kl"]], [arrays["flops"]], arrays["seed"].tolist(), arrays["scene"].tolist())
        return table, settings

    def save(self, path: Path, settings: Sequence[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path,
            settings=json.dumps(settings),
            kl=np.concatenate(self.kl, 1).astype(np.float32),
            flops=np.concatenate(self.flops, 1).astype(np.float32),
            seed=np.array(self.seed),
            scene=np.array(self.scene),
        )


def possible(
    kl: NDArray[np.float64], flops: NDArray[np.float64], bound: float, far: float
) -> NDArray[np.bool_]:
    """The settings that a calibration could choose, by their means on the first questions: bool `[settings]`.

    Neither those that are far beyond the bound, nor those that are much dearer than one that is far below it.
    """
    sure = flops[kl <= SURE * bound]
    return (kl <= far * bound) & (flops <= DEARER * sure.min(initial=np.inf))


def measure(path: Path, sizes: Sequence[int], bound: float, device: str) -> None:
    """KL and FLOPs of settings on so many questions of `data.seed` 0, 1, ..., saved as they come.

    Goes on where an earlier start stopped.
    """
    model, processor = load_base("embedded", dtype=compute_dtype())
    model.to(device)  # type: ignore[arg-type]
    arguments, settings = Arguments(batch_size=BATCH), list[dict[str, Any]]()
    table, number = Table([], [], [], []), 0
    if path.exists():
        table, settings = Table.load(path)
    with attach(model, VisionSchedule()) as attachment:
        which: NDArray[np.bool_] | None = None
        for seed, most in enumerate(sizes):
            rows = load_scenes("validation", seed=seed).shuffle(seed=seed)
            prompts = Prompts(arguments, attachment, processor, of_rows(rows.select(range(most))))
            names = rows.with_format(None)["scene"]
            for at in track(batches(most), f"Scenes of seed {seed}", console=Console(stderr=True)):
                number += len(at)
                if number <= len(table.seed):
                    continue
                batch, _ = prompts.dense_batch(at)
                if not settings:
                    recorded = replay.record(batch, attachment, 0, arguments.sink_rule)
                    settings = grid(arguments, range(len(attachment.layers) - 1), scale(recorded))
                cut = max((n for n in FAR if n <= len(table.seed)), default=0)
                if cut and (which is None or cut == len(table.seed)):
                    which = possible(*table.means(cut), bound, FAR[cut])
                every = np.ones(len(settings), bool)
                tried = Tried(lambda batch=batch: batch, attachment, arguments)  # type: ignore[misc]
                table.add(tried, settings, every if which is None else which)
                table.seed += [seed] * len(at)
                table.scene += [names[i] for i in at]
                table.save(path, settings)


def batches(n: int) -> list[list[int]]:
    """The numbers from 0 to `n` - 1, BATCH at a time."""
    return [list(range(start, min(start + BATCH, n))) for start in range(0, n, BATCH)]


@dataclass(frozen=True)
class Settings:
    """KL and FLOPs of every setting, float `[settings, N]`, NaN where it did not run.

    Attributes:
        new: whether each question is about scenes that nothing is chosen on, `[N]`.
        scene: what each question is about, `[N]`.
    """

    names: list[dict[str, Any]]
    kl: NDArray[np.float64]
    flops: NDArray[np.float64]
    new: NDArray[np.bool_]
    scene: NDArray[np.str_]

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read a table; the last seed's scenes are new."""
        with np.load(path) as table:
            seed, scene = table["seed"], table["scene"]
            kl, flops = (table[name].astype(float) for name in ("kl", "flops"))
            return cls(json.loads(str(table["settings"])), kl, flops, seed == seed.max(), scene)

    def choose(self, number: int, samples: int, confirm: int, bound: float, fresh: int) -> dict[str, Any]:
        """Choose on a random subset, and say what the setting costs on `fresh` new questions and on all of them."""
        random = np.random.default_rng(number)
        drawn, new = (random.permutation(np.flatnonzero(which)) for which in (~self.new, self.new))
        search, others = drawn[:samples], drawn[samples : samples + confirm]
        kl, flops = self.kl[:, search].mean(1), self.flops[:, search].mean(1)  # NaN for settings left out
        boundaries = [setting["boundary"] for setting in self.names]
        accepted = accept(
            lambda most, least: nearly_cheapest(
                np.where(flops >= least, kl, np.inf), flops, most, boundaries
            ),
            lambda setting: self.kl[setting, others],
            lambda setting: float(flops[setting]),
            bound,
            self.scene[others].tolist(),
        )
        at = accepted.setting
        if at is None:
            return {"subset": number, "setting": None, "limits": list(accepted.limits.values())}

        def on_new(which: NDArray[np.int64]) -> dict[str, Any]:
            return described(self.kl[at, which].tolist(), self.scene[which].tolist())

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
            "new": on_new(new[:fresh]),
            "all_new": on_new(new),
            "measured": len(accepted.limits),
        }


def markdown(out: dict[str, Any]) -> str:
    """The table for docs/inference.md."""
    head = (
        "searched on", "accepted on", "a setting was accepted", f"and holds {out['settings']['bound']:g} nats on new",
        "its KL there at most", "decoder FLOPs: median, least, most",
    )  # fmt: skip
    lines = [head, ["---:"] * len(head)]
    for choice in out["choices"]:
        totals = choice["summary"]
        shares = [totals["flops_median"], *totals["flops_least_and_most"]]
        worst = max(subset["new"]["kl"] for subset in choice["subsets"] if subset["setting"])
        lines.append([
            str(choice["samples"]), str(choice["confirm"]), f"{totals['chosen']} of {totals['subsets']}",
            f"{totals['hold_on_new']} of {totals['chosen']}", f"{worst:.3f}", ", ".join(f"{one:.0%}" for one in shares),
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--measure", action="store_true", help="run the settings, into the table")
    parser.add_argument("--questions", type=int, default=1792, help="to draw subsets from")
    parser.add_argument("--new", type=int, default=640, help="about other scenes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--subsets", type=int, default=20)
    parser.add_argument(
        "--sizes", nargs="+", metavar="SAMPLES:CONFIRM", default=[f"{Arguments.samples}:{Arguments.confirm}"],
        help="questions to search on and others to accept on",
    )  # fmt: skip
    parser.add_argument("--bound", type=float, default=Arguments.kl)
    parser.add_argument("--fresh", type=int, default=600, help="new questions that a subset is judged on")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.measure:
        measure(options.table, (options.questions, options.new), options.bound, options.device)
        return
    settings = Settings.read(options.table)
    choices = []
    for sizes in options.sizes:
        samples, confirm = map(int, sizes.split(":"))
        subsets = [
            settings.choose(number, samples, confirm, options.bound, options.fresh)
            for number in range(options.subsets)
        ]
        totals = summary(subsets, options.bound)
        choices.append({"samples": samples, "confirm": confirm, "summary": totals, "subsets": subsets})
    out = {
        "settings": {
            "bound": options.bound,
            "fresh": options.fresh,
            "grid": len(settings.names),
            "on_all": int((~np.isnan(settings.kl)).all(1).sum()),
            "drawn_from": int((~settings.new).sum()),
            "new": int(settings.new.sum()),
        },
        "choices": choices,
    }
    print(markdown(out))
    if options.json:
        options.json.write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
