"""What a training step costs: predicted from the schedule, or counted from what ran."""

from __future__ import annotations

from transformers import PretrainedConfig

from latefusion.models.attach import Attachment
from latefusion.models.flops import decoder_flops
from latefusion.models.schedule import VisionSchedule


def training_flops(
    config: PretrainedConfig,
    schedule: VisionSchedule,
    n_text: int,
    n_vision: int,
    *,
    answers: int = 0,
    teacher: PretrainedConfig | None = None,
) -> int:
    """FLOPs of decoder and output head for one sample's step of LoRA training.

    The forward pass, and as much again backward: frozen weights need no gradient of their own, adapters hardly count. A
    teacher in the loop adds a dense forward pass, which is what `VisiPruner`, that decides at run time, costs at most.

    Args:
        config: the model's.
        n_text, n_vision: tokens of the sample.
        answers: tokens that the head scores.
        teacher: the configuration of the model that teaches in every step, if one does.
    """
    step = 2 * (schedule.flops(config, n_text, n_vision) + head_flops(config, answers))
    if teacher is not None:
        step += VisionSchedule().flops(teacher, n_text, n_vision) + head_flops(teacher, answers)
    return step


def head_flops(config: PretrainedConfig, tokens: int) -> int:
    """FLOPs of scoring the vocabulary for so many tokens."""
    text = config.get_text_config()
    return 2 * tokens * text.hidden_size * text.vocab_size


def computed_flops(attachment: Attachment, config: PretrainedConfig, scored: int) -> int:
    """FLOPs of the last forward pass, decoder and head, padding not counted.

    Args:
        attachment: of the model that ran, with its trace.
        config: the model's.
        scored: tokens that the head scored.
    """
    decoder = sum(decoder_flops(config, tokens, frozen) for tokens, frozen in attachment.sizes)
    return decoder + head_flops(config, scored)
