"""What tests run on an attached model: logits, generation, gradients; the schedules they share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from helpers.families import shared, text_tokens, vision_tokens
from helpers.oracle import ranked

from latefusion import VisionSchedule
from latefusion.models.attach import attached

BAND = VisionSchedule(enter=2, exit=4)
KEEPS = VisionSchedule(enter=1, exit=5, keep={2: 3, 4: 2})


def logits(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **options).logits


def generate(model: Any, inputs: dict[str, Any], tokens: int = 4, **options: Any) -> Any:
    """Greedy tokens with the logits of every step."""
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def seen_by_keeps(
    family: str, inputs: dict[str, Any], schedule: VisionSchedule = KEEPS
) -> list[torch.Tensor]:
    """Which vision tokens each layer sees under a schedule with keeps, by the oracle. Per layer `[B, T]`."""
    return ranked(
        shared(family, "eager"),
        inputs,
        vision_tokens(inputs),
        enter=schedule.enter,
        exit=schedule.exit,
        keep=dict(schedule.keep),
        queries=ranking_rows(inputs),
    )


def ranking_rows(inputs: dict[str, Any]) -> list[list[int]]:
    """Per sample, the last token and the text after the first vision token."""
    rows = []
    for real, sees in zip(inputs["attention_mask"].tolist(), vision_tokens(inputs).tolist(), strict=True):
        there = [i for i, r in enumerate(real) if r]
        rows.append([i for i in there if i == there[-1] or (any(sees[:i]) and not sees[i])])
    return rows


def gradients(model: Any, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients of all parameters and of the image features, under labels on text that text predicts."""
    text = text_tokens(inputs)
    from_text = torch.nn.functional.pad(text, (1, 0))[:, :-1]
    labels = inputs["input_ids"].masked_fill(~(text & from_text), -100)
    pooled = inputs["mm_encoder_outputs"]["image"].pooler_output
    images = [pooled] if isinstance(pooled, torch.Tensor) else list(pooled)
    for image in images:
        image.requires_grad_()
        image.grad = None
    model.train()
    model.zero_grad()
    with prompts_as_asked(model, inputs):
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
    model.eval()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {**grads, **{f"image {i}": image.grad.clone() for i, image in enumerate(images)}}, loss.item()


def prompts_as_asked(model: Any, inputs: dict[str, Any]) -> AbstractContextManager[Any]:
    """The whole row asks, as at inference, unless the test says otherwise: `gradients` learns the question's text."""
    attachment = attached(model)
    if attachment is None or attachment.prompt_end.queries is not None:
        return nullcontext()
    mask = inputs["attention_mask"]
    return attachment.queries(mask.shape[1] - 1 - mask.flip(1).argmax(1, keepdim=True))


def gradients_checkpointed(model: Any, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], float]:
    """`gradients` under gradient checkpointing, which computes each layer a second time."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    result = gradients(model, inputs)
    model.gradient_checkpointing_disable()
    return result
