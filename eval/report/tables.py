"""One table, three faces: terminal (rich), README (markdown), report (HTML, from the same rows)."""

from __future__ import annotations

from dataclasses import dataclass
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
        accuracies.append(Row("Accuracy, %", name, [_accuracy(s["accuracy"]["types"][name]) for s in systems]))
    costs = [
        Row("Cost", "decoder FLOPs", [(si(s["flops"]["mean"]), _times(s["flops"]["ratio"])) for s in systems]),
        Row(
            "Cost",
            "vision tokens a layer",
            [(f"{s['vision_tokens']['mean']:.1f}", _times(s["vision_tokens"]["ratio"])) for s in systems],
        ),
        Row("Cost", "time to first token", [_seconds(s["ttft"]) for s in systems]),
        Row("Cost", "time per output token", [_seconds(s["tpot"]) for s in systems]),
        Row("Cost", "KV cache", [_bytes(s["kv_bytes"]) for s in systems]),
        Row("Cost", "peak working memory", [_bytes(s["working_bytes"]) for s in systems]),
    ]
    return accuracies + costs


def headline(results: dict[str, Any]) -> str:
    """The result in one sentence: candidate against reference and baseline, with intervals."""
    roles, systems = results["roles"], results["systems"]
    student, dense, pruned = (systems[roles[role]] for role in ("candidate", "reference", "baseline"))
    overall = student["accuracy"]["overall"]
    return (
        f"{student['name']} answers {percent(overall['value'])}% of {overall['n']:,} {results['data']['split']} "
        f"questions [{percent(overall['low'])} to {percent(overall['high'])}] "
        f"at {percent(student['flops']['ratio'], 0)}% of the decoder FLOPs of {dense['name']}: "
        f"{_gap(results, roles['reference'])} {dense['name']}, "
        f"and {_gap(results, roles['baseline'])} {pruned['name']}, "
        f"which needs {percent(pruned['flops']['ratio'], 0)}% of the FLOPs."
    )


def print_table(results: dict[str, Any], console: Console | None = None) -> None:
    """Print headline and table for a terminal of 80 columns or more."""
    console = console or Console()
    table = Table(title=f"{results['title']}: {results['data']['questions']:,} questions", title_justify="left")
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
        table.add_row(f" {row.label}", *(f"{value}{between}[dim]{detail}[/dim]" for value, detail in row.cells))
    console.print(table)
    console.print(headline(results))


def markdown(results: dict[str, Any]) -> str:
    """The results table for a README."""
    names = [system["name"] for system in results["systems"].values()]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for row in rows(results):
        label = f"accuracy, {row.label}, %" if row.group.startswith("Accuracy") else row.label
        lines.append(f"| {label} | " + " | ".join(f"{value} ({detail})" for value, detail in row.cells) + " |")
    return "\n".join(lines) + "\n"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def si(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: `1.76 G`."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def _accuracy(score: dict[str, Any]) -> tuple[str, str]:
    return percent(score["value"]), f"{percent(score['low'])}–{percent(score['high'])}"


def _seconds(spread: dict[str, Any]) -> tuple[str, str]:
    return f"{1000 * spread['median']:.3g} ms", _times(spread["ratio"])


def _bytes(count: dict[str, Any]) -> tuple[str, str]:
    return si(count["mean"], "B"), _times(count["ratio"])


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def _gap(results: dict[str, Any], key: str) -> str:
    found = results["paired"][key]["difference"]
    side = "above" if found["value"] > 0 else "below"
    ends = f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}"
    return f"{percent(abs(found['value']))} points {side} [{ends}]"
