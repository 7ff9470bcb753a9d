"""Pictures of single things: a point a vision token or a schedule, a bar for the samples that agree."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from latefusion.eval.fusion.style import (
    BLUE,
    FLOOR,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PINK,
    WIDTH,
    bound_line,
    edges,
    floored,
    kl_axis,
    layer_axis,
    shade,
)


def sinks(found: dict[str, Any]) -> Figure:
    """Attention received against the size of what there is to give, one point a vision token."""
    a, b, layers = edges(found)
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
        shade(axis, found)
    layer_axis(axes[2], layers)
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
                floored(p["kl"] for p in points),
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
        floored(p["kl"] for p in front),
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
            [max(chosen["high"], FLOOR) - max(chosen["kl"], FLOOR)],
        ],
        fmt="*",
        ms=13,
        color=PINK,
        capsize=3,
        label="chosen",
        zorder=5,
    )
    kl_axis(axis)
    bound_line(axis, found, 102)
    axis.set_xlabel("decoder FLOPs of the prefill, % of dense")
    axis.set_xlim(0, 103)
    figure.legend(loc="outside upper center", ncols=1, alignment="left")
    return figure
