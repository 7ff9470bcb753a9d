"""Offline distillation: the teacher's answers, written once and read in every epoch instead of a forward pass.

`training/teach.py` writes them, `kl.cache=FOLDER` trains on them. The folder holds Arrow files with a row per sample,
and `teacher.json`, which says who taught.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch import Tensor

from latefusion.data.bad_rows import SKIPPED_FILE, Bad, Guard, skipped
from latefusion.data.collate import IGNORE, BadRow, Collator, collator_without_weights
from latefusion.data.load import training_data
from latefusion.data.samples import videos_of_sample
from latefusion.models.fingerprint import model_identity
from latefusion.models.folder_contents import TEACHER
from latefusion.recipes.launcher import local_rank, rank, world_size
from latefusion.recipes.printable import error_line
from latefusion.recipes.schema import Config, EntryInit, Trust
from latefusion.training import assemble as parts
from latefusion.training.engines.sharding import place_teacher
from latefusion.training.prepare import count_steps, settle_threads
from latefusion.training.teacher import check_models, shared_vocabulary
from latefusion.training.teacher_cache import Stale, again_with, facts_in, facts_of
from latefusion.training.trust import settle_trust
from latefusion.training.trust_record import Decision

SCHEMA = pa.schema(
    [
        ("sample", pa.string()),
        ("prompt", pa.string()),
        ("tokens", pa.list_(pa.int32())),  # N * k, by answer token, the likeliest first
        ("logprobs", pa.list_(pa.float32())),  # N * k
    ]
)


def expected(config: Config, processor: Any) -> dict[str, Any]:
    """Everything but the samples that must be the same when answers are written and when they are read."""
    model, kl = config.model, config.kl
    path, revision = (model.path, model.revision) if kl.model is None else (kl.model, kl.revision)
    dtype = "nf4" if model.load_in_4bit and kl.model is None else parts.dtype_of(config)
    identity = model_identity(path, revision, processor=processor, dtype=dtype)
    identity["train.dtype"] = identity.pop("dtype")
    return {**facts_of(config), **identity, "kl.top_k": min(kl.top_k, shared_vocabulary(config))}


def prompt_hash(ids: Tensor, labels: Tensor, queries: Tensor, pad: int, sample: dict[str, Any]) -> str:
    """Hash of what the teacher saw of a sample: tokens, which of them are learnt, which rank its vision tokens, pixels.

    Args:
        ids, labels: int64 `[T]`, padded with `pad`.
        queries: int64 `[Q]`, the collator's; the last may be repeated.
    """
    real = ids != pad
    digest = hashlib.blake2b(digest_size=12)
    digest.update(ids[real].numpy().tobytes())
    digest.update((labels[real] != IGNORE).numpy().tobytes())
    digest.update(queries.unique().numpy().tobytes())
    for image in sample["images"]:
        digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    for video in videos_of_sample(sample):
        digest.update(video.fingerprint().encode())
    return digest.hexdigest()


def rows_of(
    samples: Sequence[dict[str, Any]],
    batch: dict[str, Tensor],
    logits: Tensor,
    *,
    pad: int,
    k: int,
    temperature: float,
) -> Iterator[dict[str, Any]]:
    """The rows of the cache for a batch.

    Args:
        logits: the teacher's, for each label, `[N, V]`, sample by sample.
        k: number of the likeliest tokens to keep.
    """
    logprobs, tokens = (logits / temperature).log_softmax(-1).topk(k)  # [N, k]
    counts = (batch["labels"][:, 1:] != IGNORE).sum(1).tolist()
    parts = zip(
        samples,
        batch["input_ids"],
        batch["labels"],
        batch["queries"],
        tokens.split(counts),
        logprobs.split(counts),
        strict=True,
    )
    for sample, ids, labels, queries, token, logprob in parts:
        yield {
            "sample": str(sample.get("id", "")),
            "prompt": prompt_hash(ids, labels, queries, pad, sample),
            "tokens": token.flatten().int().numpy(),
            "logprobs": logprob.flatten().numpy(),
        }


def write(folder: str | Path, batches: Iterator[list[dict[str, Any]]], *, rank: int, world: int) -> int:
    """Write the file of one process, under its name only once it is complete; an older one goes first.

    Returns:
        The number of samples in it.
    """
    path = Path(folder) / f"teacher-{rank:05d}-of-{world:05d}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # or a teacher.json that another process has written would count it in
    part, count = path.with_suffix(".part"), 0
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for rows in batches:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
            count += len(rows)
    part.replace(path)
    return count


class Taught:
    """A collator that adds the teacher's answers to each batch.

    They are `teacher_tokens` int64 and `teacher_logprobs` float32 `[N, k]`, for the batch's `N` label tokens, sample by
    sample.

    Args:
        collator: makes the batches.
        folder: written by `training/teach.py`.
        teacher: what this run expects in `teacher.json`.

    Raises:
        FileNotFoundError: there is no complete cache.
        Stale: it holds another teacher's answers.
    """

    def __init__(self, collator: Collator, folder: str, teacher: dict[str, Any]):
        path = Path(folder)
        again = again_with(folder)
        written = facts_in(folder, teacher)
        if not written["files"]:
            raise no_answers(folder)
        files = sorted(path.glob("teacher-*.arrow"))
        if len(files) != written["files"]:
            raise FileNotFoundError(
                f"{len(files)} of {written['files']} files are in kl.cache={folder}; {again}."
            )
        self.collator, self.folder, self.again, self.k = collator, folder, again, written["kl.top_k"]
        self.pad = collator.processor.tokenizer.pad_token_id
        parts = [answers_in(file, again) for file in files]
        self.rows = datasets.concatenate_datasets(parts).with_format("torch")
        plain = self.rows.with_format(None)
        self.index = {key: i for i, key in enumerate(zip(plain["sample"], plain["prompt"], strict=True))}

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.collator(samples)
        keys = [
            (str(sample.get("id", "")), prompt_hash(ids, labels, queries, self.pad, sample))
            for sample, ids, labels, queries in zip(
                samples, batch["input_ids"], batch["labels"], batch["queries"], strict=True
            )
        ]
        for sample, prompt in keys:
            if (sample, prompt) not in self.index:
                written = any(sample == name for name, _ in self.index)
                why = "for another prompt, ranking, tokenizer or image" if written else "without it"
                raise Stale(
                    f"sample {sample}: the teacher's answers in {self.folder} were written {why}; {self.again}."
                )
        rows = self.rows[[self.index[key] for key in keys]]
        batch["teacher_tokens"] = torch.cat(list(rows["tokens"])).long().view(-1, self.k)
        batch["teacher_logprobs"] = torch.cat(list(rows["logprobs"])).view(-1, self.k)
        return batch


def answers_in(file: Path, again: str) -> datasets.Dataset:
    """The rows of a file of the cache; raises ValueError if it is damaged."""
    try:
        return datasets.Dataset.from_file(str(file))
    except (OSError, ValueError, pa.ArrowException):
        raise ValueError(f"{file} is damaged; {again}.") from None


def with_answers(config: Config, collator: Collator, rows: int | None = None) -> Collator | Taught:
    """The collator, which adds the teacher's answers if `kl.cache` holds them.

    Args:
        rows: of the training set, all of which need answers; None: unknown.

    A cache whose writing stopped at `kl.trust=auto` holds none; the collator then stays what it is.

    Raises:
        FileNotFoundError, Stale: there is no cache, or it holds another teacher's answers.
    """
    folder = config.kl.cache
    if folder is None:
        return collator
    facts = expected(config, collator.processor)
    written = facts_in(folder, facts)
    if config.kl.trust is Trust.auto and not written["files"]:
        return collator
    answered = written.get("rows")
    if rows is not None and answered is not None and rows > answered:
        raise Stale(
            f"the teacher's answers in {folder} are to the {answered} rows of other data, but this run has {rows}; "
            f"{again_with(folder)}."
        )
    return Taught(collator, folder, facts)


def no_answers(folder: str) -> ValueError:
    """The error of a run that needs answers which `write_answers` did not write."""
    return ValueError(
        f"kl.cache={folder} is empty, because its teacher knew no better than the labels that it was asked; "
        f"{again_with(folder)}, and kl.trust=all if they are not to be asked."
    )


def write_answers(config: Config) -> None:
    """Write `kl.cache` for a configuration that `preflight.checked_teaching` has checked.

    Under `kl.trust=auto` the teacher is asked first, and an empty cache is written if training would not have it; a
    `kl.model` in shards is not asked.

    Raises:
        SystemExit: it cannot be done; the message is one sentence.
    """
    started = time.perf_counter()
    process, world = rank(), world_size()
    try:
        check_models(config)
        sharded, can_ask = config.engine.in_shards, not (config.engine.in_shards and config.kl.model)
        if sharded and config.kl.model is None:  # the base as a model of its own, without adapters to shard
            model = config.model
            config.kl.model, config.kl.revision, config.kl.visipruner = (
                model.path,
                model.revision,
                model.visipruner,
            )
        dataset = training_data(config.data)
        collator = collator_without_weights(config, dtype=parts.dtype_of(config))
        parts.guarded(config, collator, dataset)(parts.first_samples(dataset))
        settle_threads(config)
        facts = expected(config, collator.processor)
        if can_ask and config.kl.trust is Trust.auto:
            count_steps(config, dataset)
            decision = settle_trust(config, collator, lambda: parts.base_of(config)[0], dataset, None)
            if decision is not None and decision.trust == "none":
                leave_empty(Path(config.kl.cache or ""), facts, decision)
                return
        config.entry.init = EntryInit.identity  # a teacher has no entry adapter to calibrate
        context = None
        if sharded:
            config.train.trackers, config.train.steps = [], 1
            engine: ModuleType = import_module(f"latefusion.training.engines.{config.engine.trainer.value}")
            context = engine.prepare(config, dtype=parts.dtype_of(config))
        student = parts.student_of(config)
        objective = parts.objective_of(config, student, offline=False)
        guard = parts.guarded(config, collator, dataset, folder=config.kl.cache)
        blank = first_usable_batch(collator, dataset) if sharded else None
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(error_line(error)) from None
    answering: Any = student.model if objective.kl.other is None else objective.kl.other.model
    if context is not None:
        assert objective.kl.other is not None
        device = context.device
        place_teacher(config, objective.kl.other, device)
    else:
        if torch.cuda.is_available():
            answering.to(f"cuda:{local_rank()}")
        device = answering.device
    folder = Path(config.kl.cache or "")
    (folder / TEACHER).unlink(missing_ok=True)  # from here on the old cache is incomplete
    if process == 0:
        (folder / SKIPPED_FILE).unlink(missing_ok=True)
        for old in folder.glob("teacher-*"):  # also what an interruption has left
            if not old.stem.endswith(f"-of-{world:05d}"):
                old.unlink()
    pad = student.processor.tokenizer.pad_token_id
    size, share = config.train.batch_size, range(process, len(dataset), world)

    def answers(batch: dict[str, Any]) -> Tensor:
        moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=parts.dtype_of(config) is torch.bfloat16):
            return objective.answers(moved).cpu()  # [N, V]

    def batches() -> Iterator[list[dict[str, Any]]]:
        for start in range(0, len(range(0, len(dataset), world)), size):  # the first process has the most
            rows = share[start : start + size]
            samples, batch = usable_batch(guard, [dataset[i] for i in rows])
            if samples:
                logits, temperature = answers(batch), config.kl.temperature
                yield list(
                    rows_of(samples, batch, logits, pad=pad, k=facts["kl.top_k"], temperature=temperature)
                )
            elif blank is not None:
                answers(blank)  # the other processes wait for this one's shards
            if process == 0 and sys.stderr.isatty():
                print(f"\r{start + len(rows)}/{len(share)} samples", end="", file=sys.stderr)

    try:
        count = write(folder, batches(), rank=process, world=world)
    except (ValueError, OSError) as error:  # a row that must not be left out, a full disk
        raise SystemExit(error_line(error)) from error
    if process == 0:
        (folder / TEACHER).write_text(
            json.dumps({**facts, "files": world, "rows": len(dataset)}, indent=1) + "\n"
        )
        written = sum(file.stat().st_size for file in folder.glob("teacher-*.arrow"))
        by = f" by the first of {world} processes" if world > 1 else ""
        print(
            f"{count} samples answered{by} in {time.perf_counter() - started:.0f} s, {written / 1e6:.0f} MB in "
            f"{folder}; train with kl.cache={folder}."
        )
        if left_out := skipped(folder):
            print(f"{left_out} row(s) could not be used and were left out: {folder / SKIPPED_FILE} says why.")


def leave_empty(folder: Path, facts: dict[str, Any], decision: Decision) -> None:
    """Write a cache that says whose answers training does not need."""
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("teacher-*.arrow"):
            old.unlink()
        (folder / TEACHER).write_text(json.dumps({**facts, "files": 0}, indent=1) + "\n")
        print(f"{decision}. {folder} stays empty; train with kl.cache={folder} or without.")


def first_usable_batch(collator: Collator, dataset: Any) -> dict[str, Any]:
    """A batch of the first sample that can be used, for a process that has no samples left.

    Raises:
        ValueError: no sample can be used.
    """
    for row in range(len(dataset)):
        sample = dataset[row]
        with suppress(BadRow):
            if not isinstance(sample, Bad):
                return collator([sample])
    raise ValueError("no row of the data can be used; run data/validate.py.")


def usable_batch(guard: Guard, samples: list[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The samples that training can use, without the others, and their batch.

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
