"""Decoder FLOPs from the tokens that enter each layer; nobody else counts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def layer_flops(config: PretrainedConfig, tokens: int, *, past: int = 0, frozen: int = 0) -> int:
    """FLOPs (2 a multiply-add) of one decoder layer on `tokens` new tokens over `past` cached ones.

    `frozen` of the new tokens are only read: their keys and values are computed.

    Counts the q/k/v/o projections, attention (scores and weighted sum over every key: kernels are counted as
    `torch.utils.flop_counter` does, without the causal half) and the gated MLP. Norms, RoPE and softmax are left
    out, as is customary (below 1%).
    """
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    kv_heads = text.num_key_value_heads or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    whole = tokens - frozen
    projections = 2 * hidden * head_dim * (2 * heads * whole + 2 * kv_heads * tokens)
    attention = 4 * whole * (past + tokens) * heads * head_dim
    mlp = 6 * whole * hidden * text.intermediate_size
    return projections + attention + mlp


def decoder_flops(config: PretrainedConfig, tokens: Sequence[int], frozen: Sequence[int] = ()) -> int:
    """FLOPs of a prefill whose layer `i` takes `tokens[i]` tokens (text and vision), padding not counted.

    Args:
        frozen: how many of them are only read in each layer; empty: none.
    """
    return sum(
        layer_flops(config, n, frozen=f) for n, f in zip(tokens, frozen or [0] * len(tokens), strict=True)
    )


def ranking_flops(config: PretrainedConfig, rows: int, keys: int) -> int:
    """FLOPs of the attention scores of `rows` queries with `keys` keys, computed once more to rank tokens by them."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * rows * keys * heads * head_dim


def vision_macs(config: PretrainedConfig, vision_tokens: Sequence[int], *, frozen: bool = False) -> int:
    """The literature's vision-only convention, in MACs: `4nd^2 + 2n^2d + 3ndm` per layer (FastV, HiDrop).

    `n` is the number of vision tokens of the layer, `d` the hidden size, `m` the MLP's inner size. Dense
    LLaVA-1.5-7B gives 3.82T. Of `frozen` tokens keys and values are left, `2nd^2`.
    """
    text = config.get_text_config()
    d, m = text.hidden_size, text.intermediate_size
    if frozen:
        return sum(2 * n * d * d for n in vision_tokens)
    return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in vision_tokens)
