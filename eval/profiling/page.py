"""`report.html`: one file with everything a profile found, no network."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageDraw

from latefusion.eval.profiling import figures
from latefusion.eval.profiling.style import ORANGE

SIDE = 168  # pixels of an image with its map


def write_report(folder: Path, found: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
    """Draw every picture and write the page.

    Args:
        found: what `profile.json` holds; samples: for the example images.
    """
    drawings = figures.draw(found, folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share, digits=1: f"{100 * share:.{digits}f}"
    page = environment.get_template("template.html").render(
        found=found,
        headline=headline(found),
        stages=stages_in_words(found),
        drawings={name: Markup(text) for name, text in drawings.items()},
        examples=examples(folder, found, samples),
    )
    (folder / "report.html").write_text(page)


def headline(found: dict[str, Any]) -> str:
    chosen = found["chosen"]
    schedule, layers = chosen["schedule"], found["layers"]
    leave = layers if schedule["exit"] is None else schedule["exit"]
    right = ""
    if found["labelled"]:
        right = (
            f" {100 * chosen['accuracy']:.1f}% of the answers are right, "
            f"{100 * found['dense_accuracy']:.1f}% in the dense model."
        )
    return (
        f"Of {layers} decoder layers, {schedule['enter']} to {leave - 1} see vision tokens, {_keeps(schedule)}: "
        f"{100 * chosen['flops']:.0f}% of the FLOPs, untrained.{right}"
    )


def _keeps(schedule: dict[str, Any]) -> str:
    if not schedule["keep"]:
        return "all of them"
    first, *rest = schedule["keep"].items()
    return ", ".join(
        [f"{first[1]} of them from layer {first[0]} on", *(f"{k} from {layer}" for layer, k in rest)]
    )


def stages_in_words(found: dict[str, Any]) -> str:
    """Whether the three stages of VisiPruner's paper appear, plainly."""
    a, b, layers = found["ends"]["enter"], found["ends"]["exit"], found["layers"]
    bound = found["wishes"]["bound"]
    parts = [
        f"Shallow: hiding the image from the text in layers 0 to {a - 1} stays within the bound of {bound:g} nats."
        if a
        else f"Shallow: there is no such stage; layer 0 alone already costs more than {bound:g} nats.",
        f"Deep: so does hiding it from layer {b} on."
        if b < layers
        else f"Deep: there is no such stage; the last layer still costs more than {bound:g} nats.",
    ]
    single = {int(row["layer"]): row["kl"] for row in found["curves"]["single"]}
    peak = max(single, key=lambda layer: single[layer])
    inside = [layer for layer, kl in single.items() if kl > bound]
    parts.append(
        f"Middle: {f'layers {_listed(inside)} are each needed' if inside else 'no layer is needed'} by themselves "
        f"(beyond the bound), layer {peak} most ({single[peak]:.3f} nats)."
    )
    schedule = found["chosen"]["schedule"]
    enter, leave = schedule["enter"], layers if schedule["exit"] is None else schedule["exit"]
    if (enter, leave) != (a, b):
        parts.append(
            f"The schedule's band, layers {enter} to {leave - 1}, is wider, as both ends hidden at once, or the entry, "
            "cost more."
            if enter <= a and leave >= b
            else f"The schedule's band is layers {enter} to {leave - 1}."
        )
    verdict = "All three stages appear." if a and b < layers else "Not all three stages appear."
    return f"{verdict} {' '.join(parts)}"


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


# ---------------------------------------------------------------- example images


def examples(folder: Path, found: dict[str, Any], samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first few samples: image, where the last prompt token looks, what the schedule keeps.

    Maps are drawn where a sample has one image with a square number of tokens; other samples have their image alone.
    """
    schedule, rows = found["chosen"]["schedule"], []
    middle = (schedule["enter"] + (schedule["exit"] or found["layers"])) // 2
    for i, (sample, maps) in enumerate(zip(samples, found["maps"], strict=False)):
        image = sample["images"][0].convert("RGB")
        pictures = [("the image", _scaled(image))]
        side = math.isqrt(len(maps["words"]))
        if side * side == len(maps["words"]) and len(sample["images"]) == 1:
            attention = maps["attention"]
            for layer in sorted({0, middle, found["layers"] - 1}):
                pictures.append((f"attention, layer {layer}", _heat(image, attention[layer], side)))
            kept = found["kept"]["tokens"][i] or []
            fewer = [tokens for tokens in kept if 0 < len(tokens) < side * side]
            for (layer, k), tokens in zip(schedule["keep"].items(), fewer, strict=False):
                pictures.append((f"kept from layer {layer}: {k}", _masked(image, tokens, side)))
        strip = _strip([picture for _, picture in pictures])
        strip.save(folder / f"example_{i}.png")
        question = sample["messages"][0]["content"]
        rows.append(
            {
                "question": " ".join(part["text"] for part in question if part["type"] == "text"),
                "answer": " ".join(part["text"] for part in sample["messages"][-1]["content"]),
                "pictures": [(label, _uri(picture)) for label, picture in pictures],
            }
        )
    return rows


def _scaled(image: Image.Image) -> Image.Image:
    return image.resize(
        (SIDE, SIDE), Image.Resampling.NEAREST if image.width < SIDE else Image.Resampling.LANCZOS
    )


def _heat(image: Image.Image, attention: Sequence[float], side: int) -> Image.Image:
    """Where attention falls, from dark to bright (`cividis`, safe for colour-blind readers), over a grey image."""
    top = max(attention) or 1.0
    cells = Image.new("RGB", (side, side))
    colours = figures.mpl.colormaps["cividis"]
    cells.putdata([tuple(round(255 * c) for c in colours((value / top) ** 0.5)[:3]) for value in attention])
    grey = _scaled(image).convert("L").convert("RGB")
    return Image.blend(grey, cells.resize((SIDE, SIDE), Image.Resampling.NEAREST), 0.72)


def _masked(image: Image.Image, tokens: Sequence[int], side: int) -> Image.Image:
    """The image where tokens were kept, faint elsewhere, kept tokens framed."""
    base = _scaled(image)
    shown = Image.blend(base.convert("L").convert("RGB"), Image.new("RGB", base.size, "#ffffff"), 0.75)
    draw = ImageDraw.Draw(shown)
    step = SIDE / side
    for token in tokens:
        row, column = divmod(token, side)
        left, top, right, bottom = (round(v * step) for v in (column, row, column + 1, row + 1))
        shown.paste(base.crop((left, top, right, bottom)), (left, top))
        draw.rectangle((left, top, right - 1, bottom - 1), outline=ORANGE)
    return shown


def _strip(pictures: Sequence[Image.Image]) -> Image.Image:
    strip = Image.new("RGB", (len(pictures) * (SIDE + 8) - 8, SIDE), "#ffffff")
    for i, picture in enumerate(pictures):
        strip.paste(picture, (i * (SIDE + 8), 0))
    return strip


def _uri(image: Image.Image) -> str:
    data = io.BytesIO()
    image.quantize(64).save(data, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
