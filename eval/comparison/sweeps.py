"""How time grows with the batch and with the text: decoder prefill and answers a second, systems taking turns.

What is timed runs on images that were encoded before, so it is the decoder's alone, beside what the FLOPs of the
tokens that entered each layer predict for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from statistics import fmean
from typing import Any

from latefusion.data.prompts import prompt_inputs, prompt_of
from latefusion.eval.comparison.cost import generate, seconds
from latefusion.eval.comparison.systems import System, running
from latefusion.eval.metrics import spread
from latefusion.models.executor.vision import vision_tokens
from latefusion.models.flops import decoder_flops
from latefusion.models.inputs import encode_images, fresh_inputs

Row = dict[str, Any]

PATIENCE = 15.0  # seconds a point may take before the rest of its rounds are left out
FEWEST = 2  # timed rounds of a point, however slow


def against_batch(
    *, model: Any, processor: Any, rows: Sequence[Row], sizes: Sequence[int], **common: Any
) -> list[dict[str, Any]]:
    """Prefill and throughput at each batch size; `rows` are repeated to fill a batch.

    Returns:
        A dict a size: `batch`, and per system `prefill` (seconds), `predicted` (FLOPs ratio) and
        `per_second` (answers of `new_tokens`, decoder only; a ratio above 1 is faster).
    """
    batches = [[rows[i % len(rows)] for i in range(size)] for size in sizes]
    inputs = [prompt_inputs(model, processor, batch) for batch in batches]
    points = _measure(model=model, inputs=inputs, answers=True, **common)
    return [{"batch": size, "systems": point} for size, point in zip(sizes, points, strict=True)]


def against_text(
    *, model: Any, processor: Any, row: Row, lengths: Sequence[int], **common: Any
) -> list[dict[str, Any]]:
    """Prefill of one prompt whose question is repeated until it has about the wanted number of text tokens."""
    limit = model.config.get_text_config().max_position_embeddings
    points = []
    for length in lengths:
        question = row.get("prompt") or row["question"]
        once = len(processor.tokenizer(question, add_special_tokens=False).input_ids)
        text = " ".join([question] * max(1, ceil(length / once)))
        images = [part for m in prompt_of(row) for part in m["content"] if part["type"] == "image"]
        content = [*images, {"type": "text", "text": text}]
        inputs = prompt_inputs(
            model, processor, [{**row, "messages": [{"role": "user", "content": content}]}]
        )
        if inputs["input_ids"].shape[1] <= limit:
            points.append((int((~vision_tokens(model.config, inputs["input_ids"])).sum()), inputs))
    measured = _measure(model=model, inputs=[inputs for _, inputs in points], answers=False, **common)
    return [{"text_tokens": n, "systems": point} for (n, _), point in zip(points, measured, strict=True)]


def _measure(
    *,
    model: Any,
    attachment: Any,
    systems: dict[str, System],
    reference: str,
    inputs: Sequence[dict[str, Any]],
    answers: bool,
    repeats: int,
    new_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    points = []
    for prompt in inputs:
        prefill: dict[str, list[float]] = {key: [] for key in systems}
        whole: dict[str, list[float]] = {key: [] for key in systems}
        flops: dict[str, float] = {}
        encoded: dict[tuple[Any, bool], dict[str, Any]] = {}  # by model, with its adapters on or off
        began = time.monotonic()
        for repeat in range(repeats + 1):  # the first is the warm-up
            if repeat > FEWEST and time.monotonic() - began > PATIENCE:
                break
            keys = list(systems)
            for key in keys[repeat % len(keys) :] + keys[: repeat % len(keys)]:
                with running(model, attachment, systems[key]) as active:
                    encoder = (active, systems[key].adapters)
                    if encoder not in encoded:
                        encoded[encoder] = encode_images(active, prompt)
                    work = partial(active, **fresh_inputs(encoded[encoder]), use_cache=True, logits_to_keep=1)
                    took = seconds(work, active.device)
                    if repeat == 0:
                        owner = systems[key].student.attachment if systems[key].student else attachment
                        flops[key] = fmean(
                            decoder_flops(active.config, r.tokens, r.frozen) for r in owner.trace
                        )
                    else:
                        prefill[key].append(took)
                    if answers and repeat:
                        work = partial(generate, active, fresh_inputs(encoded[encoder]), new_tokens)
                        whole[key].append(seconds(work, active.device))
            advance()
        count = len(prompt["input_ids"])
        points.append(
            {
                key: {
                    "prefill": vars(spread(prefill[key], prefill[reference])),
                    "predicted": flops[key] / flops[reference],
                    **({"per_second": _rate(whole[key], whole[reference], count)} if answers else {}),
                }
                for key in systems
            }
        )
    return points


def _rate(times: list[float], reference: list[float], count: int) -> dict[str, float]:
    return vars(spread([count / t for t in times], [count / t for t in reference]))
