"""What a recipe's training step takes against dense LoRA: time and memory, beside what its FLOPs promise.

    python eval/bench_training.py --shape small --threads 1 --json outputs/bench_training.json
    python eval/bench_training.py --shape llava-1.5-7b --device cuda --dtype bfloat16 --batch 8

A step is the product's own: student, objective and optimizer of `training/`, on random weights and made-up vision
features (the frozen vision tower costs every recipe the same, and is neither run nor predicted). The schedules are
those that the recipes give LLaVA-1.5-7B, stretched to the shape's layers. Every recipe has LoRA in all layers
(`lora.layers=all`), so that only the schedule differs. Three tables:

* step time of each recipe without a teacher, in turn within every round (`bench_executor` says why), beside what its
  FLOPs say, and what this machine allows: products of few rows run at a lower speed than those of many, so steps on
  text alone are timed too, at the numbers of tokens that the layers have, and each layer is given its share of those;
* peak memory of a step beyond weights and optimizer;
* what the teacher adds: online (a dense one, which `VisiPruner` costs at most, or nearly so) and offline (its answers
  read from a cache).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from latefusion.eval.bench_executor import build
from latefusion.eval.memory import peak_bytes
from latefusion.eval.timing import interleaved, prompt, seconds
from latefusion.models.build import Student, build_student
from latefusion.models.schedule import VisionSchedule
from latefusion.training.checks import read
from latefusion.training.config import RECIPES
from latefusion.training.cost import training_flops
from latefusion.training.objective import Objective
from latefusion.training.schedule import schedule_of

SHAPES = {"llava-1.5-7b": (32, 4096), "small": (16, 1024)}  # layers, hidden size
PUBLISHED = "llava_1_5_7b"  # whose schedules are stretched
PUBLISHED_LAYERS, PUBLISHED_VISION = 32, 576
NO_LATE_FUSION = ("align",)  # a stage before it
ANSWER = 8  # label tokens
TOP_K = 32  # of the offline teacher
APART = 1.25  # numbers of tokens nearer to each other than this are not all timed


def recipes(layers: int, n_vision: int) -> dict[str, VisionSchedule]:
    """The schedule of each recipe, dense first; of recipes with the same one, the one with the shortest name."""
    found: dict[str, VisionSchedule] = {"dense": VisionSchedule()}
    names = sorted(
        (path.stem for path in (RECIPES / "recipe").glob("*.yaml")), key=lambda name: (len(name), name)
    )
    with initialize_config_dir(str(RECIPES.resolve()), version_base="1.3"):
        for name in (n for n in names if n not in NO_LATE_FUSION):
            schedule = read(compose("config", [f"model={PUBLISHED}", f"recipe={name}"])).schedule
            stretched = stretch(schedule_of(schedule), layers, n_vision)
            if stretched not in found.values():
                found[name] = stretched
    return found


def stretch(schedule: VisionSchedule, layers: int, n_vision: int) -> VisionSchedule:
    """A schedule for `PUBLISHED` at the same places of a decoder with so many layers, on so many vision tokens."""

    def layer(i: int) -> int:
        return -(-i * layers // PUBLISHED_LAYERS)  # up: a keep stays after its entry

    keep = {layer(i): max(1, round(k * n_vision / PUBLISHED_VISION)) for i, k in schedule.keep.items()}
    if schedule.cross:
        return replace(schedule, enter=0, exit=None, keep=keep, cross=[layer(i) for i in schedule.cross])
    leaves = None if schedule.exit is None else layer(schedule.exit)
    return VisionSchedule(enter=layer(schedule.enter), exit=leaves, keep=keep)


class Bench:
    """One student whose schedule changes from step to step.

    Args:
        args: of the command line.
        layers: of the decoder.
    """

    def __init__(self, args: argparse.Namespace, layers: int):
        self.args = args
        model: Any = build(args)
        self.config = model.config
        self.student: Student = build_student(
            model,
            None,  # type: ignore[arg-type]  # nothing here is text
            base="random",
            schedule=VisionSchedule(enter=layers // 4, exit=3 * layers // 4),  # late, for its entry adapter
            rank=16,
            alpha=32,
            dropout=0.0,
            entry_rank=16,
        )
        self.student.model.train()
        trained = [p for p in self.student.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.batch = with_answers(prompt(args))
        n = args.batch * ANSWER
        vocabulary = self.config.text_config.vocab_size
        logprobs, tokens = torch.randn(n, vocabulary, device=args.device).log_softmax(-1).topk(TOP_K)
        self.answers = {"teacher_tokens": tokens, "teacher_logprobs": logprobs}

    def step(self, schedule: VisionSchedule, teacher: str) -> Callable[[], None]:
        """A training step; `teacher`: `none`, `online` or `offline`."""
        objective = Objective(
            model=self.student.model,
            attachment=self.student.attachment,
            teacher=VisionSchedule() if teacher == "online" else None,
            weight=1.0,
            temperature=1.0,
            share_images=True,
        )
        batch = {**self.batch, **self.answers} if teacher == "offline" else self.batch
        return self.work(objective, schedule, batch)

    def on_text(self, tokens: int) -> Callable[[], None]:
        """A training step of the same model on so many text tokens a sample."""
        ids = torch.randint(2, 1024, (self.args.batch, tokens), device=self.args.device)
        objective = Objective(
            model=self.student.model,
            attachment=self.student.attachment,
            teacher=None,
            weight=0.0,
            temperature=1.0,
            share_images=True,
        )
        batch = with_answers({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return self.work(objective, VisionSchedule(), batch)

    def work(
        self, objective: Objective, schedule: VisionSchedule, batch: dict[str, Any]
    ) -> Callable[[], None]:
        count = self.args.batch * ANSWER
        bf16 = self.args.dtype == "bfloat16"

        def work() -> None:
            with self.student.attachment.using(schedule):
                with torch.autocast(self.args.device, torch.bfloat16, enabled=bf16):
                    loss, _ = objective(self.student.model, batch, count=count)
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return work

    def rounds(self, works: dict[str, Any]) -> dict[str, list[float]]:
        """Seconds of every step in every round."""
        return interleaved(works, lambda work: seconds(work, self.args), self.args.rounds)

    def tokens(self, schedule: VisionSchedule) -> list[int]:
        """Text and vision tokens of each layer."""
        layers = self.config.text_config.num_hidden_layers
        return [self.args.text + n for n in schedule.vision_tokens(layers, self.args.vision)]

    def flops(self, schedule: VisionSchedule, teacher: str = "none") -> int:
        text, vision = self.args.text, self.args.vision
        taught = self.config if teacher == "online" else None
        return training_flops(self.config, schedule, text, vision, answers=ANSWER, teacher=taught)


def with_answers(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch whose last tokens are to be learnt."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -ANSWER:] = inputs["input_ids"][:, -ANSWER:]
    queries = torch.full_like(labels[:, :1], labels.shape[1] - ANSWER - 1)
    return {**inputs, "labels": labels, "queries": queries}


def sizes(tokens: Iterable[int]) -> list[int]:
    """Of these numbers of tokens, ascending, those to time; the others lie between two of them."""
    chosen: list[int] = []
    for n in sorted(set(tokens)):
        if not chosen or n >= APART * chosen[-1] or n == max(tokens):
            chosen.append(n)
    return chosen


def allowed(tokens: list[int], times: dict[int, list[float]], dense: list[float]) -> float:
    """The ratio to the dense step's time that a step with `tokens` in its layers could have on this machine.

    Args:
        times: seconds of a step on text, by tokens and round; dense: of the dense step.
    """
    each = []
    for i, whole in enumerate(dense):
        at = [times[n][i] for n in times]
        each.append(float(np.interp(tokens, list(times), at).mean()) / whole)
    return statistics.median(each)


def ratios(times: list[float], reference: list[float]) -> dict[str, float]:
    """Median over rounds of the ratio within a round, with quartiles."""
    each = [t / r for t, r in zip(times, reference, strict=True)]
    low, ratio, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return {"ratio": ratio, "low": low, "high": high, "seconds": statistics.median(times)}


def steps(bench: Bench, schedules: dict[str, VisionSchedule]) -> list[dict[str, Any]]:
    """Step time and peak memory of each recipe against dense LoRA, without a teacher."""
    timed = sizes([n for schedule in schedules.values() for n in bench.tokens(schedule)])
    works = {name: bench.step(schedule, "none") for name, schedule in schedules.items()}
    times = bench.rounds({**works, **{str(n): bench.on_text(n) for n in timed}})
    plain = {n: times.pop(str(n)) for n in timed}
    peaks = {
        n: peak_bytes(bench.step(s, "none"), torch.device(bench.args.device)) for n, s in schedules.items()
    }
    rows = []
    for name, schedule in schedules.items():
        time = ratios(times[name], times["dense"])
        promised = bench.flops(schedule) / bench.flops(schedules["dense"])
        rows.append(
            {
                "recipe": name,
                **time,
                "speedup": 1 / time["ratio"],
                "predicted_speedup": 1 / promised,
                "share_of_prediction": promised / time["ratio"],
                "allowed_speedup": 1 / (limit := allowed(bench.tokens(schedule), plain, times["dense"])),
                "share_of_allowed": limit / time["ratio"],
                "peak_bytes": peaks[name],
                "peak_ratio": peaks[name] / peaks["dense"],
                "schedule": schedule.to_dict(),
            }
        )
    return rows


def teachers(bench: Bench, schedules: dict[str, VisionSchedule]) -> list[dict[str, Any]]:
    """What a teacher adds to the dearest and the cheapest recipe's step, online and offline."""
    cheapest = min(schedules, key=lambda name: bench.flops(schedules[name]))
    rows = []
    for name in ("dense", cheapest):
        times = bench.rounds(
            {teacher: bench.step(schedules[name], teacher) for teacher in ("none", "online", "offline")}
        )
        for teacher in ("online", "offline"):
            promised = bench.flops(schedules[name], teacher) / bench.flops(schedules[name])
            rows.append(
                {
                    "recipe": name,
                    "teacher": teacher,
                    **ratios(times[teacher], times["none"]),
                    "predicted_ratio": promised,
                }
            )
    return rows


def show(rows: list[dict[str, Any]], taught: list[dict[str, Any]], title: str) -> None:
    console = Console(width=132)
    table = Table(title=title)
    columns = ("recipe", "step", "speed-up (quartiles)", "FLOPs say", "share", "machine allows", "share")
    for column in (*columns, "peak memory", "of dense"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for row in rows:
        table.add_row(
            row["recipe"],
            f"{1e3 * row['seconds']:.0f} ms",
            f"{row['speedup']:.2f}x ({1 / row['high']:.2f} to {1 / row['low']:.2f})",
            f"{row['predicted_speedup']:.2f}x",
            f"{row['share_of_prediction']:.0%}",
            f"{row['allowed_speedup']:.2f}x",
            f"{row['share_of_allowed']:.0%}",
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{row['peak_ratio']:.0%}",
        )
    console.print(table)
    table = Table(title="What a teacher adds to the step")
    for column in ("recipe", "teacher", "step", "of the step without (quartiles)", "FLOPs say"):
        table.add_column(column, justify="left" if column in ("recipe", "teacher") else "right")
    for row in taught:
        table.add_row(
            row["recipe"],
            row["teacher"],
            f"{1e3 * row['seconds']:.0f} ms",
            f"{row['ratio']:.2f}x ({row['low']:.2f} to {row['high']:.2f})",
            f"{row['predicted_ratio']:.2f}x",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="small", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--hidden", type=int, help="instead of the shape's; a multiple of 64")
    parser.add_argument("--vision", type=int, default=576, help="vision tokens a sample")
    parser.add_argument("--text", type=int, default=64, help="text tokens a sample")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: this process alone")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    layers, hidden = SHAPES[args.shape]
    args.layers, args.hidden = args.layers or layers, args.hidden or hidden
    torch.set_num_threads(args.threads)

    bench = Bench(args, args.layers)
    schedules = recipes(args.layers, args.vision)
    gc.disable()
    rows = steps(bench, schedules)
    gc.collect()
    taught = teachers(bench, schedules)
    title = (
        f"LoRA step, {args.layers} layers x {args.hidden}, {args.batch} x ({args.vision} + {args.text}) tokens, "
        f"{args.dtype}, {args.device}, {args.threads} threads, {args.clock} time"
    )
    show(rows, taught, title)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"title": title, "torch": torch.__version__, "steps": rows, "teachers": taught}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
