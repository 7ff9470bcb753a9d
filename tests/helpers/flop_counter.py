"""PyTorch's FLOPs counter on one prefill of a small Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

N_TEXT, N_VISION = 24, 96


def attention_flops(query: torch.Size, key: torch.Size, *args: object, **kwargs: object) -> int:
    """Scores and weighted sum over every key, as PyTorch counts the fused kernels of a GPU."""
    batch, heads, queries, dim = query
    return 4 * batch * heads * queries * key[2] * dim


# the one fused kernel that PyTorch does not count
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


def llama_config(kv_heads: int, attention: str) -> LlamaConfig:
    options: dict[str, Any] = {"attn_implementation": attention}
    return LlamaConfig(
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=32,
        max_position_embeddings=256,
        **options,
    )


def counted_flops(model: LlamaForCausalLM, inputs_embeds: torch.Tensor) -> int:
    """What PyTorch counts in the decoder layers of one prefill."""
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter, torch.no_grad():
        model(inputs_embeds=inputs_embeds)
    head = sum(counter.get_flop_counts()["LlamaForCausalLM.lm_head"].values())
    assert head == 2 * inputs_embeds.shape[1] * model.config.hidden_size * model.config.vocab_size
    return counter.get_total_flops() - head


def flops_prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings `[1, T, D]` with vision tokens after ten of text, and where they are `[1, T]`."""
    vision = torch.zeros(1, N_TEXT + N_VISION, dtype=torch.bool)
    vision[:, 10 : 10 + N_VISION] = True
    return torch.randn(1, N_TEXT + N_VISION, 128), vision
