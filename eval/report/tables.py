"""One table, three faces: terminal (rich), README (markdown), report (HTML, from the same rows)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table


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


def rows(results: dict[str, Any]) -> list[Row]:
    """The results table: a row a quantity, a cell a system, in the order of `results["systems"]`."""
    systems = list(results["systems"].values())
    accuracies = [Row("Accuracy, %", "all questions", [_accuracy(s["accuracy"]["overall"]) for s in systems])]
    for name in results["data"]["types"]:
        accuracies.append(
            Row("Accuracy, %", name, [_accuracy(s["accuracy"]["types"][name]) for s in systems])
        )
    costs = [
        Row("Cost", "decoder FLOPs", _amounts([s["flops"] for s in systems])),
        Row(
            "Cost",
            "vision tokens/layer",
            [(f"{s['vision_tokens']['mean']:.1f}", times(s["vision_tokens"]["ratio"])) for s in systems],
        ),
        Row("Cost", "time to 1st token", [_seconds(s["ttft"]) for s in systems]),
        Row("Cost", "time per token", [_seconds(s["tpot"]) for s in systems]),
        Row("Cost", "KV cache", _amounts([s["kv_bytes"] for s in systems], "B")),
        Row("Cost", "working memory", _amounts([s["working_bytes"] for s in systems], "B")),
    ]
    return accuracies + costs


def headline(results: dict[str, Any]) -> str:
    """The result in one sentence: candidate against reference and baseline, with intervals."""
    roles, systems = results["roles"], results["systems"]
    student, pruned = systems[roles["candidate"]], systems[roles["baseline"]]
    score, split = student["accuracy"]["overall"], results["data"]["split"]
    return (
        f"{student['name']} answers {percent(score['value'])}% of {score['n']:,} {split} questions "
        f"[{percent(score['low'])} to {percent(score['high'])}] "
        f"at {percent(student['flops']['ratio'], 0)}% of the dense base's decoder FLOPs: "
        f"{_gap(results, 'reference')} and {_gap(results, 'baseline')}, "
        f"which needs {percent(pruned['flops']['ratio'], 0)}%."
    )


def print_table(results: dict[str, Any], console: Console | None = None) -> None:
    """Print headline and table for a terminal of 80 columns or more."""
    console = console or Console()
    table = Table(
        title=f"{results['title']}: {results['data']['questions']:,} questions", title_justify="left"
    )
    table.add_column("")
    for system in results["systems"].values():
        table.add_column(system["name"], justify="right")
    group = ""
    for row in rows(results):
        if row.group != group:
            if group:
                table.add_section()
            table.add_row(f"[bold]{row.group}[/bold]")
            group = row.group
        between = "\n" if console.width < 80 else " "
        table.add_row(row.label, *(f"{value}{between}[dim]{detail}[/dim]" for value, detail in row.cells))
    console.print(table)
    console.print(headline(results))


def markdown(results: dict[str, Any]) -> str:
    """The results table for a README."""
    names = [system["name"] for system in results["systems"].values()]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for row in rows(results):
        label = f"accuracy, {row.label}, %" if row.group.startswith("Accuracy") else row.label
        lines.append(
            f"| {label} | " + " | ".join(f"{value} ({detail})" for value, detail in row.cells) + " |"
        )
    return "\n".join(lines) + "\n"


def seeds(runs: Sequence[dict[str, Any]]) -> str:
    """Runs that differ in their seed as a table: a line each, and their mean with the spread between them."""
    roles = runs[0]["roles"]
    order = [roles["reference"], roles["baseline"], roles["candidate"]]
    names = [runs[0]["systems"][key]["name"] for key in order]
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
        costs = [f"{percent(s['flops']['ratio'])}%" for s in systems[1:]]
        points = f"{_signed(gap['value'])} ({_signed(gap['low'])} to {_signed(gap['high'])})"
        lines.append(f"| {run['settings']['seed']} | {' | '.join(scores)} | {points} | {' | '.join(costs)} |")
    means = [mean(run["systems"][key]["accuracy"]["overall"]["value"] for run in runs) for key in order]
    costs = [percent(mean(run["systems"][key]["flops"]["ratio"] for run in runs)) for key in order[1:]]
    values = [gap["value"] for gap in gaps]
    points = f"{_signed(mean(values))} ({_signed(min(values))} to {_signed(max(values))})"
    lines.append(f"| mean | {' | '.join(map(percent, means))} | {points} | {costs[0]}% | {costs[1]}% |")
    return "\n".join(lines) + "\n"


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


def _seconds(spread: dict[str, Any]) -> tuple[str, str]:
    return f"{1000 * spread['median']:.3g} ms", times(spread["ratio"])


def _amounts(counts: list[dict[str, Any]], unit: str = "") -> list[tuple[str, str]]:
    """Amounts of one row under one decimal prefix, the one of the largest."""
    size, letter = prefix(max(count["mean"] for count in counts))
    digits = 2 - min(2, floor(log10(max(count["mean"] for count in counts) / size)))
    return [(f"{count['mean'] / size:.{digits}f} {letter}{unit}", times(count["ratio"])) for count in counts]


def times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def _gap(results: dict[str, Any], role: str) -> str:
    """`1.2 points above NAME [+0.3 to +2.1]`."""
    key = results["roles"][role]
    found, name = results["paired"][key]["difference"], results["systems"][key]["name"]
    side = "above" if found["value"] > 0 else "below" if found["value"] < 0 else "from"
    return (
        f"{percent(abs(found['value']))} points {side} {name} "
        f"[{points(found['low'])} to {points(found['high'])}]"
    )
