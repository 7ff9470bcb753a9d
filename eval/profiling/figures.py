"""The pictures of a profile: drawn once, written as PNG, and put into the page as SVG that follows light and dark.

Colours are Okabe and Ito's, safe for colour-blind readers; every line also has its own dash and marker.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID, SHADE = "#1d2331", "#5b6475", "#e3e6ed", "#f0f2f7"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b3", "#c45501", "#007a5b", "#a84080", "#5b6476"
VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", SHADE: "--shade",
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
FLOOR = 1e-4  # nats: less is drawn as so much


def draw(found: dict[str, Any], folder: Path) -> dict[str, str]:
    """Every picture as PNG in `folder`, and as SVG text by name."""
    made: dict[str, Callable[[dict[str, Any]], Figure]] = {
        "stages": stages,
        "vision_side": vision_side,
        "attention": attention,
        "contribution": contribution,
        "sinks": sinks,
        "settling": settling,
        "agreement": agreement,
        "pareto": pareto,
    }
    texts = {}
    with mpl.rc_context(STYLE):
        for name, picture in made.items():
            figure = picture(found)
            figure.savefig(folder / f"{name}.png", facecolor="#ffffff", metadata={"Software": None})
            svg = io.StringIO()
            figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
            plt.close(figure)
            texts[name] = inline(svg.getvalue(), name)
    return texts


def inline(svg: str, name: str) -> str:
    """The drawing alone, its colours as CSS variables, its ids its own, as wide as the page allows."""
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


# ---------------------------------------------------------------- the three stages


def stages(found: dict[str, Any]) -> Figure:
    """KL and accuracy of the knock-outs by layer, the three stages shaded."""
    labelled = found["labelled"]
    figure, axes = plt.subplots(
        2 if labelled else 1,
        1,
        figsize=(WIDTH, 5.0 if labelled else 3.2),
        sharex=True,
        height_ratios=[1.35, 1] if labelled else [1],
        layout="constrained",
        squeeze=False,
    )
    top = axes[0, 0]
    lines = (
        ("prefix", "hidden in all layers before", BLUE, "-", "o"),
        ("suffix", "hidden from this layer on", ORANGE, "--", "s"),
        ("single", "hidden in this layer alone", GREEN, ":", "^"),
    )
    for kind, label, colour, dash, marker in lines:
        rows = found["curves"][kind]
        x = [row["layer"] for row in rows]
        if kind != "single":
            _band(top, x, [row["low"] for row in rows], [row["high"] for row in rows], colour)
        top.plot(
            x, _floored(row["kl"] for row in rows), dash, marker=marker, ms=3.5, color=colour, label=label
        )
        if labelled:
            accuracy = [100 * row["accuracy"] for row in rows]
            axes[1, 0].plot(x, accuracy, dash, marker=marker, ms=3.5, color=colour)
    _kl_axis(top)
    top.axhline(found["wishes"]["bound"], color=MUTED, lw=0.9, ls=(0, (1, 2)))
    top.annotate(
        f"bound {found['wishes']['bound']:g}",
        (found["layers"], found["wishes"]["bound"]),
        ha="right",
        va="bottom",
        color=MUTED,
        fontsize=8,
    )
    figure.legend(loc="outside upper center", ncols=1, title="Image hidden from the text:", alignment="left")
    for row in axes[:, 0]:
        _shade(row, found)
    a, b, layers = _edges(found)
    for middle, text in (
        ((0 + a) / 2, "shallow"),
        ((a + b) / 2, "middle: fuses"),
        ((b + layers) / 2, "deep"),
    ):
        if text == "middle: fuses" or (a if text == "shallow" else layers - b) >= 2:
            top.annotate(
                text,
                (middle, 1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                color=MUTED,
                fontsize=8,
            )
    if labelled:
        axes[1, 0].set_ylabel("answers right, %")
        axes[1, 0].set_ylim(0, 103)
    _layers(axes[-1, 0], layers)
    return figure


def vision_side(found: dict[str, Any]) -> Figure:
    """Frozen, late and hidden before a layer: what the vision tokens' own computation is worth."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.5), layout="constrained")
    lines = (
        ("late", "late entry: hidden before, raw features at the layer", ORANGE, "-", "s"),
        ("prefix", "hidden before, states computed (the ceiling)", BLUE, "--", "o"),
        ("frozen", "seen, but not computed before", GREEN, ":", "^"),
    )
    for kind, label, colour, dash, marker in lines:
        rows = found["curves"][kind]
        x = [row["layer"] for row in rows]
        _band(axis, x, [row["low"] for row in rows], [row["high"] for row in rows], colour)
        axis.plot(
            x, _floored(row["kl"] for row in rows), dash, marker=marker, ms=3.5, color=colour, label=label
        )
    entry = found["entry"]
    if entry is not None:
        axis.plot(
            [entry["layer"]],
            [max(entry["kl_calibrated"], FLOOR)],
            "*",
            ms=12,
            color=PINK,
            label="the chosen band, calibrated entry",
        )
    _kl_axis(axis)
    _shade(axis, found)
    _layers(axis, found["layers"])
    figure.legend(loc="outside upper center", ncols=1, alignment="left")
    return figure


# ---------------------------------------------------------------- attention and contribution


def attention(found: dict[str, Any]) -> Figure:
    seen = found["observed"]
    panels = (
        ("share", "attention on\nvision, %", 100.0, BLUE),
        ("entropy", "its entropy,\nnats", 1.0, GREEN),
        ("tokens", "tokens that\n90% falls on", 1.0, ORANGE),
    )
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 4.8), sharex=True, layout="constrained")
    for axis, (name, label, factor, colour) in zip(axes, panels, strict=True):
        _quartiles(axis, seen[name], colour, factor)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        _shade(axis, found)
    axes[2].axhline(found["tokens"]["vision"], color=MUTED, lw=0.9, ls=(0, (1, 2)))
    _layers(axes[2], found["layers"])
    return figure


def contribution(found: dict[str, Any]) -> Figure:
    seen = found["observed"]
    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 4.4), sharex=True, layout="constrained")
    for name, label, colour, dash in (
        ("cosine_min", "most important token", ORANGE, "-"),
        ("cosine_1%", "1% quantile", BLUE, "--"),
        ("cosine_10%", "10% quantile", GREEN, ":"),
    ):
        _quartiles(axes[0], [[1 - q for q in row] for row in seen[name]], colour, 1.0, label, dash)
    axes[0].set_yscale("log")
    axes[0].set_ylim(1e-5, 2)
    axes[0].axhline(1 - found["agreement"]["fusion_threshold"], color=MUTED, lw=0.9, ls=(0, (1, 2)))
    axes[0].set_ylabel("1 - cosine, output\nwithout the token")
    for name, colour, dash in (("norm_max", ORANGE, "-"), ("norm_99%", BLUE, "--"), ("norm_90%", GREEN, ":")):
        _quartiles(axes[1], seen[name], colour, 1.0, None, dash)
    axes[1].set_ylabel("l2 norm of the\ncontribution")
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        _shade(axis, found)
    figure.legend(loc="outside upper center", ncols=3)
    _layers(axes[1], found["layers"])
    return figure


def sinks(found: dict[str, Any]) -> Figure:
    """Attention received against the size of what there is to give, one point a vision token."""
    a, b, layers = _edges(found)
    chosen = sorted({0, (a + b) // 2, layers - 1})
    figure, axes = plt.subplots(
        1, len(chosen), figsize=(WIDTH, 2.5), layout="constrained", sharey=True, squeeze=False
    )
    for axis, layer in zip(axes[0], chosen, strict=True):
        x = np.concatenate([np.asarray(example["value_norm"][layer]) for example in found["maps"]])
        y = np.concatenate([np.asarray(example["attention"][layer]) for example in found["maps"]])
        axis.plot(x, 100 * np.maximum(y, 1e-6), "o", ms=1.8, mew=0, alpha=0.45, color=BLUE)
        axis.set_yscale("log")
        axis.set_title(f"layer {layer} (ρ = {found['observed']['sink'][layer][1]:.2f})", fontsize=8.5)
    axes[0, 0].set_ylabel("attention received, %")
    figure.supxlabel("L1 norm of the token's value vector", fontsize=9, color=INK)
    return figure


def settling(found: dict[str, Any]) -> Figure:
    """From which layer on the logit lens says what the model will write."""
    rows = found["lenses"]["layers"]
    figure, axis = plt.subplots(figsize=(WIDTH, 2.5), layout="constrained")
    x = [row["layer"] for row in rows]
    axis.plot(x, [100 * row["settled"] for row in rows], "-o", ms=3.5, color=BLUE, label="samples settled, %")
    axis.plot(
        x,
        [100 * row["probability"] for row in rows],
        "--s",
        ms=3.5,
        color=ORANGE,
        label="median probability of the top word, %",
    )
    axis.set_ylim(0, 103)
    axis.set_ylabel("%")
    _shade(axis, found)
    _layers(axis, found["layers"])
    figure.legend(loc="outside upper center", ncols=1, alignment="left")
    return figure


# ---------------------------------------------------------------- agreement, front


def agreement(found: dict[str, Any]) -> Figure:
    spread, layers = found["agreement"], found["layers"]
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 3.9), sharex=True, layout="constrained")
    n = len(spread["enter"])
    for axis, name, label, colour in (
        (axes[0], "enter", "latest enter", BLUE),
        (axes[1], "fusion", "VisiPruner's\nfusion layer", GREEN),
        (axes[2], "exit", "earliest exit", ORANGE),
    ):
        values = [value for value in spread[name] if value is not None]
        counts = np.bincount(values, minlength=layers + 1) if values else np.zeros(layers + 1)
        axis.bar(range(layers + 1), 100 * counts / n, color=colour, width=0.7)
        axis.set_ylabel(f"{label},\n% of samples")
        if len(values) < n:
            axis.annotate(
                f"none in {100 * (n - len(values)) / n:.0f}%",
                (0.99, 0.95),
                xycoords="axes fraction",
                ha="right",
                va="top",
                color=MUTED,
                fontsize=8,
            )
        _shade(axis, found)
    _layers(axes[2], layers)
    return figure


def pareto(found: dict[str, Any]) -> Figure:
    figure, axis = plt.subplots(figsize=(WIDTH, 3.9), layout="constrained")
    kinds = (
        (
            "late entry or early exit alone",
            lambda p: not (p["calibrated"] or p["schedule"]["keep"]),
            GREY,
            "o",
        ),
        (
            "the band, its keeps, calibrated entry",
            lambda p: p["calibrated"] or p["schedule"]["keep"],
            BLUE,
            "s",
        ),
    )
    for label, test, colour, marker in kinds:
        points = [p for p in found["points"] if test(p)]
        if points:
            axis.plot(
                [100 * p["flops"] for p in points],
                _floored(p["kl"] for p in points),
                marker,
                ms=4,
                mew=0,
                alpha=0.65,
                color=colour,
                label=label,
            )
    front = found["front"]
    axis.step(
        [100 * p["flops"] for p in front],
        _floored(p["kl"] for p in front),
        where="post",
        color=ORANGE,
        lw=1.4,
        label="nothing measured is better in both",
    )
    chosen = found["chosen"]
    axis.errorbar(
        [100 * chosen["flops"]],
        [max(chosen["kl"], FLOOR)],
        yerr=[
            [max(chosen["kl"], FLOOR) - max(chosen["low"], FLOOR)],
            [chosen["high"] - max(chosen["kl"], FLOOR)],
        ],
        fmt="*",
        ms=13,
        color=PINK,
        capsize=3,
        label="chosen",
        zorder=5,
    )
    _kl_axis(axis)
    axis.set_xlabel("decoder FLOPs of the prefill, % of dense")
    axis.set_xlim(0, 103)
    figure.legend(loc="outside upper center", ncols=1, alignment="left")
    return figure


# ---------------------------------------------------------------- parts


def _edges(found: dict[str, Any]) -> tuple[int, int, int]:
    schedule, layers = found["chosen"]["schedule"], found["layers"]
    return schedule["enter"], layers if schedule["exit"] is None else schedule["exit"], layers


def _shade(axis: Axes, found: dict[str, Any]) -> None:
    a, b, _ = _edges(found)
    axis.axvspan(a - 0.5, b - 0.5, color=SHADE, lw=0, zorder=0)


def _layers(axis: Axes, layers: int) -> None:
    step = max(1, -(-layers // 16))
    axis.set_xticks(range(0, layers + 1, step * 2 if layers > 8 else step))
    axis.set_xlim(-0.6, layers + 0.6)
    axis.set_xlabel("decoder layer")


def _kl_axis(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.set_ylim(bottom=FLOOR * 0.8)
    axis.set_ylabel("KL to dense, nats an answer token")


def _floored(values: Any) -> list[float]:
    return [max(value, FLOOR) for value in values]


def _band(axis: Axes, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> None:
    axis.fill_between(x, _floored(low), _floored(high), color=colour, alpha=0.15, lw=0)


def _quartiles(
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
