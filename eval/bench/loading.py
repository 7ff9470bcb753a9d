"""Whether loading keeps up with training: how long a step waits for its batch, by number of loader workers.

    python eval/bench/loading.py --workers 0,1,2 --json outputs/bench_loading.json recipe=late_fusion train.threads=1

What `training/train.py` takes (`recipe=`, `data=`, `train.prefetch=`, ...) says what is loaded and trained: its data
set, collator, student and objective, one optimizer step a batch. After the loader's first batch:

* loading, for each number of workers: batches a second, with nothing else to do;
* training: steps a second on one batch, loaded before;
* both, for each number of workers: steps a second as a run makes them, and the share of the time that they wait.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from latefusion.data.collate import IGNORE
from latefusion.data.load import training_data
from latefusion.eval.bench.timing import write_json
from latefusion.recipes.compose import compose_config
from latefusion.recipes.schema import Config, EntryInit
from latefusion.training import assemble as parts
from latefusion.training.offline import with_answers
from latefusion.training.order import order_of
from latefusion.training.prepare import settle_threads


class Bench:
    """One run's loader and one run's step.

    Args:
        config: of the run.
        steps: number of steps of each measurement.
    """

    def __init__(self, config: Config, steps: int):
        self.config, self.steps = config, steps
        self.dataset = training_data(config.data)
        config.entry.init = EntryInit.identity  # no run is there to have fitted it
        self.student = parts.student_of(config)
        guard = parts.guarded(
            config, with_answers(config, parts.collator_of(self.student, config)), self.dataset
        )
        self.collator = parts.packing(config, self.student, guard)
        self.objective = parts.objective_of(config, self.student)
        if torch.cuda.is_available():
            self.student.model.cuda()
        self.student.model.train()
        trained = [p for p in self.student.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.train.learning_rate)
        self.bfloat16 = parts.dtype_of(config) is torch.bfloat16
        self.device = self.student.model.device

    def batches(self, workers: int) -> Iterator[dict[str, Any]]:
        """The batches of the run, in its order."""
        train = self.config.train
        loader = DataLoader(
            self.dataset,
            batch_size=train.batch_size,
            sampler=order_of(train, self.dataset, 1),
            num_workers=workers,
            prefetch_factor=train.prefetch if workers else None,
            collate_fn=self.collator,
        )
        return iter(loader)

    def step(self, batch: dict[str, Any]) -> None:
        batch = {name: value.to(self.device) for name, value in batch.items()}
        count = (batch["labels"] != IGNORE).sum()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss, _ = self.objective(self.student.model, batch, count=count)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()  # waits for the device

    def loading(self, workers: int) -> float:
        """Batches a second."""
        batches = self.batches(workers)
        next(batches)
        begun = time.perf_counter()
        for _ in range(self.steps):
            next(batches)
        return self.steps / (time.perf_counter() - begun)

    def training(self) -> float:
        """Steps a second on one batch."""
        batch = next(self.batches(0))
        self.step(batch)
        begun = time.perf_counter()
        for _ in range(self.steps):
            self.step(batch)
        return self.steps / (time.perf_counter() - begun)

    def both(self, workers: int) -> tuple[float, float]:
        """Steps a second, and the share of the time that they wait for a batch."""
        batches = self.batches(workers)
        self.step(next(batches))
        waited, begun = 0.0, time.perf_counter()
        for _ in range(self.steps):
            start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - start
            self.step(batch)
        took = time.perf_counter() - begun
        return self.steps / took, waited / took


def measured(config: Config, *, workers: list[int], steps: int) -> dict[str, Any]:
    """All measurements of one run.

    Raises:
        ValueError: the run has fewer steps than a measurement takes.
    """
    if config.train.total_steps <= steps:
        raise ValueError(f"train.steps={config.train.steps} must exceed --steps {steps}.")
    settle_threads(config)
    bench = Bench(config, steps)
    rows = []
    for n in workers:
        rate, waits = bench.both(n)
        rows.append({"workers": n, "loading": bench.loading(n), "both": rate, "waits": waits})
    return {
        "name": config.name,
        "data": config.data.source.value,
        "batch_size": config.train.batch_size,
        "prefetch": config.train.prefetch,
        "threads": torch.get_num_threads(),
        "training": bench.training(),
        "workers": rows,
    }


def show(results: dict[str, Any]) -> None:
    console = Console(width=100)
    console.print(
        f"{results['name']} on {results['data']}: {results['training']:.2f} steps/s of {results['batch_size']} samples "
        f"without loading, {results['threads']} thread(s)"
    )
    table = Table("workers", "batches/s, loading alone", "steps/s", "waits for its batch")
    for row in results["workers"]:
        table.add_row(
            str(row["workers"]),
            f"{row['loading']:.2f}",
            f"{row['both']:.2f}",
            f"{row['waits']:.1%} of the time",
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line; invalid arguments end the program with one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", default="0,1,2", help="numbers of loader workers, by commas")
    parser.add_argument("--steps", type=int, default=20, help="that each measurement takes")
    parser.add_argument("--json", type=Path, help="file to write what was measured to")
    parser.add_argument("overrides", nargs="*", help="as for training/train.py")
    args = parser.parse_intermixed_args(arguments)
    try:
        config = compose_config(args.overrides)
        results = measured(config, workers=[int(n) for n in args.workers.split(",")], steps=args.steps)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    show(results)
    write_json(results, args.json)


if __name__ == "__main__":
    main()
