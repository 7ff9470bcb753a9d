"""Whether `schedule=auto` holds its bound on new prompts: the choice repeated on random subsets of the embedded base's.

    python eval/bench/schedule_holds.py --subsets 20 --json docs/results/schedule_holds.json

Each subset is 128 validation questions to search on and others to accept on, drawn from a pool; the chosen schedule is
then measured on questions about scenes that no subset has. What a schedule does to a question is measured once,
whichever subset asks, so twenty subsets cost far less than twenty profiles. `--table` keeps these numbers: another
rule, or more subsets, then runs what is missing alone. Several processes fill a table together, before any choice:

    python eval/bench/schedule_holds.py --fill 2:10 2:11 --part 0/8 --table outputs/table_0.npz
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy import stats

from latefusion.data import sources
from latefusion.data.collate import Collator, build_collator
from latefusion.data.draw import distinct_images, opened, with_images
from latefusion.data.prompt_batches import Group, batches, counts
from latefusion.eval.fusion.blind import Runner
from latefusion.eval.fusion.decide import (
    Goal,
    band_schedule,
    every_pyramid,
    keep_layers,
    keep_sizes,
    near_bands,
)
from latefusion.eval.fusion.effects import Answers, Effect, interval, upper_limit
from latefusion.eval.fusion.knockouts import band_effects, effects, knock_outs
from latefusion.eval.fusion.run import calibrate
from latefusion.eval.fusion.study import Study
from latefusion.models.attach import Attachment, attach
from latefusion.models.base_model import compute_dtype, load_base
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import CalibratedEntry
from latefusion.models.student.entry_fit import Calibration, installed

IMAGES = 256  # that calibrate the entry, as `eval/profile_model.py` has it
UNEVEN = tuple(  # schedules whose upper limits are looked at
    VisionSchedule(enter=2, exit=leave, keep=keep, ranking="reading")
    for leave, keep in (
        (10, {}),
        (10, {3: 72, 4: 36, 7: 18}),
        (11, {3: 72, 4: 36, 7: 9}),
        (10, {4: 72, 5: 36, 8: 18}),
        (11, {4: 72, 8: 24}),
    )
)
DECIDING = ("prefix", "suffix")  # knock-outs that a schedule is chosen by


@dataclass
class Table:
    """What schedules do to the questions of a pool, measured when first asked for.

    Attributes:
        chunks: the pool; each chunk's questions in batches.
        values: by name, `[KL, right]` of a chunk's questions, float32 `[2, N]`; None where nobody asked.
    """

    attachment: Attachment
    chunks: list[list[Group]]
    values: dict[str, list[NDArray[np.float32] | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._runners: dict[int, list[Runner]] = {}
        self._dense: dict[int, list[Answers]] = {}

    def get(
        self,
        names: Sequence[str],
        chunks: Sequence[int],
        measure: Callable[[Runner, Answers], dict[str, Effect]],
    ) -> dict[str, NDArray[np.float32]]:
        """The values of some chunks under each name, `[2, N]`, measured now where they are missing."""
        columns = [self.values.setdefault(name, [None] * len(self.chunks)) for name in names]
        for chunk in chunks:
            if any(column[chunk] is None for column in columns):
                pairs = zip(self.runners(chunk), self.dense(chunk), strict=True)
                parts = [measure(runner, dense) for runner, dense in pairs]
                for name, column in zip(names, columns, strict=True):
                    column[chunk] = joined([part[name] for part in parts])
        return {
            name: np.concatenate([column[chunk] for chunk in chunks], 1)  # type: ignore[misc]
            for name, column in zip(names, columns, strict=True)
        }

    def runners(self, chunk: int) -> list[Runner]:
        if chunk not in self._runners:
            model = self.attachment.model
            self._runners[chunk] = [
                Runner(model, self.attachment, group.make()) for group in self.chunks[chunk]
            ]
        return self._runners[chunk]

    def dense(self, chunk: int) -> list[Answers]:
        if chunk not in self._dense:
            self._dense[chunk] = [runner.answers(VisionSchedule()) for runner in self.runners(chunk)]
        return self._dense[chunk]

    def save(self, path: Path) -> None:
        """Write every number, NaN where nobody asked."""
        empty = [np.full((2, size), np.nan, np.float16) for size in self.sizes()]
        arrays = {
            name: np.concatenate(
                [e if part is None else part for e, part in zip(empty, parts, strict=True)], 1
            ).astype(np.float16)
            for name, parts in self.values.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]

    def load(self, path: Path) -> None:
        """Read what an earlier run wrote about the same chunks."""
        ends = np.cumsum(self.sizes())[:-1]
        with np.load(path) as arrays:
            for name, array in arrays.items():
                kept = self.values.setdefault(name, [None] * len(self.chunks))
                for i, part in enumerate(np.split(array, ends, axis=1)):
                    kept[i] = kept[i] if np.isnan(part).any() else part.astype(np.float32)

    def sizes(self) -> list[int]:
        return [sum(len(group.numbers) for group in chunk) for chunk in self.chunks]


def joined(parts: Sequence[Effect]) -> NDArray[np.float32]:
    """KL and correctness of all samples, `[2, N]`."""
    return np.array([[x for p in parts for x in p.kl], [x for p in parts for x in p.right]], np.float32)


@dataclass
class Subset:
    """Some chunks of a table, to be measured on as `eval.fusion.measure.Measurer` measures on batches."""

    table: Table
    chunks: Sequence[int]

    @property
    def layers(self) -> int:
        return len(self.table.attachment.layers)

    @property
    def model(self) -> Any:
        return self.table.attachment.model

    def looks(self) -> list[Any]:
        return []

    def kept(self, schedule: VisionSchedule, entry: CalibratedEntry | None) -> list[None]:
        return []

    def knock_outs(self) -> dict[str, Any]:
        keys = [key for key in knock_outs(self.layers) if key[0] in DECIDING]

        def measure(runner: Runner, dense: Answers) -> dict[str, Effect]:
            nothing, changed = effects(runner, keys)
            return {"dense": nothing, **{f"{kind} {layer}": changed[kind, layer] for kind, layer in keys}}

        return self._effects(["dense", *(f"{kind} {layer}" for kind, layer in keys)], measure)

    def bands(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        def measure(runner: Runner, dense: Answers) -> dict[str, Effect]:
            return {f"band {a} {b}": effect for (a, b), effect in band_effects(runner, pairs)}

        bands = self._effects([f"band {a} {b}" for a, b in pairs], measure)
        return {name.removeprefix("band "): effect for name, effect in bands.items()}

    def schedule(
        self, schedule: VisionSchedule, entry: CalibratedEntry | None, flops: float = 0.0
    ) -> tuple[list[float], list[bool]]:
        name = f"{schedule.to_dict()} {'calibrated' if entry is not None else 'raw'}"

        def measure(runner: Runner, dense: Answers) -> dict[str, Effect]:
            with installed(self.model, entry) if entry is not None else nullcontext():
                return {name: dense.effect(runner.answers(schedule))}

        effect = self._effects([name], measure)[name]
        return effect["kl"], effect["right"]

    def _effects(
        self, names: Sequence[str], measure: Callable[[Runner, Answers], dict[str, Effect]]
    ) -> dict[str, Any]:
        every = self.table.get(names, self.chunks, measure)
        return {
            name: {"kl": kl.tolist(), "right": (right == 1).tolist()} for name, (kl, right) in every.items()
        }


def chunks_of(
    model: Any, collator: Collator, seed: int, size: int, most: int | None
) -> Iterator[tuple[list[Group], list[Hashable]]]:
    """The validation questions of `data.seed=seed` in a random order, `size` at a time, `most` of them.

    With each chunk comes what its questions are about, in the order of its batches.
    """
    rows: Any = sources.scenes("validation", seed=seed)
    drawn, _ = with_images(rows, needed=None, seed=seed)
    order = np.random.default_rng(seed).permutation(len(drawn))[:most]
    for at in range(0, len(order) - size + 1, size):
        here = [drawn[i] for i in order[at : at + size]]
        groups = batches(model, collator, opened(rows, here), size)
        yield groups, [here[number].images for group in groups for number in group.numbers]


@dataclass
class Pool:
    """The embedded base's table, which of its chunks are new scenes, and the calibrated entries of its layers.

    Attributes:
        images: what each question of each chunk is about; size: questions of a chunk.
    """

    table: Table
    images: Sequence[Sequence[Hashable]]
    size: int
    new: Sequence[int]
    entry: Callable[[int], Calibration]

    @property
    def drawn_from(self) -> list[int]:
        return [i for i in range(len(self.table.chunks)) if i not in self.new]

    def about(self, chunks: Sequence[int]) -> list[Hashable]:
        """What each question of these chunks is about."""
        return [image for chunk in chunks for image in self.images[chunk]]

    def choose(self, number: int, confirm: int, bound: float, fresh: int) -> dict[str, Any]:
        """Choose a schedule on a random subset, and say what it costs on `fresh` new questions."""
        random, chunks = np.random.default_rng(number), -(-confirm // self.size)
        drawn = random.permutation(self.drawn_from).tolist()
        samples, others = Subset(self.table, drawn[:1]), Subset(self.table, drawn[1 : 1 + chunks])
        text, vision = counts([group for chunk in drawn for group in self.table.chunks[chunk]])
        study = Study(
            samples,  # type: ignore[arg-type]
            others,  # type: ignore[arg-type]
            Goal(bound=bound),
            labelled=True,
            text=text,
            vision=vision,
            images=self.about(samples.chunks),
            confirming_images=self.about(others.chunks),
        )
        result = study.run(self.entry)
        schedule, confirmed = result["chosen"]["schedule"], result["confirmed"]
        entry = self.entry(schedule["enter"]).entry if result["chosen"]["calibrated"] else None
        new = random.permutation(self.new).tolist()[: -(-fresh // self.size)]
        kl, _ = Subset(self.table, new).schedule(VisionSchedule.from_dict(schedule), entry)
        return {
            "subset": number,
            "schedule": schedule,
            "flops": result["chosen"]["flops"],
            "confirm": {name: confirmed[name] for name in ("prompts", "kl", "limit")},
            "new": described(kl[:fresh], self.about(new)[:fresh]),
            "measured": len(result["ladder"]),
        }

    def fill(self, bands: Sequence[tuple[int, ...]], part: int, parts: int) -> Iterator[int]:
        """Measure the knock-outs, the bands near these, and every pyramid of these, on a part of the chunks."""
        chunks = range(part, len(self.table.chunks), parts)
        layers, vision = len(self.table.attachment.layers), len(self.table.chunks[0][0].places)
        enter, leave = max(enter for enter, _ in bands), min(leave for _, leave in bands)
        near = near_bands(enter, max(leave - 1, enter + 1), layers)
        for chunk in track(chunks, console=Console(stderr=True)):
            subset = Subset(self.table, [chunk])
            subset.knock_outs()
            subset.bands(near)
            for a, b in near:
                subset.schedule(band_schedule(a, b, layers), self.entry(a).entry if a else None)
            for enter, leave in bands:
                entry = self.entry(enter).entry if enter else None
                single = {(i, k): 0.0 for i in keep_layers(enter, leave) for k in keep_sizes(vision)}
                for keep in [{}, *every_pyramid(single)]:
                    subset.schedule(band_schedule(enter, leave, layers, keep), entry)
            yield chunk


def coverage(
    kl: Sequence[float], sizes: Sequence[int] = (128, 384, 1536), draws: int = 1500
) -> dict[str, Any]:
    """How uneven the KL of these questions is, and how often an upper limit of draws from them is below their mean."""
    values, random = np.sort(np.asarray(kl))[::-1], np.random.default_rng(0)
    mean = values.mean()
    result = {"questions": len(values), "kl": float(mean)}
    result["share_of_the_first_percent"] = float(values[: len(values) // 100].sum() / values.sum())
    for n in sizes:
        drawn = [values[random.integers(0, len(values), n)] for _ in range(draws)]
        limits = np.array([upper_limit(one.tolist()) for one in drawn])
        student = np.array([one.mean() + stats.sem(one) * stats.t.ppf(0.95, n - 1) for one in drawn])
        result[f"below_{n}"], result[f"below_{n}_uncorrected"] = (
            float((limits < mean).mean()),
            float((student < mean).mean()),
        )
        result[f"limit_{n}"] = float(np.median(limits) / mean)
    return result


def described(kl: Sequence[float], images: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """The mean with its interval (`effects.interval`)."""
    mean, low, high = interval(kl, images)
    return {"prompts": len(kl), "kl": mean, "low": low, "high": high}


def pool(
    attachment: Attachment, processor: Any, scenes: int, new: int, size: int, most: int | None = None
) -> Pool:
    """Validation questions of `data.seed` 0 to `scenes` - 1 to draw from, and of the next `new` seeds to judge by."""
    model = attachment.model
    collator = build_collator(processor, model.config, model.generation_config)
    parts = [list(chunks_of(model, collator, seed, size, most)) for seed in range(scenes + new)]
    table = Table(attachment, [chunk for part in parts for chunk, _ in part])
    train: Any = sources.scenes("train", n_scenes=IMAGES, seed=0)
    fit_on = distinct_images(train, IMAGES)
    first_new = sum(len(part) for part in parts[:scenes])
    return Pool(
        table,
        [images for part in parts for _, images in part],
        size,
        range(first_new, len(table.chunks)),
        cache(lambda enter: calibrate(attachment, collator, fit_on, enter, 32)),
    )


def summary(subsets: Sequence[dict[str, Any]], bound: float) -> dict[str, Any]:
    """How many subsets hold, and how far apart their FLOPs are."""
    chosen = [subset for subset in subsets if "flops" in subset]
    flops = np.array([subset["flops"] for subset in chosen] or [np.nan])
    return {
        "subsets": len(subsets),
        "chosen": len(chosen),
        "hold_on_new": sum(subset["new"]["kl"] <= bound for subset in chosen),
        "flops_median": float(np.median(flops)),
        "flops_least_and_most": [float(flops.min()), float(flops.max())],
        "within_20_percent_of_median": int(np.sum(np.abs(flops / np.median(flops) - 1) <= 0.2)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subsets", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first subset")
    parser.add_argument(
        "--samples", type=int, default=128, help="questions to search on; drawn and measured together"
    )
    parser.add_argument("--confirm", type=int, default=1536)
    parser.add_argument("--bound", type=float, default=0.05)
    parser.add_argument(
        "--scenes", type=int, default=3, help="seeds of scenes to draw from, about 2,000 questions each"
    )
    parser.add_argument("--new", type=int, default=1, help="seeds of scenes that no subset has")
    parser.add_argument("--questions", type=int, help="of each seed at most")
    parser.add_argument("--fresh", type=int, default=640, help="new questions that a subset is judged on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="auto: what a profile computes in; a table holds the numbers of one of them",
    )  # fmt: skip
    parser.add_argument(
        "--table", type=Path, nargs="+", default=[], help=".npz that keep what is measured: in the first"
    )
    parser.add_argument(
        "--fill", nargs="*", metavar="ENTER:EXIT", help="measure every pyramid of these bands, and no more"
    )
    parser.add_argument("--part", default="0/1", help="of the questions, that --fill measures")
    parser.add_argument(
        "--limits", action="store_true", help="write how uneven the KL is, and how often a limit is too low"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--merge", type=Path, nargs="+", help="put together what several runs wrote into --json"
    )
    options = parser.parse_args()
    if options.merge:
        parts = [json.loads(path.read_text()) for path in options.merge]
        subsets = sorted((one for part in parts for one in part["subsets"]), key=lambda one: one["subset"])
        write(options.json, subsets, parts[0]["settings"])
        return
    dtype = compute_dtype() if options.dtype == "auto" else getattr(torch, options.dtype)
    model, processor = load_base("embedded", dtype=dtype)
    model.to(options.device)
    with attach(model, VisionSchedule()) as attachment:
        drawn = pool(attachment, processor, options.scenes, options.new, options.samples, options.questions)
        for path in options.table:
            if path.exists():
                drawn.table.load(path)
        if options.limits:
            every = Subset(drawn.table, drawn.drawn_from)
            kl = {str(one.to_dict()): every.schedule(one, drawn.entry(one.enter).entry)[0] for one in UNEVEN}
            options.json.write_text(
                json.dumps({name: coverage(one) for name, one in kl.items()}, indent=1) + "\n"
            )
        elif options.fill is not None:
            bands = [tuple(map(int, band.split(":"))) for band in options.fill]
            for _ in drawn.fill(bands, *map(int, options.part.split("/"))):
                drawn.table.save(options.table[0])
        else:
            subsets = []
            for number in track(
                range(options.first, options.first + options.subsets), console=Console(stderr=True)
            ):
                subsets.append(drawn.choose(number, options.confirm, options.bound, options.fresh))
                write(options.json, subsets, vars(options))
                if options.table:
                    drawn.table.save(options.table[0])
            print(json.dumps(summary(subsets, options.bound), indent=1))
        if options.table:
            drawn.table.save(options.table[0])


def write(path: Path, subsets: Sequence[dict[str, Any]], options: dict[str, Any]) -> None:
    settings = {
        name: options[name]
        for name in ("samples", "confirm", "bound", "scenes", "new", "fresh", "device", "dtype")
    }
    out = {"settings": settings, "summary": summary(subsets, options["bound"]), "subsets": list(subsets)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
