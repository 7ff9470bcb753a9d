"""Features of boards, computed once and kept in float16 outside the repository.

Training sees two sources. *Boards*: whole pictures of `train`. *Squares*: 36 squares of each of some crowded,
jittered sheets; `compose` puts squares together to any number of boards. The network is convolutional, so a
square's features depend on its neighbours only a little, and tokens get their places after it.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from latefusion.data.icons.boards import COLORS, SIDE, Board, Thing, make_board, render
from latefusion.data.icons.pictures import drawings, picture
from latefusion.models.smollm_icons.packages import load_network
from latefusion.models.smollm_icons.tower import picture_features

SHEETS, PART = 280, 20  # crowded sheets; pictures of one file, so that an interruption costs little


def square_tokens(row: int, column: int) -> list[int]:
    """The 2 x 2 tokens, of 12 x 12, that a square of the board covers."""
    return [24 * row + 2 * column + offset for offset in (0, 1, 12, 13)]


def encode(network: torch.nn.Module, image: Image.Image) -> Tensor:
    """[144, CHANNELS] in float16."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().sub(127).div(128)
    with torch.no_grad():
        return picture_features(network, pixels.contiguous(memory_format=torch.channels_last))[0].half()


def draw_sheet(rng: random.Random) -> Board:
    """A sheet of 12 to 30 things of training, for their squares; no board of any split is this crowded."""
    squares = [(row, column) for row in range(SIDE) for column in range(SIDE)]
    rng.shuffle(squares)
    shown = drawings(held_out=False)
    n_things = rng.randint(12, 30)
    things = [
        Thing(*square, rng.choice(list(COLORS)), drawing, rng.uniform(0.68, 0.95), rng.random(), rng.random(),
              rng.random() < 0.5)
        for square, drawing in zip(squares, rng.sample(shown, n_things), strict=False)
    ]  # fmt: skip
    blanks = [Thing(*square, rng.choice(list(COLORS)), None) for square in squares[n_things : n_things + 3]]
    return Board(tuple(things), tuple(blanks))


def jittered(rng: random.Random) -> Any:
    """A replacement for `picture` that tilts, recolours and dims half of the drawings."""

    def draw(drawing: Any) -> Image.Image:
        art = picture(drawing)
        if rng.random() < 0.5:
            return art
        alpha = art.getchannel("A")
        for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
            art = enhance(art).enhance(rng.uniform(0.6, 1.4))
        art.putalpha(alpha)
        return art.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC)

    return draw


class Square(NamedTuple):
    """One square of a sheet: what stands there (None: nothing) and the features of its 4 tokens."""

    thing: Thing | None
    tokens: Tensor


def cached_parts(folder: Path, name: str, count: int, make: Any) -> list[Any]:
    """`[make(network, index) for index in range(count)]`, kept in files of PART items below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    network, items = None, []
    for start in range(0, count, PART):
        path = folder / f"{name}-{start:05d}.pt"
        if not path.is_file():
            if network is None:
                network = load_network().to(memory_format=torch.channels_last)
            began = time.process_time()
            part = [make(network, index) for index in range(start, start + PART)]
            torch.save(part, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
            print(f"{path.name}: {time.process_time() - began:.0f} CPU seconds", flush=True)
        items += torch.load(path, weights_only=False)
    return items[:count]


def sheet_squares(folder: Path, count: int = SHEETS) -> list[Square]:
    """The squares of `count` sheets, seeded by their indices."""

    def make(network: torch.nn.Module, index: int) -> tuple[Board, Tensor]:
        rng = random.Random(f"icons/sheet/{index}")
        sheet = draw_sheet(rng)
        return sheet, encode(network, render(sheet, jittered(rng)))

    squares = []
    for sheet, tokens in cached_parts(folder, "sheets", count, make):
        at = {(thing.row, thing.column): thing for thing in sheet.things + sheet.blanks}
        for row in range(SIDE):
            for column in range(SIDE):
                squares.append(Square(at.get((row, column)), tokens[square_tokens(row, column)]))
    return squares


def board_features(folder: Path, split: str, count: int, seed: int = 0) -> list[tuple[Board, Tensor]]:
    """The first `count` boards of a split with the features of their pictures."""

    def make(network: torch.nn.Module, index: int) -> tuple[Board, Tensor]:
        board = make_board(split, index, seed=seed)
        return board, encode(network, render(board))

    return cached_parts(folder, f"{split}-{seed}", count, make)


class Composer:
    """Puts squares of sheets together to boards."""

    def __init__(self, squares: list[Square]) -> None:
        self.things: dict[tuple[str, str], list[Square]] = {}
        self.blanks: dict[str, list[Square]] = {}
        self.empty = torch.stack([square.tokens for square in squares if square.thing is None])
        for square in squares:
            if square.thing is None:
                continue
            if square.thing.drawing is None:
                self.blanks.setdefault(square.thing.color, []).append(square)
            else:
                self.things.setdefault((square.thing.name, square.thing.color), []).append(square)

    def compose(self, board: Board, rng: random.Random) -> Tensor | None:
        """Features of a board's layout [144, CHANNELS]; None if no sheet shows one of its things."""
        picks = [rng.randrange(len(self.empty)) for _ in range(SIDE * SIDE)]
        tokens = torch.empty(4 * SIDE * SIDE, self.empty.shape[-1], dtype=self.empty.dtype)
        for square, pick in enumerate(picks):
            tokens[square_tokens(*divmod(square, SIDE))] = self.empty[pick]
        for thing in board.things + board.blanks:
            same = (
                self.things.get((thing.name, thing.color)) if thing.drawing else self.blanks.get(thing.color)
            )
            if not same:
                return None
            tokens[square_tokens(thing.row, thing.column)] = rng.choice(same).tokens
        return tokens
