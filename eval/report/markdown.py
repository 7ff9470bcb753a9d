"""`report.md`: the report's numbers as text, for a pull request or a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latefusion.data import escape
from latefusion.eval.report.methods import methods
from latefusion.eval.report.tables import headline, markdown


def write_markdown(path: str | Path, results: dict[str, Any]) -> None:
    """Write the report; text from data, policies and checkpoints cannot become markup."""
    columns, rows = methods(results)
    systems, text = results["systems"], escape.markdown
    lines = [f"# {text(results['title'])}", "", headline(results, text), ""]
    lines += [f"| | {' | '.join(column.name for column in columns)} |", "| --- |" + " ---: |" * len(columns)]
    for key, cells in rows:
        shown = [f"{c.text} ({c.detail})" if c.detail else c.text for c in cells]
        lines.append(f"| {text(systems[key]['name'])} | {' | '.join(shown)} |")
    lines += ["", "Columns:", ""] + [f"- {column.name}: {column.hint}" for column in columns]
    lines += ["", "## In full", "", markdown(results)]
    for name, task in results["data"]["tasks"].items():
        lines.append(
            f"- {text(name)}: {task['questions']:,} questions about {task['scenes']:,} images, {task['metric']}, "
            f"split {text(task['split'])}, from {text(task['source'])}, fingerprint {task['fingerprint']}"
        )
    environment = results["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    lines += ["", escape.code(environment["command"]), ""]
    lines += [
        f"{environment['date']}, {text(environment['hardware'])} ({environment['device']}); {versions}."
    ]
    Path(path).write_text("\n".join(lines) + "\n")
