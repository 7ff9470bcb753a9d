"""`Entering`: runs the entry adapter on vision tokens that take part for the first time, once in every forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latefusion.models.executor.layout import Layout
from latefusion.models.executor.packed import Samples
from latefusion.models.policies.base import Prompt, Selection


class Entering:
    """The entry adapter in one forward.

    It maps the vision tokens that enter after layer 0. In a forward without such tokens it still runs, on no rows:
    processes of a distributed run wait for each other's collectives, so each has to run it once.

    Args:
        entry: the adapter.
        prompt: None: the forward brings no vision tokens.
        samples: of a row, if it holds several.
        idle_before: in a forward without vision tokens, the layer before which it runs; 0: after the last.

    Raises:
        ValueError: the adapter goes by places in the image, of which the forward brings a piece.
    """

    def __init__(
        self, entry: nn.Module, prompt: Prompt | None, samples: Samples | None = None, *, idle_before: int = 0
    ):
        self.entry, self.prompt, self.samples, self.idle_before = entry, prompt, samples, idle_before
        places = getattr(entry, "places", 0)
        cut = prompt is not None and prompt.piece and idle_before > 0 and places > 1
        if cut and any(n % places for n in prompt.n_vision):  # type: ignore[union-attr]
            raise ValueError(
                f"the entry adapter has a bias for each of the {places} places in an image, but this forward begins or "
                "ends inside one: prefill the prompt at once (leave prefill_chunk_size out)."
            )
        self.later = getattr(entry, "later", {})  # layers, as text, that frozen tokens are mapped on to
        self.done = False  # the adapter has run
        self._unseen = None if prompt is None else prompt.vision  # bool [B, T], not computed by any layer yet
        self._counts: Sequence[int] = () if prompt is None else prompt.n_vision  # of the unseen

    def all_computed(self) -> None:
        """Layer 0 computes every vision token, so none can enter later."""
        self._unseen = None

    def map(self, layer: int, selection: Selection, full: Tensor) -> Tensor:
        """`full` `[B, T, D]` with the rows mapped that enter at this layer; the same tensor if none do."""
        new = self._new(layer, selection)
        if new is None:
            return full
        order = self.order(new.index)  # [B, n]
        self.done = True
        return new.put(full, self.entry(new.take(full), order))

    def moves(self, layer: int) -> bool:
        """Whether the adapter maps frozen tokens, which entered before, on to what this layer expects of them."""
        return str(layer) in self.later

    def order(self, index: Tensor) -> Tensor:
        """The number of the tokens at positions `index` among their sample's vision tokens, int64 `[B, n]`."""
        assert self.prompt is not None
        return self._order(self.prompt.vision).gather(1, index).clamp(min=0)

    def _order(self, vision: Tensor) -> Tensor:
        """The number of each vision token among those of its sample, int64 `[B, T]`."""
        if self.samples is None:
            return vision.cumsum(1) - 1
        order = self.samples.split(vision).cumsum(1) - 1  # [S, L]
        return self.samples.join(order, torch.zeros_like(vision, dtype=order.dtype))

    def _new(self, layer: int, selection: Selection) -> Layout | None:
        """The tokens that take part for the first time, after layer 0; None if there are none."""
        counts = selection.counts
        if self._unseen is None or counts is None or not any(counts):
            return None
        assert self.prompt is not None
        new = self._unseen & selection.vision
        if tuple(self._counts) != self.prompt.n_vision:  # only the device knows what is new
            counts = tuple(new.sum(1).tolist())
        rest = [unseen - count for unseen, count in zip(self._counts, counts, strict=True)]
        self._unseen = self._unseen & ~selection.vision if any(rest) else None
        self._counts = rest
        return Layout.build(new, counts) if layer > 0 and any(counts) else None

    def run_idle(self, hidden_states: Tensor) -> Tensor:
        """Run the adapter on no rows, unless it has run; the hidden states do not change."""
        if self.done:
            return hidden_states
        self.done = True
        order = torch.zeros(len(hidden_states), 0, dtype=torch.long, device=hidden_states.device)
        nothing = self.entry(hidden_states[:, :0], order).sum()
        return hidden_states + nothing.to(hidden_states.dtype) if nothing.requires_grad else hidden_states
