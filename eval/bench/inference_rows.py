"""Rows of `eval/bench/inference.py`: the file that they are written to and read from, and their table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MOST_PREFILL = 0.55 / 0.47  # of what FLOPs promise
HEADER = (
    "batch",
    "text",
    "variant",
    "FLOPs",
    "first token",
    "(quartiles)",
    "target",
    "per token",
    "(quartiles)",
    "KV",
    "peak",
)


def met(row: dict[str, Any]) -> bool | None:
    """Whether the prefill is as near to its FLOPs as asked; None for the stock model."""
    promised = row["predicted_ratio"]
    return None if promised == 1.0 else row["ttft"]["ratio"] <= MOST_PREFILL * promised


def cells(row: dict[str, Any], stock: dict[str, Any]) -> list[str]:
    """A row of the table: of the stock model what it takes, of the others ratios to it."""
    ttft, tpot, first = row["ttft"], row["tpot"], row is stock
    return [
        str(row["batch"]),
        str(row["text"]),
        row["variant"],
        f"{row['predicted_ratio']:.3f}",
        f"{ttft['ms']:.0f} ms" if first else f"{ttft['ratio']:.3f}",
        "" if first else f"{ttft['low']:.3f}–{ttft['high']:.3f}",
        "" if row["met"] is None else "met" if row["met"] else "missed",
        f"{tpot['ms']:.1f} ms" if first else f"{tpot['ratio']:.3f}",
        "" if first else f"{tpot['low']:.3f}–{tpot['high']:.3f}",
        f"{row['kv_bytes'] / 1e6:.1f} MB" if first else f"{row['kv_bytes'] / stock['kv_bytes']:.3f}",
        f"{row['peak_bytes'] / 1e6:.0f} MB" if first else f"{row['peak_bytes'] / stock['peak_bytes']:.3f}",
    ]


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    stock = {(row["batch"], row["text"]): row for row in rows if row["variant"] == "stock"}
    return [cells(row, stock[row["batch"], row["text"]]) for row in rows]


def report(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title)
    for name in HEADER:
        table.add_column(name, justify="left" if name == "variant" else "right")
    for n, line in enumerate(lines(rows)):
        table.add_row(*line, end_section=n + 1 < len(rows) and rows[n + 1]["variant"] == "stock")
    console.print(table)


def markdown(rows: list[dict[str, Any]]) -> str:
    rule = ["---" if name == "variant" else "---:" for name in HEADER]
    return "".join("| " + " | ".join(line) + " |\n" for line in [list(HEADER), rule, *lines(rows)])


def write(file: Path | None, result: dict[str, Any]) -> None:
    """What there is so far, and its table beside it."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(result, indent=2) + "\n")
        part.replace(file)
        file.with_suffix(".md").write_text(markdown(result["rows"]))


def before(file: Path | None, result: dict[str, Any]) -> dict[str, Any]:
    """What the same command has written already, or `result`."""
    if file is None or not file.exists():
        return result
    found: dict[str, Any] = json.loads(file.read_text())
    same = {key: found.get(key) for key in ("title", "torch", "rounds")}
    return found if same == {key: result[key] for key in same} else result
