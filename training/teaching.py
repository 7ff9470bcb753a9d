"""The pass behind `training/teach.py`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig

from latefusion.data.collate import BadRow, Collator
from latefusion.data.guard import Bad
from latefusion.models.base import check_base
from latefusion.training import parts
from latefusion.training.checks import read
from latefusion.training.config import Config, EntryInit
from latefusion.training.engines.teachers import settle_teacher
from latefusion.training.offline import TEACHER, expected, rows_of, write
from latefusion.training.run import settle_threads
from latefusion.training.teacher import check_teacher


def teach(cfg: DictConfig) -> None:
    """Write `kl.cache`.

    Raises:
        SystemExit: what cannot work, in one sentence.
    """
    started = time.perf_counter()
    rank, world = (
        int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))
    )
    try:
        config = read(cfg)
        check(config)
        policy = parts.teacher(config)
        sharded = parts.in_shards(config)
        if (
            sharded and config.kl.model is None
        ):  # the student's base, on its own, where adapters do not get in the way
            own = config.model
            config.kl.model, config.kl.revision, config.kl.visipruner = own.path, own.revision, own.visipruner
        if config.kl.model is not None and policy is not None:
            check_teacher(config, policy)
        dataset = parts.samples(config.data)
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
            runs.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        device = runs.device
    folder = Path(config.kl.cache or "")
    (folder / TEACHER).unlink(missing_ok=True)  # what was there is no longer whole
    if rank == 0:
        for old in folder.glob("teacher-*.arrow"):
            if not old.name.endswith(f"-of-{world:05d}.arrow"):
                old.unlink()
    pad, told = student.processor.tokenizer.pad_token_id, expected(config, student, policy)
    size, mine = config.train.batch_size, range(rank, len(dataset), world)

    def answers(batch: dict[str, Any]) -> torch.Tensor:
        moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=parts.dtype_of(config) is torch.bfloat16):
            return objective.answers(moved).cpu()  # [N, V]

    def batches() -> Iterator[list[dict[str, Any]]]:
        for start in range(0, len(range(0, len(dataset), world)), size):  # the first process has the most
            rows = mine[start : start + size]
            samples, batch = usable(collator, [dataset[i] for i in rows])
            if samples:
                wanted, temperature = answers(batch), config.kl.temperature
                yield list(rows_of(samples, batch, wanted, pad=pad, k=told["k"], temperature=temperature))
            elif blank is not None:
                answers(blank)  # the other processes wait for this one's shards
            if rank == 0 and sys.stderr.isatty():
                print(f"\r{start + len(rows)}/{len(mine)} samples", end="", file=sys.stderr)

    count = write(folder, batches(), rank=rank, world=world)
    if rank == 0:
        (folder / TEACHER).write_text(json.dumps({**told, "files": world}, indent=1) + "\n")
        size = sum(file.stat().st_size for file in folder.glob("teacher-*.arrow"))
        by = f" by the first of {world} processes" if world > 1 else ""
        print(
            f"{count} samples taught{by} in {time.perf_counter() - started:.0f} s, {size / 1e6:.0f} MB in {folder}; "
            f"train with kl.cache={folder}."
        )


def check(config: Config) -> None:
    """Raise before anything is loaded if this cannot work.

    Raises:
        ValueError, FileNotFoundError: in one sentence.
    """
    if config.kl.cache is None:
        raise ValueError("kl.cache is not set; name the folder to write with kl.cache=FOLDER.")
    if config.data.streaming:
        raise ValueError("a stream has no end at which all of it is taught; use data.streaming=false.")
    check_base(config.model.path)


def stand_in(collator: Collator, dataset: Any) -> dict[str, Any]:
    """A batch for a process that has none left: of the first sample that can be used.

    Raises:
        ValueError: none can.
    """
    for row in range(len(dataset)):
        samples, batch = usable(collator, [dataset[row]])
        if samples:
            return batch
    raise ValueError("no row of the data can be used; run data/validate.py.")


def usable(collator: Collator, samples: list[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The samples that training can use (it puts others in the places of bad ones), and their batch."""
    good = [sample for sample in samples if not isinstance(sample, Bad)]
    while good:
        try:
            return good, collator(good)
        except BadRow as error:
            del good[error.at]
    return [], {}
