"""Ways through the decoder that begin alike: what a knock-out shares with the layers before it is computed once.

For L layers, a forward for each of the 5 L knock-outs would cost 4 to 5 L prefills. But `single i` and `suffix i` are
the dense model before layer i, and `prefix a` is what was hidden throughout before layer a: each is computed from
there on, half the layers on average.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from latefusion.eval.fusion.answers import Answers

Key = tuple[str, int]  # kind and layer of a knock-out


class Way(Protocol):
    """Runs layers of one model over one batch, from the input of layer `first` (`state`; None: layer 0's own).

    Text does not see vision in the layers `hidden`.
    """

    layers: int

    def part(self, hidden: Collection[int], first: int, state: Tensor | None, last: int) -> Tensor:
        """The input of layer `last`, `[B, T, D]`."""

    def answers(self, hidden: Collection[int], first: int, state: Tensor | None) -> Answers:
        """The answers."""

    def entering(self, wanted: Sequence[Key]) -> Iterator[tuple[Key, Answers]]:
        """The knock-outs `late` and `frozen` of `wanted`."""


def blinded(way: Way, wanted: Sequence[Key]) -> Iterator[tuple[Key, Answers]]:
    """The knock-outs `prefix`, `suffix` and `single` of `wanted`, layer by layer."""
    n = way.layers
    dense: Tensor | None = None
    blind: Tensor | None = None
    for i in range(n):
        if ("prefix", i) in wanted:
            yield ("prefix", i), way.answers((), i, blind)
        if ("suffix", i) in wanted:
            yield ("suffix", i), way.answers(range(i, n), i, dense)
        if ("single", i) in wanted:
            yield ("single", i), way.answers((i,), i, dense)
        if i < n - 1:
            dense = way.part((), i, dense, i + 1)
            blind = way.part((i,), i, blind, i + 1)
    if ("prefix", n) in wanted:
        yield ("prefix", n), way.answers((n - 1,), n - 1, blind)


def bands(way: Way, pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Answers]]:
    """Text sees vision in the layers [a, b) alone."""
    n, at = way.layers, 0
    blind: Tensor | None = None
    for a in sorted({a for a, _ in pairs}):
        if a > at:
            blind = way.part(range(at, a), at, blind, a)
            at = a
        state, reached = blind, a
        for b in sorted(b for enter, b in pairs if enter == a):
            if b < n:
                state, reached = way.part((), reached, state, b), b
                yield (a, b), way.answers(range(b, n), b, state)
            else:
                yield (a, b), way.answers((), reached, state)
