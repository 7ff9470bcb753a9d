"""What a teacher gives: accuracy with and without one, on data that it knows, does not know, or knows better than.

    python eval/bench/distillation.py --data noise --arm none,all,decision --seed 0 --output outputs/teacher
    python eval/bench/distillation.py --merge outputs/teacher --json outputs/teacher.json

The first command trains one cell of the table, `recipe=late_fusion` on the model that ships here, answers clean test
questions with it, and writes a small JSON file. `--arm decision` asks the teacher alone, as `kl.trust=auto` does before
training: that run is bit for bit the one with a teacher or without that the decision names. The last command merges all
cells of a folder, with t intervals over seeds.

Data: `easy_vqa` (a third party's pictures and questions, most of whose answers the base does not know), `scenes` (it
knows nearly all), `mix` (half of each); `noise` and `noise_10` (`scenes`, a fifth or a tenth of whose training answers
are wrong) and `easy_vqa_noise` (a fifth). A training row is one question. Its seed draws the rows, the wrong answers
and all that training draws; test questions are always the same.
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

WRONG = {"noise": 0.2, "noise_10": 0.1, "easy_vqa_noise": 0.2}  # share of wrong training answers
DATA = ("easy_vqa", "scenes", "mix", *WRONG)
ARMS = {  # what the teacher does in a run
    "none": ["teacher=none"],
    "all": ["kl.trust=all"],
    "auto": ["kl.trust=auto"],
    "offline": ["kl.trust=all"],  # its answers read from a cache
}
BASE, DECISION = "base", "decision"  # arms that train nothing
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
    """The questions of a data set; wrong answers are in training rows alone."""
    if data == "mix":
        half = count // 2
        return [
            *questions("scenes", split, count - half, seed),
            *questions("easy_vqa", split, half, seed),
        ]
    rows = questions("easy_vqa" if data.startswith("easy_vqa") else "scenes", split, count, seed)
    return with_wrong_answers(rows, WRONG[data], seed) if data in WRONG and split == "train" else rows


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
    """Train a cell and test it; a decision is a cell without either."""
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
    if arm == DECISION:
        return cell | decision(args)
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


def words_of(args: argparse.Namespace, arm: str, folder: Path) -> list[str]:
    """The settings of a cell's run in `folder / "run"`, whose training rows are written."""
    write_conversations(rows_of(args.data, "train", args.rows, args.seed), folder / "train.parquet")
    return [
        *("model=embedded", "data=dataset", f"data.path={folder / 'train.parquet'}", "recipe=late_fusion"),
        *(f"train.steps={args.steps}", f"train.seed={args.seed}", "train.trackers=[]", "eval.enabled=false"),
        *("train.dtype=float32", f"train.save_every={args.steps}", f"output_dir={folder / 'run'}"),
        *ARMS[arm],
        *args.settings,
    ]


def train_cell(args: argparse.Namespace, arm: str, folder: Path) -> dict[str, Any]:
    """Train in `folder / "run"`; returns what the run decided about its teacher, and the means of its log."""
    words = words_of(args, arm, folder)
    if arm == "offline":
        words.append(f"kl.cache={folder / 'cache'}")
        write_answers(checked_teaching(compose_tree(words)))
    tree = compose_tree(words)
    train(tree, *checked(tree))
    lines = [json.loads(line) for line in (folder / "run" / METRICS).read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    decided = folder / "run" / TRUST
    return {
        "decided": json.loads(decided.read_text()) if decided.is_file() else None,
        "log": {
            name: fmean(line[name] for line in logged if name in line)
            for name in ("ce", "kl", "teacher_right")
            if any(name in line for line in logged)
        },
    }


def decision(args: argparse.Namespace) -> dict[str, Any]:
    """What `kl.trust=auto` decides on a cell's data, and the CPU seconds that asking the teacher took."""
    with TemporaryDirectory() as folder:
        config = compose_config(words_of(args, "auto", Path(folder)))
        collator = collator_without_weights(config, dtype=torch.float32)
        model, rows = base_of(config)[0], training_data(config.data)  # which a run loads all the same
        begun = time.process_time()
        decided = settle_trust(config, collator, lambda: model, rows, None)
        seconds = time.process_time() - begun
    assert decided is not None
    return {"auto": asdict(decided), "cpu_seconds": {"asking": seconds}}


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
        decisions = {}
        for name in [name for name in arms if name.split()[0] == DECISION]:
            settings, seeds = name.removeprefix(DECISION), arms.pop(name)
            named = {
                seed: arms.get(f"{c['auto']['trust']}{settings}", {}).get(seed) for seed, c in seeds.items()
            }
            if decided := {seed: cell for seed, cell in named.items() if cell is not None}:
                arms.setdefault(f"auto{settings}", decided)
            decisions[f"auto{settings}"] = seeds
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
            if arm in decisions:
                of_seed = decisions[arm]
                row["decisions"] = [of_seed[seed]["auto"] for seed in sorted(seeds) if seed in of_seed]
            for name, control in against.items():
                common = sorted(seeds.keys() & arms[control].keys())
                if common and arm not in (control, BASE):
                    row[name] = interval(
                        [seeds[s]["accuracy"] - arms[control][s]["accuracy"] for s in common]
                    )
            table["arms"][arm] = row
        tables.append(table)
    return {"tables": tables, "cells": list(cells)}


COLUMNS = {
    "data": "data",
    "rows": "questions",
    "arm": "teacher",
    "seeds": "seeds",
    "accuracy": "right, %",
    "to_none": "to `none`",
    "to_all": "to `all`",
    "knows": "teacher knows, %",
    "asked": "of answers",
}


def rows_to_show(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each data set and arm, in the words of `COLUMNS`."""
    shown = []
    for part in result["tables"]:
        for arm, row in part["arms"].items():
            decisions = row.get("decisions", [])
            shares = [100 * each["right"] / each["answers"] for each in decisions]
            trusts = "/".join(sorted({each["trust"] for each in decisions}))
            shown.append(
                {
                    "data": part["data"],
                    "rows": f"{part['rows']:,}",
                    "arm": f"{arm} (= {trusts})" if trusts else arm,
                    "seeds": str(row["accuracy"]["seeds"]),
                    **{key: _percent(row.get(key), plus=key != "accuracy") for key in list(COLUMNS)[4:7]},
                    "knows": f"{min(shares):.0f} to {max(shares):.0f}" if shares else "",
                    "asked": "/".join(str(each["answers"]) for each in decisions),
                }
            )
    return shown


def markdown(result: dict[str, Any]) -> str:
    """The table of a page; brackets are 95% t intervals over seeds."""
    head = (
        f"| {' | '.join(COLUMNS.values())} |\n| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
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
        help=f"what the teacher does: {', '.join(ARMS)} (several: a cell each), or {BASE}, {DECISION}",
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
    unknown = set(args.arm or ()) - {BASE, DECISION, *ARMS}
    if unknown:
        options.error(
            f"--arm {', '.join(sorted(unknown))} does not exist; choose from {', '.join([BASE, DECISION, *ARMS])}"
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
            print(f"{cell.get('accuracy', cell.get('auto'))}: {file}", flush=True)
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
