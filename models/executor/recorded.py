"""`Recorded`: what a forward reports of every layer (hidden states, attention maps), brought to full length."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from latefusion.models.executor.cache import Keys
from latefusion.models.executor.segment import Segment


class Recorded:
    """The segments of a forward's layers, kept to expand what the stock model recorded inside them.

    Args:
        attention: per layer, whether it attends with a softmax, and so reports attention maps.
    """

    def __init__(self, attention: Sequence[bool]) -> None:
        self.layers = [
            i for i, attends in enumerate(attention) if attends
        ]  # those that report attention maps
        self.segments: list[
            tuple[Segment, Tensor | None]
        ] = []  # of each layer, with `full` as the layer began
        self.full_length: list[Tensor] = []  # outputs that were handed to the model at full length
        self.keys: dict[int, Keys] = {}  # of each layer that lacks tokens

    def enter(self, segment: Segment) -> None:
        """Keep the segment of the layer that begins; called before each layer."""
        self.segments.append((segment, segment.full))

    def hidden_states(self, states: tuple[Tensor | None, ...], last: Tensor) -> tuple[Tensor | None, ...]:
        """Recorded hidden states (input of layer 0, which is at full length, and outputs of all layers) at full length.

        A vision token that a layer does not compute has the state it had before.

        Args:
            last: the decoder's output, which is at full length already.
        """
        whole = [last, *self.full_length]

        def expand(state: Tensor | None, segment: Segment, full: Tensor | None) -> Tensor | None:
            if state is None or segment.layout is None or any(state is other for other in whole):
                return state
            assert full is not None
            return segment.layout.put(full, state)

        layers = zip(states[1:], self.segments, strict=True)
        return (states[0], *(expand(state, *segment) for state, segment in layers))

    def attentions(self, maps: tuple[Tensor | None, ...], *, narrowed: bool) -> tuple[Tensor | None, ...]:
        """Recorded attention maps at full size: zero where a token does not take part, as query or as key."""

        def expand(i: int, weights: Tensor | None) -> Tensor | None:
            if weights is None or i not in self.keys:
                return weights
            segment, keys = self.segments[i][0], self.keys[i]
            columns = keys.columns(weights.shape[0], weights.device)  # [B, K]
            weights = _scattered(weights.mT, columns, keys.width).mT  # [B, H, n, L]
            if segment.layout is None:
                return weights
            rows = segment.query_index(narrowed=narrowed)  # [B, n]
            return _scattered(weights, rows, segment.layout.length)

        return tuple(expand(i, weights) for i, weights in zip(self.layers, maps, strict=False))


def _scattered(rows: Tensor, index: Tensor, length: int) -> Tensor:
    """Rows `[B, H, n, D]` at the places `index` `[B, n]` (negative: nowhere) among `length`, and zeros elsewhere."""
    batch, heads, n, width = rows.shape
    places = (index.clamp(min=-1) + 1)[:, None, :, None].expand(batch, heads, n, width)
    return rows.new_zeros(batch, heads, length + 1, width).scatter(2, places, rows)[:, :, 1:]
