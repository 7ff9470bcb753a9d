"""What ranking vision tokens for `keep` costs, counted and measured, over text lengths; random weights.

    python eval/bench/ranking.py --threads 1 --clock cpu --json outputs/bench_ranking.json

A band with two keeps in a quarter to three quarters of the decoder, under each ranking rule, beside the same numbers
of tokens without a look at any layer, and the stock model. The variants run in turn within every round (`executor.py`
says why), each once more before it is timed: a user attaches once. For each rule two questions are answered:

* how much of a prefill it takes: its time over that of the same tokens unranked (target: at most 2%), beside the FLOPs;
* whether the FLOPs that we count say what a prefill takes: both against the stock model's (target: within 10%). FLOPs
  take every product to be equally fast, and leave out what runs beside the layers, on all tokens whatever the policy
  (embedding, norm, the cache). *At these lengths* does neither: it is what the stock model takes without its layers,
  and of each layer what the stock model's take on a prompt of as many tokens, and the FLOPs of the ranking on top.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from latefusion.eval.bench.executor import build, under
from latefusion.eval.bench.timing import (
    IMAGE_TOKEN,
    interleaved,
    parser,
    prompt,
    seconds,
    setting,
    write_json,
)
from latefusion.eval.metrics import spread
from latefusion.models.policies.base import Decision, Prompt
from latefusion.models.policies.scheduled import ScheduleDecision
from latefusion.models.schedule import RANKINGS, VisionSchedule

MOST_ADDED, MOST_APART = 0.02, 0.1


@dataclass(frozen=True, kw_only=True)
class Unranked(VisionSchedule):
    """The schedule's numbers of tokens, the first ones, without a look at any layer."""

    def begin(self, prompt: Prompt) -> Decision:
        decision = ScheduleDecision(
            prompt, sees=self.sees(prompt.num_layers), keep=self.keep, watch=(), frozen=False
        )
        decision.scores = torch.zeros_like(prompt.vision, dtype=torch.float32)
        return decision


def schedules(layers: int, vision: int) -> dict[str, VisionSchedule | None]:
    """The stock model, the band unranked, and under each rule."""
    quarter = layers // 4
    keep = {quarter + 1: round(0.375 * vision), 2 * quarter: max(1, vision // 58)}
    band: Any = {"enter": quarter, "exit": 3 * quarter, "keep": keep}
    rules = {rule: VisionSchedule(**band, ranking=rule) for rule in RANKINGS}
    return {"stock": None, "unranked": Unranked(**band), **rules}


@contextmanager
def without_layers(model: Any) -> Iterator[None]:
    """Context in which the decoder has no layer: what is left runs on all tokens, whatever the policy."""
    decoder = model.get_decoder()
    layers, decoder.layers = decoder.layers, nn.ModuleList()
    try:
        yield
    finally:
        decoder.layers = layers


def with_text_between(inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The prompt with the last `tokens` of its text before the image in the middle of it, as between two images."""
    ids = inputs["input_ids"]
    vision = (ids == IMAGE_TOKEN)[0].nonzero().flatten()  # [V]
    if not tokens or not len(vision):
        return inputs
    first, half = int(vision[0]), len(vision) // 2
    if tokens > first:
        raise ValueError(f"--between {tokens} is more than the {first} text tokens before the image.")
    before, text, image, after = ids.split(
        [first - tokens, tokens, len(vision), ids.shape[1] - first - len(vision)], 1
    )
    return {**inputs, "input_ids": torch.cat([before, image[:, :half], text, image[:, half:], after], dim=1)}


def measure(args: argparse.Namespace, model: Any, text: int) -> list[dict[str, Any]]:
    """A row for each rule at one text length."""
    variants = {
        name: schedule
        for name, schedule in schedules(args.layers, args.vision).items()
        if name in ("stock", "unranked", *args.rankings)
    }
    unranked, dense = variants["unranked"], VisionSchedule().flops(model.config, text, args.vision)
    assert unranked is not None
    vision = unranked.vision_tokens(args.layers, args.vision)
    lengths = {*vision, args.vision}  # of stock prompts as long as layers see
    prompts = {
        n: with_text_between(
            prompt(argparse.Namespace(**{**vars(args), "text": text, "vision": n, "batch": 1})), args.between
        )
        for n in lengths
    }
    if 0 in prompts:
        del prompts[0]["mm_encoder_outputs"]

    def run(variant: tuple[VisionSchedule | None, int, bool]) -> float:
        schedule, n, layered = variant
        with under(model, schedule), nullcontext() if layered else without_layers(model), torch.no_grad():
            prefill = partial(model, **prompts[n], use_cache=True, logits_to_keep=1)
            prefill()
            return seconds(prefill, args)

    whole = {name: (schedule, args.vision, True) for name, schedule in variants.items()}
    stock = {("whole", n): (None, n, True) for n in lengths - {args.vision}}
    beside = {("beside", n): (None, n, False) for n in lengths}
    timed: dict[Any, Any] = {**whole, **stock, **beside}
    times: dict[Any, list[float]] = interleaved(timed, run, args.rounds)
    times["whole", args.vision] = times["stock"]
    at_lengths = median(
        (
            times["beside", args.vision][i]
            + sum(times["whole", n][i] - times["beside", n][i] for n in vision) / len(vision)
        )
        / times["stock"][i]
        for i in range(args.rounds)
    )
    without = unranked.flops(model.config, text, args.vision) - unranked.ranking_flops(
        model.config, text, vision
    )
    rows = []
    for name in args.rankings:
        schedule = variants[name]
        assert schedule is not None
        counted = schedule.flops(model.config, text, args.vision)
        added = spread(times[name], times["unranked"])
        of_stock = spread(times[name], times["stock"])
        rows.append(
            {
                "text": text,
                "ranking": name,
                "ms": 1e3 * added.median,
                "added": added.ratio - 1,
                "added_quartiles": [added.ratio_q25 - 1, added.ratio_q75 - 1],
                "added_fastest": min(times[name]) / min(times["unranked"]) - 1,
                "counted_added": counted / without - 1,
                "of_stock": of_stock.ratio,
                "of_stock_quartiles": [of_stock.ratio_q25, of_stock.ratio_q75],
                "counted_of_stock": counted / dense,
                "at_lengths_of_stock": at_lengths * counted / without,
                "unranked_of_stock": spread(times["unranked"], times["stock"]).ratio,
                "counted_unranked_of_stock": without / dense,
            }
        )
    return rows


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    added = ("ms", "added (quartiles)", "fastest", "counted")
    columns = (*added, "of stock", "counted", "of counted", "at these lengths", "of that")
    for column in ("text", "ranking", *columns):
        table.add_column(column, justify="left" if column == "ranking" else "right")
    for row in rows:
        low, high = row["added_quartiles"]
        table.add_row(
            str(row["text"]),
            row["ranking"],
            f"{row['ms']:.1f}",
            f"{row['added']:+.1%} ({low:+.1%} to {high:+.1%})",
            f"{row['added_fastest']:+.1%}",
            f"{row['counted_added']:+.1%}",
            f"{row['of_stock']:.3f}",
            f"{row['counted_of_stock']:.3f}",
            f"{row['of_stock'] / row['counted_of_stock']:.2f}",
            f"{row['at_lengths_of_stock']:.3f}",
            f"{row['of_stock'] / row['at_lengths_of_stock']:.2f}",
        )
    Console(width=140).print(table)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=16)
    options.add_argument("--hidden", type=int, default=1024)
    options.add_argument("--texts", default="64,256,512,1024,2048,4096", help="text tokens of a prompt")
    options.add_argument(
        "--between",
        type=int,
        default=0,
        help="of these, in the middle of the vision tokens, as between two images",
    )
    options.add_argument("--rankings", nargs="+", choices=RANKINGS, default=list(RANKINGS))
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--json", type=Path, help="also write the rows here")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model = build(args)
    gc.disable()
    between = f" with {args.between} text tokens between" if args.between else ""
    title = f"{args.layers} layers x {args.hidden}, {args.vision} vision tokens{between}, {setting(args)}"
    rows: list[dict[str, Any]] = []
    for text in map(int, args.texts.split(",")):
        rows += measure(args, model, text)
        write_json({"title": title, "torch": torch.__version__, "rows": rows}, args.json)
        gc.collect()
    show(rows, title)


if __name__ == "__main__":
    main()
