"""What the benchmarks share: random LLaVAs, prompts, and timing side by side."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE_TOKEN = 1
VOCABULARY = 1024  # small, as the FLOPs counter leaves out the language head

Variant = TypeVar("Variant")
Name = TypeVar("Name")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--vision", type=int, default=576, help="vision tokens a row")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: this process alone, if others run"
    )
    return options


def llava(*, layers: int, hidden: int, mlp: int, heads: int, device: str, dtype: str) -> Any:
    """A LLaVA with random weights and next to no vision tower, made where and as it is used."""
    torch.manual_seed(0)
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
            vocab_size=VOCABULARY,
        ),
        image_token_id=IMAGE_TOKEN,  # type: ignore[call-arg]
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def prompt(args: argparse.Namespace) -> dict[str, Any]:
    """One image before the question in every row; what the vision tower would give is made up."""
    before = args.text // 2
    ids = torch.randint(2, VOCABULARY, (args.batch, args.text + args.vision), device=args.device)
    ids[:, before : before + args.vision] = IMAGE_TOKEN
    rows = torch.randn(
        args.batch, args.vision, args.hidden, device=args.device, dtype=getattr(torch, args.dtype)
    )
    features: Any = list(rows)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)},
    }


def seconds(work: Callable[[], Any], args: argparse.Namespace) -> float:
    """Of one run: between two events of the stream on a GPU, else by `args.clock`."""
    if args.device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    begin = clock()
    work()
    return clock() - begin


def interleaved(
    variants: Mapping[Name, Variant], run: Callable[[Variant], Any], rounds: int
) -> dict[Name, list[Any]]:
    """What every variant gives in every round, in an order that rotates; the first round warms up and is dropped."""
    found: dict[Name, list[Any]] = {name: [] for name in variants}
    names = list(variants)
    for i in range(rounds + 1):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            result = run(variants[name])
            if i:
                found[name].append(result)
    return found


def spread(times: list[float], stock: list[float]) -> dict[str, float]:
    """Median milliseconds, and the median and quartiles over rounds of the ratios to stock."""
    ratios = [a / b for a, b in zip(times, stock, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ms": 1e3 * statistics.median(times), "ratio": ratio, "low": low, "high": high}


def setting(args: argparse.Namespace) -> str:
    """Under what a table was measured."""
    return f"{args.dtype}, {args.device}, {args.threads} threads, {args.clock} time"
