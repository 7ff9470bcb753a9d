"""`Segment`: a run of decoder layers that compute the same tokens, with what is made once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from latefusion.models.executor.layout import Layout

Made = TypeVar("Made")


class Segment:
    """A run of layers that compute the same tokens; `Forward` starts a new one where a policy's selection changes.

    Attributes:
        layout: the tokens that these layers compute; None: all, and the stock model's tensors stay untouched.
        full: `[B, T, D]`, every token's state at the start of the segment: what a token keeps that is not computed.
            None if all are computed. `[A, B, T, D]` in decoders that carry several states of a token (AltUp).
        text: where vision tokens are frozen, the text rows among the layout's tokens; else None.
        silent: bool over the rows that attend (the text rows, or all of the layout), whose attention output is zero;
            None: no rows.
    """

    def __init__(
        self,
        layout: Layout | None = None,
        full: Tensor | None = None,
        text: Layout | None = None,
        silent: Tensor | None = None,
    ):
        self.layout, self.full, self.text, self.silent = layout, full, text, silent
        self._made: dict[tuple[Any, ...], tuple[tuple[object, ...], Any]] = {}

    def once(self, name: str, sources: tuple[object, ...], make: Callable[[], Made], *sizes: int) -> Made:
        """`make()`, computed by the first layer that asks; later layers with the same sources get the same object.

        Sources are compared by `id`, which is safe because the entry holds them: no other object can get their ids
        as long as the segment lives.
        """
        key = (name, *map(id, sources), *sizes)
        if key not in self._made:
            self._made[key] = sources, make()
        return self._made[key][1]

    def take(self, full: Tensor) -> Tensor:
        """The segment's rows of `[..., B, T, D]`."""
        return full if self.layout is None else self.layout.take(full)

    def take_embeddings(self, embeddings: Any) -> Any:
        """The segment's rows of a layer's RoPE: `(cos, sin)`, one complex tensor, or None in a layer without."""
        if embeddings is None:
            return None
        tensors = (embeddings,) if isinstance(embeddings, Tensor) else tuple(embeddings)
        taken = self.once("rope", tensors, lambda: tuple(map(self._take_embedding, tensors)))
        return taken[0] if isinstance(embeddings, Tensor) else taken

    def _take_embedding(self, full: Tensor) -> Tensor:
        """The segment's rows of `[B|1, T, D]`, or of `[axes, B|1, T, D]`: M-RoPE before transformers 5.17."""
        if self.layout is not None and full.dim() == 4 and full.shape[2] != self.layout.length:
            return self.layout.take(full.flatten(2)).unflatten(-1, full.shape[2:])  # [B|1, T, heads, D]
        return self.take(full)

    def take_ids(self, ids: Tensor) -> Tensor:
        """The segment's columns of position ids `[B|1, T]` or `[axes, B|1, T]`."""
        layout = self.layout
        if layout is None:
            return ids
        index = layout.index if ids.dim() == 2 else layout.index.expand(ids.shape[0], -1, -1)
        return self.once("positions", (ids,), lambda: ids.expand(*index.shape[:-1], -1).gather(-1, index))

    def expand(self, hidden_states: Tensor) -> Tensor:
        """The segment's hidden states `[..., B, n, D]` at full length `[..., B, T, D]`."""
        if self.layout is None:
            return hidden_states
        assert self.full is not None
        return self.layout.put(self.full, hidden_states)

    def text_index(self) -> Tensor:
        """Position of each text row of a segment with frozen tokens among the forward's tokens, int64 `[B, n]`."""
        assert self.layout is not None and self.text is not None
        return self.layout.index.gather(1, self.text.index)

    def query_index(self, *, narrowed: bool) -> Tensor:
        """Position of each row that attention is computed for, -1 for padding, int64 `[B, n]`.

        Args:
            narrowed: over frozen tokens, attention is computed for the text rows alone.
        """
        assert self.layout is not None
        if self.text is None or not narrowed:
            return self.layout.positions(0)
        index, valid = self.text_index(), self.text.valid
        return index if valid is None else torch.where(valid, index, -1)
