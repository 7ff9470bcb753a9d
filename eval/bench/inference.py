"""VisiPruner against the stock model at the work that the paper reports; random weights, stock models.

    python eval/bench/inference.py --shape small --json outputs/bench_inference.json
    python eval/bench/inference.py --shape llava-1.5-7b --device cuda --dtype bfloat16 --json outputs/bench_7b.json

Random weights fuse nowhere, so a synthetic trigger fixes what the paper reports for LLaVA-1.5-7B: fusion at 3/8 of
the decoder's depth, 10 tokens kept, exit at 3/4. Everything else is real: every layer is looked at, its findings
travel to the host, tokens leave. `no decision` removes the same tokens without looking, so the difference to it is
the cost of deciding; `stock` is the model without any hook.

Time to first token is a prefill with its cache, time per token the median decode step on that cache (on a GPU between
events of the stream). Variants run in turn within every round, in an order that rotates; a ratio is the median over
rounds of the ratio to stock within a round. Targets: a prefill takes at most 55% of the stock's where its FLOPs
say 47%, that is at most 1.17 of what FLOPs promise; a decode step is not slower.

Each batch size and text length is written into --json as it is done; the same command goes on after the last of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import pad
from torch.profiler import ProfilerActivity, profile

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
from latefusion.eval.bench.triggered import Fixed, Triggered
from latefusion.eval.memory import kv_cache_bytes, peak_bytes
from latefusion.models.attach import attach
from latefusion.models.flops import decoder_flops
from latefusion.models.inputs import fresh_inputs
from latefusion.models.policies.base import Policy, Prompt

SHAPES = {  # layers, hidden size, MLP, heads
    "small": (16, 512, 1376, 8),
    "llava-1.5-7b": (32, 4096, 11008, 32),
}
KEPT = 10
MOST_PREFILL = 0.55 / 0.47  # of what FLOPs promise
HEADER = (
    "batch",
    "text",
    "variant",
    "FLOPs",
    "first token",
    "(quartiles)",
    "target",
    "per token",
    "(quartiles)",
    "KV",
    "peak",
)


@dataclass(frozen=True)
class Variant:
    """A policy (None: no hook at all) under an attention implementation."""

    policy: Policy | None
    attention: str


def variants(layers: int, attentions: list[str]) -> dict[str, Variant]:
    work = {"fusion": 3 * layers // 8, "kept": KEPT, "leave": 3 * layers // 4}
    boundary = 3 * layers // 16
    policies: dict[str, Variant] = {}
    for attention in attentions:
        name = "" if attention == "sdpa" else f", {attention}"
        policies[f"stock{name}"] = Variant(None, attention)
        policies[f"no decision{name}"] = Variant(Fixed(**work), attention)
        for title, stages in (
            ("middle, deep", ("middle", "deep")),
            ("all stages", ("shallow", "middle", "deep")),
        ):
            policy = Triggered(**work, boundary=boundary, stages=stages)
            policies[f"VisiPruner, {title}{name}"] = Variant(policy, attention)
    return policies


def build(args: argparse.Namespace) -> Any:
    layers, hidden, mlp, heads = SHAPES[args.shape]
    return llava(layers=layers, hidden=hidden, mlp=mlp, heads=heads, device=args.device, dtype=args.dtype)


class Bench:
    """All variants on one prompt shape."""

    def __init__(self, model: Any, args: argparse.Namespace, batch: int, text: int):
        self.model, self.args, self.batch, self.text = model, args, batch, text
        hidden = model.config.text_config.hidden_size
        shape = argparse.Namespace(**vars(args) | {"batch": batch, "text": text, "hidden": hidden})
        self.inputs = prompt(shape)
        self.token = torch.full_like(self.inputs["input_ids"][:, :1], 2)
        self.mask = pad(self.inputs["attention_mask"], (0, 1), value=1)

    def prefill(self) -> Any:
        return self.model(**fresh_inputs(self.inputs), use_cache=True, logits_to_keep=1).past_key_values

    def step(self, cache: Any) -> None:
        self.model(input_ids=self.token, attention_mask=self.mask, past_key_values=cache)

    def under(self, variant: Variant) -> Any:
        if self.model.config._attn_implementation != variant.attention:
            self.model.set_attn_implementation(variant.attention)
        return nullcontext() if variant.policy is None else attach(self.model, variant.policy)

    def time(self, variant: Variant) -> tuple[float, float, int]:
        """Seconds of a prefill and of a decode step, bytes of the cache in between."""
        caches: list[Any] = []
        with self.under(variant):
            first = seconds(lambda: caches.append(self.prefill()), self.args)
            cache, steps = caches.pop(), []
            kv = kv_cache_bytes(cache)
            for _ in range(self.args.steps):
                steps.append(seconds(partial(self.step, cache), self.args))
                cache.crop(-1)
        return first, statistics.median(steps), kv

    def predicted(self, policy: Policy | None) -> float:
        """The prefill's FLOPs against dense."""
        layers, vision = len(self.model.get_decoder().layers), self.args.vision
        if policy is None:
            return 1.0
        fixed: Any = policy
        tokens = [
            self.text + (vision if i <= fixed.fusion else fixed.kept if i < fixed.leave else 0)
            for i in range(layers)
        ]
        dense = decoder_flops(self.model.config, [self.text + vision] * layers)
        return decoder_flops(self.model.config, tokens) / dense

    def peak(self, variant: Variant) -> int:
        """Most memory that a prefill needs at once beyond weights and inputs."""
        with self.under(variant) as attachment:
            if attachment is not None:
                self.model(input_ids=self.token)  # so that what the attachment remembers is gone
            return peak_bytes(self.prefill, torch.device(self.args.device))

    def run(self, chosen: dict[str, Variant]) -> list[dict[str, Any]]:
        gc.collect()
        results = interleaved(chosen, self.time, self.args.rounds)
        columns = {name: list(zip(*rounds, strict=True)) for name, rounds in results.items()}
        first, step, _ = columns["stock"]
        rows = []
        for name, variant in chosen.items():
            prefills, steps, kv = columns[name]
            row = {
                "batch": self.batch,
                "text": self.text,
                "variant": name,
                "predicted_ratio": self.predicted(variant.policy),
                "ttft": ratios(prefills, first),
                "tpot": ratios(steps, step),
                "kv_bytes": kv[-1],
                "peak_bytes": self.peak(variant),
            }
            rows.append(row | {"met": met(row)})
        return rows


def decision_cost(bench: Bench, chosen: dict[str, Variant]) -> list[str]:
    """Sentences on one prefill by the profiler: time in the decision's own operators, and waits for the device."""
    lines = []
    for name, variant in chosen.items():
        if not isinstance(variant.policy, Triggered):
            continue
        with bench.under(variant) as attachment:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.args.device == "cuda")
            with attachment.using(_Watch(variant.policy)), profile(activities=activities) as record:
                bench.prefill()
        events = {event.key: event for event in record.key_averages()}
        whole = sum(event.self_cpu_time_total for event in events.values())
        deciding = [events[key].cpu_time_total for key in (SELECT, LOOKED) if key in events]
        waits = sum(e.count for key, e in events.items() if "Synchronize" in key)
        lines.append(
            f"{name}: looking and deciding take {sum(deciding) / whole:.1%} of the host's time"
            + (f"; {waits} waits for the device." if bench.args.device == "cuda" else ".")
        )
    return lines


SELECT, LOOKED = "latefusion::select", "latefusion::look"


class _Watch:
    """Marks a policy's own work for the profiler."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def validate(self, num_layers: int) -> None:
        self.policy.validate(num_layers)

    def begin(self, prompt: Prompt) -> Any:
        decision: Any = self.policy.begin(prompt)
        decision.select = marked(SELECT, decision.select)
        decision._look = marked(LOOKED, decision._look)
        return decision


def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch.profiler.record_function(name):
            return function(*args)

    return call


# ---------------------------------------------------------------- the table and the file


def met(row: dict[str, Any]) -> bool | None:
    """Whether the prefill comes near enough to its FLOPs; None for the stock model."""
    promised = row["predicted_ratio"]
    return None if promised == 1.0 else row["ttft"]["ratio"] <= MOST_PREFILL * promised


def cells(row: dict[str, Any], stock: dict[str, Any]) -> list[str]:
    """A row of the table: times and sizes of the stock model, ratios to it for the others."""
    ttft, tpot, first = row["ttft"], row["tpot"], row is stock
    return [
        str(row["batch"]),
        str(row["text"]),
        row["variant"],
        f"{row['predicted_ratio']:.3f}",
        f"{ttft['ms']:.0f} ms" if first else f"{ttft['ratio']:.3f}",
        "" if first else f"{ttft['low']:.3f}–{ttft['high']:.3f}",
        "" if row["met"] is None else "met" if row["met"] else "missed",
        f"{tpot['ms']:.1f} ms" if first else f"{tpot['ratio']:.3f}",
        "" if first else f"{tpot['low']:.3f}–{tpot['high']:.3f}",
        f"{row['kv_bytes'] / 1e6:.1f} MB" if first else f"{row['kv_bytes'] / stock['kv_bytes']:.3f}",
        f"{row['peak_bytes'] / 1e6:.0f} MB" if first else f"{row['peak_bytes'] / stock['peak_bytes']:.3f}",
    ]


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    stock = {(row["batch"], row["text"]): row for row in rows if row["variant"] == "stock"}
    return [cells(row, stock[row["batch"], row["text"]]) for row in rows]


def report(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title)
    for name in HEADER:
        table.add_column(name, justify="left" if name == "variant" else "right")
    for n, line in enumerate(lines(rows)):
        table.add_row(*line, end_section=n + 1 < len(rows) and rows[n + 1]["variant"] == "stock")
    console.print(table)


def markdown(rows: list[dict[str, Any]]) -> str:
    rule = ["---" if name == "variant" else "---:" for name in HEADER]
    return "".join("| " + " | ".join(line) + " |\n" for line in [list(HEADER), rule, *lines(rows)])


def write(file: Path | None, result: dict[str, Any]) -> None:
    """Write the results so far, and their table beside them."""
    write_json(result, file)
    if file is not None:
        file.with_suffix(".md").write_text(markdown(result["rows"]))


def earlier(file: Path | None, result: dict[str, Any]) -> dict[str, Any]:
    """The results that the same command has written already, or `result`."""
    if file is None or not file.exists():
        return result
    written: dict[str, Any] = json.loads(file.read_text())
    same = {key: written.get(key) for key in ("title", "torch", "rounds")}
    return written if same == {key: result[key] for key in same} else result


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", choices=list(SHAPES), default="small")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options.add_argument("--text", type=int, nargs="+", default=[32, 128, 512], help="text tokens a row")
    options.add_argument("--rounds", type=int, default=5, help="prefills of each variant, after a first one")
    options.add_argument("--steps", type=int, default=6, help="decode steps after each prefill")
    options.add_argument("--json", type=Path, help="write the rows here as they come, and a table beside it")
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    layers, flash = SHAPES[args.shape][0], args.device == "cuda" and find_spec("flash_attn") is not None
    chosen = variants(layers, ["sdpa"] + ["flash_attention_2"] * flash)
    title = (
        f"{args.shape}, {args.vision} vision tokens, fusion {3 * layers // 8}, {KEPT} kept, exit {3 * layers // 4}; "
        f"{setting(args)}; ratios to stock"
    )
    rounds = f"{args.rounds} rounds of a prefill and {args.steps} decode steps"
    fresh = {"title": title, "torch": torch.__version__, "rounds": rounds, "decision": [], "rows": []}
    result, console, model = earlier(args.json, fresh), Console(width=140), build(args)
    gc.disable()
    with torch.no_grad():
        for batch in args.batch:
            for text in args.text:
                if any((row["batch"], row["text"]) == (batch, text) for row in result["rows"]):
                    continue
                bench = Bench(model, args, batch, text)
                rows = bench.run(chosen)
                result["rows"] += rows
                result["decision"] = result["decision"] or decision_cost(bench, chosen)
                write(args.json, result)
                report(rows, f"batch {batch}, {text} text tokens", console)
    gc.enable()
    report(result["rows"], title, console)
    console.print("\n".join(result["decision"]), highlight=False)


if __name__ == "__main__":
    main()
