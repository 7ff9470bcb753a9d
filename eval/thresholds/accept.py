"""Accept a setting on prompts that did not choose it: the least of many noisy means is too low.

A few prompts hold most of the KL, so the setting that is cheapest on the prompts of the search often costs more on
others. What is accepted is the upper limit of its mean KL on other prompts (`effects.upper_limit`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from latefusion.eval.fusion.effects import upper_limit

START = 0.7  # of the bound: what the first setting that is tried may cost on the prompts of the search
STEP = 0.01  # the second setting has so much more FLOPs than the first, or more; after each the step doubles
TRIES = 6  # settings tried at most: each has its own chance to be accepted by luck


@dataclass(frozen=True)
class Accepted:
    """The setting that was accepted, and the settings tried.

    Attributes:
        setting: its number; None if every setting tried is beyond the bound, or none was found.
        limits: the upper limit of the mean KL of each setting tried, in that order.
    """

    setting: int | None
    limits: dict[int, float] = field(default_factory=dict)


def accept(
    best: Callable[[float, float], int | None],
    kl: Callable[[int], NDArray],
    flops: Callable[[int], float],
    bound: float,
    images: Sequence[Hashable] | None = None,
) -> Accepted:
    """The first setting whose limit on the confirming prompts stays within the bound, from few FLOPs to more.

    Args:
        best: the setting of nearly the least FLOPs whose KL on the prompts of the search is at most the first number,
            among those of at least the second in FLOPs; None if no setting is.
        kl: of the confirming prompts under a setting: of all of them, or of the first ones, if their sum alone puts
            the mean over all beyond the bound.
        flops: of a setting, as a share of dense.
        images: what each confirming prompt is about; None: no two share an image.
    """
    limits: dict[int, float] = {}
    least = 0.0
    for tried in range(TRIES):
        setting = best(START * bound, least)
        if setting is None:
            break
        values = np.asarray(kl(setting)).tolist()
        limits[setting] = upper_limit(values, None if images is None else images[: len(values)])
        if limits[setting] <= bound:
            return Accepted(setting, limits)
        least = (1 + STEP * 2**tried) * flops(setting)
    return Accepted(None, limits)
