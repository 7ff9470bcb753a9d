"""The report's figures as plain SVG text: no script, no font, no network; colours follow light and dark.

Colours are Okabe and Ito's, safe for colour-blind readers, and every series also has its own marker and
dash. A figure is 400 units wide, so that its 12-unit text stays readable on a phone. Figures inline in a
page take their colours from the page's copy of `STYLE`; `standalone` puts a copy inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Any

from latefusion.eval.report.tables import prefix

WIDTH = 400
ROW = 18  # of the legend
ALL = "all questions"

STYLE = """
.figure { --ink: #1d2330; --muted: #5b6474; --grid: #e3e6ec; --s0: #5b6474; --s1: #c45500; --s2: #0072b2;
  --s3: #007a5a; --s4: #a8407f; font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
@media (prefers-color-scheme: dark) { .figure { --ink: #e8eaf0; --muted: #a4adbd; --grid: #333a48;
  --s0: #b4bccb; --s1: #e69f00; --s2: #56b4e9; --s3: #3ecf9f; --s4: #e59cc6; } }
.figure text { fill: var(--ink); }
.figure .muted { fill: var(--muted); }
.figure .axis { stroke: var(--muted); }
.figure .grid { stroke: var(--grid); }
.figure .line { fill: none; stroke: var(--c); stroke-width: 2.5; stroke-linejoin: round; }
.figure .area { fill: var(--c); opacity: 0.12; }
.figure .bar { stroke: var(--c); stroke-width: 2; }
.figure .mark { fill: var(--c); }
.figure .c0 { --c: var(--s0); } .figure .c1 { --c: var(--s1); } .figure .c2 { --c: var(--s2); }
.figure .c3 { --c: var(--s3); } .figure .c4 { --c: var(--s4); }
"""
CORNERS: dict[int, list[tuple[float, float]]] = {
    1: [(-4, -4), (4, -4), (4, 4), (-4, 4)],
    2: [(0, -6), (6, 0), (0, 6), (-6, 0)],
    3: [(0, -5.5), (5.5, 4.5), (-5.5, 4.5)],
    4: [(0, 5.5), (5.5, -4.5), (-5.5, -4.5)],
}
DASHES = ("", "7 3", "", "2 3", "9 3 2 3")


def tokens_per_layer(results: dict[str, Any]) -> str:
    """Vision tokens that each layer computes, as steps, one line a system."""
    systems = list(results["systems"].values())
    layers = results["model"]["layers"]
    most = max(max(system["vision_tokens"]["per_layer"]) for system in systems)
    top, left, right, height = ROW * len(systems) + 14, 42, 10, 170
    bottom = top + height
    x = _scale(0, layers, left, WIDTH - right)
    y = _scale(0, most, bottom, top)
    body = _legend(systems, lambda s: f"{s['vision_tokens']['mean']:.1f} a layer on average", lines=True)
    for share in (0, 0.25, 0.5, 0.75, 1):
        body += _horizontal(left, WIDTH - right, y(most * share), f"{most * share:.0f}")
    every = ceil(layers / 8)
    for layer in range(0, layers, every):
        body += _text(x(layer + 0.5), bottom + 16, str(layer), anchor="middle", muted=True)
    body += _text((left + WIDTH - right) / 2, bottom + 34, "decoder layer", anchor="middle")
    for i, system in enumerate(systems):
        tokens = system["vision_tokens"]["per_layer"]
        points = [(x(layer + end), y(n)) for layer, n in enumerate(tokens) for end in (0, 1)]
        path = "M" + " L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        if i == len(systems) - 1:
            closed = f"{path} L{x(layers):.1f} {y(0):.1f} L{x(0):.1f} {y(0):.1f} Z"
            body += f'<path class="area c{i % 5}" d="{closed}"/>'
        body += f'<path class="line c{i % 5}" stroke-dasharray="{DASHES[i % 5]}" d="{path}"/>'
    means = ", ".join(f"{s['name']} {s['vision_tokens']['mean']:.1f}" for s in systems)
    return _svg("tokens", "Vision tokens per decoder layer", f"On average: {means}.", bottom + 42, body)


def accuracy_against_flops(results: dict[str, Any]) -> str:
    """One point a system: decoder FLOPs across, accuracy up, with its interval."""
    systems = list(results["systems"].values())
    scores = [system["accuracy"]["overall"] for system in systems]
    low, high, ticks = _percent_axis([100 * s["low"] for s in scores], [100 * s["high"] for s in scores])
    most = max(system["flops"]["mean"] for system in systems)
    unit, letter = prefix(most)
    top, left, right, height = ROW * len(systems) + 14, 42, 14, 190
    bottom = top + height
    x = _scale(0, most * 1.06, left, WIDTH - right)
    y = _scale(low, high, bottom, top)
    body = _legend(systems, lambda s: _score(s, unit, letter))
    for tick in ticks:
        body += _horizontal(left, WIDTH - right, y(tick), f"{tick:g}%")
    for tick in _nice_ticks(0, most / unit, 5):
        body += _text(x(tick * unit), bottom + 16, f"{tick:g}", anchor="middle", muted=True)
    label = f"decoder {letter}FLOPs a prompt"
    body += _text((left + WIDTH - right) / 2, bottom + 34, label, anchor="middle")
    for i, (system, score) in enumerate(zip(systems, scores, strict=True)):
        at = x(system["flops"]["mean"])
        body += f'<line class="bar c{i % 5}" x1="{at:.1f}" x2="{at:.1f}" '
        body += f'y1="{y(100 * score["low"]):.1f}" y2="{y(100 * score["high"]):.1f}"/>'
        body += _mark(at, y(100 * score["value"]), i)
    points = "; ".join(f"{s['name']}: {_score(s, unit, letter)}" for s in systems)
    return _svg("flops", "Accuracy against decoder FLOPs", f"{points}.", bottom + 42, body)


def accuracy_by_type(results: dict[str, Any]) -> str:
    """A row a question type, a dot with its interval a system."""
    systems = list(results["systems"].values())
    types = [ALL, *results["data"]["types"]]
    scores = [[_by_type(system, name) for system in systems] for name in types]
    flat = [score for row in scores for score in row]
    low, high, ticks = _percent_axis([100 * s["low"] for s in flat], [100 * s["high"] for s in flat])
    top, left, right = ROW * len(systems) + 10, 108, 14
    step = 14 * len(systems) + 12
    bottom = top + step * len(types)
    x = _scale(low, high, left, WIDTH - right)
    body = _legend(systems, lambda s: "")
    for tick in ticks:
        body += f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>'
        body += _text(x(tick), bottom + 16, f"{tick:g}%", anchor="middle", muted=True)
    for row, name in enumerate(types):
        start = top + row * step
        body += f'<line class="grid" x1="0" x2="{WIDTH - right}" y1="{start}" y2="{start}"/>'
        count = results["data"]["questions"] if name == ALL else results["data"]["types"][name]
        body += _text(0, start + step / 2, name, bold=name == ALL)
        body += _text(0, start + step / 2 + 14, f"n = {count:,}", muted=True)
        for i, score in enumerate(scores[row]):
            at = start + 13 + 14 * i
            body += f'<line class="bar c{i % 5}" y1="{at}" y2="{at}" x1="{x(100 * score["low"]):.1f}" '
            body += f'x2="{x(100 * score["high"]):.1f}"/>'
            body += _mark(x(100 * score["value"]), at, i)
    text = "Exact-match accuracy with 95% intervals; the same numbers stand in the table."
    return _svg("types", "Accuracy by question type", text, bottom + 24, body)


def standalone(figure: str) -> str:
    """A figure as a file of its own, with its colours inside."""
    return (
        figure.replace(">", f" xmlns='http://www.w3.org/2000/svg' width='560'><style>{STYLE}</style>", 1)
        + "\n"
    )


def _svg(name: str, title: str, description: str, height: float, body: str) -> str:
    return (
        f'<svg class="figure" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-labelledby="{name}-title {name}-text"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-text">{escape(description)}</desc>{body}</svg>'
    )


def _legend(systems: Sequence[dict], detail: Callable[[dict], str], *, lines: bool = False) -> str:
    body = ""
    for i, system in enumerate(systems):
        at = ROW * i + 10
        if lines:
            body += f'<line class="line c{i % 5}" stroke-dasharray="{DASHES[i % 5]}" '
            body += f'x1="2" x2="26" y1="{at}" y2="{at}"/>'
        else:
            body += _mark(14, at, i)
        body += f'<text x="34" y="{at + 4}">{escape(system["name"])}'
        body += f'<tspan class="muted" dx="8">{escape(detail(system))}</tspan></text>'
    return body


def _mark(x: float, y: float, i: int) -> str:
    """The marker of series `i`: circle, square, diamond, triangle up, triangle down."""
    kind = f'class="mark c{i % 5}"'
    if i % 5 == 0:
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in CORNERS[i % 5])
    return f'<polygon {kind} points="{points}"/>'


def _horizontal(x1: float, x2: float, y: float, label: str) -> str:
    line = f'<line class="grid" x1="{x1}" x2="{x2}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(x1 - 6, y + 4, label, anchor="end", muted=True)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", muted: bool = False, bold: bool = False
) -> str:
    style = (' class="muted"' if muted else "") + (' font-weight="600"' if bold else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _percent_axis(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float, list[float]]:
    """Ends and ticks of an axis in percent that holds all intervals."""
    span = max(max(highs) - min(lows), 1)
    ticks = _nice_ticks(max(0, min(lows) - 0.04 * span), min(100, max(highs) + 0.04 * span), 5, outside=True)
    return ticks[0], ticks[-1], ticks


def _nice_ticks(low: float, high: float, count: int, *, outside: bool = False) -> list[float]:
    """Round numbers between the ends; `outside`: the first and last enclose them."""
    step = (high - low) / count
    size = 10 ** floor(log10(step))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= step)
    first, last = (
        (floor(low / step), ceil(high / step)) if outside else (ceil(low / step), floor(high / step))
    )
    return [round(step * i, 10) for i in range(first, last + 1)]


def _by_type(system: dict, name: str) -> dict:
    return system["accuracy"]["overall"] if name == ALL else system["accuracy"]["types"][name]


def _score(system: dict, unit: float, letter: str) -> str:
    flops = system["flops"]["mean"] / unit
    return f"{100 * system['accuracy']['overall']['value']:.1f}% at {flops:.2f} {letter}FLOPs"
