"""Base models whose students are served: the embedded one, and tiny random ones of the other families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers as hf
from helpers.families import build_from
from helpers.processors import CHATML, SYSTEM, qwen
from PIL import Image

from latefusion.models.base_model import load_base

SIDE = 96  # of a picture for LLaVA, in pixels


@dataclass(frozen=True)
class Base:
    """A model and its processor, and what a test must know of its tokens.

    Attributes:
        image: id of the placeholder of an image.
        tokens: how many vision tokens a picture has.
        words: the ids of text, from the first to behind the last.
        size: of a picture by number: width and height.
    """

    model: Any
    processor: Any
    image: int
    tokens: Callable[[Image.Image], int]
    words: tuple[int, int]
    size: Callable[[int], tuple[int, int]] = lambda seed: (SIDE, SIDE)

    @property
    def sizes_differ(self) -> bool:
        return len({self.size(seed) for seed in range(3)}) > 1

    def picture(self, seed: int) -> Image.Image:
        """Squares on a bright ground."""
        width, height = self.size(seed)
        rng = np.random.default_rng(seed)
        pixels = np.full((height, width, 3), 230, np.uint8)
        for _ in range(6):
            x, y, side = rng.integers(0, width - 26), rng.integers(0, height - 26), rng.integers(10, 26)
            pixels[y : y + side, x : x + side] = rng.integers(0, 255, 3)
        return Image.fromarray(pixels)


def base(name: str) -> Base:
    """One of `embedded`, `mistral`, `qwen2` (both LLaVA), `qwen2_5_vl`."""
    if name == "qwen2_5_vl":
        return _qwen2_5_vl()
    model, processor = load_base("embedded", dtype=torch.float32)
    if name != "embedded":
        model = build_from(_llava(model.config, name))
    return Base(model, processor, image=3, tokens=lambda image: 144, words=(6, 99))


def _text(kind: type, vocabulary: int, **more: Any) -> Any:
    """A decoder whose sizes vLLM's CPU attention takes, and two processes can share."""
    return kind(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **more,
    )


def _llava(like: Any, decoder: str) -> Any:
    """Mistral behind CLIP, its heads wider than its hidden size divided; Qwen2 behind SigLIP."""
    tower = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    if decoder == "mistral":
        text = _text(hf.MistralConfig, 99, head_dim=64, sliding_window=None)
        vision = hf.CLIPVisionConfig(**tower)
    else:
        text = _text(hf.Qwen2Config, 99)
        vision = hf.SiglipVisionConfig(**tower)
    return hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=like.image_token_id,
        image_seq_length=144,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if decoder == "mistral" else "full",
        tie_word_embeddings=False,
    )


def _qwen2_5_vl() -> Base:
    videos = hf.Qwen2VLVideoProcessor()  # vLLM loads one, whether there are videos or not
    processor = qwen(hf.Qwen2_5_VLProcessor, SYSTEM + CHATML, 14, videos)
    ids = processor.tokenizer.get_vocab()
    marks = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    kind = type(hf.Qwen2_5_VLConfig().text_config)
    config = hf.Qwen2_5_VLConfig(
        text_config=_text(kind, len(ids), rope_parameters=rope).to_dict(),
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "out_hidden_size": 128,
            "num_heads": 2,
            "intermediate_size": 96,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **{name: ids[mark] for name, mark in marks.items()},
    )
    sizes = ((224, 56), (112, 112), (84, 140))
    return Base(
        build_from(config),
        processor,
        image=ids["<|image_pad|>"],
        tokens=lambda image: image.width * image.height // 28**2,
        words=(max(ids[mark] for mark in marks.values()) + 1, len(ids)),
        size=lambda seed: sizes[seed % len(sizes)],
    )
