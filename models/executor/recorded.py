"""`Recorded`: what a forward reports of every layer (`output_hidden_states`), brought to full length."""

from __future__ import annotations

from torch import Tensor

from latefusion.models.executor.segment import Segment


class Recorded:
    """The segments of a forward's layers, kept to expand what the stock model recorded inside them."""

    def __init__(self) -> None:
        self.segments: list[
            tuple[Segment, Tensor | None]
        ] = []  # of each layer, with `full` as the layer began
        self.full_length: list[Tensor] = []  # outputs that were handed to the model at full length

    def enter(self, segment: Segment) -> None:
        """Before each layer."""
        self.segments.append((segment, segment.full))

    def hidden_states(self, states: tuple[Tensor | None, ...], last: Tensor) -> tuple[Tensor | None, ...]:
        """Recorded hidden states (input of layer 0, outputs of all layers) at full length.

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

        steps = [self.segments[0], *self.segments]
        return tuple(expand(state, *step) for state, step in zip(states, steps, strict=True))
