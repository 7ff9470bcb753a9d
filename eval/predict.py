"""Ask every system the same questions and keep one record an answer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from latefusion.eval.metrics import normalise
from latefusion.models.policies.base import Policy

COLUMNS = ("id", "question", "answer", "type", "scene")


@dataclass(frozen=True, kw_only=True)
class System:
    """One thing to compare: the model at hand under a policy, with its trained adapters on or off.

    Attributes:
        name: what tables and figures call it.
        policy: which vision tokens each layer sees (`VisionSchedule()` is dense).
        adapters: LoRA and entry adapter active (the student) or disabled (the base).
    """

    name: str
    policy: Policy
    adapters: bool = False


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One system's answer to one question.

    Attributes:
        system: key of the system; id, type, scene: of the question.
        prediction: decoded text; correct: equals the answer after `normalise`.
        text_tokens: prompt tokens that are neither vision nor padding.
        tokens: tokens that entered each decoder layer in the prefill, from `Attachment.trace`.
        fusion_layer, exit_layer: as the trace has them.
    """

    system: str
    id: str
    type: str
    scene: str
    question: str
    answer: str
    prediction: str
    correct: bool
    text_tokens: int
    tokens: list[int] = field(repr=False)
    fusion_layer: int | None
    exit_layer: int | None

    @property
    def vision_tokens(self) -> list[int]:
        return [n - self.text_tokens for n in self.tokens]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(model: Any, systems: dict[str, System], dataset: Dataset) -> None:
    """Raise ValueError, before any compute, if these systems cannot answer these questions."""
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(f"the dataset has no column {missing[0]!r}; evaluation needs {', '.join(COLUMNS)}.")
    if len(dataset) == 0:
        raise ValueError("the dataset holds no question; ask for at least one scene.")
    for key, system in systems.items():
        if system.adapters and not isinstance(model, PeftModel):
            raise ValueError(
                f"system {key!r} asks for adapters, but the model is a plain {type(model).__name__}; "
                "load the adapter folder of a training run."
            )


@contextmanager
def running(model: Any, attachment: Any, system: System) -> Iterator[None]:
    """The model as `system`: its policy attached, its adapters on or off, no gradients."""
    off = isinstance(model, PeftModel) and not system.adapters
    with attachment.using(system.policy), model.disable_adapter() if off else nullcontext(), torch.no_grad():
        yield


def images_of(row: dict[str, Any]) -> list[Image.Image]:
    """The images of a row of `load_scenes` (one) or of a source in `data/sources.py` (any number)."""
    return row["images"] if "images" in row else [row["image"]]


def prompt_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a row up to where the answer begins."""
    if "messages" in row:
        return row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]


def prompt_inputs(model: Any, processor: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tensors of several prompts, padded on the left: `input_ids` `[B, T]`, `pixel_values`, ..."""
    texts = [
        processor.apply_chat_template(prompt_of(row), add_generation_prompt=True, tokenize=False)
        for row in rows
    ]
    images = [images_of(row) for row in rows]
    inputs = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    return dict(inputs.to(model.device, dtype=model.dtype))


def encode_images(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` with the pixels replaced by the vision tower's output (`mm_encoder_outputs`).

    `generate` would encode the same images again for every system; it takes this in their place.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    encoder = inner.base_model.get_image_features
    wanted = [name for name in inspect.signature(encoder).parameters if name in inputs]
    features = encoder(**{name: inputs[name] for name in wanted}, return_dict=True)
    rest = {name: value for name, value in inputs.items() if name not in wanted}
    return {**rest, "mm_encoder_outputs": {"image": features}}


def answer_questions(
    *,
    model: Any,
    processor: Any,
    attachment: Any,
    systems: dict[str, System],
    dataset: Dataset,
    batch_size: int,
) -> dict[str, list[Answer]]:
    """Every system's greedy answers to every question, in the order of `dataset`.

    Questions of like length share a batch. Images are encoded once a batch for all systems that run the same
    vision weights (those with adapters, those without).

    Raises:
        ValueError: see `check`.
    """
    check(model, systems, dataset)
    tokenizer = processor.tokenizer
    plain = dataset.with_format(None)
    lengths = [len(ids) for ids in tokenizer(list(plain["question"])).input_ids]
    wanted = tokenizer(list(plain["answer"]), add_special_tokens=False).input_ids
    longest = max(len(ids) for ids in wanted) + 1  # and the end token
    order = sorted(range(len(dataset)), key=lambda i: (lengths[i], i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found: dict[str, dict[int, Answer]] = {key: {} for key in systems}
    with progress_bar() as progress:
        task = progress.add_task("Questions", total=len(dataset))
        for batch in batches:
            rows = [dataset[i] for i in batch]
            inputs = prompt_inputs(model, processor, rows)
            for adapters in (False, True):
                group = {key: system for key, system in systems.items() if system.adapters is adapters}
                encoded: dict[str, Any] | None = None
                for key, system in group.items():
                    with running(model, attachment, system):
                        encoded = encoded or encode_images(model, inputs)
                        answered = _generate(model, processor, attachment, encoded, longest)
                    for i, row, (prediction, record, n_text) in zip(batch, rows, answered, strict=True):
                        found[key][i] = _answer(key, row, prediction, record, n_text)
            progress.advance(task, len(batch))
    return {key: [rows[i] for i in range(len(dataset))] for key, rows in found.items()}


def _generate(
    model: Any, processor: Any, attachment: Any, inputs: dict[str, Any], max_new_tokens: int
) -> list[tuple[str, Any, int]]:
    """Prediction, trace record and number of text tokens of each prompt of a batch."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]  # [B, T]
    kwargs = {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}  # generate may change it
    output = model.generate(**kwargs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    texts = processor.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    n_text = (mask.bool() & (ids != model.config.image_token_id)).sum(1).tolist()
    return list(zip(texts, attachment.trace, n_text, strict=True))


def _answer(key: str, row: dict[str, Any], prediction: str, record: Any, n_text: int) -> Answer:
    return Answer(
        system=key,
        id=str(row["id"]),
        type=row["type"],
        scene=str(row["scene"]),
        question=row["question"],
        answer=row["answer"],
        prediction=prediction.strip(),
        correct=normalise(prediction) == normalise(row["answer"]),
        text_tokens=n_text,
        tokens=list(record.tokens),
        fusion_layer=record.fusion_layer,
        exit_layer=record.exit_layer,
    )


def progress_bar() -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )
