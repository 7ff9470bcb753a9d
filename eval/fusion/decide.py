"""From effects to a schedule: where vision enters, where it leaves, how few tokens are kept in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from typing import Any

from latefusion.models.schedule import VisionSchedule

NEAR = 3  # layers that the joint band may be wider than each end alone asks for, on either side
BANDS = (NEAR + 1) ** 2 + NEAR * (
    NEAR + 1
) // 2  # measured jointly at most: the second part where exit <= enter
KEEP_LAYERS = 6  # of the band, evenly spread, where a keep may begin
KEEP_SHARES = (2, 4, 8, 16, 32)  # parts of the vision tokens that a keep may be one of
STEPS = 3  # keeps in a pyramid at most
SPREAD = 4  # pyramids measured along the front of those that promise most, whatever the bound
PROBES = 6  # and more of it where the bound or the budget is met
TRIES = 3  # bands within the bound whose calibrated entry is measured


@dataclass(frozen=True)
class Point:
    """A schedule that was carried out on every sample.

    Attributes:
        calibrated: whether vision tokens entered through the calibrated entry.
        flops: of the decoder's prefill, in parts of dense (`VisionSchedule.flops`).
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


def latest(kl: Sequence[float], bound: float) -> int:
    """The last a of `kl[0..a]` that are all within the bound; 0 if none is."""
    a = 0
    while a + 1 < len(kl) and kl[a + 1] <= bound:
        a += 1
    return a


def earliest(kl: Sequence[float], bound: float) -> int:
    """The first b of `kl[b..]` that are all within the bound; the last index if none is."""
    b = len(kl) - 1
    while b > 0 and kl[b - 1] <= bound:
        b -= 1
    return b


def near_bands(enter: int, exit_layer: int, layers: int) -> list[tuple[int, int]]:
    """Bands as narrow as each end alone allows, and up to NEAR layers wider: both ends hidden at once may cost more."""
    enters = range(max(0, enter - NEAR), min(enter, layers - 1) + 1)
    exits = range(max(exit_layer, 1), min(layers, max(exit_layer, enter + 1) + NEAR) + 1)
    return [(a, b) for a, b in product(enters, exits) if a < b]


def cheapest_bands(
    kl: Mapping[tuple[int, int], float], bound: float, flops: Callable[[VisionSchedule], float], layers: int
) -> list[tuple[int, int]]:
    """The bands within the bound, cheapest first, TRIES at most; or, if none is, the one of least KL."""
    within = [band for band, value in kl.items() if value <= bound]
    if not within:
        return [min(kl, key=lambda band: (kl[band], band))]
    within.sort(key=lambda band: (flops(band_schedule(band[0], band[1], layers)), kl[band], band))
    return within[:TRIES]


def band_schedule(
    enter: int, exit_layer: int, layers: int, keep: Mapping[int, int] | None = None
) -> VisionSchedule:
    return VisionSchedule(enter=enter, exit=None if exit_layer == layers else exit_layer, keep=keep or {})


def keep_layers(enter: int, exit_layer: int, most: int = KEEP_LAYERS) -> list[int]:
    """Layers of the band where a keep may begin, at most `most`; none in a band of one layer."""
    inside = list(range(enter + 1, exit_layer))
    n = min(most, len(inside))
    return sorted({inside[round(i * (len(inside) - 1) / max(n - 1, 1))] for i in range(n)})


def keep_sizes(n_vision: int) -> list[int]:
    """Numbers of tokens that a keep may hold, descending."""
    return sorted({max(1, -(-n_vision // share)) for share in KEEP_SHARES} - {n_vision}, reverse=True)


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
    layers = sorted({layer for layer, _ in table})
    found: list[tuple[float, float, dict[int, int]]] = []
    for n in range(1, STEPS + 1):
        for chosen in combinations(layers, n):
            sizes = [[k for at, k in table if at == layer] for layer in chosen]
            for ks in product(*sizes):
                if all(a > b for a, b in pairwise(ks)):
                    keep = dict(zip(chosen, ks, strict=True))
                    found.append((flops(keep), sum(table[step] for step in keep.items()), keep))
    found.sort(key=lambda entry: (entry[0], entry[1], tuple(entry[2].items())))
    front, least = [], float("inf")
    for entry in found:
        if entry[1] < least:
            front.append(entry)
            least = entry[1]
    return front


def spread(n: int, most: int = SPREAD) -> list[int]:
    """At most `most` of n, evenly spread, both ends among them."""
    most = min(most, n)
    return sorted({round(i * (n - 1) / max(most - 1, 1)) for i in range(most)})


def bisect(n: int, guess: int, within: Callable[[int], bool]) -> int:
    """The least index of `range(n)` that is within, if those after it are, too; n if none is. PROBES tries at most."""
    low, high, at = -1, n, min(guess, n - 1)
    for _ in range(PROBES):
        if high - low <= 1:
            break
        low, high = (low, at) if within(at) else (at, high)
        at = (low + high) // 2
    return high


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both FLOPs and KL, cheapest first."""
    found: list[Point] = []
    least = float("inf")
    for point in sorted(points, key=lambda p: (p.flops, p.kl, p.schedule.to_dict()["enter"])):
        if point.kl < least:
            found.append(point)
            least = point.kl
    return found


def choose(points: Sequence[Point], limit: float, budget: float | None) -> tuple[Point, str]:
    """The schedule to recommend, and in one sentence why.

    Args:
        points: the band and its pyramids, as they would be used.
        limit: the bound, nats; without a budget the cheapest point within it is taken.
        budget: parts of dense FLOPs; given, the point of least KL within it is taken.
    """
    if budget is None:
        within = [p for p in points if p.kl <= limit]
        if within:
            point = min(within, key=lambda p: (p.flops, p.kl))
            return point, f"the fewest FLOPs at a KL of at most {limit:g} nats"
        point = min(points, key=lambda p: (p.kl, p.flops))
        return point, f"the least KL, as no schedule stays within the bound of {limit:g} nats"
    within = [p for p in points if p.flops <= budget]
    if within:
        point = min(within, key=lambda p: (p.kl, p.flops))
        beyond = "" if point.kl <= limit else f", though beyond the bound of {limit:g} nats"
        return point, f"the least KL at no more than {budget:.0%} of dense FLOPs{beyond}"
    return (
        min(points, key=lambda p: (p.flops, p.kl)),
        f"the fewest FLOPs, as no schedule of this band meets the budget of {budget:.0%}; raise the bound",
    )
