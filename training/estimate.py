"""Before the first step: about how much memory a run takes and how long it will be. Estimates, and said to be."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PretrainedConfig

from latefusion.training.cost import backward_ends, training_flops

PROBE_S = 0.1  # how long the matrix products run that the speed is taken from
OPTIMIZER_BYTES = 12  # a trained weight's gradient and two Adam moments, float32


def weight_bytes(model: Any) -> int:
    """What is held all the time: weights as they are stored, and what the optimizer keeps of those that train."""
    return sum(numel(p) * (p.element_size() + p.requires_grad * OPTIMIZER_BYTES) for p in model.parameters())


def numel(parameter: torch.nn.Parameter) -> int:
    """A weight's size, whole where ZeRO-3 has sharded it."""
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def activation_bytes(
    config: PretrainedConfig,
    tokens: list[int],
    frozen: list[int],
    *,
    dtype: torch.dtype,
    checkpointing: bool,
    eager: bool,
) -> int:
    """What the decoder keeps of one sample for its backward pass.

    Counted as the inputs that the projections, norms, attention and gated MLP of a layer save: 6 vectors of the hidden
    size (two of them float32, in the norms), 4 of the MLP's, and queries, keys, values and attention output; with
    eager attention twice its probabilities. Frozen tokens go through the norms, and have keys and values.
    Checkpointing keeps a layer's input alone, and one whole layer.

    Args:
        tokens: that enter each layer; frozen: how many of them are only read.
    """
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    attention = 2 * head_dim * (heads + (text.num_key_value_heads or heads))
    size = torch.finfo(dtype).bits // 8
    vector = size * (4 * hidden + 4 * text.intermediate_size + attention) + 4 * 2 * hidden
    read = size * (4 * hidden + 2 * head_dim * (text.num_key_value_heads or heads)) + 4 * 2 * hidden
    layers = [
        (n - f) * vector + f * read + (2 * size * heads * n * (n - f) if eager else 0)
        for n, f in zip(tokens, frozen, strict=True)
    ]
    if checkpointing:
        return sum(n * hidden * size for n in tokens) + max(layers)
    return sum(layers)


def logit_bytes(config: PretrainedConfig, answers: int, *, teacher: bool) -> int:
    """Logits of the answer tokens in float32: the student's, their log-probabilities and gradient, the teacher's."""
    return 4 * answers * config.get_text_config().vocab_size * (3 + 3 * teacher)


def flops_per_second(width: int, dtype: torch.dtype) -> float:
    """The speed of square matrix products of this width, measured now."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(width, width, dtype=dtype, device=device)

    def run(times: int) -> float:
        begun = time.perf_counter()
        for _ in range(times):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    run(1)
    times = max(1, int(PROBE_S / max(run(1), 1e-6)))
    return times * 2 * width**3 / run(times)


def estimated(
    config: Any,
    model: Any,
    schedule: Any,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    teacher: Any = None,
) -> str:
    """The printed line: peak memory of a device and time of the run.

    Args:
        config: of the run; model: the student's.
        shape: text, vision and answer tokens of a sample.
        teacher: the model that teaches in every step, if one does; `model`, or one with weights of its own.
    """
    n_text, n_vision, answers = shape
    train, known = config.train, model.config
    layers = known.get_text_config().num_hidden_layers
    vision, first = schedule.vision_tokens(layers, n_vision), backward_ends(model)
    each = activation_bytes(
        known,
        [n_text + n for n in vision[first:]],
        vision[first:] if schedule.cross else [0] * (layers - first),
        dtype=dtype,
        checkpointing=train.gradient_checkpointing,
        eager=known._attn_implementation == "eager",
    ) + logit_bytes(known, answers, teacher=teacher is not None)
    held = weight_bytes(model) + (0 if teacher is None or teacher is model else weight_bytes(teacher))
    peak = held + train.batch_size * each
    step = (
        train.batch_size
        * train.accumulation
        * training_flops(
            known,
            schedule,
            n_text,
            n_vision,
            answers=answers,
            teacher=None if teacher is None else teacher.config,
            first=first,
        )
    )
    seconds = step / flops_per_second(min(2048, max(256, known.get_text_config().hidden_size)), dtype)
    sharded = " before sharding" if config.engine.deepspeed or config.engine.fsdp else ""
    return (
        f"estimate: {_bytes(peak)} a device at the peak{sharded}, {_bytes(train.batch_size * each)} of it activations; "
        f"at least {_duration(train.steps * seconds)} for {train.steps} steps of {step / 1e9:.3g} GFLOPs "
        "(as fast as matrix products are here, the vision tower and loading left out)"
    )


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
