"""`scenes`: a procedural visual-question-answering set, rendered with Pillow.

A scene is a 96 x 96 image of 2 to 6 coloured shapes and one sign on a 3 x 3 grid, with about 13
questions (`data/scene_questions.py`). It is a function of (seed, split, index) alone, the same on every
machine and in every process.

Splits are disjoint by construction: a hash of what stands where (colours, shapes, sign text and cells;
not jitter, sizes or background) assigns every possible layout to one split, and a scene is redrawn until
its layout falls in the split asked for. Reading is closed-set: the 30 words and 90 numbers of the signs
occur in every split, only never in the same layout.

Text is drawn with the font in `data/fonts/`, so pixels do not depend on the fonts of the machine.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from latefusion.data.scene_questions import COLORS, SHAPES, WORDS, Item, Question, Scene, Sign, ask

if TYPE_CHECKING:
    import datasets

VERSION = 1  # raise it when a scene, a question or a pixel changes: it names the cache
SIZE, CELL, ZOOM = 96, 32, 2  # pixels of the image and of a cell; drawn at ZOOM times the size, then averaged
FONT = Path(__file__).parent / "fonts" / "Aileron-Regular-subset.ttf"
SPLITS = {"train": range(2, 10), "validation": range(1, 2), "test": range(0, 1)}  # layout hash modulo 10
N_SCENES = {"train": 1500, "validation": 150, "test": 300}


def draw_layout(rng: random.Random) -> Scene:
    """A random scene. Few colours and shapes a scene, so that duplicates and near misses occur."""
    cells = [(row, column) for row in range(3) for column in range(3)]
    rng.shuffle(cells)
    n_items = rng.randint(2, 6)
    colors = rng.sample(list(COLORS), rng.choice([2, 3, 4, 5]))
    shapes = rng.sample(SHAPES, rng.choice([2, 3, 4]))
    items = tuple(
        Item(
            rng.choice(colors),
            rng.choice(shapes),
            *cell,
            dx=rng.randint(-3, 3),
            dy=rng.randint(-3, 3),
            radius=rng.choice([8, 10, 12]),
        )
        for cell in cells[:n_items]
    )
    kind = rng.choice(["word", "number"])
    text = rng.choice(WORDS) if kind == "word" else str(rng.randint(10, 99))
    sign = Sign(kind, text, *cells[n_items], dx=rng.randint(-1, 1), dy=rng.randint(-5, 5))
    return Scene(items, sign, (rng.randint(215, 245), rng.randint(215, 245), rng.randint(215, 245)))


def split_of(scene: Scene) -> str:
    """The split that a scene's layout belongs to, by a hash that no seed changes."""
    digest = hashlib.blake2b(scene.layout().encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 10
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def make_scene(split: str, index: int, *, seed: int = 0) -> tuple[Scene, list[Question]]:
    """Scene `index` (any integer from 0: an endless stream) of a split, with its questions."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"scenes/{VERSION}/{seed}/{split}/{index}")
    scene = draw_layout(rng)
    while split_of(scene) != split:
        scene = draw_layout(rng)
    return scene, ask(scene, rng)


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of SIZE x SIZE pixels. Coordinates are integers: no rounding differs."""
    image = Image.new("RGB", (SIZE * ZOOM, SIZE * ZOOM), scene.background)
    draw = ImageDraw.Draw(image)
    for item in scene.items:
        x, y = _center(item)
        draw_shape(draw, item.shape, COLORS[item.color], x, y, item.radius * ZOOM)
    x, y = _center(scene.sign)
    box = (x - 15 * ZOOM, y - 9 * ZOOM, x + 15 * ZOOM, y + 9 * ZOOM)
    draw.rectangle(box, fill=(255, 255, 255), outline=(120, 120, 120), width=ZOOM)
    draw.text((x, y), scene.sign.text.upper(), font=_font(14 * ZOOM), fill=(20, 20, 20), anchor="mm")
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _center(thing: Item | Sign) -> tuple[int, int]:
    x = thing.column * CELL + CELL // 2 + thing.dx
    y = thing.row * CELL + CELL // 2 + thing.dy
    return x * ZOOM, y * ZOOM


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, color: tuple[int, int, int], x: int, y: int, r: int
) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        q = round(0.86 * r)
        draw.rectangle((x - q, y - q, x + q, y + q), fill=color)
    elif shape == "triangle":
        draw.polygon(_corners(3, x, y, [1.15 * r]), fill=color)
    elif shape == "star":
        draw.polygon(_corners(10, x, y, [1.15 * r, 0.48 * r]), fill=color)
    elif shape == "cross":
        w = round(0.36 * r)
        draw.rectangle((x - r, y - w, x + r, y + w), fill=color)
        draw.rectangle((x - w, y - r, x + w, y + r), fill=color)
    else:
        tall, wide = round(1.1 * r), round(0.75 * r)
        draw.polygon([(x, y - tall), (x + wide, y), (x, y + tall), (x - wide, y)], fill=color)


def _corners(n: int, x: int, y: int, radii: list[float]) -> list[tuple[int, int]]:
    corners = []
    for k in range(n):
        radius, angle = radii[k % len(radii)], 2 * math.pi * k / n - math.pi / 2
        corners.append((x + round(radius * math.cos(angle)), y + round(radius * math.sin(angle))))
    return corners


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, size, layout_engine=ImageFont.Layout.BASIC)


def load_scenes(split: str, n_scenes: int | None = None, seed: int = 0) -> datasets.Dataset:
    """The first `n_scenes` scenes of a split, one row a question, built once and cached by `datasets`.

    Columns: `id`, `image` (PIL), `question`, `answer`, `type` (see `questions.TYPES`), `scene` (equal for the
    questions of one image). Without `n_scenes`: 1500 scenes of train, 150 of validation, 300 of test.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; choose one of {', '.join(SPLITS)}")
    n_scenes = N_SCENES[split] if n_scenes is None else n_scenes
    if n_scenes < 1:
        raise ValueError(f"n_scenes={n_scenes} leaves no scene; give 1 or more")
    import datasets  # lazy: a scene can be drawn without it

    features = datasets.Features(
        {name: datasets.Value("string") for name in ("id", "question", "answer", "type", "scene")}
        | {"image": datasets.Image()}
    )
    return datasets.Dataset.from_generator(
        _rows,
        features=features,
        gen_kwargs={"split": split, "n_scenes": n_scenes, "seed": seed},
        fingerprint=f"latefusion-scenes-{VERSION}-{split}-{n_scenes}-{seed}",
        split=datasets.NamedSplit(split),
    )


def _rows(split: str, n_scenes: int, seed: int) -> Iterator[dict[str, Any]]:
    for index in range(n_scenes):
        scene, questions = make_scene(split, index, seed=seed)
        png = io.BytesIO()
        render(scene).save(png, format="PNG", compress_level=1)
        name = f"{split}-{seed}-{index:05d}"
        for k, question in enumerate(questions):
            yield {
                "id": f"{name}-{k:02d}",
                "image": {"bytes": png.getvalue(), "path": None},
                "question": question.question,
                "answer": question.answer,
                "type": question.type,
                "scene": name,
            }
