"""Layers that attend to the keys and values of a layer before (Gemma 4 E2B and E4B), and compute none of their own.

Such a layer sees what its source stored: a vision token that left after the source is still read there, though it
computes nothing any more.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.cache_utils import Cache

from latefusion.models.executor.cache import Keys, Track, all_keys, is_scheduled_layer


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


class LayerKeys:
    """What the layers of one forward attend to: keys of their own, or those of a layer before.

    Args:
        length: T, tokens of the forward.
        past: tokens that the cache has seen before.
        shared: whether any layer reuses the keys of a layer before.

    Attributes:
        start: the track of a layer that has computed everything so far.
    """

    def __init__(self, length: int, past: int, *, shared: bool):
        self.length, self.shared = length, shared
        self.start = Track(tail=past, length=past)
        self._sources: dict[Any, Keys] = {}  # by kind of layer, the keys that later layers reuse

    def lacks_some(self, i: int, layer: nn.Module, cache: Cache | None) -> bool:
        """Whether a layer that computes all tokens attends to fewer; the keys of a source layer are kept."""
        if not self.shared:
            return is_scheduled_layer(cache, i)
        if reuses_keys(layer):
            return not self._sources[kind_of(layer)].complete
        lacks = is_scheduled_layer(cache, i)
        if not lacks:
            self.keep(layer, all_keys(cache, i, self.start, self.length))
        return lacks

    def keep(self, layer: nn.Module, keys: Keys) -> None:
        """Keep a layer's keys if later layers reuse them."""
        if stores_keys(layer):
            self._sources[kind_of(layer)] = keys

    def reused_by(self, attention: Any) -> Keys | None:
        """The keys of a layer before that an attention module attends to; None: it has keys of its own."""
        return self._sources.get(getattr(attention, "layer_type", None)) if is_reusing(attention) else None
