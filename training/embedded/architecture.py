"""The embedded model: a stock LLaVA of 5.3 million parameters, and its initialisation.

96 x 96 pixels in patches of 8 give 144 vision tokens against about 14 of text; CLIP tower of 4 layers x
128, Llama decoder of 16 layers x 192 with 3 heads that share one key-value head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from latefusion.training.embedded.vocabulary import BOS, EOS, IMAGE, PAD, VOCABULARY

EMBEDDING_STD = 0.15
POSITION_SCALE = 0.5  # of the tower's fixed sine and cosine table


def build_config(
    *,
    image_size: int = 96,
    patch_size: int = 8,
    tower_width: int = 128,
    tower_layers: int = 4,
    width: int = 192,
    layers: int = 16,
    heads: int = 3,
    mlp: int = 320,
) -> LlavaConfig:
    """The defaults are the shipped model; tests shrink them."""
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    vision = CLIPVisionConfig(
        hidden_size=tower_width,
        intermediate_size=3 * tower_width,
        num_hidden_layers=tower_layers,
        num_attention_heads=tower_width // 32,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=tower_width,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(image_size // patch_size) ** 2,
        tie_word_embeddings=True,
    )


def build_model(config: LlavaConfig, *, seed: int = 0) -> LlavaForConditionalGeneration:
    """A fresh float32 model, initialised so that a small decoder learns to bind two words in minutes.

    Without what is written here beyond the usual, phrases such as "red circle" were not bound and half of
    the question types stayed at chance: embeddings of one scale with one shared direction, through which
    heads can attend by position alone; a previous-token head, written into head 0 of layers 0 and 1;
    every residual branch but that head starts at zero; a small final norm, so that tied logits start
    small.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _initialise(model)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=16, do_sample=False
    )
    return model


@torch.no_grad()
def _initialise(model: LlavaForConditionalGeneration) -> None:
    decoder: Any = model.model.language_model
    width = decoder.config.hidden_size
    for layer in decoder.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.normal_(0, 0.05)
        layer.mlp.gate_proj.weight.normal_(0, 0.05)
        layer.mlp.up_proj.weight.normal_(0, 0.05)
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    decoder.norm.weight.fill_(0.2)

    shared = torch.randn(width)  # [D]
    shared /= shared.norm()
    embeddings = decoder.embed_tokens.weight  # [V, D]
    embeddings.normal_(0, EMBEDDING_STD).add_(shared * EMBEDDING_STD * width**0.5)
    for layer in decoder.layers[:2]:
        _write_previous_token_head(layer.self_attn, shared)

    tower: Any = model.model.vision_tower
    positions = tower.embeddings.position_embedding.weight  # [1 + patches, D]
    side = math.isqrt(len(positions) - 1)
    positions[1:] = POSITION_SCALE * sine_table(side, positions.shape[1])


def _write_previous_token_head(attention: Any, shared: Tensor) -> None:
    """Head 0 reads the shared direction in queries and keys and turns the query back by one RoPE
    position.
    """
    head, width = attention.head_dim, len(shared)
    key, query = torch.zeros(head), torch.zeros(head)
    scale = 5.6 / (width**0.5 / 2**0.5)
    for i in range(4):  # the fastest frequencies tell neighbours apart
        turn = 10000.0 ** (-2 * i / head)
        key[i] = scale
        query[i], query[i + head // 2] = scale * math.cos(turn), -scale * math.sin(turn)
    attention.k_proj.weight[:head] += torch.outer(key, shared)
    attention.q_proj.weight[:head] += torch.outer(query, shared)
    attention.o_proj.weight[:, :head] = torch.randn(width, head) * 0.03


def sine_table(side: int, width: int) -> Tensor:
    """Two-dimensional sines and cosines of a `side` x `side` grid, [side * side, width]."""
    quarter = width // 4
    angle = torch.arange(side)[:, None] * 100.0 ** (-torch.arange(quarter) / (quarter - 1))
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # [side, width / 2]
    rows, columns = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)
