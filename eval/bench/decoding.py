"""What a decode step costs under a policy, over the length of the prompt: one token on a filled cache.

    python eval/bench/decoding.py --threads 1 --json outputs/bench_decoding.json
    python eval/bench/decoding.py --threads 1 --model embedded --text 10 --json outputs/bench_decoding_embedded.json

The weights are random, or a model's; random numbers stand for its images.

Two things move a step away from the stock model's: the calls that a policy adds (they do not depend on the length), and
the caches of layers that saw fewer vision tokens, which are shorter. The table says from which length on they win. The
variants take a few steps in turn within every round, in an order that rotates; a ratio is the median over rounds of the
ratio of medians within a round, and beside it that of the tenth percentiles, which other processes disturb least.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from latefusion.eval.bench.executor import build, under
from latefusion.eval.bench.timing import interleaved, parser, prompt, ratios, seconds, setting, write_json
from latefusion.models.base_model import load_base
from latefusion.models.schedule import VisionSchedule

STEPS = 6  # of a variant in a round; the first is not timed


def schedules(layers: int, vision: int) -> dict[str, VisionSchedule | None]:
    """The stock model, and policies in quarters of the decoder."""
    quarter = layers // 4
    band: dict[str, Any] = {"enter": quarter, "exit": 3 * quarter}
    keep = {quarter + 1: max(1, vision * 3 // 8), 2 * quarter: max(1, vision // 58)}
    return {
        "stock": None,
        "keep all": VisionSchedule(),
        f"[{quarter}, {3 * quarter})": VisionSchedule(**band),
        f"cross {quarter} to {3 * quarter - 1}": VisionSchedule(cross=range(quarter, 3 * quarter)),
        "pyramid": VisionSchedule(**band, keep=keep),
    }


def calls(work: Callable[[], Any]) -> int:
    """Calls of functions, Python's and C's, that a piece of work makes."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def measure(args: argparse.Namespace, model: Any, vision: int) -> list[dict[str, Any]]:
    """A row for each policy at one number of vision tokens."""
    inputs = prompt(
        argparse.Namespace(**{**vars(args), "vision": vision}),
        vocabulary=model.config.text_config.vocab_size,
        image_token=model.config.image_token_id,
    )
    token = torch.full_like(inputs["input_ids"][:, :1], 2)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    variants = schedules(args.layers, vision)
    caches: dict[str, Any] = {}
    counts: dict[str, int] = {}

    def run(schedule: VisionSchedule | None) -> list[float]:
        key = json.dumps(None if schedule is None else schedule.to_dict())
        times = []
        with under(model, schedule), torch.no_grad():
            if key not in caches:
                caches[key] = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
            cache = caches[key]
            step = lambda: model(input_ids=token, attention_mask=mask, past_key_values=cache)  # noqa: E731
            for _ in range(STEPS):
                times.append(seconds(step, args))
                cache.crop(-1)
            if key not in counts:
                counts[key] = calls(step)
                cache.crop(-1)
        return times[1:]

    results = interleaved(variants, run, args.rounds)
    medians = {name: [statistics.median(times) for times in rounds] for name, rounds in results.items()}
    low = {name: tenth([time for times in rounds for time in times]) for name, rounds in results.items()}
    rows = []
    for name, schedule in variants.items():
        key = json.dumps(None if schedule is None else schedule.to_dict())
        kept = sum(layer.keys.shape[-2] for layer in caches[key].layers) / args.layers
        row = {"vision": vision, "text": args.text, "policy": name, "keys": kept, "calls": counts[key]}
        rows.append({**row, **ratios(medians[name], medians["stock"]), "tenth": low[name] / low["stock"]})
    return rows


def tenth(times: list[float]) -> float:
    """The tenth percentile."""
    return sorted(times)[len(times) // 10]


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in (
        "prompt",
        "policy",
        "keys a layer",
        "calls",
        "ms",
        "of stock (quartiles)",
        "fastest tenth",
    ):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        table.add_row(
            str(row["vision"] + row["text"]),
            row["policy"],
            f"{row['keys']:.0f}",
            str(row["calls"]),
            f"{row['ms']:.2f}",
            f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
            f"{row['tenth']:.3f}",
        )
    Console(width=120).print(table)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", help="a LLaVA, in place of --layers and --hidden")
    options.add_argument("--layers", type=int, default=16)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--text", type=int, default=64, help="text tokens of a prompt")
    options.add_argument("--visions", default="16,144,576,1152,2304", help="vision tokens of a prompt")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--rounds", type=int, default=12)
    options.add_argument("--json", type=Path, help="also write the rows here")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.model is None:
        model = build(args)
    else:
        model = load_base(args.model, dtype=getattr(torch, args.dtype))[0].to(args.device)
        sizes = model.config.text_config
        args.layers, args.hidden = sizes.num_hidden_layers, sizes.hidden_size
    gc.disable()
    title = f"{args.model or 'random'}, {args.layers} layers x {args.hidden}, {setting(args)}"
    rows: list[dict[str, Any]] = []
    for vision in map(int, args.visions.split(",")):
        rows += measure(args, model, vision)
        write_json({"title": title, "torch": torch.__version__, "rows": rows}, args.json)
        gc.collect()
    show(rows, title)


if __name__ == "__main__":
    main()
