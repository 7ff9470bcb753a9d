"""Boards: a few things and blank cards on 6 x 6 squares, drawn at random, and their splits.

A board is a function of (seed, split, index) alone. Splits are disjoint twice. *Layouts*: a hash of what
stands where assigns every possible layout to one split. *Drawings*: `new_drawings` shows only drawings that no
other split shows, each object in the one style that was held out for it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageDraw

from latefusion.data.icons.pictures import Drawing, drawings, picture

VERSION = 1  # raise it when a board, a question or a pixel changes
SIDE = 6  # squares in a row of the board
SQUARE = 128  # pixels
SIZE = SIDE * SQUARE
COLORS = {
    "red": (225, 60, 60),
    "yellow": (250, 225, 80),
    "green": (80, 180, 90),
    "blue": (70, 110, 220),
    "purple": (150, 80, 190),
    "white": (255, 255, 255),
}
BACKGROUND = (205, 203, 198)
SPLITS = {  # layout hash modulo 10
    "train": range(3, 10),
    "validation": range(2, 3),
    "test": range(1, 2),
    "new_drawings": range(0, 1),
}


class Thing(NamedTuple):
    """A drawing on a coloured card; without a drawing, a blank card. `size`, `x`, `y`: fractions of the card."""

    row: int
    column: int
    color: str
    drawing: Drawing | None
    size: float = 0.8
    x: float = 0.5
    y: float = 0.5
    mirrored: bool = False

    @property
    def name(self) -> str:
        return self.drawing.name if self.drawing else ""


class Board(NamedTuple):
    """Things (every object at most once) and blank cards, each on a square of its own."""

    things: tuple[Thing, ...]
    blanks: tuple[Thing, ...]

    def layout(self) -> str:
        """Name what stands where, without styles, sizes and jitter; a board's split follows from it."""
        return ";".join(sorted(f"{t.row}{t.column} {t.color} {t.name}" for t in self.things + self.blanks))


def address(row: int, column: int) -> str:
    """The name of a square, like A1 (top left) and F6 (bottom right): a letter a column, a digit a row."""
    return f"{'ABCDEF'[column]}{row + 1}"


def draw_layout(rng: random.Random, split: str, window: int | None = None) -> Board:
    """A random board: things within a window of 2 x 2 to 6 x 6 squares, blank cards anywhere."""
    window = window or rng.randint(2, SIDE)
    top, left = rng.randint(0, SIDE - window), rng.randint(0, SIDE - window)
    squares = [(top + row, left + column) for row in range(window) for column in range(window)]
    rng.shuffle(squares)
    n_things = rng.randint(2, min(9, len(squares)))
    shown = drawings(held_out=split == "new_drawings")
    things: list[Thing] = []
    while len(things) < n_things:
        drawing = rng.choice(shown)
        if drawing.name not in [thing.name for thing in things]:
            things.append(_place(rng, squares[len(things)], drawing))
    taken = {(thing.row, thing.column) for thing in things}
    free = [(row, column) for row in range(SIDE) for column in range(SIDE) if (row, column) not in taken]
    blanks = [_place(rng, square, None) for square in rng.sample(free, rng.randint(0, 3))]
    return Board(tuple(things), tuple(blanks))


def _place(rng: random.Random, square: tuple[int, int], drawing: Drawing | None) -> Thing:
    size, x, y = rng.uniform(0.68, 0.95), rng.random(), rng.random()
    return Thing(*square, rng.choice(list(COLORS)), drawing, size, x, y, rng.random() < 0.5)


def split_layouts_of(board: Board) -> str:
    """The split that a board's layout belongs to, by a hash that no seed changes."""
    digest = hashlib.blake2b(board.layout().encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 10
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def make_board(split: str, index: int, *, seed: int = 0) -> Board:
    """Board `index` (any integer from 0: an endless stream) of a split."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"icons/{VERSION}/{seed}/{split}/{index}")
    board = draw_layout(rng, split)
    while split_layouts_of(board) != split:
        board = draw_layout(rng, split)
    return board


def render(board: Board, draw_picture: Callable[[Drawing], Image.Image] = picture) -> Image.Image:
    """The board as an RGB picture of SIZE x SIZE pixels."""
    image = Image.new("RGB", (SIZE, SIZE), BACKGROUND)
    draw = ImageDraw.Draw(image)
    margin = 3
    for thing in board.things + board.blanks:
        left, top = thing.column * SQUARE + margin, thing.row * SQUARE + margin
        side = SQUARE - 2 * margin
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=COLORS[thing.color])
        if thing.drawing is None:
            continue
        size = int(side * thing.size)
        art = draw_picture(thing.drawing).resize((size, size), Image.Resampling.LANCZOS)
        if thing.mirrored:
            art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        corner = (left + int((side - size) * thing.x), top + int((side - size) * thing.y))
        image.paste(art, corner, art)
    return image
