"""What a training step costs: FLOPs from the schedule or counted from what ran, memory and time as estimates."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PretrainedConfig

from latefusion.models.attach import Attachment
from latefusion.models.flops import decoder_flops, head_flops, mlp_width
from latefusion.models.inputs import unwrapped
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import entry_of
from latefusion.training.loss import LOGITS

PROBE_SECONDS = 0.1  # how long the matrix products run that measure this machine's speed
OPTIMIZER_BYTES = 12  # gradient and two Adam moments of a trained weight, float32


def training_flops(
    config: PretrainedConfig,
    schedule: VisionSchedule,
    n_text: int,
    n_vision: int,
    *,
    answers: int = 0,
    teacher: PretrainedConfig | None = None,
    share: float = 1.0,
    first: int = 0,
) -> int:
    """FLOPs of decoder and output head for one sample's step of LoRA training.

    The forward pass, and as much again backward: frozen weights need no gradient, and adapters hardly count. An online
    teacher adds a dense forward pass, which is the most that `VisiPruner`, deciding at run time, can cost.

    Args:
        config: the model's.
        n_text, n_vision: tokens of the sample.
        answers: tokens that the output head scores.
        teacher: configuration of the model that teaches; None: no online teacher.
        share: of the steps that it teaches in; the FLOPs are the mean over steps.
        first: the layer at which the backward pass ends (`backward_ends`).
    """
    vision = schedule.vision_tokens(config.get_text_config().num_hidden_layers, n_vision)[:first]
    spared = decoder_flops(config, [n_text + n for n in vision], () if schedule.cross is None else vision)
    step = 2 * (schedule.flops(config, n_text, n_vision) + head_flops(config, answers)) - spared
    if teacher is not None:
        step += round(
            share * (VisionSchedule().flops(teacher, n_text, n_vision) + head_flops(teacher, answers))
        )
    return step


def backward_ends(model: Any) -> int:
    """The first decoder layer with trainable weights; no gradient is computed below it. 0 if the projector trains.

    Args:
        model: a student's, or the Hugging Face model itself.
    """
    layers = unwrapped(model).get_decoder().layers
    reached = {p for layer in layers for p in layer.parameters()}
    entry = entry_of(model) or torch.nn.Module()
    reached |= set(entry.parameters())  # it runs where vision tokens enter
    if any(p.requires_grad and p not in reached for p in model.parameters()):
        return 0
    return next((i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), 0)


def computed_flops(attachment: Attachment, config: PretrainedConfig, scored: int, *, first: int = 0) -> int:
    """FLOPs of the last forward pass: decoder and output head, without padding.

    Args:
        attachment: of the model that ran, with its trace.
        config: the model's.
        scored: tokens that went through the output head.
        first: count the decoder from this layer on.
    """
    decoder = sum(
        decoder_flops(config, tokens[first:], frozen[first:], first=first)
        for tokens, frozen in attachment.sizes
    )
    return decoder + head_flops(config, scored)


def weight_bytes(model: Any) -> int:
    """Bytes held during the whole run: the weights, and gradients and optimizer state of those that train."""
    return sum(numel(p) * (p.element_size() + p.requires_grad * OPTIMIZER_BYTES) for p in model.parameters())


def numel(parameter: torch.nn.Parameter) -> int:
    """Number of elements of a weight, also if ZeRO-3 has sharded it."""
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
    """Bytes that the decoder keeps of one sample for its backward pass.

    Counted as the inputs that the projections, norms, attention and gated MLP of a layer save: 6 vectors of the hidden
    size (two of them float32, in the norms), 4 of the MLP's, and queries, keys, values and attention output; with
    eager attention twice its probabilities. Frozen tokens go through the norms, and have keys and values.
    Checkpointing keeps only the input of each layer, and one whole layer.

    Args:
        tokens: entering each layer; frozen: how many of these are only read.
    """
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    attention = 2 * head_dim * (heads + (text.num_key_value_heads or heads))
    size = torch.finfo(dtype).bits // 8
    vector = size * (4 * hidden + 4 * mlp_width(text) + attention) + 4 * 2 * hidden
    read = size * (4 * hidden + 2 * head_dim * (text.num_key_value_heads or heads)) + 4 * 2 * hidden
    layers = [
        (n - f) * vector + f * read + (2 * size * heads * n * (n - f) if eager else 0)
        for n, f in zip(tokens, frozen, strict=True)
    ]
    if checkpointing:
        return sum(n * hidden * size for n in tokens) + max(layers)
    return sum(layers)


def logit_bytes(config: PretrainedConfig, answers: int, *, teacher: bool) -> int:
    """Bytes of the logits in float32 that exist at once, of all `answers` tokens of a batch.

    Of student and teacher, with log-probabilities and gradients; at most `loss.LOGITS` of each.
    """
    return 4 * min(LOGITS, answers * config.get_text_config().vocab_size) * (3 + 3 * teacher)


def flops_per_second(width: int, dtype: torch.dtype) -> float:
    """Measure the speed of square matrix products of this width."""
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
    times = max(1, int(PROBE_SECONDS / max(run(1), 1e-6)))
    return times * 2 * width**3 / run(times)
