"""Where text has to read vision tokens that no layer computes: few layers for `schedule.cross`.

Layers are given up in the order of what text misses when it sees no vision in that layer alone. How far that may go is
measured with all of them hidden together: a layer that costs nothing alone may stand in for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latefusion.eval.fusion.decide import measured

WIDER = 1.2  # each set has about this many times the layers of the next smaller one
CONFIRMED = 6  # sets that the confirming prompts are asked about at most
LEAST = 1e-6  # nats; what is below is rounding
START = 0.5  # of the bound: what the samples may lose by the set that the confirming prompts begin with


def by_need(effects: Mapping[str, Any], layers: int) -> list[int]:
    """All layers, least needed first: by the KL of text that sees no vision in that layer alone.

    It is the samples' geometric mean: a few samples carry most of an arithmetic one, and order the layers by their own
    need. Layer 0 comes first whatever it costs: where it reads, nothing can be calibrated before it, so a student has
    neither entry nor maps, and its tokens stay the projector's in all layers.

    Args:
        effects: `kl` of each sample under the knock-outs `KIND LAYER`.
        layers: of the decoder, two or more.
    """
    keys = [*(f"single {i}" for i in range(1, layers - 1)), f"suffix {layers - 1}"]  # of layers 1, 2, ...
    cost = [float(np.log(np.maximum(measured(effects[key]["kl"]), LEAST)).mean()) for key in keys]
    return [0, *sorted(range(1, layers), key=lambda i: cost[i - 1])]


def nested_sets(order: Sequence[int]) -> list[tuple[int, ...]]:
    """Layers that read, the most needed alone first and all of `order` last; each set holds those before it."""
    sizes = [len(order)]
    while sizes[-1] > 1:
        sizes.append(min(sizes[-1] - 1, round(sizes[-1] / WIDER)))
    return [tuple(sorted(order[-size:])) for size in reversed(sizes)]


def to_confirm(sets: Sequence[tuple[int, ...]], kl: Sequence[float], bound: float) -> list[tuple[int, ...]]:
    """The sets that other prompts are asked about: one smaller than what the samples allow, that, and larger ones.

    The samples allow what costs little more than the best of the sets without the layer given up first: all of them
    pay for that one.

    Args:
        kl: mean of the samples under each set, in nats.
        bound: on the mean.
    """
    most = min(kl[:-1], default=0.0) + START * bound
    at = next((i for i, value in enumerate(kl) if value <= most), len(sets) - 1)
    first = max(0, min(at - 1, len(sets) - CONFIRMED))
    return list(sets[first : first + CONFIRMED])
