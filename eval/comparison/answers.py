"""Ask every system the same questions and keep one record an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from peft import PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from latefusion.data.load import check_questions
from latefusion.data.prompts import prompt_inputs, without_image
from latefusion.eval.comparison.systems import System, running
from latefusion.eval.metrics import normalise
from latefusion.models.inputs import encode_images, fresh_inputs

if TYPE_CHECKING:
    from latefusion.eval.ledger import Ledger

__all__ = ["Answer", "System", "answer_questions", "running"]

Score = Callable[[str, dict[str, Any]], float]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One system's answer to one question.

    Attributes:
        system: key of the system; task, id, type, scene: of the question.
        answer: the right one, or the first of several.
        prediction: decoded text; score: what the task's scorer gives it, from 0 to 1.
        text_tokens: prompt tokens that are neither vision nor padding.
        tokens: tokens that entered each decoder layer in the prefill, from `Attachment.trace`.
        fusion_layer, exit_layer, frozen, reads: as the trace has them.
    """

    system: str
    task: str
    id: str
    type: str
    scene: str
    question: str
    answer: str
    prediction: str
    score: float
    text_tokens: int
    tokens: list[int] = field(repr=False)
    fusion_layer: int | None
    exit_layer: int | None
    frozen: list[int] = field(default_factory=list, repr=False)
    reads: list[int] = field(default_factory=list, repr=False)

    @property
    def correct(self) -> bool:
        return self.score >= 0.5

    @property
    def vision_tokens(self) -> list[int]:
        return [n - self.text_tokens for n in self.tokens]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "correct": self.correct}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Answer:
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})


def exact_match(prediction: str, row: dict[str, Any]) -> float:
    """1 if the prediction equals one of the row's `answers` (or its `answer`) after `normalise`."""
    wanted = row["answers"] if row.get("answers") else [row["answer"]]
    return float(normalise(prediction) in [normalise(answer) for answer in wanted])


def check(model: Any, systems: dict[str, System], dataset: Dataset) -> None:
    """Raise ValueError, before any compute, if these systems cannot answer these questions."""
    check_questions(dataset)
    for key, system in systems.items():
        own = model if system.student is None else system.student.model
        try:
            system.policy.validate(own.config.get_text_config().num_hidden_layers)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if system.adapters and not isinstance(own, PeftModel):
            raise ValueError(
                f"system {key!r} asks for adapters, but the model is a plain {type(model).__name__}; "
                "load the adapter folder of a training run."
            )


def answer_questions(
    *,
    model: Any,
    processor: Any,
    attachment: Any,
    systems: dict[str, System],
    dataset: Dataset,
    batch_size: int,
    task: str = "",
    score: Score = exact_match,
    max_new_tokens: int | None = None,
    ledger: Ledger | None = None,
) -> dict[str, list[Answer]]:
    """Every system's greedy answers to every question, in the order of `dataset`.

    Questions of like length share a batch. Images are encoded once a batch for all systems that run the same
    vision weights (those with adapters, those without).

    Args:
        task, score: name of what the questions belong to, and its scorer of `(prediction, row)`.
        max_new_tokens: of an answer; None: as many as the longest right one has, and its end.
        ledger: what was answered before, by this process or another; answers go there at once. Of several
            processes, each answers its share of the batches.

    Raises:
        ValueError: see `check`.
    """
    check(model, systems, dataset)
    plain = dataset.with_format(None)
    tokenizer = processor.tokenizer
    if max_new_tokens is None:
        wanted = tokenizer(list(plain["answer"]), add_special_tokens=False).input_ids
        max_new_tokens = max(len(ids) for ids in wanted) + 1  # and the end token
    batches = _batches(tokenizer, plain, batch_size)
    ids = [str(name) for name in plain["id"]]
    if ledger is not None:
        batches = batches[ledger.processes.rank :: ledger.processes.count]
    found: dict[str, dict[int, Answer]] = {key: {} for key in systems}
    with progress_bar(disable=ledger is not None and not ledger.processes.main) as progress:
        bar = progress.add_task(f"Questions {task}".strip(), total=sum(map(len, batches)))
        for batch in batches:
            kept = ledger.values if ledger else {}
            todo = {
                key: system
                for key, system in systems.items()
                if any(ledger_key(key, task, ids[i]) not in kept for i in batch)
            }
            rows = [dataset[i] for i in batch] if todo else []
            for group in _groups(todo):
                said = _ask(model, processor, attachment, group, rows, max_new_tokens)
                new = {
                    key: [_answer(key, task, row, score, *of) for row, of in zip(rows, answers, strict=True)]
                    for key, answers in said.items()
                }
                for key, answers in new.items():
                    found[key].update(zip(batch, answers, strict=True))
                if ledger:
                    made = [answer for answers in new.values() for answer in answers]
                    ledger.add({ledger_key(a.system, a.task, a.id): a.to_dict() for a in made})
            progress.advance(bar, len(batch))
    if ledger is None:
        return {key: [rows[i] for i in range(len(dataset))] for key, rows in found.items()}
    ledger.together()
    return {
        key: [Answer.from_dict(ledger.values[ledger_key(key, task, name)]) for name in ids] for key in systems
    }


def ledger_key(system: str, task: str, name: str) -> str:
    """The key under which the ledger keeps a system's answer to the question `name` of a task."""
    return json.dumps([system, task, name])


def _batches(tokenizer: Any, plain: Dataset, size: int) -> list[list[int]]:
    """Rows of like length together, those without an image apart from the others."""
    asked = plain["prompt"] if "prompt" in plain.column_names else plain["question"]
    lengths = [len(ids) for ids in tokenizer(list(asked)).input_ids]
    bare = (
        [not images for images in plain["images"]] if "images" in plain.column_names else [False] * len(plain)
    )
    batches = []
    for without in (False, True):
        order = sorted((i for i in range(len(plain)) if bare[i] is without), key=lambda i: (lengths[i], i))
        batches += [order[i : i + size] for i in range(0, len(order), size)]
    return batches


def _groups(systems: dict[str, System]) -> list[dict[str, System]]:
    """Systems that run on the same encoded images."""
    groups: dict[tuple, dict[str, System]] = {}
    for key, system in systems.items():
        groups.setdefault((id(system.student), system.adapters, system.blind), {})[key] = system
    return list(groups.values())


def _ask(
    model: Any,
    processor: Any,
    attachment: Any,
    group: dict[str, System],
    rows: list[dict[str, Any]],
    longest: int,
) -> dict[str, list[tuple[str, Any, int]]]:
    """What the systems of a group say: prediction, trace record and number of text tokens of each row."""
    first = next(iter(group.values()))
    if first.student is not None:
        model, processor, attachment = first.student.model, first.student.processor, first.student.attachment
    inputs = prompt_inputs(model, processor, [without_image(row) for row in rows] if first.blind else rows)
    said, encoded = {}, None
    for key, system in group.items():
        with running(model, attachment, system):
            encoded = encoded or encode_images(model, inputs)
            said[key] = _generate(model, processor, attachment, encoded, longest)
    return said


def _generate(
    model: Any, processor: Any, attachment: Any, inputs: dict[str, Any], max_new_tokens: int
) -> list[tuple[str, Any, int]]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]  # [B, T]
    kwargs = fresh_inputs(inputs)
    output = model.generate(**kwargs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    texts = processor.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    n_text = (mask.bool() & (ids != model.config.image_token_id)).sum(1).tolist()
    return list(zip(texts, attachment.trace, n_text, strict=True))


def _answer(
    key: str, task: str, row: dict[str, Any], score: Score, prediction: str, record: Any, n_text: int
) -> Answer:
    return Answer(
        system=key,
        task=task,
        id=str(row["id"]),
        type=row["type"],
        scene=str(row["scene"]),
        question=row["question"],
        answer=row["answer"],
        prediction=prediction.strip(),
        score=score(prediction, row),
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
