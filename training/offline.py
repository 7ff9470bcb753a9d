"""Offline distillation: the teacher's answers, written once and read in every epoch instead of a forward pass.

`training/teach.py` writes them, `kl.cache=FOLDER` trains on them. The folder holds Arrow files with one row a sample,
and `teacher.json`, which says who taught.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latefusion.data.collate import IGNORE, Collator
from latefusion.models.fingerprint import model_fingerprint
from latefusion.models.policies.base import Policy
from latefusion.recipes.schema import Config
from latefusion.training.teacher import shared_vocabulary

TEACHER = "teacher.json"
SCHEMA = pa.schema(
    [
        ("sample", pa.string()),
        ("prompt", pa.string()),
        ("tokens", pa.list_(pa.int32())),  # N * k, by answer token, the likeliest first
        ("logprobs", pa.list_(pa.float32())),  # N * k
    ]
)


class Stale(ValueError):
    """The cache was written for another teacher, prompt, tokenizer or image."""


def fingerprint(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Of everything that turns text into tokens."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    for state in ("padding", "truncation"):  # of the last call
        rules.pop(state, None)
    return hashlib.sha256((json.dumps(rules, sort_keys=True) + template).encode()).hexdigest()[:16]


def expected(config: Config, processor: Any, teacher: Policy | None) -> dict[str, Any]:
    """What must be the same when the answers are written and when they are read."""
    path, revision = config.kl.model or config.model.path, config.kl.revision
    return {
        "model": path,
        "weights": model_fingerprint(
            path, revision if config.kl.model is not None else config.model.revision
        ),
        "teacher": repr(teacher),
        "temperature": config.kl.temperature,
        "isolate": config.data.isolate,
        "k": min(config.kl.top_k, shared_vocabulary(config)),
        "tokenizer": fingerprint(processor.tokenizer, processor.chat_template or ""),
    }


def prompt_hash(ids: Tensor, labels: Tensor, pad: int, sample: dict[str, Any]) -> str:
    """Of what the teacher saw of a sample: tokens, which of them are to be learnt, pixels.

    Args:
        ids, labels: int64 `[T]`, padded with `pad`.
    """
    real = ids != pad
    digest = hashlib.blake2b(digest_size=12)
    digest.update(ids[real].numpy().tobytes())
    digest.update((labels[real] != IGNORE).numpy().tobytes())
    for image in sample["images"]:
        digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def rows_of(
    samples: Sequence[dict[str, Any]],
    batch: dict[str, Tensor],
    wanted: Tensor,
    *,
    pad: int,
    k: int,
    temperature: float,
) -> Iterator[dict[str, Any]]:
    """A batch's rows of the cache.

    Args:
        wanted: the teacher's logits where labels are, `[N, V]`, sample by sample.
        k: so many of the likeliest tokens are kept.
    """
    logprobs, tokens = (wanted / temperature).log_softmax(-1).topk(k)  # [N, k]
    counts = (batch["labels"][:, 1:] != IGNORE).sum(1).tolist()
    parts = zip(
        samples,
        batch["input_ids"],
        batch["labels"],
        tokens.split(counts),
        logprobs.split(counts),
        strict=True,
    )
    for sample, ids, labels, token, logprob in parts:
        yield {
            "sample": str(sample.get("id", "")),
            "prompt": prompt_hash(ids, labels, pad, sample),
            "tokens": token.flatten().int().numpy(),
            "logprobs": logprob.flatten().numpy(),
        }


def write(folder: str | Path, batches: Iterator[list[dict[str, Any]]], *, rank: int, world: int) -> int:
    """One process's file of the cache, complete or not there.

    Returns:
        Samples in it.
    """
    path = Path(folder) / f"teacher-{rank:05d}-of-{world:05d}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    part, count = path.with_suffix(".part"), 0
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for rows in batches:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
            count += len(rows)
    part.replace(path)
    return count


class Taught:
    """A collator that hands each batch what the teacher said of it.

    Beside the collator's: `teacher_tokens` int64 and `teacher_logprobs` float32 `[N, k]`, for the batch's `N` label
    tokens, sample by sample.

    Args:
        collator: whose batches they are.
        folder: that `training/teach.py` wrote.
        teacher: what this run expects in `teacher.json`.

    Raises:
        FileNotFoundError: there is no complete cache.
        Stale: it is another teacher's.
    """

    def __init__(self, collator: Collator, folder: str, teacher: dict[str, Any]):
        path = Path(folder)
        again = f"write it with python training/teach.py kl.cache={folder} and this run's other options"
        try:
            written = json.loads((path / TEACHER).read_text())
        except FileNotFoundError:
            raise FileNotFoundError(f"no teacher's answers in kl.cache={folder}; {again}.") from None
        for key, value in teacher.items():
            if written.get(key) != value:
                raise Stale(
                    f"the teacher's answers in {folder} were written with {key}={written.get(key)}, but this run has "
                    f"{value}; {again}."
                )
        files = sorted(path.glob("teacher-*.arrow"))
        if len(files) != written["files"]:
            raise FileNotFoundError(
                f"{len(files)} of {written['files']} files are in kl.cache={folder}; {again}."
            )
        self.collator, self.folder, self.again, self.k = collator, folder, again, written["k"]
        self.pad = collator.processor.tokenizer.pad_token_id
        parts = [datasets.Dataset.from_file(str(file)) for file in files]
        self.rows = datasets.concatenate_datasets(parts).with_format("torch")
        plain = self.rows.with_format(None)
        self.index = {key: i for i, key in enumerate(zip(plain["sample"], plain["prompt"], strict=True))}

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.collator(samples)
        keys = [
            (str(sample.get("id", "")), prompt_hash(ids, labels, self.pad, sample))
            for sample, ids, labels in zip(samples, batch["input_ids"], batch["labels"], strict=True)
        ]
        for sample, prompt in keys:
            if (sample, prompt) not in self.index:
                known = any(sample == name for name, _ in self.index)
                why = "for another prompt, tokenizer or image" if known else "without it"
                raise Stale(
                    f"sample {sample}: the teacher's answers in {self.folder} were written {why}; {self.again}."
                )
        rows = self.rows[[self.index[key] for key in keys]]
        batch["teacher_tokens"] = torch.cat(list(rows["tokens"])).long().view(-1, self.k)
        batch["teacher_logprobs"] = torch.cat(list(rows["logprobs"])).view(-1, self.k)
        return batch
