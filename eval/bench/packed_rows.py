"""What packing rows with images saves: padding before and after, and CPU time of a training step.

    python eval/bench/packed_rows.py --threads 1 --clock cpu --json outputs/bench_packing.json

Lengths are like those of LLaVA's instruction data, drawn, not read: 94% of the samples have one image, their text is
log-normal around 180 tokens; the others' around 545 (`draw`). Two tables:

* the share of padding among the tokens that layers compute, over `--batches` random batches: in layers that see vision
  tokens, in layers of text alone, and over a late-fusion band, half of whose layers are of either kind;
* a step (forward and backward, cross-entropy) of a random LLaVA at a quarter of these lengths, dense and under the
  band, packed over padded, in turn within every round (`executor.py` says why).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from latefusion.data.collate import IGNORE
from latefusion.data.packing import WIDER, Packed, in_order
from latefusion.eval.bench.timing import (
    IMAGE_TOKEN,
    VOCABULARY,
    interleaved,
    llava,
    parser,
    ratios,
    seconds,
    setting,
    write_json,
)
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Lora, build_student
from latefusion.training.objective import Distillation, Objective

TEXT_ONLY = 0.06  # share of the samples
SIZES = (4, 8, 16)  # samples a batch
ANSWER = 8  # learnt tokens of a timed sample
SHORTER = 4  # the lengths of timed samples are divided by this


def draw(rng: np.random.Generator, n: int, vision: int) -> tuple[np.ndarray, np.ndarray]:
    """Vision and text tokens of `n` samples."""
    pictured = rng.random(n) >= TEXT_ONLY
    about = rng.lognormal(np.where(pictured, 5.2, 6.3), 0.8)
    text = np.clip(about, 20, np.where(pictured, 2048 - vision, 2048)).astype(int)
    return vision * pictured, text


def padding(rows: list[list[int]], tokens: np.ndarray) -> tuple[int, int]:
    """Real and computed tokens of a layer."""
    sums = [int(tokens[row].sum()) for row in rows]
    return sum(sums), len(rows) * max(sums)


def shares(vision: int, size: int, batches: int) -> dict[str, dict[str, float]]:
    """Padding's share of the computed tokens, and rows a batch, padded and packed."""
    rng = np.random.default_rng(0)
    sums: dict[str, np.ndarray] = {"padded": np.zeros(5), "packed": np.zeros(5)}
    for _ in range(batches):
        images, text = draw(rng, size, vision)
        whole = images + text
        ways = {"padded": [[i] for i in range(size)], "packed": in_order(whole.tolist(), WIDER * max(whole))}
        for name, rows in ways.items():
            sums[name] += [*padding(rows, whole), *padding(rows, text), len(rows)]
    return {
        name: {
            "with_vision": 1 - s[0] / s[1],
            "text_alone": 1 - s[2] / s[3],
            "band": 1 - (s[0] + s[2]) / (s[1] + s[3]),
            "rows": s[4] / batches,
        }
        for name, s in sums.items()
    }


def batch_of(rng: np.random.Generator, size: int, vision: int, hidden: int) -> dict[str, Any]:
    """A right-padded batch of random tokens and features, a quarter as long as `draw` says."""
    images, text = (x // SHORTER for x in draw(rng, size, vision))
    lengths = torch.from_numpy(images + text)
    column = torch.arange(int(lengths.max()))
    mask = (column < lengths[:, None]).long()
    ids = torch.from_numpy(rng.integers(2, VOCABULARY, mask.shape))
    ids[(column < torch.from_numpy(images)[:, None] + 2) & (column >= 2) & (mask > 0)] = IMAGE_TOKEN
    ids[torch.from_numpy(images) == 0, :2] = 2
    text_only = torch.from_numpy(images == 0)[:, None]
    ids = torch.where(text_only & (ids == IMAGE_TOKEN), 3, ids)
    learnt = (column >= lengths[:, None] - ANSWER) & (mask > 0)
    number = int((images > 0).sum())
    features: Any = list(torch.randn(number, vision // SHORTER, hidden))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.where(learnt, ids, IGNORE),
        "queries": lengths[:, None] - ANSWER - 1,
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)},
    }


def steps(args: argparse.Namespace, schedule: VisionSchedule) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of the same batches, padded and packed."""
    shape: dict[str, Any] = {"layers": args.layers, "hidden": args.hidden, "mlp": 3 * args.hidden, "heads": 4}
    model = llava(**shape, device="cpu", dtype=args.dtype)
    student = build_student(
        model, None, base="bench", schedule=schedule, lora=Lora(rank=8, alpha=16), entry_rank=None
    )
    objective = Objective(
        model=student.model,
        attachment=student.attachment,
        kl=Distillation(policy=None, weight=0.0),
        share_images=True,
    )
    rng = np.random.default_rng(1)
    padded = [batch_of(rng, args.batch, args.vision, args.hidden) for _ in range(args.timed)]
    pack = Packed.of(model, dict)
    packed = [pack.packed(batch, pictured=True) for batch in padded]
    trained = [p for p in student.model.parameters() if p.requires_grad]

    def run(batches: list[dict[str, Any]]) -> Tensor:
        total = torch.zeros(())
        for batch in batches:
            loss, _ = objective(student.model, batch, count=args.batch * ANSWER)
            torch.autograd.grad(loss, trained, allow_unused=True)
            total += loss.detach()
        return total

    return {"padded": lambda: run(padded), "packed": lambda: run(packed)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batches", type=int, default=1000)
    options.add_argument("--batch", type=int, default=8, help="samples of a timed step")
    options.add_argument("--timed", type=int, default=3, help="batches of a timed run")
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--hidden", type=int, default=128)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "setting": {name: value for name, value in vars(args).items() if name != "json"},
        "torch": torch.__version__,
        "padding": {size: shares(args.vision, size, args.batches) for size in SIZES},
        "steps": {},
    }
    table = Table("samples", "way", "with vision", "text alone", "band", "rows", title="share of padding")
    for size, ways in result["padding"].items():
        for name, s in ways.items():
            numbers = [f"{s[key]:.1%}" for key in ("with_vision", "text_alone", "band")]
            table.add_row(str(size), name, *numbers, f"{s['rows']:.1f}")
    Console().print(table)
    quarter = args.layers // 4
    schedules = {"dense": VisionSchedule(), "band": VisionSchedule(enter=quarter, exit=3 * quarter)}
    table = Table("schedule", "way", "ms", "of padded", "quartiles", title=setting(args))
    for name, schedule in schedules.items():
        ways = steps(args, schedule)
        losses = {way: work().item() for way, work in ways.items()}
        times = interleaved(ways, lambda work: seconds(work, args), args.rounds)
        cells = {way: ratios(each, times["padded"]) for way, each in times.items()}
        result["steps"][name] = {**cells, "losses": losses}
        write_json(result, args.json)
        for way, cell in cells.items():
            quartiles = f"{cell['low']:.3f} to {cell['high']:.3f}"
            table.add_row(name, way, f"{cell['ms']:.0f}", f"{cell['ratio']:.3f}", quartiles)
    Console().print(table)


if __name__ == "__main__":
    main()
