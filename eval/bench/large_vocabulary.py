"""What the loss costs in parts and over whole logits: peak memory and CPU time, at a large vocabulary and the embedded.

    python eval/bench/large_vocabulary.py --threads 1 --clock cpu --json outputs/bench_loss.json

Three measurements, each in turn within every round (`executor.py` says why):

* the output head and the loss alone, forward and backward, on random hidden states of student and teacher, without a
  teacher and with one: answers in the same columns of every row, or wherever prompts of different lengths put them
  (whole logits are computed at every column that some row needs);
* a training step of the embedded model.

*Whole* is what the objective did before: both models' logits at all of those columns, those of the answers in float32,
and autograd through both softmaxes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from latefusion.data.collate import IGNORE, label_columns
from latefusion.data.load import training_data
from latefusion.eval.bench.timing import interleaved, parser, ratios, seconds, setting, write_json
from latefusion.eval.memory import peak_bytes
from latefusion.models.inputs import fresh_inputs
from latefusion.recipes.compose import compose_config
from latefusion.training import assemble, loss
from latefusion.training.loss import Teaching, Terms, answer_loss

WEIGHT, TEMPERATURE = 1.0, 2.0


def whole_loss(logits: Tensor, taught: Tensor | None, labels: Tensor) -> Tensor:
    """Cross-entropy and KL from whole logits `[N, V]`."""
    total = F.cross_entropy(logits, labels, reduction="sum")
    if taught is not None:
        student = F.log_softmax(logits / TEMPERATURE, dim=-1)
        teacher = F.log_softmax(taught / TEMPERATURE, dim=-1)
        total = total + WEIGHT * TEMPERATURE**2 * F.kl_div(student, teacher, log_target=True, reduction="sum")
    return total


def columns(args: argparse.Namespace, spread: bool) -> Tensor:
    """Where answers are among the columns that some row needs, bool `[B, R]`."""
    generator = torch.Generator().manual_seed(0)
    length = 4 * args.answers
    starts = torch.randint(0, length - args.answers, (args.batch,), generator=generator) * spread
    place = torch.arange(length)
    learnt = (place >= starts[:, None]) & (place < starts[:, None] + args.answers)
    return learnt[:, learnt.any(0)]


def head_and_loss(
    args: argparse.Namespace, *, spread: bool, teacher: bool
) -> dict[str, Callable[[], Tensor]]:
    """Each way of the loss, forward and backward; it returns the gradient of the hidden states."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    made: dict[str, Any] = {"device": args.device, "dtype": dtype}
    learnt = columns(args, spread).to(args.device)
    head = torch.nn.Linear(args.hidden, args.vocabulary, bias=False, **made).requires_grad_(False)
    hidden, taught = (torch.randn(*learnt.shape, args.hidden, **made) for _ in range(2))
    hidden.requires_grad_()
    labels = torch.randint(0, args.vocabulary, (int(learnt.sum()),), device=args.device)

    def whole() -> Tensor:
        others = None
        if teacher:
            with torch.no_grad():
                others = head(taught)[learnt].float()
        value = whole_loss(head(hidden)[learnt].float(), others, labels)
        return torch.autograd.grad(value, hidden)[0]

    def parts() -> Tensor:
        teaching = None
        if teacher:
            teaching = Teaching(rows=taught[learnt], read=head, temperature=TEMPERATURE)
        value = answer_loss(
            hidden[learnt], labels, head, teaching, Terms(labels.device), weight=WEIGHT, width=args.vocabulary
        )
        return torch.autograd.grad(value, hidden)[0]

    return {"whole": whole, "parts": parts}


def embedded_steps(args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of a step on the embedded model, with its online teacher."""
    config = compose_config([
        "recipe=late_fusion", "data.scenes=50", f"kl.temperature={TEMPERATURE}", "kl.trust=all", "train.dtype=float32"
    ])  # fmt: skip
    student = assemble.student_from(config, *assemble.base_of(config))
    objective = assemble.objective_of(config, student)
    dataset, collate = training_data(config.data), assemble.collator_of(student, config)
    batch = collate([dataset[i] for i in range(config.train.batch_size)])
    trained = [p for p in student.model.parameters() if p.requires_grad]

    def learn(value: Tensor) -> Tensor:
        torch.autograd.grad(value, trained, allow_unused=True)
        return value.detach()

    def whole() -> Tensor:
        inputs = dict(batch)
        labels, queries = inputs.pop("labels"), inputs.pop("queries")
        at = label_columns(labels)
        targets = labels[:, at + 1]
        learnt = targets != IGNORE
        inputs.update(logits_to_keep=at, use_cache=False)
        with torch.no_grad():
            inputs = objective.tower.encode(inputs)
        model, attachment = student.model, student.attachment
        with objective.prompts_end(queries, labels != IGNORE):
            with torch.no_grad(), model.disable_adapter(), attachment.using(objective.kl.policy):
                taught = model(**fresh_inputs(inputs)).logits[learnt].float()
            logits = model(**fresh_inputs(inputs)).logits[learnt].float()
        return learn(whole_loss(logits, taught, targets[learnt]))

    objective.kl.weight = WEIGHT
    return {"whole": whole, "parts": lambda: learn(objective(student.model, batch, count=1)[0])}


def measure(
    args: argparse.Namespace, ways: dict[str, Callable[[], Tensor]], *, memory: bool
) -> dict[str, dict[str, Any]]:
    """Time of each way, its ratio to the whole logits', and peak memory beyond inputs and weights."""
    results = {name: way() for name, way in ways.items()}
    apart = (results["parts"] - results["whole"]).abs().max() / results["whole"].abs().max()
    times = interleaved(ways, lambda way: seconds(way, args), args.rounds)
    cells: dict[str, dict[str, Any]] = {name: ratios(each, times["whole"]) for name, each in times.items()}
    for name, way in ways.items():
        if memory:
            cells[name]["peak_mb"] = peak_bytes(lambda way=way: way(), torch.device(args.device)) / 1e6
    cells["parts"]["largest_difference"] = apart.item()
    return cells


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--vocabulary", type=int, default=152064, help="Qwen2's by default")
    options.add_argument("--hidden", type=int, default=256)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--answers", type=int, default=64, help="label tokens a row")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--embedded-rounds", type=int, default=9)
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "setting": {name: value for name, value in vars(args).items() if name != "json"},
        "torch": torch.__version__,
        "logits_at_once": loss.LOGITS,
        "cells": {},
    }
    table = Table("cell", "way", "ms", "of whole", "quartiles", "peak MB", title=setting(args))

    def add(name: str, cells: dict[str, dict[str, Any]]) -> None:
        result["cells"][name] = cells
        write_json(result, args.json)
        for way, cell in cells.items():
            peak = f"{cell['peak_mb']:.0f}" if "peak_mb" in cell else ""
            quartiles = f"{cell['low']:.3f} to {cell['high']:.3f}"
            table.add_row(name, way, f"{cell['ms']:.0f}", f"{cell['ratio']:.3f}", quartiles, peak)

    for teacher in (False, True):
        for spread in (False, True):
            where = "anywhere" if spread else "same columns"
            name = f"{'with a teacher' if teacher else 'no teacher'}, {where}"
            add(name, measure(args, head_and_loss(args, spread=spread, teacher=teacher), memory=True))
    args.rounds = args.embedded_rounds
    if args.rounds:
        add("embedded, a step", measure(args, embedded_steps(args), memory=False))
    Console().print(table)


if __name__ == "__main__":
    main()
