"""Pictures by decoder layer: knock-outs, what vision tokens compute, attention, contribution, logit lens."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from latefusion.eval.fusion.style import (
    ASIDE,
    BLUE,
    FLOOR,
    GREEN,
    MUTED,
    ORANGE,
    PINK,
    SHADE,
    WIDTH,
    bound_line,
    edges,
    floored,
    interval_band,
    kl_axis,
    layer_axis,
    quartiles,
    shade,
)


def stages(found: dict[str, Any]) -> Figure:
    """KL and accuracy of the knock-outs by layer, the three stages shaded, and the chosen band above them."""
    labelled = found["labelled"]
    figure, axes = plt.subplots(
        2 if labelled else 1,
        1,
        figsize=(WIDTH, 5.4 if labelled else 3.6),
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
            interval_band(top, x, [row["low"] for row in rows], [row["high"] for row in rows], colour)
        top.plot(
            x, floored(row["kl"] for row in rows), dash, marker=marker, ms=3.5, color=colour, label=label
        )
        if labelled:
            accuracy = [100 * row["accuracy"] for row in rows]
            axes[1, 0].plot(x, accuracy, dash, marker=marker, ms=3.5, color=colour)
    kl_axis(top)
    bound_line(top, found, found["layers"])
    enter, leave, layers = edges(found)
    top.plot(
        [enter - 0.5, leave - 0.5],
        [1, 1],
        transform=top.get_xaxis_transform(),
        color=PINK,
        lw=5,
        solid_capstyle="butt",
        clip_on=False,
        label="layers that see vision tokens in the schedule",
    )
    figure.legend(loc="outside upper center", ncols=1, title="Image hidden from the text:", alignment="left")
    a, b = found["ends"]["enter"], found["ends"]["exit"]
    if a >= b:  # the ends overlap: no layer is needed in between
        a, b = enter, leave
    for row in axes[:, 0]:
        for first, end, tint in ((0, a, ASIDE), (a, b, SHADE), (b, layers, ASIDE)):
            row.axvspan(first - 0.5, end - 0.5, color=tint, lw=0, zorder=0)
        for edge in (a, b):
            if 0 < edge < layers:
                row.axvline(edge - 0.5, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
    for middle, text in (
        ((0 + a) / 2, "shallow"),
        ((a + b) / 2, "middle: fuses"),
        ((b + layers) / 2, "deep"),
    ):
        if text == "middle: fuses" or (a if text == "shallow" else layers - b) >= 2:
            top.annotate(
                text,
                (middle, 1.015),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                color=MUTED,
                fontsize=8,
            )
    if labelled:
        axes[1, 0].set_ylabel("answers right, %")
        axes[1, 0].set_ylim(0, 103)
    layer_axis(axes[-1, 0], layers)
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
        interval_band(axis, x, [row["low"] for row in rows], [row["high"] for row in rows], colour)
        axis.plot(
            x, floored(row["kl"] for row in rows), dash, marker=marker, ms=3.5, color=colour, label=label
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
    kl_axis(axis)
    shade(axis, found)
    layer_axis(axis, found["layers"])
    figure.legend(loc="outside upper center", ncols=1, alignment="left")
    return figure


def attention(found: dict[str, Any]) -> Figure:
    seen = found["observed"]
    panels = (
        ("share", "attention on\nvision, %", 100.0, BLUE),
        ("entropy", "its entropy,\nnats", 1.0, GREEN),
        ("tokens", "tokens that\n90% falls on", 1.0, ORANGE),
    )
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 4.8), sharex=True, layout="constrained")
    for axis, (name, label, factor, colour) in zip(axes, panels, strict=True):
        quartiles(axis, seen[name], colour, factor)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        shade(axis, found)
    axes[2].axhline(found["tokens"]["vision"], color=MUTED, lw=0.9, ls=(0, (1, 2)))
    axes[2].set_ylim(0, 1.08 * found["tokens"]["vision"])
    layer_axis(axes[2], found["layers"])
    return figure


def contribution(found: dict[str, Any]) -> Figure:
    seen = found["observed"]
    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 4.4), sharex=True, layout="constrained")
    for name, label, colour, dash in (
        ("cosine_min", "most important token", ORANGE, "-"),
        ("cosine_1%", "1% quantile", BLUE, "--"),
        ("cosine_10%", "10% quantile", GREEN, ":"),
    ):
        quartiles(axes[0], [[1 - q for q in row] for row in seen[name]], colour, 1.0, label, dash)
    axes[0].set_yscale("log")
    axes[0].set_ylim(1e-5, 2)
    axes[0].axhline(1 - found["agreement"]["fusion_threshold"], color=MUTED, lw=0.9, ls=(0, (1, 2)))
    axes[0].set_ylabel("1 - cosine, output\nwithout the token")
    for name, colour, dash in (("norm_max", ORANGE, "-"), ("norm_99%", BLUE, "--"), ("norm_90%", GREEN, ":")):
        quartiles(axes[1], seen[name], colour, 1.0, None, dash)
    axes[1].set_ylabel("l2 norm of the\ncontribution")
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        shade(axis, found)
    figure.legend(loc="outside upper center", ncols=3)
    layer_axis(axes[1], found["layers"])
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
    shade(axis, found)
    layer_axis(axis, found["layers"])
    figure.legend(loc="outside upper center", ncols=1, alignment="left")
    return figure
