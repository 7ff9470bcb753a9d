"""Tables and bars of what `end_to_end.py` measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "loading": "#9aa0a6",
    "processor": "#9aa0a6",
    "tower": "#5b8db8",
    "teacher": "#d98c3f",
    "student": "#3c8d5a",
    "prefill": "#3c8d5a",
    "backward": "#7fbf95",
    "decode": "#7fbf95",
    "optimizer": "#8e6bb0",
    "rest": "#cfcfcf",
}


def read(files: Sequence[Path]) -> dict[str, Any]:
    """The rows of several files as one result, with the title of the first."""
    results = [json.loads(file.read_text()) for file in files]
    return {**results[0], "rows": [row for result in results for row in result["rows"]]}


def markdown(result: dict[str, Any]) -> str:
    """Two tables: training runs, and requests."""
    rows = result["rows"]
    made = (
        f"{result['title']}; torch {result['torch']}, transformers {result['transformers']}, {result['date']}"
    )
    parts = [made]
    trained = [row for row in rows if row["part"] == "training"]
    if trained:
        parts.append(_training(trained))
    answered = [row for row in rows if row["part"] == "request"]
    if answered:
        parts.append(_request(answered))
    return "\n\n".join(parts)


def _training(rows: list[dict[str, Any]]) -> str:
    memory = any("peak_bytes" in row for row in rows)
    head = ["batch", "text", "recipe", "samples/s", "step", "speed-up", "(quartiles)", "FLOPs say"]
    lines = []
    for row in rows:
        again = ", activations computed twice" if row.get("checkpointing") else ""
        line = [str(row["batch"]), str(row["text"]), named(row["recipe"]) + again]
        if "failed" in row:
            line += [row["failed"], "", "", "", f"{1 / row['predicted_ratio']:.2f}x"]
        else:
            line += [f"{row['samples_per_second']:.3g}", f"{row['ms']:.0f} ms", *_speedup(row)]
            line += [f"{1 / row['predicted_ratio']:.2f}x"]
        if memory:
            line.append(f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else "")
        lines.append(line)
    return table([*head, *(["memory"] if memory else [])], lines, words=3)


def _request(rows: list[dict[str, Any]]) -> str:
    tokens = next(list(row["until"]) for row in rows if "until" in row)
    memory = any("peak_bytes" in row for row in rows)
    head = ["batch", "text", "system", "first token", "speed-up", "(quartiles)", "FLOPs say"]
    head += [x for n in tokens[1:] for x in (f"{n} tokens", "speed-up")] + ["KV"]
    lines = []
    for row in rows:
        line = [str(row["batch"]), str(row["text"]), row["system"]]
        promised = f"{1 / row['predicted_ratio']:.2f}x"
        if "failed" in row:
            lines.append([*line, row["failed"], "", "", promised, *[""] * (len(head) - 7 + memory)])
            continue
        until = row["until"]
        line += [milliseconds(until["1"]["ms"]), *_speedup(until["1"]), promised]
        for n in tokens[1:]:
            line += [milliseconds(until[n]["ms"]), _speedup(until[n])[0]]
        line.append(f"{row['kv_bytes'] / 1e6:,.0f} MB" if "kv_bytes" in row else "")
        if memory:
            line.append(f"{row['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in row else "")
        lines.append(line)
    return table([*head, *(["working memory"] if memory else [])], lines, words=3)


def _speedup(times: dict[str, float]) -> list[str]:
    if "ratio" not in times:  # the reference did not fit
        return ["", ""]
    low, high = 1 / times["high"], 1 / times["low"]
    return [f"{1 / times['ratio']:.2f}x", "" if low == high else f"{low:.2f}–{high:.2f}"]


def named(recipe: str) -> str:
    """A recipe in words, with its teacher."""
    name, _, teacher = recipe.partition("/")
    return f"{name}, no teacher" if teacher == "none" and name != "dense" else name


def milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"


def table(head: Sequence[str], lines: Iterable[Sequence[str]], *, words: int) -> str:
    """Markdown; the column of this number (from 1) is left-aligned, the others are numbers."""
    rule = ["---" if i == words else "---:" for i in range(1, len(head) + 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """A stacked bar a recipe and a system of where the time goes, an SVG for each part and cell."""
    cells: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if "phases" in row:
            cells.setdefault((row["part"], row["batch"], row["text"]), []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _bars(rows, folder / f"{part}_{batch}x{text}.svg", result["title"])
        for (part, batch, text), rows in cells.items()
    ]


def _bars(rows: list[dict[str, Any]], file: Path, title: str) -> Path:
    import matplotlib  # lazy: tables do not need it

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "latefusion", "svg.fonttype": "none", "font.size": 11})
    from matplotlib import pyplot

    names = [named(row["recipe"]) if "recipe" in row else row["system"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(8.6, 1.25 + 0.42 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        left = 0.0
        for phase, seconds in row["phases"].items():
            width = 1e3 * max(seconds, 0.0)
            axes.barh(
                place, width, left=left, color=COLOURS[phase], height=0.72, label=phase if not place else None
            )
            left += width
        axes.text(left, place, f" {left:,.0f} ms", va="center", fontsize=10)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    what = "A training step" if rows[0]["part"] == "training" else "A request"
    axes.set_title(
        f"{what}, {rows[0]['batch']} x {rows[0]['text']} text tokens\n{title}", loc="left", fontsize=9
    )
    axes.set_xlabel("ms")
    figure.legend(loc="outside lower center", ncols=7, frameon=False, fontsize=10)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return file
