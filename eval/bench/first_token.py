"""How long a shipped model takes to its first token under a policy, and where that time goes.

    python eval/bench/first_token.py --threads 1 --clock cpu --json outputs/bench_first_token.json
    python eval/bench/first_token.py --model smollm_icons --schedule docs/results/profile_icons/schedule.yaml \\
        --threads 1 --clock cpu --json outputs/bench_first_token_icons.json

One picture and one question that the processor has read: vision tower, decoder, head. The schedules are those of the
model's recipes, or one of a file; beside one that ranks, the same numbers of tokens unranked. The variants run in turn
within every round, in an order that rotates; a ratio is the median over rounds of the ratio within a round. Then a
second pass times the parts of a prefill, each by its own time: the tower, the stock layers, and *beside*: embedding,
norm and head, and under a policy everything that it does.
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
import yaml
from rich.console import Console
from rich.table import Table

from latefusion.data.question_sets import samples, usual_set
from latefusion.eval.bench.decoding import calls
from latefusion.eval.bench.executor import under
from latefusion.eval.bench.phases import Phases
from latefusion.eval.bench.ranking import Unranked
from latefusion.eval.bench.timing import interleaved, parser, ratios, seconds, setting, write_json
from latefusion.eval.metrics import spread
from latefusion.models.base_model import load_base
from latefusion.models.policies.configured import schedule_of
from latefusion.models.schedule import VisionSchedule
from latefusion.recipes.compose import compose_config
from latefusion.recipes.schema import Source

TOWER, LAYERS, BESIDE = "tower", "layers", "rest"


def schedules(model: str, file: Path | None) -> dict[str, VisionSchedule | None]:
    """The stock model, everything kept, and the schedules of the model's recipes, or the one of a file."""
    if file is not None:
        named = {"its schedule": VisionSchedule.from_dict(yaml.safe_load(file.read_text()))}
    else:
        recipes = ("late_fusion", "late_fusion_pyramid", "cross_only")
        configs = {name: compose_config([f"model={model}", f"recipe={name}"]) for name in recipes}
        named = {name: schedule_of(config.schedule) for name, config in configs.items()}
    variants: dict[str, VisionSchedule | None] = {"stock": None, "keep all": VisionSchedule(), **named}
    name, band = next(iter(named.items()))
    if band.keep:
        ends: dict[str, Any] = {"enter": band.enter, "exit": band.exit}
        variants |= {
            "its band alone": VisionSchedule(**ends),
            f"{name}, unranked": Unranked(**ends, keep=band.keep),
        }
    return variants


def question(processor: Any, model: str) -> dict[str, Any]:
    """The processor's inputs of a test question of the model's usual set."""
    sample = samples(Source(usual_set(model)), "test", n_images=1)[0]
    text = processor.apply_chat_template(sample["messages"][:1], add_generation_prompt=True)
    return dict(processor(text=text, images=sample["images"], return_tensors="pt"))


@contextmanager
def watching(phases: Phases, model: Any) -> Iterator[None]:
    """Context in which the time of tower and layers is counted."""
    layer = type(model.get_decoder().layers[0])
    with phases.watching({(type(model.base_model), "get_image_features"): TOWER, (layer, "forward"): LAYERS}):
        yield


def measure(args: argparse.Namespace, model: Any, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each policy."""
    variants = schedules(args.model, args.schedule)

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
        if (unranked := f"{name}, unranked") in times:
            added = spread(times[name], times[unranked])
            row |= {
                "ranking": added.ratio - 1,
                "ranking_quartiles": [added.ratio_q25 - 1, added.ratio_q75 - 1],
            }
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
        "ranking adds",
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
            f"{row['ranking']:+.1%}" if "ranking" in row else "",
        )
    Console(width=140).print(table)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="embedded", choices=["embedded", "smollm_icons"])
    options.add_argument("--schedule", type=Path, help="the file of a schedule, in place of the recipes'")
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--json", type=Path, help="also write the rows here")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load_base(args.model, dtype=getattr(torch, args.dtype))
    model.to(args.device)
    inputs = {name: value.to(args.device) for name, value in question(processor, args.model).items()}
    gc.disable()
    title = f"{args.model}, {setting(args)}"
    rows = measure(args, model, inputs)
    write_json({"title": title, "torch": torch.__version__, "rows": rows}, args.json)
    show(rows, title)


if __name__ == "__main__":
    main()
