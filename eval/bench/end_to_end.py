"""What a user gets: samples a second of a whole training run, and the time of a whole answered request.

    python eval/bench/end_to_end.py --shape small --threads 1 --text 32 256 --batch 1 --json outputs/end_to_end.json
    python eval/bench/end_to_end.py --shape llava-1.5-7b --device cuda --dtype bfloat16 --seconds 170 --json FILE
    python eval/bench/end_to_end.py --show FILE... [--draw FOLDER]         # tables and bars of files written before

Random weights, real work: pictures are read from JPEG files, go through the processor and a tower of the shape's size.
The schedules are those that the recipes give LLaVA-1.5-7B, stretched to the shape's layers; VisiPruner finds what the
paper reports (`triggered.py`), in requests and as the teacher.

* **Training**: the product's own run (data, collator, tower, teacher as configured, student, optimizer), by Trainer. A
  step's time is from the end of one optimizer step to that of the next, between events on a GPU. The checkpoint of
  every `train.save_every` steps is timed, and its share added. LoRA as each recipe has it: in the *busy* layers
  for students; in dense all layers are.
* **Request**: picture and question to the processor, tower, prefill, answer: seconds until 1, 32, ... tokens are there,
  by the wall clock of an idle device on a GPU. *merged* is a student whose LoRA is in its weights (as `latefusion.load`
  does), *adapters* the same with LoRA apart.

Beside each time stands what FLOPs promise (of a training step; of a request to its first token), and where the time
goes: of a training step, by one more run under a stopwatch, on a GPU with the device idle at each change.

Variants run in turn within every round, in an order that rotates; a ratio is the median over rounds (and steps) of the
ratio to dense's median within a round. On a CPU time is that of this thread. `--json` is written after every cell (a
part, batch and text length), and no cell begins after `--seconds`. Cells come in the order of `--text`, then `--batch`,
then `--part`, or as `--cells` has them. Answers longer than the second of `--tokens` are timed at the first cell's
text length alone.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from latefusion.data.printing import first_line
from latefusion.eval.bench.answered_request import ADAPTERS, DENSE, MERGED, PRUNED, Requests
from latefusion.eval.bench.end_to_end_table import draw, markdown, read
from latefusion.eval.bench.timing import ratios, write_json
from latefusion.eval.bench.training_run import CHECKPOINT, Runs, Settings
from latefusion.eval.bench.whole_model import SHAPES, build_model, processor_for, shrunk
from latefusion.eval.memory import kv_cache_bytes, peak_bytes

Variant = TypeVar("Variant")
PARTS = ("training", "request")
WARM_UP = (1, 3)  # tokens of an answer that is not timed
SAVE_EVERY = 500  # steps, the default of train.save_every
RECIPES = (  # recipe/teacher; without one as the recipe has it; the reference first
    "dense/none",
    "late_fusion",
    "late_fusion/none",
    "late_fusion_pyramid",
    "late_fusion_pyramid/none",
    "cross_only",
    "cross_only/none",
    "vica_7b",
)
SYSTEMS = (
    DENSE,
    PRUNED,
    f"late_fusion, {MERGED}",
    f"late_fusion_pyramid, {MERGED}",
    f"cross_only, {MERGED}",
    f"late_fusion, {ADAPTERS}",
)


def training(runs: Runs, cell: Settings, recipes: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row a recipe."""
    cases = {name: (name.partition("/")[0], name.partition("/")[2]) for name in recipes}
    failed: dict[str, str] = {}

    results = in_turn(  # a run's own first step warms up
        {name: name for name in recipes},
        lambda name: attempt(partial(runs.run, *cases[name], cell), failed, name),
        rounds,
    )
    rows = []
    reference = [steps_of(r) for r in results[recipes[0]]]
    promised = runs.flops(*cases[recipes[0]], cell)
    for name, case in cases.items():
        row: dict[str, Any] = {"part": "training", "recipe": name, "batch": cell.batch, "text": cell.text}
        row["predicted_ratio"] = runs.flops(*case, cell) / promised
        if cell.checkpointing:
            row["checkpointing"] = True
        phases = attempt(partial(runs.phases, *case, cell), failed, name)
        if phases is None:
            rows.append({**row, "failed": failed[name]})
            continue
        checkpoint = phases.pop(CHECKPOINT)
        steps = [second for result in results[name] for second in result["steps"]]
        row |= {"ms": 1e3 * statistics.median(steps)}
        if all(reference):
            row |= ratios(steps, [dense for dense in reference for _ in range(cell.steps - 1)])
        row |= {
            "samples_per_second": cell.batch / (row["ms"] / 1e3 + checkpoint / SAVE_EVERY),
            "checkpoint_seconds": checkpoint,
            "phases": phases,
        }
        if "peak" in results[name][-1]:
            row["peak_bytes"] = results[name][-1]["peak"]
        rows.append(row)
    return rows


def in_turn(
    variants: Mapping[str, Variant], run: Callable[[Variant], Any], rounds: int
) -> dict[str, list[Any]]:
    """Results of every variant in every round, in an order that rotates."""
    names = list(variants)
    results: dict[str, list[Any]] = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(run(variants[name]))
    return results


def steps_of(result: dict[str, Any] | None) -> float:
    """Median seconds of a run's steps; 0 if it failed."""
    return 0.0 if result is None else statistics.median(result["steps"])


def request(
    requests: Requests, cell: Settings, systems: list[str], tokens: list[int], rounds: int
) -> list[dict[str, Any]]:
    """A row a system."""
    failed: dict[str, str] = {}
    for name in systems:  # warm up
        attempt(partial(requests.answer, name, cell, WARM_UP), failed, name)
    results = in_turn(
        {name: name for name in systems},
        lambda name: attempt(partial(requests.answer, name, cell, tokens), failed, name),
        rounds,
    )
    rows = []
    promised = requests.flops(systems[0], cell)
    reference = results[systems[0]]
    for name in systems:
        row: dict[str, Any] = {"part": "request", "system": name, "batch": cell.batch, "text": cell.text}
        row["predicted_ratio"] = requests.flops(name, cell) / promised
        if name in failed:
            rows.append({**row, "failed": failed[name]})
            continue
        answers = results[name]
        until = {}
        for n in tokens:
            times = [a.until[n] for a in answers]
            if None in reference:
                until[str(n)] = {"ms": 1e3 * statistics.median(times)}
            else:
                until[str(n)] = ratios(times, [a.until[n] for a in reference])
        phases = [a.phases(max(tokens)) for a in answers]
        row |= {
            "until": until,
            "phases": {key: statistics.median(p[key] for p in phases) for key in phases[0]},
        }
        row |= attempt(partial(prefilled, requests, name, cell), failed, name) or {}
        rows.append(row)
    return rows


def prefilled(requests: Requests, name: str, cell: Settings) -> dict[str, float]:
    """Bytes of the cache after a prefill; on a GPU also its working memory, and its time on the device."""
    prefill = requests.prefill(name, cell)
    row: dict[str, float] = {"kv_bytes": kv_cache_bytes(prefill().past_key_values)}
    if cell.device == "cuda":
        row |= {"peak_bytes": peak_bytes(prefill, torch.device("cuda")), **launched(prefill)}
    return row


def launched(work: Callable[[], Any]) -> dict[str, float]:
    """Time of a piece of work on the stream of a GPU, and the part of it in which kernels run."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        work()
        torch.cuda.synchronize()
    busy = sum(event.self_device_time_total for event in record.key_averages())
    return {"prefill_ms": start.elapsed_time(end), "kernels_ms": busy / 1e3}


def attempt(work: Callable[[], Any], failed: dict[str, str], name: str) -> Any:
    """The result of `work`; None if it fails now or failed before, with the reason in `failed`."""
    if name in failed:
        return None
    try:
        return work()
    except torch.OutOfMemoryError:
        failed[name] = "out of memory"
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {first_line(error)}"
        traceback.print_exc()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every cell that there is time for; written to `args.json` as it comes."""
    begun = time.perf_counter()
    torch.set_num_threads(args.threads)
    shape = shrunk(SHAPES[args.shape], args.layers)
    model = build_model(shape, device=args.device, dtype=getattr(torch, args.dtype))
    result: dict[str, Any] = {**setting(args, shape), "rows": []}
    cells = args.cells or [
        (part, batch, text) for text, batch, part in product(args.text, args.batch, args.part)
    ]
    longest_at = cells[0][2]  # text tokens
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(model, Path(folder))
        requests = Requests(runs, processor_for(shape))
        for number, (part, batch, text) in enumerate(cells):
            if time.perf_counter() - begun > args.seconds:
                result["left_out"] = [f"{p}, {b} x {t}" for p, b, t in cells[number:]]
                print(f"No time for {len(cells) - number} of {len(cells)} cells.", flush=True)
                break
            cell = Settings(shape, args.device, args.dtype, batch, text, args.steps, args.checkpointing)
            gc.collect()
            started = time.perf_counter()
            if part == "training":
                rows = training(runs, cell, args.recipes, args.train_rounds or args.rounds)
            else:
                tokens = args.tokens if text == longest_at else args.tokens[:2]
                rows = request(requests, cell, args.systems, tokens, args.rounds)
            result["rows"] += rows
            result["seconds"] = time.perf_counter() - begun
            print(f"{part}, {batch} x {text}: {time.perf_counter() - started:.0f} s", flush=True)
            write_json(result, args.json)
    write_json(result, args.json)
    return result


def cell_of(word: str) -> tuple[str, int, int]:
    """`training:8x256` as part, batch and text tokens."""
    part, _, size = word.partition(":")
    batch, _, text = size.partition("x")
    if part not in PARTS or not (batch.isdigit() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{word!r} is no cell; write PART:BATCHxTEXT, as training:8x256")
    return part, int(batch), int(text)


def setting(args: argparse.Namespace, shape: Any) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {args.threads} thread(s)"
    return {
        "title": f"{args.shape}, {shape.layers} layers x {shape.hidden}, {shape.vision} vision tokens, {args.dtype}, "
        f"{device}",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": args.rounds,
        "steps": args.steps - 1,
        "checkpointing": args.checkpointing,
    }


def options() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--layers", type=int, help="decoder layers, if not the shape's")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--text", type=int, nargs="+", default=[256, 32, 1024], help="text tokens a row")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument(
        "--cells", type=cell_of, nargs="+", metavar="PART:BATCHxTEXT", help="these, in this order"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 32, 128], help="of an answer; the first is 1"
    )
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="RECIPE[/TEACHER]")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-rounds", type=int, help="of training runs, if not --rounds")
    parser.add_argument("--steps", type=int, default=4, help="of a training run; the first is not timed")
    parser.add_argument("--checkpointing", action="store_true", help="train with gradient checkpointing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after that")
    parser.add_argument("--json", type=Path, help="write the rows here as they come")
    parser.add_argument("--show", type=Path, nargs="+", help="show these files instead of measuring")
    parser.add_argument("--draw", type=Path, help="write bars of where the time goes into this folder")
    return parser


def main() -> None:
    args = options().parse_args()
    result = read(args.show) if args.show else measure(args)
    Console(width=150).print(markdown(result), highlight=False, markup=False, soft_wrap=True)
    if args.draw is not None:
        draw(result, args.draw)


if __name__ == "__main__":
    main()
