"""`report.md`: the report's numbers as text, for a pull request or a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latefusion.eval.report.methods import methods
from latefusion.eval.report.tables import headline, markdown


def write_markdown(path: str | Path, results: dict[str, Any]) -> None:
    columns, rows = methods(results)
    systems = results["systems"]
    lines = [f"# {results['title']}", "", headline(results), ""]
    lines += [f"| | {' | '.join(column.name for column in columns)} |", "| --- |" + " ---: |" * len(columns)]
    for key, cells in rows:
        shown = [f"{c.text} ({c.detail})" if c.detail else c.text for c in cells]
        lines.append(f"| {systems[key]['name']} | {' | '.join(shown)} |")
    lines += ["", "Columns:", ""] + [f"- {column.name}: {column.hint}" for column in columns]
    lines += ["", "## In full", "", markdown(results)]
    for name, task in results["data"]["tasks"].items():
        lines.append(
            f"- {name}: {task['questions']:,} questions about {task['scenes']:,} images, {task['metric']}, "
            f"split {task['split']}, from {task['source']}, fingerprint {task['fingerprint']}"
        )
    environment = results["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    lines += ["", f"`{environment['command']}`", ""]
    lines += [f"{environment['date']}, {environment['hardware']} ({environment['device']}); {versions}."]
    Path(path).write_text("\n".join(lines) + "\n")
