"""The pictures of a profile: drawn once, written as PNG, and returned as SVG for the page."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from latefusion.eval.fusion.style import (
    ASIDE,
    BLUE,
    FLOOR,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PINK,
    SHADE,
    STYLE,
    WIDTH,
    bound_line,
    edges,
    floored,
    inline,
    interval_band,
    kl_axis,
    layer_axis,
    quartiles,
    shade,
)  # fmt: skip
from latefusion.models.flops import prefill_share


def draw(profile: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write every picture as PNG into `folder`, and return it as SVG text by name."""
    pictures: dict[str, Callable[[dict[str, Any]], Figure]] = {
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
        for name, picture in pictures.items():
            figure = picture(profile)
            figure.savefig(folder / f"{name}.png", facecolor="#ffffff", metadata={"Software": None})
            svg = io.StringIO()
            figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
            plt.close(figure)
            texts[name] = inline(svg.getvalue(), name)
    return texts


def stages(profile: dict[str, Any]) -> Figure:
    """KL and accuracy of the knock-outs by layer, the three stages shaded, and the chosen band above them."""
    labelled = profile["labelled"]
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
        rows = profile["curves"][kind]
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
    bound_line(top, profile, profile["layers"])
    enter, leave, layers = edges(profile)
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
    a, b = profile["ends"]["enter"], profile["ends"]["exit"]
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


def vision_side(profile: dict[str, Any]) -> Figure:
    """Frozen, late and hidden before a layer: what the vision tokens' own computation is worth."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.5), layout="constrained")
    lines = (
        ("late", "late entry: hidden before, raw features at the layer", ORANGE, "-", "s"),
        ("prefix", "hidden before, states computed (the ceiling)", BLUE, "--", "o"),
        ("frozen", "seen, but not computed before", GREEN, ":", "^"),
    )
    for kind, label, colour, dash, marker in lines:
        rows = profile["curves"][kind]
        x = [row["layer"] for row in rows]
        interval_band(axis, x, [row["low"] for row in rows], [row["high"] for row in rows], colour)
        axis.plot(
            x, floored(row["kl"] for row in rows), dash, marker=marker, ms=3.5, color=colour, label=label
        )
    entry = profile["entry"]
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
    shade(axis, profile)
    layer_axis(axis, profile["layers"])
    figure.legend(loc="outside upper center", ncols=1, alignment="left")
    return figure


def attention(profile: dict[str, Any]) -> Figure:
    seen = profile["observed"]
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
        shade(axis, profile)
    axes[2].axhline(profile["tokens"]["vision"], color=MUTED, lw=0.9, ls=(0, (1, 2)))
    axes[2].set_ylim(0, 1.08 * profile["tokens"]["vision"])
    layer_axis(axes[2], profile["layers"])
    return figure


def contribution(profile: dict[str, Any]) -> Figure:
    seen = profile["observed"]
    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 4.4), sharex=True, layout="constrained")
    for name, label, colour, dash in (
        ("cosine_min", "most important token", ORANGE, "-"),
        ("cosine_1%", "1% quantile", BLUE, "--"),
        ("cosine_10%", "10% quantile", GREEN, ":"),
    ):
        quartiles(axes[0], [[1 - q for q in row] for row in seen[name]], colour, 1.0, label, dash)
    axes[0].set_yscale("log")
    axes[0].set_ylim(1e-5, 2)
    axes[0].axhline(1 - profile["agreement"]["fusion_threshold"], color=MUTED, lw=0.9, ls=(0, (1, 2)))
    axes[0].set_ylabel("1 - cosine, output\nwithout the token")
    for name, colour, dash in (("norm_max", ORANGE, "-"), ("norm_99%", BLUE, "--"), ("norm_90%", GREEN, ":")):
        quartiles(axes[1], seen[name], colour, 1.0, None, dash)
    axes[1].set_ylabel("l2 norm of the\ncontribution")
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        shade(axis, profile)
    figure.legend(loc="outside upper center", ncols=3)
    layer_axis(axes[1], profile["layers"])
    return figure


def settling(profile: dict[str, Any]) -> Figure:
    """From which layer on the logit lens says what the model will write."""
    rows = profile["lenses"]["layers"]
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
    shade(axis, profile)
    layer_axis(axis, profile["layers"])
    figure.legend(loc="outside upper center", ncols=1, alignment="left")
    return figure


def sinks(profile: dict[str, Any]) -> Figure:
    """Attention received against the size of what there is to give, one point a vision token."""
    a, b, layers = edges(profile)
    chosen = sorted({0, (a + b) // 2, layers - 1})
    figure, axes = plt.subplots(
        1, len(chosen), figsize=(WIDTH, 2.5), layout="constrained", sharey=True, squeeze=False
    )
    for axis, layer in zip(axes[0], chosen, strict=True):
        x = np.concatenate([np.asarray(example["value_norm"][layer]) for example in profile["maps"]])
        y = np.concatenate([np.asarray(example["attention"][layer]) for example in profile["maps"]])
        axis.plot(x, 100 * np.maximum(y, 1e-6), "o", ms=1.8, mew=0, alpha=0.45, color=BLUE)
        axis.set_yscale("log")
        axis.set_title(f"layer {layer} (ρ = {profile['observed']['sink'][layer][1]:.2f})", fontsize=8.5)
    axes[0, 0].set_ylabel("attention received, %")
    figure.supxlabel("L1 norm of the token's value vector", fontsize=9, color=INK)
    return figure


def agreement(profile: dict[str, Any]) -> Figure:
    spread, layers = profile["agreement"], profile["layers"]
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
        shade(axis, profile)
    layer_axis(axes[2], layers)
    return figure


def pareto(profile: dict[str, Any]) -> Figure:
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
        points = [p for p in profile["points"] if test(p)]
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
    front = profile["front"]
    axis.step(
        [100 * p["flops"] for p in front],
        floored(p["kl"] for p in front),
        where="post",
        color=ORANGE,
        lw=1.4,
        label="nothing measured is better in both",
    )
    flops, confirmed = profile["chosen"]["flops"], profile["confirmed"]
    axis.errorbar(
        [100 * flops],
        [max(confirmed["kl"], FLOOR)],
        yerr=[
            [max(confirmed["kl"], FLOOR) - max(confirmed["low"], FLOOR)],
            [max(confirmed["limit"], FLOOR) - max(confirmed["kl"], FLOOR)],
        ],
        fmt="*",
        ms=13,
        color=PINK,
        capsize=3,
        label="chosen",
        zorder=5,
    )
    kl_axis(axis)
    bound_line(axis, profile, 102)
    axis.set_xlabel("decoder FLOPs of the prefill, % of dense")
    axis.set_xlim(0, 103)
    if (outside := profile.get("outside")) is not None:

        def whole_of(decoder: Any) -> Any:
            return 100 * prefill_share(decoder / 100, outside)

        def decoder_of(whole: Any) -> Any:
            return whole * (1 + outside) - 100 * outside

        above = axis.secondary_xaxis("top", functions=(whole_of, decoder_of))
        above.set_xlabel("FLOPs of the whole prefill (tower, projector and head too), % of dense")
    figure.legend(loc="outside upper center", ncols=1, alignment="left")
    return figure
