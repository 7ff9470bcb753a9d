"""Every picture of a profile: drawn once, written as PNG, put into the page as SVG that follows light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from latefusion.eval.fusion import curves, points
from latefusion.eval.fusion.style import STYLE, VARIABLES


def draw(found: dict[str, Any], folder: Path) -> dict[str, str]:
    """Every picture as PNG in `folder`, and as SVG text by name."""
    made: dict[str, Callable[[dict[str, Any]], Figure]] = {
        "stages": curves.stages,
        "vision_side": curves.vision_side,
        "attention": curves.attention,
        "contribution": curves.contribution,
        "sinks": points.sinks,
        "settling": curves.settling,
        "agreement": points.agreement,
        "pareto": points.pareto,
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
