"""What students of `smollm_icons` keep of their base: one file a training, and the table over seeds.

    python eval/bench/icons_students.py --arm late_fusion --seed 0 --output outputs/students
    python eval/bench/icons_students.py --arm base --output outputs/students
    python eval/bench/icons_students.py --merge outputs/students --json outputs/students.json

An arm is a recipe and a teacher, which counts fully, in an eighth of the steps (`late_fusion_eighth`) or from answers
written before (`late_fusion_offline`); `base` trains nothing and answers under dense, VisiPruner and
the schedule of `schedule=auto`, under which `profiled` is trained.
`--share` takes a part of the boards, `--noise` gives a part of the training answers wrong, `--transfer` goes on
training on 50 pictures of `easy_vqa` (500 rows). Every file has the outcome of each test question, so that arms are
compared on the same questions: new boards (`test`), boards of drawings that training never shows (`new_drawings`),
and `easy_vqa`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve other processes

import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from latefusion.data.prompts import prompt_inputs
from latefusion.data.question_sets import load_questions
from latefusion.eval import metrics
from latefusion.eval.bench.timing import write_json
from latefusion.eval.comparison import cost
from latefusion.eval.comparison.answers import answer_questions
from latefusion.eval.comparison.systems import System, entry_adapter
from latefusion.eval.tasks.base import Answer, Task
from latefusion.models.attach import attach
from latefusion.models.base_model import compute_dtype, load_base
from latefusion.models.flops import head_flops
from latefusion.models.policies.configured import visipruner
from latefusion.models.profile_schedule import read_schedule
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.save import load_student
from latefusion.recipes.compose import compose_config

MODEL = "smollm_icons"
BOARDS = 400  # to train on
ROOT = Path(__file__).parents[2]
PROFILE = "docs/results/profile_icons"  # of schedule=auto
BAND = ["schedule.enter=0", "schedule.exit=24"]  # that schedule's
UNTRAINED = ["schedule.exit=24", "schedule.keep={11: 36, 17: 16}"]  # chosen without training
CROSS_PROFILE = "docs/results/profile_icons_cross"  # of the layers that read
ARMS = {
    "base": [],
    "dense": ["recipe=dense", "teacher=none"],
    "dense_taught": ["recipe=dense", "teacher=dense", "kl.trust=all"],
    "late_fusion": ["recipe=late_fusion", "teacher=visipruner", "kl.trust=all"],
    "late_fusion_eighth": ["recipe=late_fusion", "teacher=visipruner", "kl.trust=all", "kl.share=0.125"],
    "late_fusion_offline": ["recipe=late_fusion", "teacher=visipruner", "kl.trust=all"],
    "late_fusion_dense_teacher": ["recipe=late_fusion", "teacher=dense", "kl.trust=all"],
    "late_fusion_no_teacher": ["recipe=late_fusion", "teacher=none"],
    "cross_only": ["recipe=cross_only", "teacher=visipruner", "kl.trust=all"],
    "cross_only_no_teacher": ["recipe=cross_only", "teacher=none"],
    "cross_only_band": ["recipe=cross_only", "teacher=none", f"schedule.cross={[*range(8, 24)]}"],
    "cross_only_profiled": ["recipe=cross_only", "teacher=none", f"schedule.profile={CROSS_PROFILE}"],
    "cross_only_unmoved": ["recipe=cross_only", "teacher=none", "entry.later=false"],
    "pyramid": ["recipe=late_fusion_pyramid", "teacher=visipruner", "kl.trust=all"],
    "pyramid_no_teacher": ["recipe=late_fusion_pyramid", "teacher=none"],
    "pyramid_chosen_untrained": ["recipe=late_fusion_pyramid", "teacher=none", *UNTRAINED],
    "pyramid_gentle": ["recipe=late_fusion_pyramid", "teacher=none", "train.learning_rate=1e-4"],
    "profiled": ["recipe=late_fusion", "teacher=none", f"schedule.profile={PROFILE}"],
    # the profile's band with fewer tokens: under 40% of the whole prefill, under 20% of the decoder's
    "narrow": ["recipe=late_fusion", "teacher=none", *BAND, "schedule.keep={1: 36, 12: 20}"],
    "narrower": ["recipe=late_fusion", "teacher=none", *BAND, "schedule.keep={1: 32, 8: 12}"],
}
OFFLINE = "late_fusion_offline"  # the arm whose teacher has written its answers before
TESTS = {  # name -> set, split, boards or pictures (about 11 and 10 questions each)
    "test": ("icons", "test", 1.0),
    "new_drawings": ("icons", "new_drawings", 0.5),
    "easy_vqa": ("easy_vqa", "test", 0.5),
}
PICTURES = 50  # of easy_vqa, about 500 rows, for --transfer


def tasks_of(boards: int) -> dict[str, Task]:
    """The test questions, on `boards` boards of the test split and fewer pictures of the others."""
    return {
        name: Task(name=name, rows=load_questions(source, split, max(2, round(part * boards))), split=split)
        for name, (source, split, part) in TESTS.items()
    }


def run_cell(args: argparse.Namespace) -> dict[str, Any]:
    """Train an arm and test it."""
    began = time.perf_counter()
    cell = {
        name: getattr(args, name)
        for name in ("arm", "seed", "share", "noise", "transfer", "steps", "batch", "train_boards")
    }
    cell["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    tasks = tasks_of(args.boards)
    if args.arm == "base":
        model: Any
        model, processor = load_base(MODEL, dtype=compute_dtype())
        on_device(model)
        thresholds = visipruner(compose_config([f"model={MODEL}", *args.settings]).model.visipruner)
        systems = {
            "dense": System(name="Dense base", policy=VisionSchedule()),
            "pruned": System(name="VisiPruner", policy=thresholds),
            "profiled": System(name="schedule=auto", policy=read_schedule(ROOT / PROFILE)),
        }
        with attach(model, VisionSchedule()) as attachment:
            return cell | {"systems": answered(model, processor, attachment, systems, tasks)}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "boards"
        train(folder, args, [*ARMS[args.arm], f"data.scenes={max(1, round(args.share * args.train_boards))}"])
        if args.transfer:
            first, folder = folder, Path(scratch) / "transfer"
            more = ["data=easy_vqa", f"data.scenes={PICTURES}", f"init={first}"]
            train(folder, args, [*ARMS[args.arm], *more])
        trained = time.perf_counter() - began
        student = load_student(folder, dtype=compute_dtype())
    on_device(student.model)
    system = System(name=args.arm, policy=student.schedule, adapters=True, student=student)
    systems = {"student": system}
    rows = answered(student.model, student.processor, student.attachment, systems, tasks)
    return cell | {"train_seconds": trained, "seconds": time.perf_counter() - began, "systems": rows}


def train(folder: Path, args: argparse.Namespace, words: Sequence[str]) -> None:
    """Run training/train.py, behind training/teach.py where the arm says so.

    Raises:
        subprocess.CalledProcessError: one of them fails.
    """
    for command in commands(folder, args, words):
        subprocess.run(command, check=True, cwd=ROOT)


def commands(folder: Path, args: argparse.Namespace, words: Sequence[str]) -> list[list[str]]:
    """The commands that train a student into `folder`."""
    numbers = [f"train.steps={args.steps}", f"train.batch_size={args.batch}", f"train.seed={args.seed}"]
    more = [f"data.seed={args.seed}", f"data.noise={args.noise}", "eval.enabled=false", "train.trackers=[]"]
    every = [f"model={MODEL}", *words, *numbers, *more, f"output_dir={folder}", *args.settings]
    scripts = ["training/train.py"]
    if args.arm == OFFLINE:
        every.append(f"kl.cache={folder.with_name(folder.name + '_answers')}")
        scripts.insert(0, "training/teach.py")
    return [[sys.executable, str(ROOT / script), *every] for script in scripts]


def on_device(model: Any) -> None:
    if torch.cuda.is_available():
        model.cuda()


def answered(
    model: Any, processor: Any, attachment: Any, systems: dict[str, System], tasks: Mapping[str, Task]
) -> dict[str, Any]:
    """By system: outcomes of every question, by test, and FLOPs of the decoder and of the whole prefill.

    Both are strings of a digit a question: `right` is 1 where the answer is, `boards` where another board begins.
    """
    rows: dict[str, Any] = {key: {"right": {}, "boards": {}} for key in systems}
    of_test: dict[str, dict[str, list[Answer]]] = {}
    for name, task in tasks.items():
        of_test[name] = answer_questions(
            model=model, processor=processor, attachment=attachment, systems=systems, task=task, batch_size=64
        )
        for key, answers in of_test[name].items():
            rows[key]["right"][name] = "".join(str(int(answer.correct)) for answer in answers)
            names = [answer.scene for answer in answers]
            rows[key]["boards"][name] = "0" + "".join(str(int(a != b)) for a, b in pairwise(names))
    vision = cost.vision_flops(model, [prompt_inputs(model, processor, [tasks["test"].rows[0]])]) or 0.0
    head = head_flops(model.config, 1)
    for key, system in systems.items():
        answers = of_test["test"][key]
        flops = cost.compute(model.config, answers, system.policy, entry_adapter(model, system)).flops
        rows[key] |= {"flops": flops, "prefill_flops": flops + vision + head}
    return rows


# ---------------------------------------------------------------- the table


SETTINGS = (
    "arm",
    "share",
    "noise",
    "transfer",
    "steps",
    "batch",
    "train_boards",
)  # what cells of several seeds have in common


def merged(folder: Path) -> dict[str, Any]:
    """All cells of a folder as rows: accuracy by seed and its difference to the dense arm of the same seed.

    Raises:
        FileNotFoundError: there is no cell.
    """
    cells = [
        {"train_boards": BOARDS, **json.loads(file.read_text())} for file in sorted(folder.glob("*.json"))
    ]
    if not cells:
        raise FileNotFoundError(f"no cell in {folder}; write some with --arm NAME --output {folder}.")
    base = next((cell["systems"] for cell in cells if cell["arm"] == "base"), None)
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["arm"] != "base":
            groups.setdefault(tuple(cell[name] for name in SETTINGS), []).append(cell)
    rows = [] if base is None else [base_row(name, row, base) for name, row in base.items()]
    for settings, members in groups.items():
        dense = {cell["seed"]: cell for cell in groups.get(("dense", *settings[1:]), [])}
        untaught = {cell["seed"]: cell for cell in groups.get((untaught_arm(settings[0]), *settings[1:]), [])}
        row: dict[str, Any] = {**dict(zip(SETTINGS, settings, strict=True)), "tests": {}}
        systems = {cell["seed"]: cell["systems"]["student"] for cell in members}
        first = next(iter(systems.values()))
        for test in TESTS:
            values = {seed: 100 * right(system, test) for seed, system in systems.items()}
            others = {seed: dense[seed]["systems"]["student"] for seed in systems if seed in dense}
            alone = {seed: untaught[seed]["systems"]["student"] for seed in systems if seed in untaught}
            row["tests"][test] = {
                "by_seed": values,
                **widest(of_questions(systems.values(), test), mean_over_seeds(list(values.values()))),
                "against_dense": gaps(systems, {} if row["arm"] == "dense" else others, test),
                "against_untaught": gaps(systems, alone, test),
                "against_base": gaps(systems, dict.fromkeys(systems, base["dense"]) if base else {}, test),
            }
        if base is not None:
            row |= {name: first[name] / base["dense"][name] for name in ("flops", "prefill_flops")}
        rows.append(row | {"device": members[0]["device"]})
    return {"rows": rows, "questions": {test: len(cells[0]["systems"][s]["right"][test]) for test in TESTS
                                        for s in list(cells[0]["systems"])[:1]}}  # fmt: skip


def untaught_arm(arm: str) -> str | None:
    """The arm that trains by the same recipe without a teacher; None: it has none itself."""
    recipe, *words = ARMS[arm]
    if "teacher=none" in words:
        return None
    return next((name for name, other in ARMS.items() if other == [recipe, "teacher=none"]), None)


def base_row(name: str, system: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """A row of the base, which has no seeds: intervals over its questions."""
    tests = {
        test: of_questions([system], test)
        | {"against_base": gaps({0: system}, {} if name == "dense" else {0: base["dense"]}, test)}
        for test in TESTS
    }
    ratios = {key: system[key] / base["dense"][key] for key in ("flops", "prefill_flops")}
    return {"arm": f"base, {name}", "tests": tests, **ratios}


def of_questions(systems: Collection[dict[str, Any]], test: str) -> dict[str, float]:
    """Accuracy of systems of several seeds; its interval over questions knows that several share a picture."""
    estimate = metrics.accuracy(scores(systems, test), clusters(next(iter(systems)), test))
    return in_percent(estimate)


def in_percent(estimate: metrics.Estimate) -> dict[str, float]:
    return {"mean": 100 * estimate.value, "low": 100 * estimate.low, "high": 100 * estimate.high}


def widest(questions: Mapping[str, float], seeds: Mapping[str, float | None]) -> dict[str, float]:
    """One mean with the outer limits of two intervals: seeds that agree by chance say nothing of other questions."""
    low, high = seeds["low"], seeds["high"]
    if low is None or high is None:  # one seed
        return dict(questions)
    return {**questions, "low": min(low, questions["low"]), "high": max(high, questions["high"])}


def gaps(
    systems: Mapping[int, dict[str, Any]], others: Mapping[int, dict[str, Any]], test: str
) -> dict[str, Any]:
    """Systems less others by seed, on the same questions, and the mean over the seeds that both have."""
    pairs = {seed: (system, others[seed]) for seed, system in systems.items() if seed in others}
    by_seed = {seed: asdict(difference([one], [other], test)) for seed, (one, other) in pairs.items()}
    seeds = mean_over_seeds([100 * gap["difference"]["value"] for gap in by_seed.values()])
    if not pairs:
        return {"by_seed": by_seed, **seeds}
    ours, theirs = zip(*pairs.values(), strict=True)
    return {"by_seed": by_seed, **widest(in_percent(difference(ours, theirs, test).difference), seeds)}


def scores(systems: Collection[dict[str, Any]], test: str) -> list[float]:
    """By question, the share of the systems that are right."""
    return [
        fmean(map(float, outcomes)) for outcomes in zip(*(one["right"][test] for one in systems), strict=True)
    ]


def clusters(system: dict[str, Any], test: str) -> list[int]:
    """The number of each question's picture."""
    number, numbers = 0, []
    for is_next in system["boards"][test]:
        number += int(is_next)
        numbers.append(number)
    return numbers


def right(system: dict[str, Any], test: str) -> float:
    return fmean(scores([system], test))


def difference(
    first: Collection[dict[str, Any]], second: Collection[dict[str, Any]], test: str
) -> metrics.Paired:
    """The first systems less the second on the same questions."""
    return metrics.paired(scores(first, test), scores(second, test), clusters(next(iter(first)), test))


def mean_over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """Mean with its 95% t interval; no interval of one seed, nothing of none."""
    if not values:
        return {"mean": None, "low": None, "high": None}
    mean = fmean(values)
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None}
    half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


AGAINST = {"against_base": "against the dense base, test", "against_dense": "against dense LoRA, test"}
HEAD = ("arm", "seeds", *TESTS, *AGAINST.values(), "decoder FLOPs", "whole prefill", "boards trained on")


def lines(result: dict[str, Any]) -> list[list[str]]:
    """The table's rows, as text: % right, brackets are 95% (over questions or over seeds, whichever is wider)."""
    table = []
    for row in result["rows"]:
        of_test = row["tests"]["test"]
        table.append(
            [
                label(row),
                str(len(of_test["by_seed"])) if "by_seed" in of_test else "",
                *(interval(row["tests"][test]) for test in TESTS),
                *(interval(of_test[name], "+.1f") if name in of_test else "" for name in AGAINST),
                *(f"{row[name]:.0%}" if name in row else "" for name in ("flops", "prefill_flops")),
                passes(row),
            ]
        )
    return table


def print_table(result: dict[str, Any]) -> None:
    table = Table(*HEAD, title="Students of smollm_icons: % right (95%)")
    for line in lines(result):
        table.add_row(*line)
    Console(width=160).print(table)


def markdown(result: dict[str, Any]) -> str:
    """The table for docs/evidence.md."""
    head = ["| " + " | ".join(HEAD) + " |", "| --- |" + " ---: |" * (len(HEAD) - 1)]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines(result))])


def label(row: dict[str, Any]) -> str:
    parts = [row["arm"]]
    if row.get("share", 1) != 1:
        parts.append(f"{row['share']:.0%} of the boards")
    if row.get("noise"):
        parts.append(f"{row['noise']:.0%} of the answers wrong")
    if row.get("transfer"):
        parts.append("then 500 rows of easy_vqa")
    return ", ".join(parts)


def passes(row: Mapping[str, Any]) -> str:
    """The boards that a row was trained on, and how often."""
    if "steps" not in row:
        return ""
    boards, rows = round(row.get("share", 1) * row["train_boards"]), row["steps"] * row["batch"]
    return str(rows) if rows <= boards else f"{boards}, {rows / boards:g} times"


def interval(row: Mapping[str, Any], spec: str = ".1f") -> str:
    if row["mean"] is None:
        return ""
    return format(row["mean"], spec) + (
        "" if row["low"] is None else f" ({row['low']:{spec}} to {row['high']:{spec}})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the training boards")
    parser.add_argument("--noise", type=float, default=0.0, help="share of wrong training answers")
    parser.add_argument("--transfer", action="store_true", help="go on training on easy_vqa")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="boards a step")
    parser.add_argument("--train-boards", type=int, default=BOARDS)
    parser.add_argument("--boards", type=int, default=60, help="test boards, of about 11 questions each")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--merge", type=Path, help="folder of cells to merge")
    parser.add_argument("--json", type=Path, help="file for the merged table")
    parser.add_argument("--markdown", action="store_true", help="print the merged table as Markdown")
    parser.add_argument("settings", nargs="*", help="further key=value of training/train.py")
    args = parser.parse_args()
    if args.merge is not None:
        result = merged(args.merge)
        if args.markdown:
            print(markdown(result))
        else:
            print_table(result)
        if args.json is not None:
            write_json(result, args.json)
        return
    if args.arm is None or args.output is None:
        parser.error(
            "name an arm and a folder (--arm NAME --output FOLDER), or cells to merge (--merge FOLDER)"
        )
    kind = f"{args.arm}_{args.steps}x{args.batch}_boards{args.train_boards}_share{args.share:g}_noise{args.noise:g}"
    name = f"{kind}{'_transfer' * args.transfer}_{args.seed}.json"
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / name).write_text(json.dumps(run_cell(args), indent=1) + "\n")


if __name__ == "__main__":
    main()
