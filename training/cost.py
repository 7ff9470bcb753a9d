"""What a training step costs: predicted from the schedule, or counted from what ran."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from latefusion.models.attach import Attachment
from latefusion.models.flops import decoder_flops
from latefusion.models.inputs import unwrapped
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import entry_of


def training_flops(
    config: PretrainedConfig,
    schedule: VisionSchedule,
    n_text: int,
    n_vision: int,
    *,
    answers: int = 0,
    teacher: PretrainedConfig | None = None,
    first: int = 0,
) -> int:
    """FLOPs of decoder and output head for one sample's step of LoRA training.

    The forward pass, and as much again backward: frozen weights need no gradient of their own, adapters hardly count. A
    teacher in the loop adds a dense forward pass, which is what `VisiPruner`, that decides at run time, costs at most.

    Args:
        config: the model's.
        n_text, n_vision: tokens of the sample.
        answers: tokens that the head scores.
        teacher: the configuration of the model that teaches in every step, if one does.
        first: the layer at which the backward pass ends (`backward_ends`).
    """
    vision = schedule.vision_tokens(config.get_text_config().num_hidden_layers, n_vision)[:first]
    spared = decoder_flops(config, [n_text + n for n in vision], vision if schedule.cross else ())
    step = 2 * (schedule.flops(config, n_text, n_vision) + head_flops(config, answers)) - spared
    if teacher is not None:
        step += VisionSchedule().flops(teacher, n_text, n_vision) + head_flops(teacher, answers)
    return step


def backward_ends(model: Any) -> int:
    """The first decoder layer with something to train, below which no gradient is computed; 0 if the projector trains.

    Args:
        model: a student's, or the Hugging Face model itself.
    """
    layers = unwrapped(model).get_decoder().layers
    inside = {id(p) for layer in layers for p in layer.parameters()}
    entry = entry_of(model) or torch.nn.Module()
    after = {id(p) for p in entry.parameters()}  # it runs where vision tokens enter
    if any(p.requires_grad and id(p) not in inside | after for p in model.parameters()):
        return 0
    return next((i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), 0)


def head_flops(config: PretrainedConfig, tokens: int) -> int:
    """FLOPs of scoring the vocabulary for so many tokens."""
    text = config.get_text_config()
    return 2 * tokens * text.hidden_size * text.vocab_size


def computed_flops(attachment: Attachment, config: PretrainedConfig, scored: int, *, first: int = 0) -> int:
    """FLOPs of the last forward pass, decoder and head, padding not counted.

    Args:
        attachment: of the model that ran, with its trace.
        config: the model's.
        scored: tokens that the head scored.
        first: the decoder counts from this layer on.
    """
    decoder = sum(
        decoder_flops(config, tokens[first:], frozen[first:]) for tokens, frozen in attachment.sizes
    )
    return decoder + head_flops(config, scored)
