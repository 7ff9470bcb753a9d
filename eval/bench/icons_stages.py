"""Three stages in bases that nobody here shaped, and in planted controls: a table and a picture from several runs.

    python eval/bench/icons_stages.py seed0=RUN/stages.json ... --json docs/results/icons_stages.json
    python eval/bench/icons_stages.py --json docs/results/icons_stages.json --svg docs/icons_stages.svg

Files come from `training/smollm_icons/fusion_stages.py`. The base's early stage ends where hiding the picture in
layers [0, a) first costs more than BOUND, and its late stage begins at the smallest b whose [b, end) costs no more.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from latefusion.eval.fusion.style import (
    BLUE,
    GREEN,
    GREY,
    MUTED,
    ORANGE,
    PINK,
    STYLE,
    VARIABLES,
    WIDTH,
    inline,
)  # fmt: skip

BOUND = 0.05  # nats an answer token
DRAWS, FLOOR = 2000, 1e-4
DARK = {
    "--ink": "#e8eaf0", "--muted": "#a4adbd", "--grid": "#333a48", "--shade": "#28304a", "--aside": "#1a1f2b",
    "--blue": "#56b4e9", "--orange": "#e69f00", "--green": "#3ecf9f", "--pink": "#e59cc6", "--grey": "#b4bccb",
    "--page": "#10141c",
}  # fmt: skip
LOOKS = {"projector": (ORANGE, (0, (5, 2)), "s"), "untrained": (GREEN, (0, (1, 1.5)), "^")}
SEEDS = ((BLUE, "-", "o"), (PINK, "-", "o"), (GREY, "-", "o"))


def curves(profile: dict[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """KL of each board, hidden in [0, a) for a = 0 to L and in [b, L) for b = 0 to L: [L + 1, boards] twice."""
    layers, ranges = profile["layers"], profile["ranges"]
    none = ranges["0-0"]["kl"]
    early = [ranges[f"0-{a}"]["kl"] for a in range(layers + 1)]
    late = [ranges[f"{b}-{layers}"]["kl"] for b in range(layers)] + [none]
    return np.array(early), np.array(late)


def stages(early: NDArray[np.float64], late: NDArray[np.float64]) -> tuple[int, int]:
    """How many early layers, and from which layer on, no text token needs the picture (mean over boards <= BOUND)."""
    costly = early.mean(1) > BOUND
    first = int(np.argmax(costly)) - 1 if costly.any() else len(early) - 1
    last = int(np.argmax(late.mean(1) <= BOUND))
    return first, last


def interval(values: Any) -> list[float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return [round(float(low), 4), round(float(high), 4)]


def summarise(profile: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Means and 95% intervals over boards (bootstrap), and the ends of the stages with theirs."""
    early, late = curves(profile)
    boards = early.shape[1]
    draws = rng.integers(0, boards, (DRAWS, boards))
    ends = np.array([stages(early[:, draw], late[:, draw]) for draw in draws])
    questions = np.array(profile["questions"])
    right = {name: int(sum(entry["right"])) for name, entry in profile["ranges"].items()}
    summary: dict[str, Any] = {
        "layers": profile["layers"],
        "boards": boards,
        "questions": int(questions.sum()),
        "unused_first_layers": stages(early, late)[0],
        "unused_first_layers_95": interval(ends[:, 0]),
        "unused_from_layer": stages(early, late)[1],
        "unused_from_layer_95": interval(ends[:, 1]),
        "accuracy": round(100 * right["0-0"] / int(questions.sum()), 1),
    }
    for name, curve, key in (
        ("hidden_before", early, "0-{}"),
        ("hidden_from", late, "{}-" + str(profile["layers"])),
    ):
        low, high = np.percentile(curve[:, draws].mean(2), [2.5, 97.5], axis=1)
        summary[name] = [
            {
                "layer": layer,
                "kl": round(float(curve[layer].mean()), 4),
                "low": round(float(low[layer]), 4),
                "high": round(float(high[layer]), 4),
                "accuracy": round(100 * right.get(key.format(layer), right["0-0"]) / int(questions.sum()), 1),
            }
            for layer in range(len(curve))
        ]
    return summary


def draw(table: dict[str, Any]) -> str:
    """Two panels, KL against the layer; SVG that follows light and dark."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 5.6), sharex=True, layout="constrained")
        seeds = iter(SEEDS)
        for name, base in table.items():
            colour, dash, marker = LOOKS.get(name.split()[0]) or next(seeds)
            for axis, part in zip(axes, ("hidden_before", "hidden_from"), strict=True):
                rows = [row for row in base[part] if row["kl"] > 0]  # not where nothing is hidden
                x = [row["layer"] for row in rows]
                low, high = ([max(row[end], FLOOR) for row in rows] for end in ("low", "high"))
                axis.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)
                y = [max(row["kl"], FLOOR) for row in rows]
                axis.plot(x, y, ls=dash, marker=marker, ms=2.6, lw=1.2, color=colour, label=name)
        for axis, title in zip(
            axes, ("picture hidden in layers before a", "picture hidden from layer b on"), strict=True
        ):
            axis.set_yscale("log")
            axis.set_ylim(FLOOR * 0.8, None)
            axis.axhline(BOUND, color=MUTED, lw=0.9, ls=(0, (1, 2)))
            axis.annotate(f"{BOUND:g} nats", (0, BOUND), va="bottom", color=MUTED, fontsize=8)
            axis.set_title(title, fontsize=9, loc="left")
            axis.set_ylabel("KL, nats an answer token")
        axes[1].set_xlabel("layer a, layer b")
        axes[0].legend(fontsize=8, loc="lower right")
        path = Path("icons_stages.tmp.svg")
        figure.savefig(path, transparent=True)
        plt.close(figure)
        svg = inline(path.read_text(), "stages")
        path.unlink()
    light = "; ".join(f"{variable}: {colour}" for colour, variable in VARIABLES.items())
    dark = "; ".join(f"{variable}: {colour}" for variable, colour in DARK.items())
    style = f"<style>:root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}</style>"
    title = f"KL of hiding the picture in some layers: {', '.join(table)}"
    return re.sub(
        r"<svg([^>]*)>",
        rf"<svg xmlns='http://www.w3.org/2000/svg' xmlns:xlink='http://www.w3.org/1999/xlink' width='560'"
        rf" role='img' aria-label='{title}'\1>{style}",
        svg,
        count=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="*", help="NAME=FILE, in the order of the table; none: draw what --json holds"
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    table = {} if options.files else json.loads(options.json.read_text())["bases"]
    for argument in options.files:
        name, _, path = argument.partition("=")
        table[name] = summarise(json.loads(Path(path).read_text()), rng)
        base = table[name]
        print(f"{name}: {base['accuracy']}% right, layers before {base['unused_first_layers']} "
              f"{base['unused_first_layers_95']} and from {base['unused_from_layer']} {base['unused_from_layer_95']} "
              "do not need the picture")  # fmt: skip
    if options.files:
        options.json.write_text(json.dumps({"bound": BOUND, "bases": table}) + "\n")
    if options.svg:
        options.svg.write_text(draw(table))


if __name__ == "__main__":
    main()
