"""Ask every system the same questions and keep one record an answer."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from latefusion.data.escape import terminal
from latefusion.data.prompts import check_fit, prompt_inputs, undecoded, without_image
from latefusion.eval.comparison.encoded import EncodedPrompts
from latefusion.eval.comparison.prefix import SharedPrefix
from latefusion.eval.comparison.systems import System, running
from latefusion.eval.ledger import Ledger
from latefusion.eval.tasks.base import Answer, Task
from latefusion.models.executor.vision import vision_tokens
from latefusion.models.inputs import fresh_inputs


def answer_questions(
    *,
    model: Any,
    processor: Any,
    attachment: Any,
    systems: dict[str, System],
    task: Task,
    batch_size: int,
    ledger: Ledger | None = None,
    prompts: EncodedPrompts | None = None,
) -> dict[str, list[Answer]]:
    """Every system's greedy answers to every question of a task, in the order of its rows.

    Questions of like length share a batch. An image is encoded once for all its questions and for all systems that run
    the same vision weights; layers that several policies compute alike run once a batch.

    Args:
        ledger: keeps answers as soon as they are there, and has those of an earlier start and of other processes. Of
            several processes, each answers its share of the batches. None: nothing is kept.
        prompts: that were encoded for other systems, for these to use and add to; None: none were.

    Raises:
        ValueError: a question and its answer have more tokens than the model has positions.
    """
    rows = undecoded(task.rows)
    plain = rows.with_format(None)
    longest = longest_answer(processor.tokenizer, task)
    batches = batches_of(processor.tokenizer, plain, batch_size)
    names = [str(name) for name in plain["id"]]
    if ledger is not None:
        batches = batches[ledger.processes.rank :: ledger.processes.count]
    answered: dict[str, dict[int, Answer]] = {key: {} for key in systems}
    prompts = prompts or EncodedPrompts()
    with progress_bar(disable=ledger is not None and not ledger.processes.main) as progress:
        bar = progress.add_task(f"Questions {terminal(task.name)}".strip(), total=sum(map(len, batches)))
        for batch in batches:
            kept = ledger.values if ledger else {}
            left = {
                key: system
                for key, system in systems.items()
                if any(ledger_key(key, task.name, names[i]) not in kept for i in batch)
            }
            questions = [rows[i] for i in batch] if left else []
            for group in groups_of(left):
                name = (task.name, *batch)
                outputs = _ask(model, processor, attachment, group, questions, longest, prompts, name)
                new: list[Answer] = []
                for key, of_rows in outputs.items():
                    answers = [
                        _answer(key, task, i, row, *output)
                        for i, row, output in zip(batch, questions, of_rows, strict=True)
                    ]
                    answered[key].update(zip(batch, answers, strict=True))
                    new += answers
                if ledger:
                    ledger.add({ledger_key(a.system, a.task, a.id): a.to_dict() for a in new})
            progress.advance(bar, len(batch))
    if ledger is None:
        return {key: [by_row[i] for i in range(len(rows))] for key, by_row in answered.items()}
    ledger.together()
    return {
        key: [Answer.from_dict(ledger.values[ledger_key(key, task.name, name)]) for name in names]
        for key in systems
    }


def ledger_key(system: str, task: str, name: str) -> str:
    """The key under which the ledger keeps a system's answer to the question `name` of a task."""
    return json.dumps([system, task, name])


def longest_answer(tokenizer: Any, task: Task) -> int:
    """How many tokens an answer to a task may have."""
    if task.max_new_tokens is not None:
        return task.max_new_tokens
    right = tokenizer(list(task.rows.with_format(None)["answer"]), add_special_tokens=False).input_ids
    return max(len(ids) for ids in right) + 1  # and the end token


def check_longest(model: Any, processor: Any, task: Task) -> None:
    """Raise ValueError, before any question is asked, if the one of longest text does not fit the model's positions.

    One whose image makes it longer than that is refused when its batch is made.
    """
    plain = task.rows.with_format(None)
    lengths = [len(ids) for ids in processor.tokenizer(texts_of(plain)).input_ids]
    row = task.rows[max(range(len(lengths)), key=lengths.__getitem__)]
    inputs = prompt_inputs(model, processor, [row])
    check_fit(model.config, [row], inputs, longest_answer(processor.tokenizer, task))


def texts_of(plain: Dataset) -> list[str]:
    """The questions as they are put to the model, without what a chat template writes around them."""
    return list(plain["prompt"] if "prompt" in plain.column_names else plain["question"])


def batches_of(tokenizer: Any, plain: Dataset, size: int) -> list[list[int]]:
    """Row numbers in batches: those of like length together, rows without images and with videos apart."""
    lengths = [len(ids) for ids in tokenizer(texts_of(plain)).input_ids]
    images, videos = (plain[n] if n in plain.column_names else None for n in ("images", "videos"))
    kinds = [
        (images is None or bool(images[i]), videos is not None and bool(videos[i])) for i in range(len(plain))
    ]
    batches = []
    for kind in sorted(set(kinds), reverse=True):
        order = sorted((i for i in range(len(plain)) if kinds[i] == kind), key=lambda i: (lengths[i], i))
        batches += [order[i : i + size] for i in range(0, len(order), size)]
    return batches


def groups_of(systems: dict[str, System]) -> list[dict[str, System]]:
    """Systems that can run on the same encoded images, together."""
    groups: dict[tuple, dict[str, System]] = {}
    for key, system in systems.items():
        model = None if system.student is None else system.student.model
        groups.setdefault((model, system.adapters, system.blind), {})[key] = system
    return list(groups.values())


def _ask(
    model: Any,
    processor: Any,
    attachment: Any,
    group: dict[str, System],
    questions: list[dict[str, Any]],
    longest: int,
    prompts: EncodedPrompts,
    name: Hashable,
) -> dict[str, list[tuple[str, Any, int]]]:
    """For each system of a group: text, trace record and number of text tokens of each question.

    Args:
        name: of the batch.
    """
    first = next(iter(group.values()))
    if first.student is not None:
        model, processor, attachment = first.student.model, first.student.processor, first.student.attachment
    rows = [without_image(row) for row in questions] if first.blind else questions
    outputs: dict[str, list[tuple[str, Any, int]]] = {}
    encoded: dict[str, Any] | None = None
    with SharedPrefix(attachment).shared() if len(group) > 1 else nullcontext():
        for key, system in group.items():
            with running(model, attachment, system):
                if encoded is None:
                    encoded = prompts.encoded(model, processor, rows, (name, first.blind))
                    check_fit(model.config, questions, encoded, longest)
                outputs[key] = _generate(model, processor, attachment, encoded, longest)
    return outputs


@contextmanager
def dense_rows(head: nn.Module) -> Iterator[None]:
    """The head gets its rows side by side in memory.

    `generate` hands it the last token of each prompt, a slice of all states; torch multiplies such a slice in bfloat16
    on a CPU without its fast kernel, so that the head takes longer than the decoder.
    """

    def copy(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])

    handle = head.register_forward_pre_hook(copy)
    try:
        yield
    finally:
        handle.remove()


def _generate(
    model: Any, processor: Any, attachment: Any, inputs: dict[str, Any], max_new_tokens: int
) -> list[tuple[str, Any, int]]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]  # [B, T]
    kwargs = fresh_inputs(inputs)
    with dense_rows(model.get_output_embeddings()):
        output = model.generate(**kwargs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    texts = processor.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    n_text = (mask.bool() & ~vision_tokens(model.config, ids)).sum(1).tolist()
    return list(zip(texts, attachment.trace, n_text, strict=True))


def _answer(
    system: str, task: Task, i: int, row: dict[str, Any], prediction: str, record: Any, n_text: int
) -> Answer:
    return Answer(
        system=system,
        task=task.name,
        id=str(row["id"]),
        type=row["type"],
        scene=str(row["scene"]),
        cluster=task.clusters[i] if task.clusters else "",
        question=row["question"],
        answer=row["answer"],
        prediction=prediction.strip(),
        score=task.score(prediction, row),
        text_tokens=n_text,
        tokens=list(record.tokens),
        fusion_layer=record.fusion_layer,
        exit_layer=record.exit_layer,
        frozen=list(record.frozen),
        reads=list(record.reads),
    )


def progress_bar(*, disable: bool = False) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        disable=disable,
    )
