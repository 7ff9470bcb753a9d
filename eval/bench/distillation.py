"""What a teacher gives: accuracy with and without one, on data that it knows, does not know, or knows better than.

    python eval/bench/distillation.py --data noise --arm auto --seed 0 --output outputs/teacher
    python eval/bench/distillation.py --merge outputs/teacher --json outputs/teacher.json

The first command trains one cell of the table, `recipe=late_fusion` on the model that ships here, answers clean test
questions with it, and writes a small JSON file. The second merges all cells of a folder, with t intervals over seeds.

Data: `easy_vqa` (a third party's pictures and questions, most of whose answers the base does not know), `scenes` (it
knows nearly all), `mix` (half of each), `noise` (`scenes`, a fifth of whose training answers are wrong). A training row
is one question. Its seed draws the rows, the wrong answers and all that training draws; test questions are always the
same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve other processes

import datasets
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from latefusion.data.collate import collator_without_weights
from latefusion.data.easy_vqa import load_easy_vqa
from latefusion.data.load import training_data
from latefusion.data.scenes import load_scenes
from latefusion.eval.bench.timing import write_json
from latefusion.eval.comparison.answers import answer_questions
from latefusion.eval.comparison.systems import System
from latefusion.eval.report.__main__ import insert
from latefusion.eval.tasks.base import Task
from latefusion.models.attach import attach
from latefusion.models.base_model import load_base
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.save import load_student
from latefusion.recipes.compose import compose_config, compose_tree
from latefusion.training.assemble import base_of
from latefusion.training.monitor import METRICS
from latefusion.training.offline import write_answers
from latefusion.training.preflight import checked, checked_teaching
from latefusion.training.run import train
from latefusion.training.trust import settle_trust
from latefusion.training.trust_record import FILE as TRUST

DATA = ("easy_vqa", "scenes", "mix", "noise")
ARMS = {  # what the teacher does in a run
    "none": ["teacher=none"],
    "all": ["kl.trust=all"],
    "labels": ["kl.trust=labels"],
    "auto": ["kl.trust=auto"],
    "offline": ["kl.trust=auto"],  # its answers read from a cache
}
BASE = "base"  # the arm that trains nothing
WRONG = 0.2  # share of wrong training answers in `noise`
PER_IMAGE = 10  # questions
QUESTIONS = 1000  # of the test


def questions(source: str, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Questions of a source, about images drawn by the seed."""
    images = count // (PER_IMAGE - 2) + 5  # some have fewer
    if source == "scenes":
        rows = load_scenes(split, n_scenes=images, seed=seed)
    else:
        rows = load_easy_vqa(split, n_images=images, seed=seed, per_image=PER_IMAGE)
    stored = rows.cast_column("image", datasets.Image(decode=False))
    return [dict(row) for row in stored.select(range(count))]


def with_wrong_answers(rows: Sequence[dict[str, Any]], share: float, seed: int) -> list[dict[str, Any]]:
    """The rows, a share of them with another answer to a question of the same type, or to any if there is no other."""
    rng = random.Random(f"wrong {seed}")
    answers = defaultdict(set)
    for row in rows:
        answers[row["type"]].add(row["answer"])
    every = set().union(*answers.values())
    wrong = set(rng.sample(range(len(rows)), round(share * len(rows))))
    return [
        {
            **row,
            "answer": rng.choice(sorted((answers[row["type"]] - {row["answer"]}) or every - {row["answer"]})),
        }
        if i in wrong
        else row
        for i, row in enumerate(rows)
    ]


def rows_of(data: str, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """The questions of a data set; wrong answers are in the training rows of `noise` alone."""
    if data == "mix":
        half = count // 2
        return [
            *questions("scenes", split, count - half, seed),
            *questions("easy_vqa", split, half, seed),
        ]
    rows = questions("easy_vqa" if data == "easy_vqa" else "scenes", split, count, seed)
    return with_wrong_answers(rows, WRONG, seed) if data == "noise" and split == "train" else rows


def write_conversations(rows: Iterable[dict[str, Any]], file: Path) -> None:
    """A conversation of one question a row, as `data=dataset` reads them."""
    table = [
        {
            "id": row["id"],
            "images": [row["image"]],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]},
                {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
            ],
        }
        for row in rows
    ]
    datasets.Dataset.from_list(table).cast_column("images", datasets.List(datasets.Image())).to_parquet(file)


def run_cell(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Train a cell and test it."""
    tested = datasets.Dataset.from_list(rows_of(args.data, "test", args.questions, seed=0))
    tested = tested.cast_column("image", datasets.Image(decode=False))
    cell = {
        "data": args.data,
        "arm": arm,
        "seed": args.seed,
        "rows": args.rows,
        "steps": args.steps,
        "settings": args.settings,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    begun, device = time.process_time(), "cuda" if torch.cuda.is_available() else "cpu"
    if arm == BASE:
        model, processor = load_base("embedded", dtype=torch.float32)
        model.to(device)
        with attach(model, VisionSchedule()) as attachment:
            system = System(name="Dense base", policy=VisionSchedule())
            return cell | scores(tested, model, processor, attachment, system)
    with TemporaryDirectory() as folder:
        trained = train_cell(args, arm, Path(folder))
        seconds = time.process_time() - begun
        student = load_student(Path(folder) / "run", dtype=torch.float32)
        student.model.to(device)
        system = System(name="Student", policy=student.schedule, adapters=True, student=student)
        right = scores(tested, student.model, student.processor, student.attachment, system)
    return cell | trained | {"cpu_seconds": {"training": seconds, "all": time.process_time() - begun}} | right


def train_cell(args: argparse.Namespace, arm: str, folder: Path) -> dict[str, Any]:
    """Train in `folder / "run"`; returns what the run decided about its teacher, and the means of its log."""
    write_conversations(rows_of(args.data, "train", args.rows, args.seed), folder / "train.parquet")
    words = [
        *("model=embedded", "data=dataset", f"data.path={folder / 'train.parquet'}", "recipe=late_fusion"),
        *(f"train.steps={args.steps}", f"train.seed={args.seed}", "train.trackers=[]", "eval.enabled=false"),
        *("train.dtype=float32", f"train.save_every={args.steps}", f"output_dir={folder / 'run'}"),
        *(ARMS[arm]),
        *args.settings,
    ]
    if arm == "offline":
        words.append(f"kl.cache={folder / 'cache'}")
        write_answers(checked_teaching(compose_tree(words)))
    tree = compose_tree(words)
    train(tree, *checked(tree))
    lines = [json.loads(line) for line in (folder / "run" / METRICS).read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    decided = folder / "run" / TRUST
    return {
        "auto": None if arm == "none" else decision(words),
        "decided": json.loads(decided.read_text()) if decided.is_file() else None,
        "log": {
            name: fmean(line[name] for line in logged if name in line)
            for name in ("ce", "kl", "teacher_right")
            if any(name in line for line in logged)
        },
    }


def decision(words: Sequence[str]) -> dict[str, Any]:
    """What `kl.trust=auto` decides on the data of a run, which is then bit for bit one with that `kl.trust`."""
    config = compose_config([*words, "kl.trust=auto"])
    collator = collator_without_weights(config, dtype=torch.float32)
    decided = settle_trust(config, collator, lambda: base_of(config)[0], training_data(config.data), None)
    assert decided is not None
    return asdict(decided)


def scores(rows: Any, model: Any, processor: Any, attachment: Any, system: System) -> dict[str, Any]:
    """The share of test questions answered right, of all and of each type."""
    answers = answer_questions(
        model=model,
        processor=processor,
        attachment=attachment,
        systems={"system": system},
        task=Task(name="test", rows=rows),
        batch_size=96,
    )["system"]
    types: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        types[answer.type].append(answer.score)
    return {
        "questions": len(answers),
        "accuracy": fmean(answer.score for answer in answers),
        "types": {name: fmean(values) for name, values in sorted(types.items())},
    }


# --- all cells ---


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean with its 95% t interval over seeds; no interval of one seed."""
    mean = fmean(values)
    if len(values) < 2:
        return {"mean": mean, "seeds": len(values)}
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": len(values)}


def merged(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each arm's accuracy on each data set, and its differences in the same seeds: to both controls and their better.

    Where no cell ran with `kl.trust=auto`, it is the cell that its decision names.
    """
    groups: dict[tuple, dict[str, dict[int, dict[str, Any]]]] = defaultdict(dict)
    for cell in cells:
        name = " ".join([cell["arm"], *cell["settings"]])
        groups[cell["data"], cell["rows"], cell["steps"]].setdefault(name, {})[cell["seed"]] = cell
    tables = []
    for (data, rows, steps), arms in sorted(groups.items()):
        for settings in {tuple(cell["settings"]) for seeds in arms.values() for cell in seeds.values()}:
            decided = as_decided(arms, settings)
            if decided:
                arms.setdefault(" ".join(["auto", *settings]), decided)
        means = {arm: fmean(cell["accuracy"] for cell in seeds.values()) for arm, seeds in arms.items()}
        controls = [arm for arm in ("none", "all") if arm in arms]
        against = {f"to_{control}": control for control in controls}
        if len(controls) == 2:
            against["to_better"] = max(controls, key=means.__getitem__)
        table: dict[str, Any] = {"data": data, "rows": rows, "steps": steps, "arms": {}}
        for arm, seeds in sorted(arms.items()):
            row: dict[str, Any] = {
                "accuracy": interval([cell["accuracy"] for cell in seeds.values()]),
                "of_seeds": {str(seed): seeds[seed]["accuracy"] for seed in sorted(seeds)},
            }
            autos = [seeds[seed]["auto"] for seed in sorted(seeds) if seeds[seed].get("auto")]
            if autos:
                row["auto"] = autos
            for name, control in against.items():
                common = sorted(seeds.keys() & arms[control].keys())
                if common and arm not in (control, BASE):
                    row[name] = interval(
                        [seeds[s]["accuracy"] - arms[control][s]["accuracy"] for s in common]
                    )
            table["arms"][arm] = row
        tables.append(table)
    return {"tables": tables, "cells": list(cells)}


def as_decided(arms: dict[str, dict[int, dict[str, Any]]], settings: tuple) -> dict[int, dict[str, Any]]:
    """For each seed the cell with the trust that `auto` decides on its data."""
    trusts = {
        seed: cell["auto"]["trust"]
        for seeds in arms.values()
        for seed, cell in seeds.items()
        if cell.get("auto") and tuple(cell["settings"]) == settings
    }
    of_arm = {seed: arms.get(" ".join([trust, *settings]), {}) for seed, trust in trusts.items()}
    return {seed: cells[seed] for seed, cells in of_arm.items() if seed in cells}


COLUMNS = {
    "data": "data",
    "rows": "questions",
    "arm": "teacher",
    "seeds": "seeds",
    "accuracy": "right, %",
    "to_none": "to `none`",
    "to_all": "to `all`",
    "auto": "teacher knows, %",
}


def rows_to_show(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each data set and arm, in the words of `COLUMNS`."""
    shown = []
    for part in result["tables"]:
        for arm, row in part["arms"].items():
            shares = [
                100 * each["right"] / each["answers"] for each in row.get("auto", []) if each["answers"]
            ]
            trusts = "/".join(sorted({each["trust"] for each in row.get("auto", [])}))
            shown.append(
                {
                    "data": part["data"],
                    "rows": f"{part['rows']:,}",
                    "arm": f"{arm} (= {trusts})" if arm.startswith("auto") else arm,
                    "seeds": str(row["accuracy"]["seeds"]),
                    **{key: _percent(row.get(key), plus=key != "accuracy") for key in list(COLUMNS)[4:7]},
                    "auto": f"{min(shares):.0f} to {max(shares):.0f}" if shares else "",
                }
            )
    return shown


def markdown(result: dict[str, Any]) -> str:
    """The table of a page; brackets are 95% t intervals over seeds."""
    head = f"| {' | '.join(COLUMNS.values())} |\n| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    rows = [" | ".join(row[key] for key in COLUMNS) for row in rows_to_show(result)]
    return "\n".join([head, *(f"| {row} |" for row in rows)])


def print_merged(result: dict[str, Any]) -> None:
    table = Table(*COLUMNS.values())
    for row in rows_to_show(result):
        table.add_row(*row.values())
    Console(width=140).print(table)


def _percent(value: dict[str, Any] | None, *, plus: bool) -> str:
    if value is None:
        return ""
    sign = "+" if plus else ""
    ends = f" ({100 * value['low']:.1f} to {100 * value['high']:.1f})" if "low" in value else ""
    return f"{100 * value['mean']:{sign}.1f}{ends}".replace("-", "−")


def arguments(words: Sequence[str]) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", choices=DATA, help="of one cell")
    options.add_argument(
        "--arm",
        type=lambda names: names.split(","),
        help=f"what the teacher does: {', '.join(ARMS)} (several: a cell each), or {BASE}, which trains nothing",
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--rows", type=int, default=2400, help="training questions")
    options.add_argument("--steps", type=int, default=150, help="of 12 questions")
    options.add_argument("--questions", type=int, default=QUESTIONS, help="test questions")
    options.add_argument("--output", default="outputs/teacher", help="folder for the cell's file")
    options.add_argument("--merge", metavar="FOLDER", help="of cells, instead of running one")
    options.add_argument("--json", type=Path, help="the merged file")
    options.add_argument("--page", type=Path, help="the page whose table is to be that of the merged cells")
    options.add_argument("settings", nargs="*", help="key=value of the run, such as kl.share=0.125")
    args = options.parse_args(words)
    if args.merge is None and None in (args.data, args.arm):
        options.error("name a cell with --data and --arm, or a folder of cells with --merge")
    unknown = set(args.arm or ()) - {BASE, *ARMS}
    if unknown:
        options.error(
            f"--arm {', '.join(sorted(unknown))} does not exist; choose from {', '.join([BASE, *ARMS])}"
        )
    return args


def main(words: Sequence[str]) -> None:
    args = arguments(words)
    if args.merge is None:
        for arm in args.arm:
            name = "-".join([args.data, arm, *args.settings, f"{args.rows}x{args.steps}", f"seed{args.seed}"])
            file = Path(args.output) / f"{name.replace('/', '_')}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            cell = run_cell(args, arm)
            file.write_text(json.dumps(cell, indent=1) + "\n")
            print(f"{cell['accuracy']:.1%} of {cell['questions']} right: {file}", flush=True)
        return
    cells = [json.loads(file.read_text()) for file in sorted(Path(args.merge).glob("*.json"))]
    if not cells:
        raise SystemExit(f"error: no cell in {args.merge}; run some first.")
    result = merged(cells)
    print_merged(result)
    write_json(result, args.json)
    if args.page:
        args.page.write_text(insert(args.page.read_text(), "distillation", markdown(result)))


if __name__ == "__main__":
    main(sys.argv[1:])
