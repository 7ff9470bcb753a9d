"""The picture of an explanation: plain SVG text, no script, no font, no network; safe for colour-blind readers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import ceil

from PIL import Image

from latefusion.models.executor.trace import TraceRecord

WIDTH, SIDE, GAP = 720, 250, 30  # of the picture, of an image, between things
PLOT = (WIDTH - SIDE - 3 * GAP - 30, 200)  # width and height of the axes
STYLE = (
    ".f{--ink:#1d2330;--muted:#5b6474;--grid:#e3e6ec;--paper:#fff;--all:#5b6474;--vision:#0072b2;--kept:#d55e00;"
    "font:13px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif}"
    "@media(prefers-color-scheme:dark){.f{--ink:#e8eaf0;--muted:#a4adbd;--grid:#333a48;--paper:#171b24;"
    "--all:#b4bccb;--vision:#56b4e9;--kept:#e69f00}}"
    ".f text{fill:var(--ink)}.f .m{fill:var(--muted)}.f .g{stroke:var(--grid)}.f .a{stroke:var(--muted)}"
    ".f .t{fill:none;stroke:var(--all);stroke-width:2;stroke-dasharray:6 4}"
    ".f .v{fill:none;stroke:var(--vision);stroke-width:3}.f .k{fill:none;stroke:var(--kept);stroke-width:2}"
    ".f .mark{stroke:var(--kept);stroke-width:1.5;stroke-dasharray:2 3}"
    ".f .veil{fill:#fff;opacity:.72;shape-rendering:crispEdges}"
    ".f .paper{fill:var(--paper)}"
)


@dataclass(frozen=True)
class Patches:
    """An image, and the grid of its tokens."""

    image: Image.Image
    rows: int
    columns: int


def draw(record: TraceRecord, kept: Sequence[int] | None, images: Sequence[Patches], words: str) -> str:
    """Draw the kept patches over each image, one below the other, and beside them the tokens of each layer.

    Args:
        kept: numbers of the vision tokens that were chosen, counted over all images; None: all are shown.
        images: may be empty.
        words: what the picture says, for readers who cannot see it.
    """
    left = GAP + SIDE if images else GAP
    body, top, first = [], 34, 0
    for number, patches in enumerate(images):
        count = patches.rows * patches.columns
        inside = None if kept is None else {i - first for i in kept if first <= i < first + count}
        shown = "all patches" if inside is None else f"{len(inside)} of {count} patches kept"
        name = f"Image {number + 1}: " if len(images) > 1 else ""
        body.append(_text(GAP, top - 12, f"{name}{shown}", bold=True))
        height = round(SIDE * patches.rows / patches.columns)
        body.append(_image(patches, inside, GAP, top, height))
        first, top = first + count, top + height + 44
    body.append(_steps(record, left + GAP + 24, 34))
    tall = max(top - 10, 34 + PLOT[1] + 84)
    return (
        f'<svg class="f" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" '
        'style="max-width:100%;height:auto" '
        f'role="img"><title>{escape(words)}</title><style>{STYLE}</style>'
        f'<rect class="paper" width="{WIDTH}" height="{tall}"/>{"".join(body)}</svg>\n'
    )


def _image(patches: Patches, kept: set[int] | None, x: int, y: int, height: int) -> str:
    buffer = io.BytesIO()
    patches.image.convert("RGB").resize((2 * SIDE, 2 * height), Image.Resampling.NEAREST).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    out = [f'<image x="{x}" y="{y}" width="{SIDE}" height="{height}" href="data:image/png;base64,{data}"/>']
    if kept is not None:
        wide, high = SIDE / patches.columns, height / patches.rows
        boxes = [
            (
                i,
                f'x="{x + i % patches.columns * wide:.2f}" y="{y + i // patches.columns * high:.2f}" '
                f'width="{wide:.2f}" height="{high:.2f}"',
            )
            for i in range(patches.rows * patches.columns)
        ]
        out += [f'<rect class="veil" {box}/>' for i, box in boxes if i not in kept]
        out += [f'<rect class="k" {box}/>' for i, box in boxes if i in kept]
    return "".join(out)


def _steps(record: TraceRecord, x: int, y: int) -> str:
    wide, high = PLOT[0] if x > SIDE else WIDTH - x - GAP, PLOT[1]
    layers, most = len(record.tokens), max(record.tokens)
    across, bottom = wide / layers, y + high
    out = [_text(x - 24, y - 12, "Tokens that enter each layer", bold=True)]
    for share in (0, 0.25, 0.5, 0.75, 1):
        level = bottom - share * high
        out.append(f'<line class="g" x1="{x}" x2="{x + wide}" y1="{level:.1f}" y2="{level:.1f}"/>')
        out.append(_text(x - 6, level + 4, f"{share * most:.0f}", anchor="end", muted=True))
    for layer in range(0, layers, ceil(layers / 8)):
        out.append(_text(x + (layer + 0.5) * across, bottom + 18, str(layer), anchor="middle", muted=True))
    out.append(_text(x + wide / 2, bottom + 36, "decoder layer", anchor="middle", muted=True))
    for name, layer in (("fusion", record.fusion_layer), ("exit", record.exit_layer)):
        if layer is not None:
            at = x + (layer + (0.5 if name == "fusion" else 0)) * across
            out.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{y}" y2="{bottom}"/>')
            down, anchor = (40, "end") if name == "fusion" else (64, "start")
            out.append(
                _text(at + (4 if anchor == "start" else -4), bottom - down, f"{name} {layer}", anchor=anchor)
            )
    for kind, counts in (("t", record.tokens), ("v", record.vision)):
        points: list[tuple[float, float]] = [(x, bottom - counts[0] / most * high)]
        for layer, (before, now) in enumerate(pairwise([*counts, counts[-1]]), 1):
            points += [(x + layer * across, bottom - n / most * high) for n in (before, now)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        out.append(f'<polyline class="{kind}" points="{line}"/>')
    legend = bottom + 58
    for at, kind, name in ((x, "t", "all tokens"), (x + 130, "v", "vision tokens")):
        out.append(f'<line class="{kind}" x1="{at}" x2="{at + 28}" y1="{legend - 4}" y2="{legend - 4}"/>')
        out.append(_text(at + 34, legend, name))
    return "".join(out)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", muted: bool = False, bold: bool = False
) -> str:
    kind = (' class="m"' if muted else "") + (' font-weight="600"' if bold else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'
