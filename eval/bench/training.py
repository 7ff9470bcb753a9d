"""What a recipe's training step takes against dense LoRA: time and memory, beside what its FLOPs promise.

    python eval/bench/training.py --shape small --threads 1 --json outputs/bench_training.json
    python eval/bench/training.py --shape llava-1.5-7b --device cuda --dtype bfloat16 --batch 8

A step is the product's own: student, objective and optimizer of `training/`, on random weights and made-up vision
features (the frozen vision tower costs every recipe the same, and is neither run nor predicted). The schedules are
those that the recipes give LLaVA-1.5-7B, stretched to the shape's layers. Three tables:

* step time and peak memory (beyond weights and optimizer) of each recipe without a teacher, in turn within every round
  (`executor.py` says why), beside what the FLOPs say. With LoRA in all layers, so that only the schedule differs,
  and in the busy ones alone, the recipes' default, where the backward pass ends at the first of them. And what this
  machine allows: products of few rows run at a lower speed than those of many, so steps on text alone are timed too,
  at the numbers of tokens that the layers have, and each layer is given its share of those;
* what the teacher adds: online (a dense one, which `VisiPruner` costs at most, or nearly so) and offline (its answers
  read from a cache);
* ViCA's schedule beside the same under masks over all tokens (`masked.py`), as its authors trained: same gradients.

`--json` is written after each of them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from rich.table import Table

from latefusion.eval.bench.executor import build
from latefusion.eval.bench.masked import masked
from latefusion.eval.bench.timing import (
    IMAGE_TOKEN,
    interleaved,
    parser,
    prompt,
    ratios,
    seconds,
    setting,
    write_json,
)
from latefusion.eval.memory import peak_bytes
from latefusion.models.inputs import unwrapped
from latefusion.models.policies.configured import schedule_of
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Lora, Student, build_student
from latefusion.recipes.compose import compose_config
from latefusion.recipes.schema import RECIPES
from latefusion.training.objective import Distillation, Objective
from latefusion.training.step_cost import training_flops

SHAPES = {"llava-1.5-7b": (32, 4096), "small": (16, 1024)}  # layers, hidden size
PUBLISHED = "llava_1_5_7b"  # whose schedules are stretched
PUBLISHED_LAYERS, PUBLISHED_VISION = 32, 576
NOT_COMPARED = ("align", "vica_13b", "vica_3b")  # a stage before late fusion, and schedules of other models
TARGETS = {
    "late_fusion": (1.8, 0.6),
    "late_fusion_pyramid": (3.5, 0.35),
}  # speed-up, peak memory, without a teacher
LEAST_SHARE = 0.9  # of the speed-up that FLOPs promise
APART = 1.25  # of numbers of tokens that are nearer to each other than this, one is timed
ANSWER = 8  # label tokens
PARTS = ("steps", "teachers", "masks")
TOP_K = 32  # of the offline teacher


class Bench:
    """One student whose schedule, and whose layers with LoRA, change from step to step.

    Args:
        args: of the command line.
        layers: of the decoder.
    """

    def __init__(self, args: argparse.Namespace, layers: int):
        self.args, self.layers = args, layers
        model: Any = build(args)
        self.config = model.config
        self.student: Student = build_student(
            model,
            None,  # type: ignore[arg-type]  # nothing here is text
            base="random",
            schedule=VisionSchedule(enter=layers // 4, exit=3 * layers // 4),  # late, for its entry adapter
            lora=Lora(rank=16, alpha=32),
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

    def step(
        self, schedule: VisionSchedule, *, teacher: str = "none", busy: bool = False
    ) -> Callable[[], None]:
        """A training step.

        Args:
            teacher: `none`, `online` or `offline`.
            busy: LoRA in the layers that compute or read vision tokens alone (`lora.layers=busy`), else in all.
        """
        objective = self.objective(VisionSchedule() if teacher == "online" else None, weight=1.0)
        batch = {**self.batch, **self.answers} if teacher == "offline" else self.batch
        return self.work(objective, schedule, batch, self.adapted(schedule, busy))

    def under_masks(self, schedule: VisionSchedule) -> Callable[[], None]:
        """The step of `step(schedule)` with every token in every layer, and masks over what it must not see."""
        plain, vision = self.step(VisionSchedule()), self.batch["input_ids"] == IMAGE_TOKEN

        def work() -> None:
            with masked(unwrapped(self.student.model), schedule, vision):
                plain()

        return work

    def on_text(self, tokens: int) -> Callable[[], None]:
        """A training step of the same model on `tokens` text tokens a sample."""
        ids = torch.randint(2, 1024, (self.args.batch, tokens), device=self.args.device)
        batch = with_answers({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return self.work(
            self.objective(None, weight=0.0), VisionSchedule(), batch, self.adapted(VisionSchedule(), False)
        )

    def objective(self, teacher: VisionSchedule | None, *, weight: float) -> Objective:
        return Objective(
            model=self.student.model,
            attachment=self.student.attachment,
            kl=Distillation(policy=teacher, weight=weight),
            share_images=True,
        )

    def adapted(self, schedule: VisionSchedule, busy: bool) -> list[bool]:
        """Whether each layer has LoRA."""
        return [not busy or n > 0 for n in schedule.vision_tokens(self.layers, 1)]

    def adapt(self, layers: list[bool]) -> None:
        """Adapters of other layers neither run nor learn."""
        decoder = unwrapped(self.student.model).get_decoder()
        for layer, adapted in zip(decoder.layers, layers, strict=True):
            for module in layer.modules():
                if isinstance(module, BaseTunerLayer):
                    module.enable_adapters(adapted)

    def work(
        self, objective: Objective, schedule: VisionSchedule, batch: dict[str, Any], adapted: list[bool]
    ) -> Callable[[], None]:
        count = self.args.batch * ANSWER
        bf16 = self.args.dtype == "bfloat16"

        def work() -> None:
            self.adapt(adapted)
            with self.student.attachment.using(schedule):
                with torch.autocast(self.args.device, torch.bfloat16, enabled=bf16):
                    loss, _ = objective(self.student.model, batch, count=count)
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return work

    def rounds(self, works: Mapping[Any, Callable[[], None]]) -> dict[Any, list[float]]:
        """Seconds of every step in every round."""
        return interleaved(works, lambda work: seconds(work, self.args), self.args.rounds)

    def tokens(self, schedule: VisionSchedule) -> list[int]:
        """Text and vision tokens of each layer."""
        return [self.args.text + n for n in schedule.vision_tokens(self.layers, self.args.vision)]

    def flops(self, schedule: VisionSchedule, *, teacher: str = "none", busy: bool = False) -> int:
        """FLOPs a sample of the step that `step` makes with the same arguments."""
        return training_flops(
            self.config,
            schedule,
            self.args.text,
            self.args.vision,
            answers=ANSWER,
            teacher=self.config if teacher == "online" else None,
            first=self.adapted(schedule, busy).index(True),
        )


def with_answers(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch whose last tokens are to be learnt."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -ANSWER:] = inputs["input_ids"][:, -ANSWER:]
    queries = torch.full_like(labels[:, :1], labels.shape[1] - ANSWER - 1)
    return {**inputs, "labels": labels, "queries": queries}


# ---------------------------------------------------------------- what is compared


def recipes(layers: int, n_vision: int) -> dict[str, VisionSchedule]:
    """The schedule of each recipe, dense first; of recipes with the same one, the one with the shortest name."""
    schedules: dict[str, VisionSchedule] = {"dense": VisionSchedule()}
    names = sorted(
        (path.stem for path in (RECIPES / "recipe").glob("*.yaml")), key=lambda name: (len(name), name)
    )
    for name in (n for n in names if n not in NOT_COMPARED):
        schedule = compose_config([f"model={PUBLISHED}", f"recipe={name}"]).schedule
        stretched = stretch(schedule_of(schedule), layers, n_vision)
        if stretched not in schedules.values():
            schedules[name] = stretched
    return schedules


def stretch(schedule: VisionSchedule, layers: int, n_vision: int) -> VisionSchedule:
    """A schedule of `PUBLISHED` at the same relative places of a decoder with `layers`, on `n_vision` tokens."""

    def layer(i: int) -> int:
        return -(-i * layers // PUBLISHED_LAYERS)  # up: a keep stays after its entry

    keep = {layer(i): max(1, round(k * n_vision / PUBLISHED_VISION)) for i, k in schedule.keep.items()}
    if schedule.cross is not None:
        return replace(schedule, enter=0, exit=None, keep=keep, cross=[layer(i) for i in schedule.cross])
    leaves = None if schedule.exit is None else layer(schedule.exit)
    return replace(schedule, enter=layer(schedule.enter), exit=leaves, keep=keep)


def sizes(tokens: Iterable[int]) -> list[int]:
    """The numbers of tokens to time, ascending; the others lie between two of them."""
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


def steps(bench: Bench, schedules: dict[str, VisionSchedule]) -> list[dict[str, Any]]:
    """Step time and peak memory of each recipe against dense LoRA, without a teacher."""
    timed = sizes([n for schedule in schedules.values() for n in bench.tokens(schedule)])
    cases = {(name, busy): schedule for name, schedule in schedules.items() for busy in (False, True)}
    del cases["dense", True]  # all its layers are busy
    works = {case: bench.step(schedule, busy=case[1]) for case, schedule in cases.items()}
    everything: dict[Any, Any] = {**works, **{n: bench.on_text(n) for n in timed}}
    times = bench.rounds(everything)
    plain = {n: times.pop(n) for n in timed}
    peaks = {case: peak_bytes(work, torch.device(bench.args.device)) for case, work in works.items()}
    dense = ("dense", False)
    rows = []
    for (name, busy), schedule in cases.items():
        time = ratios(times[name, busy], times[dense])
        promised = bench.flops(schedule, busy=busy) / bench.flops(schedules["dense"])
        row = {
            "recipe": name,
            "lora": "busy" if busy else "all",
            **time,
            "speedup": 1 / time["ratio"],
            "predicted_speedup": 1 / promised,
            "share_of_prediction": promised / time["ratio"],
            "peak_bytes": peaks[name, busy],
            "peak_ratio": peaks[name, busy] / peaks[dense],
            "schedule": schedule.to_dict(),
        }
        if not busy and schedule.cross is None:  # frozen tokens are projected only
            limit = allowed(bench.tokens(schedule), plain, times[dense])
            row |= {"allowed_speedup": 1 / limit, "share_of_allowed": limit / time["ratio"]}
        rows.append(row)
    return rows


def teachers(bench: Bench, schedules: dict[str, VisionSchedule]) -> list[dict[str, Any]]:
    """What a teacher adds to the dearest and the cheapest recipe's step, online and offline."""
    cheapest = min(schedules, key=lambda name: bench.flops(schedules[name]))
    rows = []
    for name in ("dense", cheapest):
        times = bench.rounds(
            {t: bench.step(schedules[name], teacher=t) for t in ("none", "online", "offline")}
        )
        for teacher in ("online", "offline"):
            promised = bench.flops(schedules[name], teacher=teacher) / bench.flops(schedules[name])
            rows.append(
                {
                    "recipe": name,
                    "teacher": teacher,
                    **ratios(times[teacher], times["none"]),
                    "predicted_ratio": promised,
                }
            )
    return rows


def against_masks(bench: Bench, schedule: VisionSchedule) -> list[dict[str, Any]]:
    """Dense LoRA, ViCA's schedule under masks, and ours; each against dense."""
    works = {
        "dense": bench.step(VisionSchedule()),
        "under masks": bench.under_masks(schedule),
        "ours": bench.step(schedule),
    }
    times = bench.rounds(works)
    peaks = {name: peak_bytes(work, torch.device(bench.args.device)) for name, work in works.items()}
    return [
        {
            "step": name,
            **ratios(times[name], times["dense"]),
            "of_masked": ratios(times[name], times["under masks"]),
            "peak_bytes": peaks[name],
            "peak_ratio": peaks[name] / peaks["dense"],
        }
        for name in works
    ]


def show_masks(rows: list[dict[str, Any]]) -> None:
    table = Table(title="ViCA's schedule (LoRA in all layers): under masks over all tokens, and ours")
    for column in ("step", "ms", "of dense (quartiles)", "of the masked (quartiles)", "peak", "of dense"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows:
        masks = row["of_masked"]
        table.add_row(
            row["step"],
            f"{row['ms']:.0f}",
            f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
            f"{masks['ratio']:.2f} ({masks['low']:.2f} to {masks['high']:.2f})",
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{row['peak_ratio']:.0%}",
        )
    Console(width=120).print(table)


def show_steps(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    columns = (
        "step",
        "speed-up (quartiles)",
        "FLOPs say",
        "share",
        "machine allows",
        "share",
        "peak",
        "of dense",
    )
    for column in ("recipe", "LoRA", *columns):
        table.add_column(column, justify="left" if column in ("recipe", "LoRA") else "right")
    for row in rows:
        bounded = "allowed_speedup" in row
        table.add_row(
            row["recipe"],
            row["lora"],
            f"{row['ms']:.0f} ms",
            f"{row['speedup']:.2f}x ({1 / row['high']:.2f} to {1 / row['low']:.2f})",
            f"{row['predicted_speedup']:.2f}x",
            f"{row['share_of_prediction']:.0%}",
            f"{row['allowed_speedup']:.2f}x" if bounded else "",
            f"{row['share_of_allowed']:.0%}" if bounded else "",
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{row['peak_ratio']:.0%}",
        )
    console = Console(width=132)
    console.print(table)
    for row in rows:
        if row["recipe"] in TARGETS:
            console.print(verdict(row), highlight=False)


def verdict(row: dict[str, Any]) -> str:
    """Whether a recipe's row meets its targets, in a line."""
    speedup, peak = TARGETS[row["recipe"]]
    parts = [
        f"{row['speedup']:.2f}x of {speedup}x {met(row['speedup'] >= speedup)}",
        f"{row['share_of_prediction']:.0%} of {LEAST_SHARE:.0%} {met(row['share_of_prediction'] >= LEAST_SHARE)}",
        f"peak {row['peak_ratio']:.0%} of {peak:.0%} {met(row['peak_ratio'] <= peak)}",
    ]
    return f"targets of {row['recipe']}, LoRA in {row['lora']} layers: {', '.join(parts)}"


def met(reached: bool) -> str:
    return "met" if reached else "missed"


def show_teachers(rows: list[dict[str, Any]]) -> None:
    table = Table(title="What a teacher adds to the step (LoRA in all layers)")
    for column in ("recipe", "teacher", "step", "of the step without (quartiles)", "FLOPs say"):
        table.add_column(column, justify="left" if column in ("recipe", "teacher") else "right")
    for row in rows:
        table.add_row(
            row["recipe"],
            row["teacher"],
            f"{row['ms']:.0f} ms",
            f"{row['ratio']:.2f}x ({row['low']:.2f} to {row['high']:.2f})",
            f"{row['predicted_ratio']:.2f}x",
        )
    Console(width=132).print(table)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", default="small", choices=sorted(SHAPES))
    options.add_argument("--layers", type=int, help="instead of the shape's")
    options.add_argument("--hidden", type=int, help="instead of the shape's; a multiple of 64")
    options.add_argument("--text", type=int, default=64, help="text tokens a sample")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="the tables to make")
    options.add_argument("--json", type=Path, help="also write the rows here")
    args = options.parse_args()
    layers, hidden = SHAPES[args.shape]
    args.layers, args.hidden = args.layers or layers, args.hidden or hidden
    torch.set_num_threads(args.threads)

    bench = Bench(args, args.layers)
    schedules = recipes(args.layers, args.vision)
    gc.disable()
    title = (
        f"LoRA step, {args.layers} layers x {args.hidden}, {args.batch} x ({args.vision} + {args.text}) tokens, "
        f"{setting(args)}"
    )
    result: dict[str, Any] = {"title": title, **versions()}
    if "steps" in args.parts:
        result["steps"] = steps(bench, schedules)
        show_steps(result["steps"], title)
        write_json(result, args.json)
        gc.collect()
    if "teachers" in args.parts:
        result["teachers"] = teachers(bench, schedules)
        show_teachers(result["teachers"])
        write_json(result, args.json)
        gc.collect()
    if "masks" in args.parts:
        result["masks"] = against_masks(bench, schedules["vica_7b"])
        show_masks(result["masks"])
        write_json(result, args.json)


def versions() -> dict[str, str]:
    return {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
