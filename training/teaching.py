"""The pass behind `training/teach.py`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig

from latefusion.data.bad_rows import SKIPPED_FILE, Bad, Guard, skipped
from latefusion.data.collate import BadRow, Collator
from latefusion.models.policies.configured import teacher
from latefusion.recipes.launcher import local_rank, rank, world_size
from latefusion.recipes.schema import Config, EntryInit
from latefusion.training import assemble as parts
from latefusion.training.describe import first_samples
from latefusion.training.engines.teachers import settle_teacher
from latefusion.training.offline import TEACHER, expected, rows_of, write
from latefusion.training.preflight import checked_teaching
from latefusion.training.rows import check_rows
from latefusion.training.run import settle_threads
from latefusion.training.teacher import check_models


def teach(cfg: DictConfig) -> None:
    """Check what a composed configuration says, and write `kl.cache`; see `answer`."""
    answer(checked_teaching(cfg))


def answer(config: Config) -> None:
    """Write `kl.cache` for a configuration that `preflight.checked_teaching` has seen.

    Raises:
        SystemExit: what cannot work, in one sentence.
    """
    started = time.perf_counter()
    process, world = rank(), world_size()
    try:
        check_models(config)
        policy = teacher(config)
        sharded = parts.in_shards(config)
        if (
            sharded and config.kl.model is None
        ):  # the student's base, on its own, where adapters do not get in the way
            own = config.model
            config.kl.model, config.kl.revision, config.kl.visipruner = own.path, own.revision, own.visipruner
        dataset = parts.samples(config.data)
        check_rows(config, dataset, first_samples(dataset), cache=None)
        settle_threads(config)
        config.entry.init = EntryInit.identity  # no teacher has an entry adapter to calibrate
        context = None
        if sharded:
            config.train.trackers = []
            engine: ModuleType = import_module(f"latefusion.training.engines.{config.engine.trainer.value}")
            context = engine.prepare(config, dtype=parts.dtype_of(config))
        student = parts.student_of(config)
        objective = parts.objective_of(config, student, offline=False)
        collator = parts.collator_of(student, config)
        guard = parts.guarded(config, collator, dataset, folder=config.kl.cache)
        blank = stand_in(collator, dataset) if sharded else None
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    runs: Any = student.model if objective.other is None else objective.other.model
    if context is not None:
        assert objective.other is not None
        device = context.device
        settle_teacher(config, objective.other, device)
    else:
        if torch.cuda.is_available():
            runs.to(f"cuda:{local_rank()}")
        device = runs.device
    folder = Path(config.kl.cache or "")
    (folder / TEACHER).unlink(missing_ok=True)  # what was there is no longer whole
    if process == 0:
        (folder / SKIPPED_FILE).unlink(missing_ok=True)
        for old in folder.glob("teacher-*.arrow"):
            if not old.name.endswith(f"-of-{world:05d}.arrow"):
                old.unlink()
    pad, told = student.processor.tokenizer.pad_token_id, expected(config, student.processor, policy)
    size, mine = config.train.batch_size, range(process, len(dataset), world)

    def answers(batch: dict[str, Any]) -> torch.Tensor:
        moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=parts.dtype_of(config) is torch.bfloat16):
            return objective.answers(moved).cpu()  # [N, V]

    def batches() -> Iterator[list[dict[str, Any]]]:
        for start in range(0, len(range(0, len(dataset), world)), size):  # the first process has the most
            rows = mine[start : start + size]
            samples, batch = usable(guard, [dataset[i] for i in rows])
            if samples:
                wanted, temperature = answers(batch), config.kl.temperature
                yield list(rows_of(samples, batch, wanted, pad=pad, k=told["k"], temperature=temperature))
            elif blank is not None:
                answers(blank)  # the other processes wait for this one's shards
            if process == 0 and sys.stderr.isatty():
                print(f"\r{start + len(rows)}/{len(mine)} samples", end="", file=sys.stderr)

    try:
        count = write(folder, batches(), rank=process, world=world)
    except (ValueError, OSError) as error:  # a row that must not be left out, a full disk
        raise SystemExit(f"error: {error}") from error
    if process == 0:
        (folder / TEACHER).write_text(json.dumps({**told, "files": world}, indent=1) + "\n")
        size = sum(file.stat().st_size for file in folder.glob("teacher-*.arrow"))
        by = f" by the first of {world} processes" if world > 1 else ""
        print(
            f"{count} samples taught{by} in {time.perf_counter() - started:.0f} s, {size / 1e6:.0f} MB in {folder}; "
            f"train with kl.cache={folder}."
        )
        if left_out := skipped(folder):
            print(f"{left_out} row(s) could not be used and were left out: {folder / SKIPPED_FILE} says why.")


def stand_in(collator: Collator, dataset: Any) -> dict[str, Any]:
    """A batch for a process that has none left: of the first sample that can be used.

    Raises:
        ValueError: none can.
    """
    for row in range(len(dataset)):
        sample = dataset[row]
        with suppress(BadRow):
            if not isinstance(sample, Bad):
                return collator([sample])
    raise ValueError("no row of the data can be used; run data/validate.py.")


def usable(guard: Guard, samples: list[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The samples that training can use (it puts others in the places of bad ones), and their batch.

    Raises:
        ValueError: one cannot be used, and must not be left out.
    """
    for sample in samples:
        if isinstance(sample, Bad):
            guard.note(sample)
    good = [sample for sample in samples if not isinstance(sample, Bad)]
    while good:
        try:
            return good, guard.collator(good)
        except BadRow as error:
            guard.note(Bad.of(good.pop(error.at), error))
    return [], {}
