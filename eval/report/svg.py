"""Pieces of the report's figures: scales, ticks, marks, legends, as plain SVG text.

No script, no font, no network; colours follow light and dark. They are Okabe and Ito's and darker kin of theirs, safe
for colour-blind readers, and every series also has its own marker and dash. A figure is 400 units wide, so that its
12-unit text stays readable on a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import ceil, cos, floor, log10, pi, sin
from typing import Any

WIDTH = 400
ROW = 18  # of the legend
LETTER = 6.7  # width of a letter of it, on average, in a wide font
LEAST = 12  # letters of a name that are always shown
SERIES = 8  # colours, markers and dashes before they repeat

STYLE = """
.figure { --ink: #1d2330; --muted: #5b6474; --grid: #e3e6ec; --s0: #5b6474; --s1: #c45500; --s2: #0072b2;
  --s3: #007a5a; --s4: #a8407f; --s5: #8a6d00; --s6: #5246b8; --s7: #7a4a21;
  font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
@media screen and (prefers-color-scheme: dark) { .figure { --ink: #e8eaf0; --muted: #a4adbd; --grid: #333a48;
  --s0: #b4bccb; --s1: #e69f00; --s2: #56b4e9; --s3: #3ecf9f; --s4: #e59cc6;
  --s5: #e8dc6a; --s6: #aaa2f5; --s7: #d9a97c; } }
.figure text { fill: var(--ink); }
.figure .muted { fill: var(--muted); }
.figure .axis { stroke: var(--muted); }
.figure .grid { stroke: var(--grid); }
.figure .line { fill: none; stroke: var(--c); stroke-width: 2.5; stroke-linejoin: round; }
.figure .area { fill: var(--c); opacity: 0.12; }
.figure .bar { stroke: var(--c); stroke-width: 2; }
.figure .mark { fill: var(--c); }
.figure .open { fill: none; stroke: var(--c); stroke-width: 1.8; }
.figure .c0 { --c: var(--s0); } .figure .c1 { --c: var(--s1); } .figure .c2 { --c: var(--s2); }
.figure .c3 { --c: var(--s3); } .figure .c4 { --c: var(--s4); } .figure .c5 { --c: var(--s5); }
.figure .c6 { --c: var(--s6); } .figure .c7 { --c: var(--s7); }
"""
DASHES = ("", "7 3", "14 4", "2 3", "9 3 2 3", "1 2", "12 3", "5 2 1 2")


def _star(points: int, outer: float, inner: float) -> list[tuple[float, float]]:
    turns = [(outer if i % 2 == 0 else inner, pi * i / points - pi / 2) for i in range(2 * points)]
    return [(r * cos(a), r * sin(a)) for r, a in turns]


CORNERS: dict[int, list[tuple[float, float]]] = {
    1: [(-4, -4), (4, -4), (4, 4), (-4, 4)],
    2: [(0, -6), (6, 0), (0, 6), (-6, 0)],
    3: [(0, -5.5), (5.5, 4.5), (-5.5, 4.5)],
    4: [(0, 5.5), (5.5, -4.5), (-5.5, -4.5)],
    5: _star(5, 6.5, 2.8),
    6: _star(4, 6.5, 2),
    7: [(-6, -2), (6, -2), (6, 2), (-6, 2)],
}


def svg(name: str, title: str, description: str, height: float, body: str) -> str:
    return (
        f'<svg class="figure" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-labelledby="{name}-title {name}-text"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-text">{escape(description)}</desc>{body}</svg>'
    )


def standalone(figure: str) -> str:
    """A figure as a file of its own, with its colours inside."""
    return (
        figure.replace(">", f" xmlns='http://www.w3.org/2000/svg' width='560'><style>{STYLE}</style>", 1)
        + "\n"
    )


def legend(
    series: Sequence[tuple[int, dict[str, Any]]], detail: Callable[[dict], str], *, lines: bool = False
) -> str:
    """A row a system; `series` pairs each with the number of its colour; a `solid` one has no dashes."""
    body = ""
    for row, (i, system) in enumerate(series):
        at = ROW * row + 10
        if lines:
            dash = "" if system.get("solid") else DASHES[i % SERIES]
            body += f'<line class="line c{i % SERIES}" stroke-dasharray="{dash}" '
            body += f'x1="2" x2="26" y1="{at}" y2="{at}"/>'
        else:
            body += mark(14, at, i, open_=system.get("control", False))
        body += _legend_text(at + 4, system["name"], detail(system))
    return body


def _legend_text(y: float, name: str, detail: str) -> str:
    """A system's name and a detail of it; a name too long for the figure's width is cut, and whole under a pointer."""
    most = max(LEAST, round((WIDTH - 34) / LETTER) - (len(detail) + 2 if detail else 0))
    cut = name if len(name) <= most else name[: most - 1].rstrip() + "…"
    title = "" if cut == name else f"<title>{escape(name)}</title>"
    return f'<text x="34" y="{y}">{title}{escape(cut)}<tspan class="muted" dx="8">{escape(detail)}</tspan></text>'


def mark(x: float, y: float, i: int, *, open_: bool = False, hint: str = "") -> str:
    """The marker of series `i`; open for a control. `hint` shows where a pointer rests on it."""
    title = f"<title>{escape(hint)}</title>" if hint else ""
    kind = f'class="{"open" if open_ else "mark"} c{i % SERIES}"'
    if i % SERIES == 0:
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="4.5">{title}</circle>'
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in CORNERS[i % SERIES])
    return f'<polygon {kind} points="{points}">{title}</polygon>'


def bar(x1: float, y1: float, x2: float, y2: float, i: int) -> str:
    """Draw an interval as a line."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="bar c{i % SERIES}" {ends}/>'


def path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{a:.1f} {b:.1f}" for a, b in points)


def horizontal(x1: float, x2: float, y: float, label: str) -> str:
    line = f'<line class="grid" x1="{x1}" x2="{x2}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + text(x1 - 6, y + 4, label, anchor="end", muted=True)


def text(
    x: float, y: float, words: str, *, anchor: str = "start", muted: bool = False, bold: bool = False
) -> str:
    style = (' class="muted"' if muted else "") + (' font-weight="600"' if bold else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def percent_axis(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float, list[float]]:
    """Ends and ticks of an axis in percent that holds all intervals."""
    span = max(max(highs) - min(lows), 1)
    ticks = nice_ticks(max(0, min(lows) - 0.04 * span), min(100, max(highs) + 0.04 * span), 5, outside=True)
    return ticks[0], ticks[-1], ticks


def nice_ticks(low: float, high: float, count: int, *, outside: bool = False) -> list[float]:
    """Round numbers between the ends; `outside`: the first and last enclose them."""
    step = (high - low) / count
    size = 10 ** floor(log10(step))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= step)
    first, last = (
        (floor(low / step), ceil(high / step)) if outside else (ceil(low / step), floor(high / step))
    )
    return [round(step * i, 10) for i in range(first, last + 1)]
