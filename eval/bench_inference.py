"""VisiPruner against the stock model at the work that the paper reports; random weights, stock models.

    python eval/bench_inference.py --shape small --threads 1 --json outputs/bench_inference.json
    python eval/bench_inference.py --shape llava-1.5-7b --device cuda --dtype bfloat16

Random weights fuse nowhere, so a synthetic trigger fixes what the paper reports for LLaVA-1.5-7B: fusion at 3/8 of
the decoder's depth, 10 tokens kept, exit at 3/4. Everything else is the real thing: every layer is looked at,
its findings travel to the host, tokens leave. `no decision` removes the same tokens without looking, so
that the difference to it is what deciding costs; `stock` is the model without any hook.

Time to first token is a prefill with its cache, time per token a decode step on the policy's own cache. Variants
run in turn within every round, in an order that rotates; a ratio is the median over rounds of the ratio to stock
within a round. Targets: a prefill takes at most 55% of the stock's where its FLOPs say 47%, that is at most
1.17 of what FLOPs promise; a decode step is not slower; the shallow stage adds at most 2%.
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
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from latefusion.eval.bench_executor import IMAGE_TOKEN, prompt, seconds
from latefusion.eval.memory import kv_cache_bytes, peak_bytes
from latefusion.eval.triggered import Told, Triggered
from latefusion.models.attach import attach
from latefusion.models.flops import decoder_flops
from latefusion.models.policies.base import Policy, Prompt

SHAPES = {  # layers, hidden size, MLP, heads
    "small": (16, 512, 1376, 8),
    "llava-1.5-7b": (32, 4096, 11008, 32),
}
KEPT = 10
MOST_PREFILL, MOST_DECODE = 0.55 / 0.47, 1.0


@dataclass(frozen=True)
class Variant:
    """A policy (None: no hook at all) under an attention implementation."""

    policy: Policy | None
    attention: str


def variants(layers: int, attentions: list[str]) -> dict[str, Variant]:
    told = {"fusion": 3 * layers // 8, "kept": KEPT, "leave": 3 * layers // 4}
    boundary = 3 * layers // 16
    found: dict[str, Variant] = {}
    for attention in attentions:
        name = "" if attention == "sdpa" else f", {attention}"
        found[f"stock{name}"] = Variant(None, attention)
        found[f"no decision{name}"] = Variant(Told(**told), attention)
        for title, stages in (
            ("middle, deep", ("middle", "deep")),
            ("all stages", ("shallow", "middle", "deep")),
        ):
            policy = Triggered(**told, boundary=boundary, stages=stages)
            found[f"VisiPruner, {title}{name}"] = Variant(policy, attention)
    return found


def build(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    layers, hidden, mlp, heads = SHAPES[args.shape]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        ),
        text_config=LlamaConfig(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=1024,
        ),
        image_token_id=IMAGE_TOKEN,  # type: ignore[call-arg]
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


class Bench:
    """All variants on one prompt shape."""

    def __init__(self, model: Any, args: argparse.Namespace, batch: int, text: int):
        self.model, self.args, self.batch, self.text = model, args, batch, text
        hidden = model.config.text_config.hidden_size
        shape = argparse.Namespace(**vars(args) | {"batch": batch, "text": text, "hidden": hidden})
        self.inputs = prompt(shape)
        self.token = torch.full_like(self.inputs["input_ids"][:, :1], 2)
        self.mask = torch.nn.functional.pad(self.inputs["attention_mask"], (0, 1), value=1)
        self.caches: dict[str, Any] = {}

    def prefill(self) -> Any:
        features = dict(self.inputs["mm_encoder_outputs"])
        return self.model(
            **{**self.inputs, "mm_encoder_outputs": features}, use_cache=True, logits_to_keep=1
        ).past_key_values

    def step(self, cache: Any) -> None:
        self.model(input_ids=self.token, attention_mask=self.mask, past_key_values=cache)

    def under(self, variant: Variant) -> Any:
        if self.model.config._attn_implementation != variant.attention:
            self.model.set_attn_implementation(variant.attention)
        return nullcontext() if variant.policy is None else attach(self.model, variant.policy)

    def time_prefill(self, name: str, variant: Variant) -> float:
        with self.under(variant):
            return seconds(self.prefill, self.args)

    def time_decode(self, name: str, variant: Variant) -> float:
        with self.under(variant):
            if name not in self.caches:
                self.caches[name] = self.prefill()
            cache = self.caches[name]
            elapsed = seconds(partial(self.step, cache), self.args)
            cache.crop(-1)
        return elapsed

    def predicted(self, policy: Policy | None) -> float:
        """The prefill's FLOPs against dense."""
        layers, vision = len(self.model.get_decoder().layers), self.args.vision
        if policy is None:
            return 1.0
        told: Any = policy
        tokens = [
            self.text + (vision if i <= told.fusion else told.kept if i < told.leave else 0)
            for i in range(layers)
        ]
        dense = decoder_flops(self.model.config, [self.text + vision] * layers)
        return decoder_flops(self.model.config, tokens) / dense

    def memory(self, variant: Variant) -> tuple[int, int]:
        """Bytes of the cache after a prefill, and the peak of a prefill beyond weights and inputs."""
        with self.under(variant) as attachment:
            kv = kv_cache_bytes(self.prefill())
            if attachment is not None:
                self.model(input_ids=self.token)  # so that what the attachment remembers is gone
            return kv, peak_bytes(self.prefill, torch.device(self.args.device))

    def run(self, chosen: dict[str, Variant]) -> list[dict[str, Any]]:
        rounds = self.args.rounds
        gc.collect()
        prefills = interleaved(chosen, self.time_prefill, rounds)
        steps = interleaved(chosen, self.time_decode, self.args.decode_rounds)
        self.caches.clear()
        rows = []
        for name, variant in chosen.items():
            kv, peak = self.memory(variant)
            rows.append(
                {
                    "batch": self.batch,
                    "text": self.text,
                    "variant": name,
                    "predicted_ratio": self.predicted(variant.policy),
                    "ttft": spread(prefills[name], prefills["stock"]),
                    "tpot": spread(steps[name], steps["stock"]),
                    "kv_bytes": kv,
                    "peak_bytes": peak,
                }
            )
        return rows


def interleaved(
    chosen: dict[str, Variant], run: Callable[[str, Variant], float], rounds: int
) -> dict[str, list[float]]:
    """Times of every variant in every round; the first round warms up and is dropped."""
    times: dict[str, list[float]] = {name: [] for name in chosen}
    names = list(chosen)
    for i in range(rounds + 1):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = run(name, chosen[name])
            if i:
                times[name].append(elapsed)
    return times


def spread(times: list[float], stock: list[float]) -> dict[str, float]:
    """Median milliseconds, and the median and quartiles of the ratios to stock."""
    ratios = [a / b for a, b in zip(times, stock, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ms": 1e3 * statistics.median(times), "ratio": ratio, "low": low, "high": high}


def decision_cost(bench: Bench, chosen: dict[str, Variant]) -> list[str]:
    """What the profiler says of one prefill: time in the decision's own operators, and waits for the device."""
    said = []
    for name, variant in chosen.items():
        if not isinstance(variant.policy, Triggered):
            continue
        with bench.under(variant) as attachment:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.args.device == "cuda")
            with attachment.using(_Watch(variant.policy)), profile(activities=activities) as record:
                bench.prefill()
        events = {event.key: event for event in record.key_averages()}
        whole = sum(event.self_cpu_time_total for event in events.values())
        mine = [events[key].cpu_time_total for key in (SELECT, ATTENDED) if key in events]
        waits = sum(
            e.count for key, e in events.items() if "Synchronize" in key or key == "aten::_local_scalar_dense"
        )
        said.append(
            f"{name}: the decision takes {sum(mine) / whole:.1%} of the host's time; {waits} waits or reads."
        )
    return said


SELECT, ATTENDED = "latefusion::select", "latefusion::attended"


class _Watch:
    """Marks a policy's own work for the profiler."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def validate(self, num_layers: int) -> None:
        self.policy.validate(num_layers)

    def begin(self, prompt: Prompt) -> Any:
        decision: Any = self.policy.begin(prompt)
        decision.select = marked(SELECT, decision.select)
        decision.attended = marked(ATTENDED, decision.attended)
        return decision


def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch.profiler.record_function(name):
            return function(*args)

    return call


def report(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title)
    columns = (
        "batch",
        "text",
        "variant",
        "FLOPs",
        "first token",
        "(quartiles)",
        "target",
        "per token",
        "(quartiles)",
    )
    for name in (*columns, "KV", "peak"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    stock: dict[str, Any] = {}
    for row in rows:
        first = row["variant"] == "stock"
        stock = row if first else stock
        ttft, tpot = row["ttft"], row["tpot"]
        table.add_row(
            str(row["batch"]) if first else "",
            str(row["text"]) if first else "",
            row["variant"],
            f"{row['predicted_ratio']:.3f}",
            f"{ttft['ms']:.0f} ms" if first else f"{ttft['ratio']:.3f}",
            "" if first else f"{ttft['low']:.3f}–{ttft['high']:.3f}",
            "met" if row["met"] else "" if row["met"] is None else "missed",
            f"{tpot['ms']:.1f} ms" if first else f"{tpot['ratio']:.3f}",
            "" if first else f"{tpot['low']:.3f}–{tpot['high']:.3f}",
            f"{row['kv_bytes'] / 1e6:.1f} MB" if first else f"{row['kv_bytes'] / stock['kv_bytes']:.3f}",
            f"{row['peak_bytes'] / 1e6:.0f} MB"
            if first
            else f"{row['peak_bytes'] / stock['peak_bytes']:.3f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--text", type=int, nargs="+", default=[32, 128, 512], help="text tokens a row")
    parser.add_argument("--vision", type=int, default=576, help="vision tokens a row")
    parser.add_argument("--rounds", type=int, default=7, help="prefills of each variant")
    parser.add_argument("--decode-rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: this process alone, if others run"
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    flash = args.device == "cuda" and find_spec("flash_attn") is not None
    chosen = variants(SHAPES[args.shape][0], ["sdpa"] + ["flash_attention_2"] * flash)
    model = build(args)
    rows: list[dict[str, Any]] = []
    said: list[str] = []
    gc.disable()
    with torch.no_grad():
        for batch in args.batch:
            for text in args.text:
                bench = Bench(model, args, batch, text)
                rows += [judged(row) for row in bench.run(chosen)]
                said = said or decision_cost(bench, chosen)
    title = (
        f"{args.shape}, {args.vision} vision tokens, fusion {3 * len(model.get_decoder().layers) // 8}, "
        f"{KEPT} kept, exit {3 * len(model.get_decoder().layers) // 4}; {args.dtype}, {args.device}, "
        f"{args.threads} threads, {args.clock} time; ratios to stock"
    )
    console = Console(width=140)
    report(rows, title, console)
    console.print("\n".join(said), highlight=False)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"title": title, "torch": torch.__version__, "decision": said, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """The row with `met`: whether the prefill is as near to its FLOPs as asked; None for the stock model."""
    if row["predicted_ratio"] == 1.0:
        return row | {"met": None}
    return row | {"met": row["ttft"]["ratio"] <= MOST_PREFILL * row["predicted_ratio"]}


if __name__ == "__main__":
    main()
