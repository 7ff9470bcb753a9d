"""From measurements to a schedule: where vision enters, where it leaves, how few tokens are kept in between.

Each function makes one decision from numbers; `study.py` measures them and calls these in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np

from latefusion.eval.fusion.plan import (
    APART,
    KEEP_LAYERS,
    KEEP_SHARES,
    NEAR,
    PROBES,
    SPREAD,
    STEPS,
    TRIES,
    UNSEEN,
)
from latefusion.models.schedule import VisionSchedule


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The limits that a schedule is chosen within.

    Attributes:
        bound: nats of KL per answer token that the schedule may cost, its entry and keeps included: the upper limit of
            the mean over confirming prompts (`effects.upper_limit`) stays within it.
        budget: share of dense decoder FLOPs; None: as few as the bound allows.
        by_hand: a schedule that is measured beside the chosen one.
        cross: choose the layers that text reads frozen vision tokens in, too.
    """

    bound: float = 0.05
    budget: float | None = None
    by_hand: VisionSchedule | None = None
    cross: bool = False


@dataclass(frozen=True)
class Point:
    """A schedule that was carried out on every sample.

    Attributes:
        calibrated: whether vision tokens entered through the calibrated entry.
        flops: of the decoder's prefill, as a share of dense (`VisionSchedule.flops`).
        kl: nats per answer token, mean over samples, with its 95% interval.
        accuracy: share of samples whose whole answer is right, None without labels.
    """

    schedule: VisionSchedule
    calibrated: bool
    flops: float
    kl: float
    low: float
    high: float
    accuracy: float | None

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "schedule": self.schedule.to_dict()}


@dataclass(frozen=True)
class Rung:
    """A schedule on the ladder from few FLOPs to many, and its effect on the confirming prompts.

    Attributes:
        limit: upper limit of the mean KL; never below that of the band alone, since a keep cannot add what it removes.
    """

    schedule: VisionSchedule
    calibrated: bool
    flops: float
    kl: list[float]
    right: list[bool]
    limit: float


def measured(values: Sequence[Any]) -> list[Any]:
    """Without the samples that a measurement left out."""
    return [value for value in values if value is not None]


# ---------------------------------------------------------------- the band


def latest(kl: Sequence[float], bound: float) -> int:
    """The last a for which all of `kl[0..a]` are within the bound; 0 if not even that of a = 0 is."""
    a = 0
    while a + 1 < len(kl) and kl[a + 1] <= bound:
        a += 1
    return a


def earliest(kl: Sequence[float], bound: float) -> int:
    """The first b for which all of `kl[b..]` are within the bound; the last index if not even its own is."""
    b = len(kl) - 1
    while b > 0 and kl[b - 1] <= bound:
        b -= 1
    return b


def near_bands(enter: int, exit_layer: int, layers: int) -> list[tuple[int, int]]:
    """The band that each end alone allows and those up to NEAR layers wider: both ends at once may cost more."""
    enters = range(max(0, enter - NEAR), min(enter, layers - 1) + 1)
    exits = range(max(exit_layer, 1), min(layers, max(exit_layer, enter + 1) + NEAR) + 1)
    return [(a, b) for a, b in product(enters, exits) if a < b]


def cheapest_bands(
    kl: Mapping[tuple[int, int], float], bound: float, flops: Callable[[VisionSchedule], float], layers: int
) -> list[tuple[int, int]]:
    """Up to TRIES bands within the bound, cheapest first; if there are none, the one of least KL."""
    within = [band for band, value in kl.items() if value <= bound]
    if not within:
        return [min(kl, key=lambda band: (kl[band], band))]
    within.sort(key=lambda band: (flops(band_schedule(band[0], band[1], layers)), kl[band], band))
    return within[:TRIES]


def band_schedule(
    enter: int, exit_layer: int, layers: int, keep: Mapping[int, int] | None = None
) -> VisionSchedule:
    return VisionSchedule(enter=enter, exit=None if exit_layer == layers else exit_layer, keep=keep or {})


# ---------------------------------------------------------------- keeps


def keep_layers(enter: int, exit_layer: int, most: int = KEEP_LAYERS) -> list[int]:
    """Layers of the band where a keep may begin, at most `most` of them; a band of one layer has none."""
    inside = list(range(enter + 1, exit_layer))
    n = min(most, len(inside))
    return sorted({inside[round(i * (len(inside) - 1) / max(n - 1, 1))] for i in range(n)})


def keep_sizes(n_vision: int) -> list[int]:
    """Numbers of tokens that a keep may hold, in descending order."""
    return sorted({max(1, -(-n_vision // share)) for share in KEEP_SHARES} - {n_vision}, reverse=True)


def unseen(band: tuple[int, int], layer: int, share: float) -> float:
    """In parts of the bound, what a keep of a share of the tokens is expected to cost at least.

    The samples may lack the few prompts that a keep costs anything. Gentler keeps are expected to cost less, so the
    ladder goes on up to them.
    """
    return UNSEEN * (1 / share - 1) * (band[1] - layer) / (band[1] - band[0])


def pyramids(
    table: Mapping[tuple[int, int], float], flops: Callable[[Mapping[int, int]], float]
) -> list[tuple[float, float, dict[int, int]]]:
    """Pyramids of up to STEPS keeps that no other beats in both FLOPs and expected cost, cheapest first.

    Args:
        table: what `{layer: k}` alone costs in nats; a pyramid is expected to cost the sum of its keeps.
        flops: of a pyramid.

    Returns:
        FLOPs, expected cost, and the pyramid.
    """
    every = [(flops(keep), sum(table[step] for step in keep.items()), keep) for keep in every_pyramid(table)]
    every.sort(key=lambda entry: (entry[0], entry[1], tuple(entry[2].items())))
    front, least = [], float("inf")
    for entry in every:
        if entry[1] < least:
            front.append(entry)
            least = entry[1]
    return front


def every_pyramid(steps: Collection[tuple[int, int]]) -> Iterator[dict[int, int]]:
    """Up to STEPS of the keeps `(layer, k)` together, fewer tokens in each later layer."""
    layers = sorted({layer for layer, _ in steps})
    for n in range(1, STEPS + 1):
        for chosen in combinations(layers, n):
            sizes = [[k for at, k in steps if at == layer] for layer in chosen]
            for ks in product(*sizes):
                if all(a > b for a, b in pairwise(ks)):
                    yield dict(zip(chosen, ks, strict=True))


def ladder(front: Sequence[tuple[float, float, dict[int, int]]]) -> list[tuple[float, dict[int, int]]]:
    """Expected cost and pyramid of those of the front that are at least APART in FLOPs, cheapest first.

    Of pyramids closer than that the dearest is a rung: it saves almost as much as the others and costs least.
    """
    rungs: list[tuple[float, float, dict[int, int]]] = []
    for rung in reversed(front):
        if not rungs or APART * rung[0] <= rungs[-1][0]:
            rungs.append(rung)
    return [(cost, keep) for _, cost, keep in reversed(rungs)]


def spread(n: int, most: int = SPREAD) -> list[int]:
    """At most `most` indices of `range(n)`, evenly spread, both ends included."""
    most = min(most, n)
    return sorted({round(i * (n - 1) / max(most - 1, 1)) for i in range(most)})


def descend(n: int, start: int, within: Callable[[int], bool]) -> None:
    """Look for the cheapest of the rungs 0 to n-1 that is within, from `start` on; at most PROBES tries.

    What is expected of all rungs may be too high or too low together: steps double, to cheaper rungs while they are
    within or to dearer ones until one is, and are then halved between the last that is within and the last that is not.
    """
    at, step = min(start, n - 1), 1
    beyond, holds = -1, n  # the dearest that is not within, the cheapest that is
    for _ in range(PROBES):
        if not beyond < at < holds:
            return
        if within(at):
            holds = at
        else:
            beyond = at
        if beyond < 0:
            at, step = max(holds - step, 0), 2 * step
        elif holds == n:
            at, step = min(beyond + step, n - 1), 2 * step
        else:
            at = (beyond + holds) // 2


# ---------------------------------------------------------------- the choice


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both FLOPs and KL, cheapest first."""
    front: list[Point] = []
    least = float("inf")
    for point in sorted(points, key=lambda p: (p.flops, p.kl, p.schedule.to_dict()["enter"])):
        if point.kl < least:
            front.append(point)
            least = point.kl
    return front


def choose(rungs: Sequence[Rung], bound: float, budget: float | None) -> tuple[Rung, str]:
    """The schedule to recommend, and the reason in one sentence.

    Args:
        rungs: the bands and pyramids that were confirmed.
        bound: in nats; without a budget the cheapest rung whose limit is within it is taken.
        budget: share of dense FLOPs; with it the rung of least KL within it is taken.
    """
    if budget is None:
        within = [rung for rung in rungs if rung.limit <= bound]
        if within:
            return (
                min(within, key=lambda rung: (rung.flops, rung.limit)),
                f"the fewest FLOPs with an upper limit of the KL of at most {bound:g} nats",
            )
        return (
            min(rungs, key=lambda rung: (rung.limit, rung.flops)),
            f"the lowest upper limit of the KL, as no schedule stays within the bound of {bound:g} nats",
        )
    affordable = [rung for rung in rungs if rung.flops <= budget]
    if affordable:
        rung = min(affordable, key=lambda rung: (rung.limit, np.mean(rung.kl), rung.flops))
        beyond = (
            "" if rung.limit <= bound else f", though its upper limit is beyond the bound of {bound:g} nats"
        )
        return rung, f"the lowest upper limit of the KL at no more than {budget:.0%} of dense FLOPs{beyond}"
    return (
        min(rungs, key=lambda rung: (rung.flops, rung.limit)),
        f"the fewest FLOPs, as no schedule of this band meets the budget of {budget:.0%}; raise the bound",
    )
