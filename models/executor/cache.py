"""The KV cache under a policy: stores what a layer computed, reports the lengths the stock model expects."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from latefusion.models.executor.layout import Layout


class Track:
    """Which logical positions a cache layer's entries hold. Immutable; shared by layers with one history.

    Every change (`append`, `crop`, `rows`) gives a new track and remembers it, so that the next layer that
    makes the same change to the same track gets the same object and nothing is computed twice. The remembered
    argument is compared by identity while the track holds it, so no other object can be taken for it.

    Args:
        head: int64 `[B, P]`, logical position of the oldest entries, -1 for padding; None if there are none.
        tail: number of entries after them, which hold the newest `tail` positions in every sample.
        length: logical length: all tokens seen, computed by this layer or not.
        ragged: whether `head` has padding.
    """

    def __init__(self, head: Tensor | None = None, tail: int = 0, length: int = 0, ragged: bool = False):
        self.head, self.tail, self.length, self.ragged = head, tail, length, ragged
        self._last: tuple[str, object, Track] | None = None

    @property
    def size(self) -> int:
        """Entries per sample."""
        return self.tail + (0 if self.head is None else self.head.shape[1])

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, so that entry i holds position i."""
        return self.size == self.length and not self.ragged

    def positions(self, batch: int, device: torch.device) -> Tensor:
        """Logical position of every entry, -1 for padding, int64 `[B, size]`."""
        tail = torch.arange(self.length - self.tail, self.length, device=device).expand(batch, -1)
        return tail if self.head is None else torch.cat([self.head, tail], dim=1)

    def append(self, layout: Layout | None, length: int) -> Track:
        """After a forward over `length` tokens, of which `layout` were computed; None: all."""
        if layout is None:
            grown = self.tail + length, self.length + length
            return self._once("text", length, lambda: Track(self.head, *grown, self.ragged))

        def make() -> Track:
            head = layout.positions(self.length)
            if self.size:
                head = torch.cat([self.positions(head.shape[0], head.device), head], dim=1)
            return Track(head, 0, self.length + length, self.ragged or layout.valid is not None)

        return self._once("layout", layout, make)

    def crop(self, tokens: int) -> Track:
        """Without the newest `tokens` logical positions."""
        return self._once("crop", tokens, lambda: self._crop(tokens))

    def _crop(self, tokens: int) -> Track:
        start = self.length - tokens
        if tokens <= self.tail:
            return Track(self.head, self.tail - tokens, start, self.ragged)
        if self.head is None:
            return Track()
        rest = tokens - self.tail  # newest entries of head, which must be these very tokens in every sample
        newest = torch.arange(start, start + rest, device=self.head.device)
        if self.head.shape[1] < rest or not bool((self.head[:, -rest:] == newest).all()):
            raise ValueError(
                f"crop(-{tokens}) reaches into tokens that the policy removed: crop at most {self.tail}."
            )
        return Track(self.head[:, :-rest], 0, start, self.ragged)

    def rows(self, operation: str, argument: object, change: Callable[[Tensor], Tensor]) -> Track:
        """With the samples rearranged by `change`, which `operation` and `argument` identify."""

        def make() -> Track:
            head = None if self.head is None else change(self.head)
            return Track(head, self.tail, self.length, self.ragged)

        return self._once(operation, argument, make)

    def _once(self, operation: str, argument: object, make: Callable[[], Track]) -> Track:
        if self._last is not None and self._last[0] == operation:
            same = self._last[1] is argument or (isinstance(argument, int) and self._last[1] == argument)
            if same:
                return self._last[2]
        self._last = operation, argument, make()
        return self._last[2]


class _Scheduled:
    """A mixin for a stock cache layer that stores the computed tokens and reports the lengths of all.

    Attributes:
        announced: `advance` has said which tokens the next `update` stores; if not, they are new ones, all of them.
    """

    track: Track
    announced = False

    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.announced:
            self.track = self.track.append(None, key_states.shape[-2])
        self.announced = False
        return super().update(key_states, *args, **kwargs)  # type: ignore[misc]

    def get_seq_length(self) -> int:
        return self.track.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.track.length + query_length, 0

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.track = Track()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if tokens_to_remove:
            self.track = self.track.crop(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.track = self.track.rows(
            "reorder", beam_idx, lambda head: head.index_select(0, beam_idx.to(head.device))
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.track = self.track.rows("repeat", repeats, lambda head: head.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.track = self.track.rows("select", indices, lambda head: head[indices])


class ScheduledLayer(_Scheduled, DynamicLayer):
    """`DynamicLayer` under a vision policy."""


class ScheduledSlidingLayer(_Scheduled, DynamicSlidingWindowLayer):
    """`DynamicSlidingWindowLayer` under a vision policy: keeps the newest `sliding_window - 1` entries."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen, window = self.track.length, self.sliding_window
        kv_length = window - 1 + query_length if seen >= window else seen + query_length
        return kv_length, max(seen - window + 1, 0)


SUPPORTED: dict[type, Any] = {DynamicLayer: ScheduledLayer, DynamicSlidingWindowLayer: ScheduledSlidingLayer}
UNCHANGED = {
    LinearAttentionLayer,  # a state of fixed size: a token that was not read has left no trace
    # nothing: the layer attends to the keys of another, or not at all (transformers 5.16 has no such class)
    getattr(cache_utils, "DummyLayer", LinearAttentionLayer),
}


def check_cache(cache: Cache | None) -> None:
    """Raise unless the cache's layers can hold fewer tokens than were seen."""
    if cache is None:
        return
    kinds = {type(layer) for layer in cache.layers}
    if cache.layer_class_to_replicate is not None:
        kinds.add(cache.layer_class_to_replicate)
    for kind in kinds - UNCHANGED - set(SUPPORTED) - set(SUPPORTED.values()):
        raise ValueError(
            f"a vision policy cannot work with cache layers of type {kind.__name__}: "
            "pass past_key_values=DynamicCache() or leave cache_implementation unset."
        )


def is_scheduled(cache: Cache | None) -> bool:
    """Whether any layer of the cache holds fewer tokens than were seen."""
    for layer in () if cache is None else cache.layers:  # noqa: SIM110 - any() costs a decode step a call a layer
        if isinstance(layer, _Scheduled):
            return True
    return False


def is_uniform(cache: Cache | None) -> bool:
    """Whether every layer holds the same number of tokens for all samples, and sees all that it holds."""
    for layer in () if cache is None else cache.layers:
        if isinstance(layer, _Scheduled) and (type(layer) is not ScheduledLayer or layer.track.ragged):
            return False
    return True


def is_scheduled_layer(cache: Cache | None, layer_idx: int) -> bool:
    """Whether this layer of the cache holds fewer tokens than were seen."""
    return (
        cache is not None
        and layer_idx < len(cache.layers)
        and isinstance(cache.layers[layer_idx], _Scheduled)
    )


@dataclass(frozen=True)
class Keys:
    """The keys that a layer's attention will see: what its cache holds, and this forward's tokens.

    Attributes:
        track: of all entries, those that a sliding cache has dropped included.
        number: K, the newest entries, which are those that attention sees.
        width: columns of the stock mask: the keys that the stock model's attention would see.
        offset: position of the stock mask's first column.
    """

    track: Track
    number: int
    width: int
    offset: int

    @property
    def complete(self) -> bool:
        """Whether no token is missing, so that the stock mask fits."""
        return self.track.complete

    @property
    def padded(self) -> bool:
        """Whether some entries must not be seen, or the stock mask's columns do not begin at position 0."""
        return self.track.ragged or self.offset > 0

    def columns(self, batch: int, device: torch.device) -> Tensor:
        """Column of each key in the stock mask, negative for padding, int64 `[B, K]`."""
        return self.track.positions(batch, device)[:, self.track.size - self.number :] - self.offset


def advance(cache: Cache | None, layer_idx: int, start: Track, layout: Layout | None, length: int) -> Keys:
    """Tell a layer's cache which tokens this forward brings, right before its attention stores them.

    Args:
        cache: None: the keys are this forward's alone.
        start: the track of a layer that has computed everything so far; one object a forward.
        layout: the tokens that the layer computes; None: all `length`.
        length: T, the forward's tokens.
    """
    computed = length if layout is None else layout.index.shape[1]
    if cache is None:
        return Keys(start.append(layout, length), number=computed, width=length, offset=0)
    store = scheduled_layer(cache, layer_idx, start)
    width, offset = store.get_mask_sizes(length)
    number = _stored(store, computed)
    store.track, store.announced = store.track.append(layout, length), True
    return Keys(store.track, number, width, offset)


def all_keys(cache: Cache | None, layer_idx: int, start: Track, length: int) -> Keys:
    """The keys of a layer that computes every token, before its cache stores this forward's."""
    track = start.append(None, length)
    if cache is None or layer_idx >= len(cache.layers):
        return Keys(track, number=track.length, width=track.length, offset=0)
    width, offset = cache.layers[layer_idx].get_mask_sizes(length)  # type: ignore[union-attr]
    return Keys(track, number=width, width=width, offset=offset)


def without_effect(cache: Cache, layer_idx: int) -> Cache:
    """A copy of the cache into which layer `layer_idx` may write: what the cache itself holds stays as it is."""
    copied = copy.copy(cache)
    copied.layers = list(cache.layers)
    if layer_idx < len(copied.layers):
        copied.layers[layer_idx] = copy.copy(copied.layers[layer_idx])
    return copied


def scheduled_layer(cache: Cache, layer_idx: int, start: Track) -> ScheduledLayer | ScheduledSlidingLayer:
    """The cache's layer as one that keeps a track, converted in place if need be; `start` fits its length."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[layer_idx]
    if isinstance(layer, (ScheduledLayer, ScheduledSlidingLayer)):
        return layer
    kind = SUPPORTED[type(layer)]
    converted = kind.__new__(kind)
    converted.__dict__.update(layer.__dict__)
    seen = layer.get_seq_length()
    converted.track = start if seen == start.length else Track(tail=seen, length=seen)
    cache.layers[layer_idx] = converted
    return converted


def _stored(layer: DynamicLayer, new: int) -> int:
    """Entries per sample that attention sees once the layer is updated with `new` more."""
    held = (
        0
        if not layer.is_initialized or layer.keys is None or layer.keys.numel() == 0
        else layer.keys.shape[-2]
    )
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.record_past:
        return min(held, layer.sliding_window - 1) + new
    return held + new
