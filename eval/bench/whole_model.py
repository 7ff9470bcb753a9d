"""A whole LLaVA of random weights for benchmarks: tower, decoder, head, processor, and pictures to ask about.

The small models of `timing.py` take made-up vision features; here a request begins with a picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from latefusion.training.embedded.vocabulary import BOS, EOS, IMAGE, PAD, TOKEN_ID, build_processor

WORDS = sorted(word for word in TOKEN_ID if word.isalpha())  # each is one token
PICTURE = (640, 480)  # pixels, as COCO's
AROUND = 3  # tokens beside image and question: <bos>, <user>, <assistant>


@dataclass(frozen=True)
class Shape:
    """Sizes of decoder and tower; the patches are 14 pixels wide."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    vocabulary: int
    tower: tuple[int, int, int]  # layers, hidden size, heads
    pixels: int = 336

    @property
    def vision(self) -> int:
        """Vision tokens of a picture."""
        return (self.pixels // 14) ** 2


SHAPES = {
    "llava-1.5-7b": Shape(32, 4096, 11008, 32, 32064, (24, 1024, 16)),
    "small": Shape(16, 512, 1376, 8, 4096, (6, 256, 4)),
    "toy": Shape(8, 32, 64, 2, 128, (2, 32, 2), pixels=56),
}


def build_model(shape: Shape, *, device: str, dtype: torch.dtype) -> Any:
    """The model with random weights, made on its device in its dtype: seconds for 7 billion weights on a GPU."""
    layers, hidden, heads = shape.tower
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=shape.pixels,
            patch_size=14,
            projection_dim=hidden,
        ),
        text_config=LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=4096,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        image_token_id=IMAGE,  # type: ignore[call-arg]
        image_seq_length=shape.vision,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model


def processor_for(shape: Shape) -> Any:
    """The embedded model's tokenizer, with pictures resized to this shape."""
    processor = build_processor(image_size=shape.pixels, patch_size=14)
    processor.tokenizer.model_max_length = 4096
    return processor


def picture(number: int) -> Image.Image:
    """A picture of noise, the same for the same number."""
    pixels = np.random.default_rng(number).integers(0, 256, (PICTURE[1], PICTURE[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def words(count: int, seed: int) -> str:
    """`count` random words of one token each."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def question(text: int, seed: int) -> list[dict[str, Any]]:
    """The messages of a prompt with an image and `text` tokens beside it."""
    content = [{"type": "image"}, {"type": "text", "text": words(text - AROUND, seed)}]
    return [{"role": "user", "content": content}]


def write_rows(folder: Path, *, rows: int, text: int, answer: int) -> Path:
    """A data set of pictures in files; each row has `text` tokens, of which `answer` are learnt."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.jsonl"
    with file.open("w") as out:
        for row in range(rows):
            picture(row).save(folder / f"{row}.jpg", quality=90)
            prompt = question(text - answer, row)
            answer_turn = {
                "role": "assistant",
                "content": [{"type": "text", "text": words(answer - 1, row + rows)}],
            }
            out.write(json.dumps({"messages": [*prompt, answer_turn], "images": [f"{row}.jpg"]}) + "\n")
    return file


def shrunk(shape: Shape, layers: int | None) -> Shape:
    """The shape with another number of decoder layers."""
    return shape if layers is None else replace(shape, layers=layers)
