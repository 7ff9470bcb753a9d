"""The pass behind `training/teach.py`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from latefusion.data.collate import BadRow, Collator
from latefusion.data.guard import Bad
from latefusion.models.base import check_base
from latefusion.training import parts
from latefusion.training.checks import read
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
        if config.kl.cache is None:
            raise ValueError("kl.cache is not set; name the folder to write with kl.cache=FOLDER.")
        check_base(config.model.path)
        policy = parts.teacher(config)
        if config.kl.model is not None and policy is not None:
            check_teacher(config, policy)
        dataset = parts.samples(config.data)
        settle_threads(config)
        student = parts.student_of(config, dataset)
        objective = parts.objective_of(config, student, offline=False)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    runs: Any = student.model if objective.other is None else objective.other.model
    if torch.cuda.is_available():
        runs.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    device = runs.device
    folder = Path(config.kl.cache)
    (folder / TEACHER).unlink(missing_ok=True)  # what was there is no longer whole
    if rank == 0:
        for old in folder.glob("teacher-*.arrow"):
            if not old.name.endswith(f"-of-{world:05d}.arrow"):
                old.unlink()
    collator, pad = parts.collator_of(student, config), student.processor.tokenizer.pad_token_id
    mine = range(rank, len(dataset), world)
    told = expected(config, student, policy)

    def batches() -> Iterator[list[dict[str, Any]]]:
        for start in range(0, len(mine), config.train.batch_size):
            rows = mine[start : start + config.train.batch_size]
            samples, batch = usable(collator, [dataset[i] for i in rows])
            if not samples:
                continue
            moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
            with torch.autocast(
                device.type, torch.bfloat16, enabled=parts.dtype_of(config) is torch.bfloat16
            ):
                wanted = objective.answers(moved).cpu()  # [N, V]
            temperature = config.kl.temperature
            yield list(rows_of(samples, batch, wanted, pad=pad, k=told["k"], temperature=temperature))
            if rank == 0 and sys.stderr.isatty():
                print(f"\r{start + len(rows)}/{len(mine)} samples", end="", file=sys.stderr)

    count = write(folder, batches(), rank=rank, world=world)
    if rank == 0:
        (folder / TEACHER).write_text(json.dumps({**told, "files": world}, indent=1) + "\n")
        size = sum(file.stat().st_size for file in folder.glob("teacher-*.arrow"))
        print(
            f"{count} samples taught in {time.perf_counter() - started:.0f} s, {size / 1e6:.0f} MB in {folder}; train "
            f"with kl.cache={folder}."
        )


def usable(collator: Collator, samples: list[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The samples that training can use (it puts others in the places of bad ones), and their batch."""
    good = [sample for sample in samples if not isinstance(sample, Bad)]
    while good:
        try:
            return good, collator(good)
        except BadRow as error:
            del good[error.at]
    return [], {}
