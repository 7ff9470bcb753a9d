"""Layers that attend to the keys and values of a layer before (Gemma 4 E2B and E4B), and compute none of their own.

Such a layer sees what its source stored: a vision token that left after the source is still read there, though it
computes nothing any more.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def is_reusing(attention: Any) -> bool:
    """Whether an attention module has no keys of its own."""
    return bool(getattr(attention, "is_kv_shared_layer", False))


def reuses_keys(layer: nn.Module) -> bool:
    """Whether a decoder layer attends to the keys of a layer before."""
    return is_reusing(layer._modules.get("self_attn"))


def stores_keys(layer: nn.Module) -> bool:
    """Whether later layers attend to this layer's keys."""
    return bool(getattr(layer._modules.get("self_attn"), "store_full_length_kv", False))


def kind_of(layer: nn.Module) -> Any:
    """The kind of a layer; one that reuses keys takes them from the source of its kind."""
    return getattr(layer._modules.get("self_attn"), "layer_type", None)
