"""What a policy costs, and how much of what its FLOPs promise it saves; random weights, stock models.

    python eval/bench/executor.py --threads 1 --json outputs/bench_executor.json

Three questions, each answered as a ratio to the stock model without any hook:

* a policy that keeps everything: how much more expensive is a prefill (target: at most 1%), a decode step (2%)?
* bands, with and without keeps: how much of the saving that `VisionSchedule.flops` predicts shows in the
  time of a prefill, and of a LoRA training step (target: at least 90%)?

The variants run in turn within every round, in an order that rotates, and a ratio is the median over rounds
of the ratio within a round, so that a machine that slows down for a while slows all of them ("of fastest" is the ratio
of the fastest rounds, which other processes disturb least). The tokens are
those of LLaVA-1.5; the vocabulary is small, as the FLOPs counter leaves out the language head.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from latefusion.eval.bench.timing import (
    interleaved,
    llava,
    parser,
    prompt,
    ratios,
    seconds,
    setting,
    write_json,
)
from latefusion.models.attach import attach
from latefusion.models.schedule import VisionSchedule

MOST_PREFILL, MOST_DECODE, LEAST_SAVED = 1.01, 1.02, 0.9


def schedules(layers: int) -> dict[str, VisionSchedule]:
    """The benchmarked bands, in quarters of the decoder; for 16 layers [4, 12) and [5, 9)."""
    quarter = layers // 4
    band = {"enter": quarter, "exit": 3 * quarter}
    return {
        f"[{quarter}, {3 * quarter})": VisionSchedule(**band),
        f"[{quarter + 1}, {2 * quarter + 1})": VisionSchedule(enter=quarter + 1, exit=2 * quarter + 1),
        f"[{quarter}, {3 * quarter}), keep 215 and 10": VisionSchedule(
            **band, keep={quarter + 1: 215, 2 * quarter: 10}
        ),
    }


def build(args: argparse.Namespace) -> Any:
    return llava(
        layers=args.layers,
        hidden=args.hidden,
        mlp=args.hidden * 11 // 4,
        heads=args.hidden // 64,
        device=args.device,
        dtype=args.dtype,
    )


@contextlib.contextmanager
def under(model: torch.nn.Module, schedule: VisionSchedule | None) -> Iterator[None]:
    """The model with a schedule attached, or without any hook."""
    with contextlib.nullcontext() if schedule is None else attach(model, schedule):
        yield


def prefill(
    model: Any, inputs: dict[str, Any], args: argparse.Namespace
) -> Callable[[VisionSchedule | None], float]:
    def run(schedule: VisionSchedule | None) -> float:
        with under(model, schedule), torch.no_grad():
            return seconds(lambda: model(**inputs, use_cache=True, logits_to_keep=1), args)

    return run


def decode(
    model: Any, inputs: dict[str, Any], args: argparse.Namespace
) -> Callable[[VisionSchedule | None], float]:
    """A step on a cache that the same policy filled."""
    caches: dict[VisionSchedule | None, Any] = {}
    token = torch.full_like(inputs["input_ids"][:, :1], 2)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)

    def run(schedule: VisionSchedule | None) -> float:
        with under(model, schedule), torch.no_grad():
            key = None if schedule is None else json.dumps(schedule.to_dict())
            if key not in caches:
                caches[key] = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
            cache = caches[key]
            step = lambda: model(input_ids=token, attention_mask=mask, past_key_values=cache)  # noqa: E731
            elapsed = seconds(step, args)
            cache.crop(-1)
        return elapsed

    return run


def train(
    model: Any, inputs: dict[str, Any], args: argparse.Namespace
) -> Callable[[VisionSchedule | None], float]:
    """Forward, backward and update of LoRA weights on all linear layers of the decoder."""
    lora = LoraConfig(
        r=16, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj", init_lora_weights="gaussian"
    )
    model = get_peft_model(model, lora)
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    labels = inputs["input_ids"].clone()
    labels[:, :-8] = -100  # an answer of eight tokens

    def step() -> None:
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def run(schedule: VisionSchedule | None) -> float:
        with under(model, schedule):
            return seconds(step, args)

    return run


def summarise(
    what: str, times: dict[str, list[float]], predicted: dict[str, float], most: float | None
) -> list[dict[str, Any]]:
    """A row a variant: median ratio to stock and its quartiles; the target is `most`, or a saving."""
    rows = []
    for name in list(times)[1:]:
        over_rounds = ratios(times[name], times["stock"])
        ratio = over_rounds["ratio"]
        promised = predicted.get(name)
        saved = None if promised is None else (1 - ratio) / (1 - promised)
        met = saved >= LEAST_SAVED if saved is not None else most is None or ratio <= most
        rows.append(
            {
                "what": what,
                "policy": name,
                "stock_ms": 1e3 * statistics.median(times["stock"]),
                "ms": over_rounds["ms"],
                "ratio": ratio,
                "quartiles": [over_rounds["low"], over_rounds["high"]],
                "fastest_ratio": min(times[name]) / min(times["stock"]),
                "predicted_ratio": promised,
                "saved_of_predicted": saved,
                "met": met if saved is not None or most is not None else None,
            }
        )
    return rows


def report(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in (
        "",
        "policy",
        "stock ms",
        "ms",
        "ratio",
        "quartiles",
        "of fastest",
        "FLOPs ratio",
        "saved of it",
        "target",
    ):
        table.add_column(column, justify="left" if column in ("", "policy") else "right")
    for row in rows:
        promised, saved, met = row["predicted_ratio"], row["saved_of_predicted"], row["met"]
        table.add_row(
            row["what"],
            row["policy"],
            f"{row['stock_ms']:.1f}",
            f"{row['ms']:.1f}",
            f"{row['ratio']:.3f}",
            "{:.3f} to {:.3f}".format(*row["quartiles"]),
            f"{row['fastest_ratio']:.3f}",
            "" if promised is None else f"{promised:.3f}",
            "" if saved is None else f"{saved:.0%}",
            "" if met is None else "met" if met else "missed",
        )
    Console(width=120).print(table)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=16)
    options.add_argument("--hidden", type=int, default=1024)
    options.add_argument("--text", type=int, default=64, help="text tokens a row")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--rounds", type=int, default=9, help="prefills; decode steps are ten times as many")
    options.add_argument("--train-rounds", type=int, default=5)
    options.add_argument("--json", type=Path, help="also write the rows here")
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    model, inputs = build(args), prompt(args)
    bands = schedules(args.layers)
    dense = VisionSchedule().flops(model.config, args.text, args.vision)
    predicted = {name: s.flops(model.config, args.text, args.vision) / dense for name, s in bands.items()}
    everything = {"stock": None, "keep all": VisionSchedule()}
    gc.disable()
    rows = summarise(
        "prefill",
        interleaved({**everything, **bands}, prefill(model, inputs, args), args.rounds),
        predicted,
        MOST_PREFILL,
    )
    steps = interleaved({**everything, **bands}, decode(model, inputs, args), 10 * args.rounds)
    rows += summarise("decode step", steps, {}, MOST_DECODE)
    gc.collect()
    training = interleaved({**everything, **bands}, train(model, inputs, args), args.train_rounds)
    rows += summarise("LoRA step", training, predicted, None)
    tokens = f"{args.batch} x ({args.vision} + {args.text}) tokens"
    title = f"{args.layers} layers x {args.hidden}, {tokens}, {setting(args)}"
    report(rows, title)
    write_json({"title": title, "torch": torch.__version__, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
