"""Example images and frames of a profile: where the last prompt token looks, which vision tokens the schedule keeps."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from latefusion.data.samples import videos_of_sample
from latefusion.eval.fusion.style import ORANGE
from latefusion.models.explain import grid_shape, pixels, run_lengths

SIDE = 168  # pixels of the longer side of an image with its map
SHOWN = 2  # images of a sample at most


@dataclass(frozen=True)
class View:
    """An image as the model sees it.

    Attributes:
        tokens: which of the sample's vision tokens are its.
        grid: their rows and columns; None where their places are not known (tiles, frames of a video).
    """

    image: Image.Image
    tokens: range
    grid: tuple[int, int] | None


def views(row: Mapping[str, Tensor], sample: dict[str, Any], vision_ids: Collection[int]) -> list[View]:
    """The first images of a sample; of one with videos its first picture and its last, without their tokens.

    Args:
        row: what the collator makes of the sample: images that it crops are shown cropped.
    """
    images = pictures_of(sample)
    if videos_of_sample(sample):
        ends = images if len(images) < SHOWN else [images[0], images[-1]]
        return [View(image, range(0), None) for image in ends]
    lengths = run_lengths(torch.isin(row["input_ids"][0], torch.tensor(sorted(vision_ids))))
    each = sum(lengths) // len(images)
    if len(lengths) < len(images) and all(length % each == 0 for length in lengths):
        lengths = [each] * len(images)  # side by side
    if len(lengths) != len(images):
        return [View(image, range(0), None) for image in images[:SHOWN]]
    cropped, grids = pixels(row.get("pixel_values"), len(images)), row.get("image_grid_thw")
    shown, first = [], 0
    for i, length in enumerate(lengths):
        grid = grid_shape(length, None if grids is None else grids[i].tolist())
        reshaped = cropped and images[i].width * cropped[i].height != images[i].height * cropped[i].width
        image = cropped[i] if grid and reshaped else images[i]
        shown.append(View(image, range(first, first + length), grid))
        first += length
    return shown[:SHOWN]


def pictures_of(sample: dict[str, Any]) -> list[Image.Image]:
    """The images of a sample, then the frames of its videos."""
    frames = (frame for video in videos_of_sample(sample) for frame in video.frames)
    return [*sample["images"], *map(Image.fromarray, frames)]


def examples(
    folder: Path, profile: dict[str, Any], samples: Sequence[dict[str, Any]], shown: Sequence[Sequence[View]]
) -> list[dict[str, Any]]:
    """The first few samples as the page has them, each also a PNG in `folder`; `shown`: of each its `views`."""
    rows = []
    for i, (sample, seen) in enumerate(zip(samples, shown, strict=False)):
        pictures, every = [], len(pictures_of(sample))
        for number, view in enumerate(seen):
            if videos_of_sample(sample):
                pictures.append((("first picture", "last picture")[number], scaled(view)))
                continue
            name = f"image {number + 1}: " if every > 1 else ""
            pictures += [(name + label, picture) for label, picture in maps(profile, i, view)]
        strip([picture for _, picture in pictures]).save(folder / f"example_{i}.png")
        question = [part for m in sample["messages"][:-1] for part in m["content"] if m["role"] != "system"]
        rows.append(
            {
                "question": " ".join(part["text"] for part in question if part["type"] == "text"),
                "answer": " ".join(part["text"] for part in sample["messages"][-1]["content"]),
                "pictures": [(label, uri(picture)) for label, picture in pictures],
                "hidden": every - len(seen),
                "unknown": any(view.grid is None for view in seen),
            }
        )
    return rows


def maps(profile: dict[str, Any], i: int, view: View) -> list[tuple[str, Image.Image]]:
    """The image of sample `i`, attention at three layers over it, and what is kept of it."""
    if view.grid is None:
        return [("the image", scaled(view))]
    schedule, layers = profile["chosen"]["schedule"], profile["layers"]
    middle = (schedule["enter"] + (schedule["exit"] or layers)) // 2
    pictures = [("the image", scaled(view))]
    for layer in sorted({0, middle, layers - 1}):
        attention = [profile["maps"][i]["attention"][layer][token] for token in view.tokens]
        pictures.append((f"attention, layer {layer}", heat(view, attention)))
    for layer, tokens in profile["kept"]["tokens"][i] or []:
        inside = [token - view.tokens.start for token in tokens if token in view.tokens]
        if str(layer) in map(str, schedule["keep"]) and len(inside) < len(view.tokens):
            pictures.append((f"kept from layer {layer}: {len(inside)}", masked(view, inside)))
    return pictures


def scaled(view: View) -> Image.Image:
    """Scale a picture to the page's size, with the proportions of its grid."""
    wide, high = view.grid[::-1] if view.grid else view.image.size
    factor = SIDE / max(wide, high)
    size = (max(1, round(wide * factor)), max(1, round(high * factor)))
    small = view.image.width < size[0]
    return view.image.convert("RGB").resize(
        size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    )


def heat(view: View, attention: Sequence[float]) -> Image.Image:
    """Where attention falls, from dark to bright (`cividis`, safe for colour-blind readers), over a grey image."""
    assert view.grid is not None
    top, base = max(attention) or 1.0, scaled(view)
    cells = Image.new("RGB", view.grid[::-1])
    colours = mpl.colormaps["cividis"]
    cells.putdata([tuple(round(255 * c) for c in colours((value / top) ** 0.5)[:3]) for value in attention])
    grey = base.convert("L").convert("RGB")
    return Image.blend(grey, cells.resize(base.size, Image.Resampling.NEAREST), 0.72)


def masked(view: View, tokens: Sequence[int]) -> Image.Image:
    """The image where tokens were kept, faint elsewhere, kept tokens framed."""
    assert view.grid is not None
    base = scaled(view)
    shown = Image.blend(base.convert("L").convert("RGB"), Image.new("RGB", base.size, "#ffffff"), 0.75)
    draw = ImageDraw.Draw(shown)
    down, across = base.height / view.grid[0], base.width / view.grid[1]
    for token in tokens:
        row, column = divmod(token, view.grid[1])
        left, right = round(column * across), round((column + 1) * across)
        top, bottom = round(row * down), round((row + 1) * down)
        shown.paste(base.crop((left, top, right, bottom)), (left, top))
        draw.rectangle((left, top, right - 1, bottom - 1), outline=ORANGE)
    return shown


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side in one."""
    whole = Image.new(
        "RGB", (sum(p.width + 8 for p in pictures) - 8, max(p.height for p in pictures)), "#ffffff"
    )
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width + 8
    return whole


def uri(image: Image.Image) -> str:
    data = io.BytesIO()
    image.quantize(64).save(data, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
