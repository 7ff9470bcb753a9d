"""Tiny models and processors of the families that read videos: from frames to answers. Needs `latefusion[video]`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from helpers.families import CONFIGS, build_from
from helpers.processors import PROCESSORS, STOP, processor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from latefusion.data.collate import Collator, build_collator
from latefusion.data.videos import Video

SQUARE = {"height": 28, "width": 28}
VIDEO_PROCESSORS = {
    "qwen2_5_vl": lambda: Qwen2VLVideoProcessor(
        patch_size=14, size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, cap_pixels_per_frame=False
    ),
    "qwen3_vl": lambda: Qwen3VLVideoProcessor(
        patch_size=16,
        size={"shortest_edge": 32 * 32, "longest_edge": 20 * 64 * 64},
        cap_pixels_per_frame=False,
    ),
    "llava_onevision": lambda: LlavaOnevisionVideoProcessor(size=SQUARE),
    "internvl": lambda: InternVLVideoProcessor(size=SQUARE),
    "smolvlm": lambda: SmolVLMVideoProcessor(size={"longest_edge": 28}, max_image_size={"longest_edge": 28}),
}
PLACEHOLDER = {
    "qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "llava_onevision": "<video>",
    "internvl": "<video>\n",
    "smolvlm": "<video>",
}
FAMILIES = list(VIDEO_PROCESSORS)
LIMIT = 4  # frames


def moving(seed: int, n: int = LIMIT, *, size: int = 28, total: int = 30, rate: float = 10.0) -> Video:
    """A video whose frames differ from each other and from those of other seeds."""
    frames = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return Video(frames, tuple(np.linspace(0, total - 1, n).round().astype(int).tolist()), total, rate, LIMIT)


@cache
def video_processor(family: str) -> Any:
    """The family's tiny processor with its real video processor, and a template that shows videos."""
    made, kind = processor(family), type(processor(family))
    template = made.chat_template.replace(
        "{%- if p['type'] == 'image' -%}",
        "{%- if p['type'] == 'video' -%}{{ '" + PLACEHOLDER[family].replace("\n", "\\n") + "' }}"
        "{%- elif p['type'] == 'image' -%}",
    )
    assert template != made.chat_template and family in PROCESSORS
    videos: Any = VIDEO_PROCESSORS[family]()
    options = {
        "llava_onevision": {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        "internvl": {"image_seq_length": 4},
        "smolvlm": {"image_seq_len": 4},
    }.get(family, {})
    return kind(made.image_processor, made.tokenizer, videos, chat_template=template, **options)


@cache
def video_model(family: str) -> tuple[Any, Any]:
    """A random model with its tower, whose tokens are its processor's, and the processor."""
    made, config = video_processor(family), CONFIGS[family]()
    tokens = made.tokenizer.convert_tokens_to_ids
    config.image_token_id = made.image_token_id
    if family.startswith("qwen") or family == "llava_onevision":
        config.video_token_id = made.video_token_id
    if family.startswith("qwen"):
        config.vision_start_token_id, config.vision_end_token_id = tokens(
            ["<|vision_start|>", "<|vision_end|>"]
        )
        config.vision_config.patch_size = made.image_processor.patch_size
    if family == "llava_onevision":
        config.image_grid_pinpoints = made.image_processor.image_grid_pinpoints
    if family == "internvl":
        config.vision_config.patch_size = [7, 7]  # four tokens a tile of 28 x 28
    model = build_from(config)
    model.generation_config.eos_token_id = tokens(STOP[family])
    model.generation_config.suppress_tokens = [config.image_token_id, getattr(config, "video_token_id", 0)]
    return model.eval(), made


def video_collator(family: str, **options: Any) -> Collator:
    model, made = video_model(family)
    return build_collator(made, model.config, model.generation_config, **options)


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs of a batch."""
    return {name: value for name, value in batch.items() if name not in ("labels", "queries")}


def logits_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits
