"""Tiny models whose token ids are those of their family's tiny processor: from pixels to answers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from helpers.families import CONFIGS, build_from
from helpers.processors import STOP, processor, vision_id

from latefusion.data.collate import Collator
from latefusion.models.inputs import stop_tokens


@cache
def model_and_processor(family: str) -> tuple[Any, Any]:
    """A random model with its tower, whose tokens are its processor's."""
    made, config = processor(family), CONFIGS[family]()
    tokens = made.tokenizer.convert_tokens_to_ids
    config.image_token_id = vision_id(family)
    if family.startswith("qwen"):
        config.video_token_id = tokens("<|video_pad|>")
        config.vision_start_token_id, config.vision_end_token_id = tokens(
            ["<|vision_start|>", "<|vision_end|>"]
        )
        config.vision_config.patch_size = made.image_processor.patch_size
    if family == "internvl":
        config.vision_config.patch_size = [7, 7]  # four tokens a tile of 28 x 28
    model = build_from(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.any() and "projection_weight" in name:  # Gemma3 starts from zero there
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = tokens(STOP[family])
    model.generation_config.suppress_tokens = [config.image_token_id]
    return model, made


def collator_of(family: str) -> Collator:
    model, made = model_and_processor(family)
    return Collator(
        processor=made,
        vision_ids=[model.config.image_token_id],
        stop=stop_tokens(model.generation_config, made),
    )
