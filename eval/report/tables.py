"""One table, three faces: terminal (rich), README (markdown), report (HTML, from the same rows)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, log10
from statistics import mean, stdev
from textwrap import fill
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy import stats

from latefusion.data import escape


@dataclass(frozen=True)
class Row:
    """A line of the results table.

    Attributes:
        group: heading it stands under; label: what is measured.
        cells: one `(value, detail)` a system; the detail is the interval or the ratio to the reference.
    """

    group: str
    label: str
    cells: list[tuple[str, str]]


MANY = 4  # systems that fit beside each other in a terminal
NOTHING = ("–", "")  # not measured


def rows(results: dict[str, Any]) -> list[Row]:
    """The results table: a row a quantity, a cell a system, in the order of `results["systems"]`.

    Tasks whose answers are read from the image come last, apart: pruning hurts them most.
    """
    systems = list(results["systems"].values())
    accuracies = [Row("Accuracy, %", "all questions", [_accuracy(s["accuracy"]["overall"]) for s in systems])]
    tasks = results["data"].get("tasks", {})
    reads = {name for name, task in tasks.items() if task["ocr"]} if len(tasks) > 1 else set()
    for name in sorted(results["data"]["types"], key=lambda name: name in reads):
        group = "Accuracy on text in images, %" if name in reads else "Accuracy, %"
        accuracies.append(Row(group, name, [_accuracy(s["accuracy"]["types"][name]) for s in systems]))
    for name in tasks:
        for measure in systems[0]["tasks"][name]["measures"]:
            cells = [_measure(s["tasks"][name]["measures"][measure]) for s in systems]
            accuracies.append(Row(f"{name}, its own figures", measure, cells))
    costs = [
        Row("Cost", "decoder FLOPs", _amounts([s["flops"] for s in systems])),
        *(
            [Row("Cost", "whole prefill FLOPs", _amounts([s["prefill_flops"] for s in systems]))]
            if all("prefill_flops" in s for s in systems)
            else []
        ),
        Row(
            "Cost",
            "vision tokens/layer",
            [(f"{s['vision_tokens']['mean']:.1f}", times(s["vision_tokens"]["ratio"])) for s in systems],
        ),
        Row("Cost", "time to 1st token", [_seconds(s.get("ttft")) for s in systems]),
        Row("Cost", "time per token", [_seconds(s.get("tpot")) for s in systems]),
        Row("Cost", "KV cache", _amounts([s.get("kv_bytes") for s in systems], "B")),
        Row("Cost", "working memory", _amounts([s.get("working_bytes") for s in systems], "B")),
    ]
    for key, label, unit in (
        ("vision_macs", "vision-only MACs", ""),
        ("vision_attention", "vision-related attention", ""),
        ("peak_bytes", "peak memory", "B"),
        ("joules", "energy an answer", "J"),
    ):
        if all(key in s or s.get("control") for s in systems):
            costs.append(Row("Cost", label, _amounts([s.get(key) for s in systems], unit)))
    return accuracies + costs


def headline(results: dict[str, Any], shown: Callable[[str], str] = str) -> str:
    """The result in one sentence: candidate against reference and baseline, with intervals.

    Args:
        shown: makes text of a name where the sentence stands (`data/escape.py`).
    """
    roles, systems = results["roles"], results["systems"]
    student, pruned = systems[roles["candidate"]], systems[roles["baseline"]]
    score, split = student["accuracy"]["overall"], results["data"]["split"]
    whole = ""
    if "prefill_flops" in student:
        whole = f" ({percent(student['prefill_flops']['ratio'], 0)}% of the whole prefill's, with the vision tower)"
    return (
        f"{shown(student['name'])} answers {percent(score['value'])}% of {score['n']:,} {shown(split)} questions "
        f"[{percent(score['low'])} to {percent(score['high'])}] "
        f"at {percent(student['flops']['ratio'], 0)}% of the dense base's decoder FLOPs{whole}: "
        + _gap(results, "reference", shown)
        + (
            f" and {_gap(results, 'baseline', shown)}, which needs {shares(pruned, digits=0)}."
            if roles["baseline"] not in (roles["reference"], roles["candidate"])
            else "."
        )
    )


def shares(system: dict[str, Any], digits: int = 1) -> str:
    """A system's share of the dense decoder's FLOPs and, where it is known, of the whole prefill's: `32% (41%)`."""
    decoder = f"{percent(system['flops']['ratio'], digits)}%"
    if "prefill_flops" not in system:
        return decoder
    return f"{decoder} ({percent(system['prefill_flops']['ratio'], digits)}%)"


def print_table(results: dict[str, Any], console: Console | None = None) -> None:
    """Print headline and table for a terminal of 80 columns or more."""
    console = console or Console()
    if len(results["systems"]) > MANY:
        console.print(_many(results))
        console.print(headline(results, escape.terminal))
        return
    table = Table(title=_title(results), title_justify="left")
    table.add_column("")
    for system in results["systems"].values():
        table.add_column(escape.terminal(system["name"]), justify="right")
    group = ""
    for row in rows(results):
        if row.group != group:
            if group:
                table.add_section()
            table.add_row(f"[bold]{escape.terminal(row.group)}[/bold]")
            group = row.group
        between = "\n" if console.width < 80 or len(results["systems"]) == MANY else " "
        cells = (f"{value}{between}[dim]{detail}[/dim]" for value, detail in row.cells)
        table.add_row(escape.terminal(row.label), *cells)
    console.print(table)
    console.print(headline(results, escape.terminal))


def _title(results: dict[str, Any]) -> str:
    return f"{escape.terminal(results['title'])}: {results['data']['questions']:,} questions"


def _many(results: dict[str, Any]) -> Table:
    """A line a system, where there are more than fit side by side."""
    table = Table(title=_title(results), title_justify="left")
    table.add_column("")
    whole = all("prefill_flops" in system for system in results["systems"].values())
    for name in (
        "accuracy, %",
        "to dense",
        "FLOPs",
        *(["prefill"] if whole else []),
        "tokens\na layer",
        "1st\ntoken",
    ):
        table.add_column(name, justify="right")
    for key, system in results["systems"].items():
        value, detail = _accuracy(system["accuracy"]["overall"])
        gap = results["against"].get(key)
        table.add_row(
            escape.terminal(system["name"]),
            f"{value} [dim]{detail}[/dim]",
            points(gap["difference"]["value"]) if gap else "",
            times(system["flops"]["ratio"]),
            *([times(system["prefill_flops"]["ratio"])] if whole else []),
            f"{system['vision_tokens']['mean']:.1f}",
            times(system["ttft"]["ratio"]) if "ttft" in system else "–",
            style="dim" if system["control"] else None,
        )
    return table


def markdown(results: dict[str, Any]) -> str:
    """The results table for a README."""
    names = [escape.markdown(system["name"]) for system in results["systems"].values()]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for row in rows(results):
        name = escape.markdown(row.label)
        label = f"accuracy, {name}, %" if row.group.startswith("Accuracy") else name
        lines.append(
            f"| {label} | "
            + " | ".join(f"{value} ({detail})" if detail else value for value, detail in row.cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def seeds(runs: Sequence[dict[str, Any]]) -> str:
    """Runs that differ in their seed as a table: a line each, and their mean with a t interval over the runs."""
    roles = runs[0]["roles"]
    order = [roles["reference"], roles["baseline"], roles["candidate"]]
    names = [escape.markdown(runs[0]["systems"][key]["name"]) for key in order]
    lines = [
        f"| seed | {' | '.join(names)} | against {names[0]} | FLOPs, {names[1]} | FLOPs, {names[2]} |",
        "| --- |" + " ---: |" * 6,
    ]
    gaps = [run["paired"][roles["reference"]]["difference"] for run in runs]
    for run, gap in zip(runs, gaps, strict=True):
        systems = [run["systems"][key] for key in order]
        scores = [
            f"{value} ({detail})" for value, detail in (_accuracy(s["accuracy"]["overall"]) for s in systems)
        ]
        costs = [shares(s) for s in systems[1:]]
        points = f"{_signed(gap['value'])} ({_signed(gap['low'])} to {_signed(gap['high'])})"
        lines.append(f"| {run['settings']['seed']} | {' | '.join(scores)} | {points} | {' | '.join(costs)} |")
    means = [_mean([run["systems"][key]["accuracy"]["overall"]["value"] for run in runs]) for key in order]
    scores = [f"{percent(m)} ({percent(max(0.0, low))}–{percent(min(1.0, high))})" for m, low, high in means]
    middle, low, high = _mean([gap["value"] for gap in gaps])
    points = f"{_signed(middle)} ({_signed(low)} to {_signed(high)})"
    costs = [shares(_mean_system([run["systems"][key] for run in runs])) for key in order[1:]]
    lines.append(f"| mean | {' | '.join(scores)} | {points} | {' | '.join(costs)} |")
    note = (
        "In a seed's row, brackets are 95% intervals over its questions; in the last row, 95% t intervals of the "
        f"mean over the {len(runs)} seeds. FLOPs are the decoder's, against dense"
    )
    whole = "; in brackets the whole prefill's." if "prefill_flops" in runs[0]["systems"][order[2]] else "."
    return "\n".join(lines) + "\n\n" + fill(note + whole, 100, break_on_hyphens=False) + "\n"


def _mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of several runs with a 95% t interval."""
    middle, count = mean(values), len(values)
    if count < 2:
        return middle, float("-inf"), float("inf")
    half = float(stats.t.ppf(0.975, count - 1)) * stdev(values) / count**0.5
    return middle, middle - half, middle + half


def _mean_system(systems: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean FLOPs of several runs of a system."""
    names = [name for name in ("flops", "prefill_flops") if all(name in system for system in systems)]
    return {name: {"ratio": mean(system[name]["ratio"] for system in systems)} for name in names}


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def points(share: float) -> str:
    """A difference of shares in percentage points, signed."""
    return f"{100 * share:+.1f}".replace("-", "−")


def prefix(value: float) -> tuple[float, str]:
    """Size and letter of the decimal prefix that fits `value`."""
    sizes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    return next(((size, letter) for size, letter in sizes if value >= size), (1.0, ""))


def si(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: `1.76 G`."""
    size, letter = prefix(value)
    return f"{value / size:.3g} {letter}{unit}".rstrip()


def _accuracy(score: dict[str, Any]) -> tuple[str, str]:
    return percent(score["value"]), f"{percent(score['low'])}–{percent(score['high'])}"


def _measure(figure: dict[str, Any]) -> tuple[str, str]:
    return f"{figure['value']:.1f}", f"{figure['low']:.1f}–{figure['high']:.1f}"


def _seconds(spread: dict[str, Any] | None) -> tuple[str, str]:
    return NOTHING if spread is None else (f"{1000 * spread['median']:.3g} ms", times(spread["ratio"]))


def _amounts(counts: list[dict[str, Any] | None], unit: str = "") -> list[tuple[str, str]]:
    """Amounts of one row under one decimal prefix, the one of the largest."""
    most = max((count["mean"] for count in counts if count), default=0.0)
    size, letter = prefix(most)
    digits = 2 - min(2, floor(log10(most / size))) if most else 0
    return [
        (f"{c['mean'] / size:.{digits}f} {letter}{unit}".rstrip(), times(c["ratio"])) if c else NOTHING
        for c in counts
    ]


def times(ratio: float | None) -> str:
    return "–" if ratio is None or ratio != ratio else f"{ratio:.2f}×"


def _gap(results: dict[str, Any], role: str, shown: Callable[[str], str]) -> str:
    """`1.2 points above NAME [+0.3 to +2.1]`."""
    key = results["roles"][role]
    gap, name = results["paired"][key]["difference"], shown(results["systems"][key]["name"])
    side = "above" if gap["value"] > 0 else "below" if gap["value"] < 0 else "from"
    return (
        f"{percent(abs(gap['value']))} points {side} {name} [{points(gap['low'])} to {points(gap['high'])}]"
    )
