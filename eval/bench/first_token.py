"""How long the shipped model takes to its first token under a policy, and where that time goes.

    python eval/bench/first_token.py --threads 1 --clock cpu --json outputs/bench_first_token.json

One picture and one question that the processor has read: vision tower, decoder, head. The schedules are those of the
model's recipes. The variants run in turn within every round, in an order that rotates; a ratio is the median over
rounds of the ratio within a round. Then a second pass times the parts of a prefill, each by its own time: the tower,
the stock layers, and *beside*: embedding, norm and head, and under a policy everything that it does.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from latefusion.data.scenes import make_scene, render
from latefusion.eval.bench.decoding import calls
from latefusion.eval.bench.executor import under
from latefusion.eval.bench.phases import Phases
from latefusion.eval.bench.timing import interleaved, parser, ratios, seconds, setting, write_json
from latefusion.models.base_model import load_base
from latefusion.models.policies.configured import schedule_of
from latefusion.models.schedule import VisionSchedule
from latefusion.recipes.compose import compose_config

MODEL = "embedded"
TOWER, LAYERS, BESIDE = "tower", "layers", "rest"


def schedules() -> dict[str, VisionSchedule | None]:
    """The stock model, everything kept, and the schedules of the recipes."""
    recipes = ("late_fusion", "late_fusion_pyramid", "cross_only")
    configs = {name: compose_config([f"model={MODEL}", f"recipe={name}"]) for name in recipes}
    named = {name: schedule_of(config.schedule) for name, config in configs.items()}
    band = named["late_fusion"]
    alone = {"its band alone": VisionSchedule(enter=band.enter, exit=band.exit)} if band.keep else {}
    return {"stock": None, "keep all": VisionSchedule(), "late_fusion": band, **alone, **named}


def question(processor: Any) -> dict[str, Any]:
    """The processor's inputs of a question about a scene."""
    scene, questions = make_scene("test", 0)
    content = [{"type": "image"}, {"type": "text", "text": questions[0].question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=text, images=render(scene), return_tensors="pt"))


@contextmanager
def watching(phases: Phases, model: Any) -> Iterator[None]:
    """Context in which the time of tower and layers is counted."""
    layer = type(model.get_decoder().layers[0])
    with phases.watching({(type(model.base_model), "get_image_features"): TOWER, (layer, "forward"): LAYERS}):
        yield


def measure(args: argparse.Namespace, model: Any, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each policy."""
    variants = schedules()

    def prefill() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    def run(schedule: VisionSchedule | None) -> float:
        with under(model, schedule), torch.no_grad():
            prefill()
            return seconds(prefill, args)

    def parts(schedule: VisionSchedule | None) -> dict[str, float]:
        phases = Phases(args.device)
        with watching(phases, model), under(model, schedule), torch.no_grad():
            prefill()
            phases.reset()
            prefill()
            phases.note()
        return dict(phases.noted)

    times = interleaved(variants, run, args.rounds)
    shares = interleaved(variants, parts, args.rounds)
    rows = []
    for name, schedule in variants.items():
        with under(model, schedule), torch.no_grad():
            prefill()
            count = calls(prefill)
        milliseconds = {part: 1e3 * median(s[part] for s in shares[name]) for part in (TOWER, LAYERS, BESIDE)}
        flops = 1.0
        if schedule is not None:
            vision = int((inputs["input_ids"] == model.config.image_token_id).sum())
            text = inputs["input_ids"].shape[1] - vision
            dense = VisionSchedule().flops(model.config, text, vision)
            flops = schedule.flops(model.config, text, vision) / dense
        row = {"policy": name, **ratios(times[name], times["stock"]), "calls": count, "decoder_flops": flops}
        fastest = min(times[name]) / min(times["stock"])
        rows.append({**row, "fastest": fastest, "parts_ms": milliseconds})
    return rows


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    columns = (
        "policy",
        "ms",
        "of stock (quartiles)",
        "fastest",
        "decoder FLOPs",
        "tower",
        "layers",
        "beside",
        "calls",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        table.add_row(
            row["policy"],
            f"{row['ms']:.1f}",
            f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
            f"{row['fastest']:.3f}",
            f"{row['decoder_flops']:.0%}",
            *(f"{row['parts_ms'][part]:.1f}" for part in (TOWER, LAYERS, BESIDE)),
            f"{row['calls']:,}",
        )
    Console(width=130).print(table)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--json", type=Path, help="also write the rows here")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load_base(MODEL, dtype=getattr(torch, args.dtype))
    model.to(args.device)
    inputs = {name: value.to(args.device) for name, value in question(processor).items()}
    gc.disable()
    title = f"{MODEL}, {setting(args)}"
    rows = measure(args, model, inputs)
    write_json({"title": title, "torch": torch.__version__, "rows": rows}, args.json)
    show(rows, title)


if __name__ == "__main__":
    main()
