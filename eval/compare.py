"""What changed between two reports; for CI, an exit code of 1 if something got worse beyond its interval.

    python eval/compare.py outputs/before/report.json outputs/after/report.json

Systems of the same key are compared. On the same questions and images, with `predictions.jsonl` beside both reports, a
difference of accuracy is paired, and its 95% interval knows which questions share an image; else the samples count as
independent. It is worse if the interval lies below zero, overall or in a task. FLOPs (the decoder's, and the whole
prefill's with vision tower, projector and head) and KV bytes, which hardly vary, are worse if they rise by more than
`--cost`; latency, as a ratio to the reference, if its quartiles lie above those before. Question types are shown and do
not count: with so many comparisons some would fail by chance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from rich.console import Console
from rich.table import Table

from latefusion.data.escape import terminal
from latefusion.eval import metrics
from latefusion.eval.evaluate import read_report
from latefusion.eval.report.tables import prefix
from latefusion.recipes.compose import print_and_exit
from latefusion.recipes.launcher import run_to_exit
from latefusion.recipes.printable import error_line

if TYPE_CHECKING:
    from latefusion.eval.tasks.base import Answer

PREDICTIONS = "predictions.jsonl"
Units = dict[tuple[str, str], "Answer"]  # answers to what counts as one question, by task and id
COSTS = {"flops": "decoder FLOPs", "prefill_flops": "whole prefill FLOPs", "kv_bytes": "KV bytes"}


@dataclass(frozen=True)
class Change:
    """A figure before and after.

    Attributes:
        system: its name; what: the figure; unit: of the values.
        difference, low, high: after minus before, with its interval (equal where there is none).
        worse: it got worse beyond its interval.
    """

    system: str
    what: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    worse: bool
    unit: str


def compare(before: Path, after: Path, *, cost: float = 0.02) -> list[Change]:
    """Changes of every system that both reports have.

    Args:
        before, after: reports, or their folders; cost: relative rise of FLOPs or KV bytes that is still let pass.

    Raises:
        FileNotFoundError: there is no report.
        ValueError: they have no system in common, their figures mean different things, or a file is damaged.
    """
    old, new = read_report(before), read_report(after)
    if old.get("schema") != new.get("schema"):
        raise ValueError(
            f"{before} is a report of format {old.get('schema')} and {after} of format {new.get('schema')}: figures of "
            "one name may mean different things; evaluate both with one version of latefusion."
        )
    shared = [key for key in new["systems"] if key in old["systems"]]
    if not shared:
        raise ValueError(
            f"{before} and {after} have no system in common ({', '.join(old['systems'])}; {', '.join(new['systems'])})."
        )
    units = _units_of_both(before, after, old, new)
    several = len(new["data"].get("tasks", {})) > 1
    changes = []
    for key in shared:
        first, second = old["systems"][key], new["systems"][key]
        changes.append(_accuracy(first, second, _paired_units(key, units)))
        for name in first["accuracy"]["types"]:
            if name in second["accuracy"]["types"]:
                a, b = first["accuracy"]["types"][name], second["accuracy"]["types"][name]
                change = _independent(second["name"], f"accuracy, {name}", a, b)
                changes.append(change if several else replace(change, worse=False))
        for name, what in COSTS.items():
            if name in first and name in second:
                changes.append(_cost(second["name"], what, first[name]["mean"], second[name]["mean"], cost))
        for name, what in (("ttft", "time to first token"), ("tpot", "time per token")):
            if name in first and name in second and key != new["roles"]["reference"]:
                changes.append(_latency(second["name"], what, first[name], second[name]))
    return changes


def notes(before: Path, after: Path) -> list[str]:
    """What else is not the same in two reports, in sentences."""
    old, new = read_report(before), read_report(after)
    remarks = []
    if old["data"]["fingerprint"] != new["data"]["fingerprint"]:
        remarks.append("The questions, answers or images are not the same: samples count as independent.")
    else:
        units = _units_of_both(before, after, old, new)
        shared = [key for key in new["systems"] if key in old["systems"]]
        if alone := [new["systems"][key]["name"] for key in shared if _paired_units(key, units) is None]:
            remarks.append(
                f"The answers of {', '.join(alone)} are not in {PREDICTIONS} beside both reports, so their samples "
                "count as independent: intervals are wider than those of paired answers."
            )
    first, second = old["model"].get("identity", {}), new["model"].get("identity", {})
    changed = [name for name in second if first.get(name) != second[name]]
    if changed:
        remarks.append(f"The dense bases differ in {', '.join(changed)}.")
    return remarks


def _accuracy(old: Mapping[str, Any], new: Mapping[str, Any], units: tuple[Units, Units] | None) -> Change:
    """Overall accuracy; paired where every answer of both is at hand."""
    a, b = old["accuracy"]["overall"], new["accuracy"]["overall"]
    if units is None:
        return _independent(new["name"], "accuracy", a, b)
    first, second = units
    names = sorted(first)
    gap = metrics.paired(
        [second[name].score for name in names],
        [first[name].score for name in names],
        [first[name].cluster for name in names],
        tasks=[first[name].task for name in names],
    ).difference
    return _percent(new["name"], "accuracy", a["value"], b["value"], gap.value, gap.low, gap.high)


def _independent(system: str, what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Change:
    """Two proportions of independent samples: Newcombe's interval, from each one's own (1998, method 10)."""
    a, b = old["value"], new["value"]
    low = b - a - np.hypot(b - new["low"], old["high"] - a)
    high = b - a + np.hypot(new["high"] - b, a - old["low"])
    return _percent(system, what, a, b, b - a, float(low), float(high))


def _percent(system: str, what: str, old: float, new: float, gap: float, low: float, high: float) -> Change:
    return Change(system, what, 100 * old, 100 * new, 100 * gap, 100 * low, 100 * high, high < 0, "%")


def _cost(system: str, what: str, old: float, new: float, allowed: float) -> Change:
    return Change(system, what, old, new, new - old, new - old, new - old, new > (1 + allowed) * old, "")


def _latency(system: str, what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Change:
    low, high = new["ratio_q25"] - old["ratio_q75"], new["ratio_q75"] - old["ratio_q25"]
    return Change(
        system, what, old["ratio"], new["ratio"], new["ratio"] - old["ratio"], low, high, low > 0, "×"
    )


def _units_of_both(
    before: Path, after: Path, old: Mapping[str, Any], new: Mapping[str, Any]
) -> tuple[dict[str, Units], dict[str, Units]]:
    """`_units` of two reports; none where their questions differ, since their answers cannot be paired."""
    if old["data"]["fingerprint"] != new["data"]["fingerprint"]:
        return {}, {}
    return _units(before, old), _units(after, new)


def _paired_units(
    system: str, units: tuple[dict[str, Units], dict[str, Units]]
) -> tuple[Units, Units] | None:
    """A system's answers before and after; None unless both files hold an answer to each question."""
    first, second = (of_report.get(system) for of_report in units)
    return (first, second) if first and second and first.keys() == second.keys() else None


def _units(path: Path, report: Mapping[str, Any]) -> dict[str, Units]:
    """Answers to what counts as one question, by system, task and id; empty without the file of the answers.

    Raises:
        ValueError: the file is damaged.
    """
    from latefusion.eval.tasks.base import Answer  # lazy: keeps argument errors fast
    from latefusion.eval.tasks.choice import CIRCULAR, circular

    file = (path if path.is_dir() else path.parent) / PREDICTIONS
    if not file.is_file() or "tasks" not in report["data"]:
        return {}
    groups: dict[tuple[str, str], list[Answer]] = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            answer = Answer.from_dict(json.loads(line))
        except (ValueError, TypeError):
            raise ValueError(
                f"{file}, line {number}, is not an answer; evaluate again, or remove the file to compare without pairs."
            ) from None
        groups.setdefault((answer.system, answer.task), []).append(answer)
    by_system: dict[str, Units] = {}
    for (system, task), answers in groups.items():
        if task not in report["data"]["tasks"]:
            raise ValueError(f"{file} has answers to {task}, which its report has not; evaluate again.")
        rotated = report["data"]["tasks"][task]["metric"] == CIRCULAR
        units = circular(answers) if rotated else answers
        by_system.setdefault(system, {}).update({(task, unit.id): unit for unit in units})
    return by_system


def table(changes: list[Change]) -> Table:
    shown = Table(title="After minus before", title_justify="left")
    for name in ("", "", "before", "after", "difference", "interval", ""):
        shown.add_column(name, justify="left" if not name else "right")
    last = ""
    for change in changes:
        digits = 1 if change.unit == "%" else 2
        size, letter = (1.0, change.unit) if change.unit else prefix(max(change.before, change.after))
        unit = letter if change.unit else f" {letter}"
        ends = f"{change.low / size:+.{digits}f} to {change.high / size:+.{digits}f}"
        shown.add_row(
            terminal(change.system) if change.system != last else "",
            terminal(change.what),
            f"{change.before / size:.{digits}f}{unit}",
            f"{change.after / size:.{digits}f}{unit}",
            f"{change.difference / size:+.{digits}f}",
            ends if change.high > change.low else "",
            "[bold red]worse[/bold red]" if change.worse else "",
        )
        last = change.system
    return shown


def _refuse(message: str) -> NoReturn:
    sys.exit(error_line(f"{message}; --help explains them."))


def main(words: list[str]) -> None:
    """Run from the command line; the exit code is 1 if anything got worse."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="report.json, or the folder that holds it")
    parser.add_argument("after", type=Path, help="the same of the later run")
    parser.add_argument(
        "--cost", type=float, default=0.02, help="rise of FLOPs or KV bytes let pass (default: 0.02)"
    )
    parser.add_argument("--cfg", choices=["job"], help="print these arguments and stop, as other commands do")
    parser.error = _refuse  # type: ignore[method-assign]
    options = parser.parse_args(words)
    if options.cfg:
        print_and_exit(
            lambda: {"before": str(options.before), "after": str(options.after), "cost": options.cost}
        )
    try:
        if not 0 <= options.cost < inf:
            raise ValueError(f"--cost={options.cost} is a relative rise; it must be finite and not negative.")
        changes = compare(options.before, options.after, cost=options.cost)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(error_line(error))
    console = Console()
    console.print(table(changes))
    for remark in notes(options.before, options.after):
        console.print(terminal(remark))
    worse = [terminal(f"{change.system}: {change.what}") for change in changes if change.worse]
    console.print(f"Worse: {'; '.join(worse)}." if worse else "Nothing got worse beyond its interval.")
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    run_to_exit(lambda: main(sys.argv[1:]))
