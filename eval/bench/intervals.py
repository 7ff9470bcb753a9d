"""How often 95% intervals lie above and below the truth, by simulation: 2.5% of the time each, if they are right.

    python eval/bench/intervals.py --trials 1000

Answers are drawn for images that differ in difficulty, several questions an image; a second system loses some of what
the first has right. `eval/metrics.py` is compared with the percentile bootstrap over images; prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from latefusion.eval import metrics

RESAMPLES = 999


@dataclass(frozen=True)
class Case:
    """A population: `images` of `questions` each; the first system is right at `rate`, the second loses `lost` of that
    and wins `won` of the rest; the smaller `alike`, the more alike are the questions about one image."""

    images: int
    questions: int
    rate: float
    lost: float
    won: float
    alike: float

    @property
    def difference(self) -> float:
        """True difference in accuracy, second system minus first."""
        return (1 - self.rate) * self.won - self.rate * self.lost

    def draw(self, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
        """Scores of both systems, `[images * questions]` each."""
        first = self._events(rng, self.rate)
        second = np.where(first, ~self._events(rng, self.lost), self._events(rng, self.won))
        return first.ravel().astype(float), second.ravel().astype(float)

    def _events(self, rng: np.random.Generator, rate: float) -> NDArray:
        if not 0 < rate < 1:
            return np.full((self.images, self.questions), rate >= 1)
        chances = rng.beta(rate * self.alike, (1 - rate) * self.alike, self.images)
        return rng.random((self.images, self.questions)) < chances[:, None]


CASES = (
    Case(200, 4, 0.998, 0.002, 0.3, 20),
    Case(200, 4, 0.998, 0.005, 0.3, 20),
    Case(200, 4, 0.998, 0.01, 0.3, 5),
    Case(800, 1, 0.998, 0.006, 0.3, 1000),
    Case(50, 10, 0.998, 0.005, 0.3, 5),
    Case(100, 15, 0.997, 0.004, 0.5, 3),
    Case(200, 4, 0.99, 0.03, 0.3, 5),
    Case(60, 8, 0.9, 0.1, 0.0, 5),
    Case(400, 2, 0.6, 0.1, 0.15, 5),
)


def bootstrap(values: NDArray, images: NDArray, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile interval of a mean over whole images."""
    sums, sizes = np.bincount(images, weights=values), np.bincount(images)
    counts = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)  # [R, images]
    low, high = np.quantile((counts @ sums) / (counts @ sizes), [0.025, 0.975])
    return float(low), float(high)


def intervals(case: Case, rng: np.random.Generator) -> Iterator[tuple[str, float, tuple[float, float]]]:
    """Name, truth and interval of each method on one draw."""
    first, second = case.draw(rng)
    images = np.repeat(np.arange(case.images), case.questions)
    accuracy = metrics.accuracy(first.tolist(), images.tolist())
    yield "accuracy", case.rate, (accuracy.low, accuracy.high)
    yield "accuracy, bootstrap", case.rate, bootstrap(first, images, rng)
    gap = metrics.paired(second.tolist(), first.tolist(), images.tolist()).difference
    yield "difference", case.difference, (gap.low, gap.high)
    yield "difference, bootstrap", case.difference, bootstrap(second - first, images, rng)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=1000)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    for number, case in enumerate(track(CASES, console=Console(stderr=True))):
        misses: dict[str, list[int]] = {}
        for _ in range(options.trials):
            for name, truth, (low, high) in intervals(case, rng):
                above, below = misses.get(name, [0, 0])
                misses[name] = [above + (low > truth), below + (high < truth)]
        if number == 0:
            heads = ["images x questions", "accuracy, %", "difference, points", *misses]
            print("| " + " | ".join(heads) + " |\n| --- |" + " ---: |" * (len(heads) - 1))
        shares = [", ".join(f"{100 * n / options.trials:.1f}" for n in sides) for sides in misses.values()]
        size, gap = f"{case.images} x {case.questions}", f"{100 * case.difference:+.2f}"
        print("| " + " | ".join([size, f"{100 * case.rate:.1f}", gap, *shares]) + " |", flush=True)


if __name__ == "__main__":
    main()
