"""Knock-outs: what answers lose when vision reaches text in fewer layers, or is computed in fewer.

L layers have about 5 L knock-outs. A forward for each would cost 4 to 5 L prefills, so runs share the layers before
they part: `single i` and `suffix i` are the dense model before layer i, and `prefix a` hides vision in every layer
before a. Each is computed from there on, half the layers on average.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain

from torch import Tensor

from latefusion.eval.fusion.blind import Key, Runner, Runs, cheapest_runs
from latefusion.eval.fusion.effects import Answers, Effect

KINDS = ("prefix", "suffix", "single", "frozen", "late")
"""The knock-outs, each at a layer (`[0, a)`, `[b, L)`: half-open, counted from 0):

- prefix a: text does not see vision in [0, a); vision tokens are computed as always.
- suffix b: text does not see vision in [b, L).
- single i: text does not see vision in layer i.
- frozen a: vision tokens skip attention and MLP in [0, a); text sees them as the projector made them.
- late a: both: text sees no vision before a, where the projector's output enters (`VisionSchedule(enter=a)`).
"""


def knock_outs(layers: int) -> list[Key]:
    """All `(kind, layer)` of a decoder without those that would repeat another or the dense model.

    `prefix L` (text never sees vision) is also `suffix 0`; `single 0` is `prefix 1`; `single L-1` is `suffix L-1`.
    """
    keys = [("prefix", a) for a in range(1, layers + 1)]
    keys += [("suffix", b) for b in range(1, layers)]
    keys += [("single", i) for i in range(1, layers - 1)]
    return keys + [(kind, a) for kind in ("frozen", "late") for a in range(1, layers)]


def effects(runner: Runner, keys: Collection[Key]) -> tuple[Effect, dict[Key, Effect]]:
    """The effect of each knock-out on a batch, and before it that of no change (`kl` 0, the dense model's `right`)."""
    dense, reference, runs = cheapest_runs(runner)
    answers = chain(blinded(runs, keys), runs.late_and_frozen(keys))
    return dense.effect(dense), {key: reference.effect(changed) for key, changed in answers}


def band_effects(
    runner: Runner, pairs: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Effect]]:
    """The effect on a batch of text that sees vision only in the layers [a, b)."""
    _, reference, runs = cheapest_runs(runner)
    for pair, changed in bands(runs, pairs):
        yield pair, reference.effect(changed)


def reading_effects(
    runner: Runner, sets: Sequence[Collection[int]]
) -> Iterator[tuple[Collection[int], Effect]]:
    """The effect on a batch of text that sees vision only in these layers, for each set of them."""
    _, reference, runs = cheapest_runs(runner)
    for read in sets:
        hidden = [i for i in range(runs.layers) if i not in read]
        yield read, reference.effect(runs.answers(hidden, 0, None))


def blinded(runs: Runs, keys: Collection[Key]) -> Iterator[tuple[Key, Answers]]:
    """The answers under the knock-outs `prefix`, `suffix` and `single` among `keys`, layer by layer."""
    n = runs.layers
    dense: Tensor | None = None  # the input of layer i of the dense model
    blind: Tensor | None = None  # of text that has not seen vision so far
    for i in range(n):
        if ("prefix", i) in keys:
            yield ("prefix", i), runs.answers((), i, blind)
        if ("suffix", i) in keys:
            yield ("suffix", i), runs.answers(range(i, n), i, dense)
        if ("single", i) in keys:
            yield ("single", i), runs.answers((i,), i, dense)
        if i < n - 1:
            dense = runs.state((), i, dense, i + 1)
            blind = runs.state((i,), i, blind, i + 1)
    if ("prefix", n) in keys:
        yield ("prefix", n), runs.answers((n - 1,), n - 1, blind)


def bands(runs: Runs, pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Answers]]:
    """The answers of text that sees vision only in the layers [a, b), from the earliest entry to the latest."""
    n, start = runs.layers, 0
    blind: Tensor | None = None  # the input of layer `start` of text that has not seen vision
    for a in sorted({a for a, _ in pairs}):
        if a > start:
            blind = runs.state(range(start, a), start, blind, a)
            start = a
        state, reached = blind, a
        for b in sorted(b for enter, b in pairs if enter == a):
            if b < n:
                state, reached = runs.state((), reached, state, b), b
                yield (a, b), runs.answers(range(b, n), b, state)
            else:
                yield (a, b), runs.answers((), reached, state)
