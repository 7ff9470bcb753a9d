"""What the benchmarks share: random LLaVAs, prompts, interleaved timing, and the file that results go to."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from latefusion.eval.comparison import cost
from latefusion.eval.metrics import spread

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
    """A LLaVA with random weights and a minimal vision tower, made on its device in its dtype."""
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


def prompt(
    args: argparse.Namespace, *, vocabulary: int = VOCABULARY, image_token: int = IMAGE_TOKEN
) -> dict[str, Any]:
    """Rows of one image and a question; random numbers stand for the features of the vision tower."""
    before = args.text // 2
    ids = torch.randint(2, vocabulary, (args.batch, args.text + args.vision), device=args.device)
    ids[ids == image_token] = image_token - 1
    ids[:, before : before + args.vision] = image_token
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
    """Time of one run on the device and by the clock of the options."""
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    return cost.seconds(work, torch.device(args.device), clock)


def interleaved(
    variants: Mapping[Name, Variant], run: Callable[[Variant], Any], rounds: int
) -> dict[Name, list[Any]]:
    """Results of every variant in every round, in an order that rotates; the first round warms up and is dropped."""
    results: dict[Name, list[Any]] = {name: [] for name in variants}
    names = list(variants)
    for i in range(rounds + 1):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            result = run(variants[name])
            if i:
                results[name].append(result)
    return results


def ratios(times: Sequence[float], stock: Sequence[float]) -> dict[str, float]:
    """Median milliseconds, and the median and quartiles over rounds of the ratios to `stock`."""
    over_rounds = spread(times, stock)
    return {
        "ms": 1e3 * over_rounds.median,
        "ratio": over_rounds.ratio,
        "low": over_rounds.ratio_q25,
        "high": over_rounds.ratio_q75,
    }


def setting(args: argparse.Namespace) -> str:
    """The conditions of a measurement, for the title of its table."""
    return f"{args.dtype}, {args.device}, {args.threads} threads, {args.clock} time"


def write_json(result: Mapping[str, Any], path: Path | None) -> None:
    """Write the results so far; an interruption leaves the file that was there before."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=2) + "\n")
        part.replace(path)
