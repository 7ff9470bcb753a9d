"""`Scores`: the numbers of all settings so far, and which settings they rule out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from latefusion.eval.thresholds.choose import NEARLY, nearly_cheapest
from latefusion.eval.thresholds.replay import Outcome

PROBES = 8  # settings that look good after the first batch, tried together until one is under the bound
EXACT = 1e-9  # relative; sums of floats in another order are equal


class Scores:
    """What each setting did to each prompt so far.

    Args:
        floors: lower bound of each setting's FLOPs on each prompt, `[settings, N]`.
        dense: FLOPs of each prompt's dense prefill, `[N]`.
        boundaries: of each setting, `[settings]`.

    Attributes:
        columns: a setting's numbers on a prompt, `[settings, N]` each; NaN where it did not run.
        bound: on a setting's mean KL.
        least: FLOPs against dense that a setting has to have.
    """

    def __init__(self, floors: NDArray, dense: NDArray, boundaries: Sequence[int]):
        self.floors, self.dense, self.boundaries = floors, dense, np.asarray(boundaries)
        empty = partial(np.full, floors.shape, np.nan)
        self.columns: dict[str, NDArray] = {name: empty() for name in Outcome.__annotations__}
        self.bound, self.least = np.inf, 0.0

    def chosen(self) -> int | None:
        """Of the settings that ran on all prompts and have `least` FLOPs, the `nearly_cheapest` within the bound."""
        kl, flops = np.nansum(self.columns["kl"], 1), self.least_flops()
        known = np.where(self.ran().all(1) & (flops >= self.least), kl, np.inf)
        return nearly_cheapest(known, flops, self.most, self.boundaries)

    def ran(self) -> NDArray[np.bool_]:
        """Which settings ran on which prompts, bool `[settings, N]`."""
        return ~np.isnan(self.columns["kl"])

    def best(self) -> float:
        """The FLOPs, against dense, of the cheapest setting that ran on all prompts and is under the bound."""
        flops = self.least_flops()
        whole = self.ran().all(1) & (np.nansum(self.columns["kl"], 1) <= self.most) & (flops >= self.least)
        return min(flops[whole], default=np.inf)

    @property
    def most(self) -> float:
        """Upper limit of the summed KL of all prompts."""
        return self.bound * self.floors.shape[1] * (1 + EXACT)

    def least_flops(self) -> NDArray:
        """Lower bound of each setting's FLOPs, against dense: exact where it ran."""
        flops = np.where(self.ran(), self.columns["flops"], self.floors)
        return (flops / self.dense).mean(1)

    def alive(self) -> NDArray[np.bool_]:
        """The settings that are neither known to the end nor ruled out."""
        under = np.nansum(self.columns["kl"], 1) <= self.most
        flops, best, chosen = self.least_flops(), self.best() * (1 + EXACT), self.chosen()
        better = flops <= best  # than the cheapest that is known, or than the one that is chosen beside it
        if chosen is not None:
            later = self.boundaries > self.boundaries[chosen]
            same = (self.boundaries == self.boundaries[chosen]) & (flops <= flops[chosen] * (1 + EXACT))
            better |= (later | same) & (flops <= NEARLY * best)
        return ~self.ran().all(1) & under & better

    def promising(self) -> NDArray[np.bool_]:
        """The settings to try next: the cheapest of those that are under the bound so far, or the nearest to it."""
        alive = np.flatnonzero(self.alive())
        kl = np.nanmean(self.columns["kl"][alive], 1)
        first = np.lexsort((self.least_flops()[alive], np.maximum(kl, self.bound)))[:PROBES]
        return np.isin(np.arange(len(self.floors)), alive[first])
