"""What the pictures of a profile share: colours, fonts, axes, bands around lines, SVG that follows light and dark.

Colours are Okabe and Ito's, safe for colour-blind readers; every line also has its own dash and marker.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

INK, MUTED, GRID, SHADE, ASIDE = "#1d2331", "#5b6475", "#e3e6ed", "#e9edf6", "#f7f8fb"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b3", "#c45501", "#007a5b", "#a84080", "#5b6476"
VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", SHADE: "--shade", ASIDE: "--aside",
    BLUE: "--blue", ORANGE: "--orange", GREEN: "--green", PINK: "--pink", GREY: "--grey", "#ffffff": "--page",
}  # fmt: skip
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "latefusion",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "figure.dpi": 200,
}
WIDTH = 4.9  # inches: 9 pt text stays readable on a phone
FLOOR = 1e-4  # nats; anything smaller is drawn here


def edges(profile: dict[str, Any]) -> tuple[int, int, int]:
    schedule, layers = profile["chosen"]["schedule"], profile["layers"]
    return schedule["enter"], layers if schedule["exit"] is None else schedule["exit"], layers


def shade(axis: Axes, profile: dict[str, Any]) -> None:
    a, b, _ = edges(profile)
    axis.axvspan(a - 0.5, b - 0.5, color=SHADE, lw=0, zorder=0)


def layer_axis(axis: Axes, layers: int) -> None:
    step = max(1, -(-layers // 16))
    axis.set_xticks(range(0, layers + 1, step * 2 if layers > 8 else step))
    axis.set_xlim(-0.6, layers + 0.6)
    axis.set_xlabel("decoder layer")


def kl_axis(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.set_ylim(bottom=FLOOR * 0.8)
    axis.set_ylabel("KL to dense, nats an answer token")


def bound_line(axis: Axes, profile: dict[str, Any], right: float) -> None:
    """A line at the bound, labelled at x = `right`."""
    bound = profile["goal"]["bound"]
    axis.axhline(bound, color=MUTED, lw=0.9, ls=(0, (1, 2)))
    axis.annotate(f"bound {bound:g}", (right, bound), ha="right", va="bottom", color=MUTED, fontsize=8)


def floored(values: Iterable[float]) -> list[float]:
    return [max(value, FLOOR) for value in values]


def interval_band(
    axis: Axes, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str
) -> None:
    axis.fill_between(x, floored(low), floored(high), color=colour, alpha=0.15, lw=0)


def quartiles(
    axis: Axes,
    rows: Sequence[Sequence[float]],
    colour: str,
    factor: float,
    label: str | None = None,
    dash: str = "-",
) -> None:
    values = factor * np.asarray(rows)
    low, high = np.minimum(values[:, 0], values[:, 2]), np.maximum(values[:, 0], values[:, 2])
    x = range(len(values))
    axis.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
    axis.plot(x, values[:, 1], dash, marker="o", ms=3, color=colour, label=label)


def inline(svg: str, name: str) -> str:
    """The drawing for a page: CSS variables as colours, ids that begin with `name`, as wide as the page allows."""
    svg = svg[svg.index("<svg") :]
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")
    return (
        re.sub(r'width="[\d.]+pt" height="[\d.]+pt"|height="[\d.]+pt" ', "", svg, count=2)
        .replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
        .replace(' xmlns="http://www.w3.org/2000/svg"', "")
        .replace("xlink:href", "href")
    )
