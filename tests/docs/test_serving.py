"""The tables of docs/serving.md are what the files of docs/results say."""

import json
import math
import re
import statistics
from pathlib import Path

from latefusion.eval.bench.serving import interval

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/serving.md").read_text()


def numbers(first_cell):
    """The numbers of the table's row that begins so, cell by cell."""
    (row,) = re.findall(rf"^\| {re.escape(first_cell)} \|(.*)\|$", PAGE, flags=re.MULTILINE)
    return [[float(number) for number in re.findall(r"[\d.]+", cell)] for cell in row.split("|")]


def test_seconds_and_speed_ups_are_those_of_the_benchmark():
    systems = json.loads((ROOT / "docs/results/serving_cpu.json").read_text())["systems"]
    stock = [math.log(value) for value in systems["stock"]["first_token"]]
    rows = {"stock": "stock vLLM, dense", "dense": "the plug-in, dense"}
    rows |= {"band": "band 4–10", "cross": "`cross=[4, 6, 8, 10]`"}
    for name, cell in rows.items():
        values = systems[name]["first_token"]
        (mean, low, high), speed_up, (step,) = numbers(cell)
        assert math.isclose(mean, statistics.mean(values), abs_tol=0.006)
        assert all(
            math.isclose(a, b, abs_tol=0.006) for a, b in zip((low, high), interval(values), strict=True)
        )
        assert math.isclose(step, statistics.median(systems[name]["decoding_step"]), abs_tol=0.0006)
        if name != "stock":
            logs = [math.log(value) for value in values]
            ratio = statistics.mean(stock) - statistics.mean(logs)
            spread = math.sqrt((statistics.variance(stock) + statistics.variance(logs)) / len(logs))
            expected = [math.exp(ratio + t * spread) for t in (0, -2.447, 2.447)]  # of 6 degrees of freedom
            assert all(math.isclose(a, b, abs_tol=0.006) for a, b in zip(speed_up, expected, strict=True))


def test_the_differences_named_are_the_worst_of_the_file():
    worst = json.loads((ROOT / "docs/results/served_differences.json").read_text())["worst"]
    for rows, text in (
        (r"executor\[band-", "for the band"),
        (r"executor\[cross-", "for `cross`"),
        (r"\[mistral-", "for Mistral"),
        (r"", "in all of the table"),
    ):
        expected = max(value for name, value in worst.items() if re.search(rows, name))
        assert f"{expected:.1e}".replace("e-0", "e-") + f" {text}" in " ".join(PAGE.split())


def test_the_interval_is_students():
    low, high = interval([1.0, 2.0, 3.0])
    assert math.isclose(low, 2 - 4.303 / 3**0.5, abs_tol=1e-3) and math.isclose(
        high, 2 + 4.303 / 3**0.5, abs_tol=1e-3
    )
    assert interval([1.0]) is None
