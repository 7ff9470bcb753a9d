"""Features of boards, computed once and kept in float16 outside the repository.

Training sees two sources. *Boards*: whole pictures of `train`. *Squares*: 36 squares of each of some crowded,
jittered sheets; `compose` puts squares together to any number of boards. The network is convolutional, so a
square's features depend on its neighbours only a little, and tokens get their places after it.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from latefusion.data.icons.boards import COLORS, SIDE, Board, Thing, make_board, render
from latefusion.data.icons.pictures import Drawing, drawings, picture
from latefusion.models.smollm_icons.packages import load_network
from latefusion.models.smollm_icons.tower import picture_features

SHEETS, PART = 280, 20  # crowded sheets; pictures of one file, so that an interruption costs little


def square_tokens(row: int, column: int) -> list[int]:
    """The 2 x 2 tokens, of 12 x 12, that a square of the board covers."""
    return [24 * row + 2 * column + offset for offset in (0, 1, 12, 13)]


def encode(network: torch.nn.Module, images: Sequence[np.ndarray], device: str = "cpu") -> list[Tensor]:
    """[144, CHANNELS] in float16 of each picture; each alone, so that none depends on its company."""
    features = []
    for image in images:
        pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float().sub(127).div(128)
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            tokens = picture_features(network, pixels.contiguous(memory_format=torch.channels_last))
        features.append(tokens[0].half().cpu())
    return features


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


class Features:
    """Boards with the features of their pictures, kept in files of PART items below `folder`."""

    def __init__(self, folder: Path, device: str = "cpu", workers: int = 0) -> None:
        self.folder, self.device, self.workers = folder, device, workers
        folder.mkdir(parents=True, exist_ok=True)
        self.network: torch.nn.Module | None = None

    def sheets(self, count: int = SHEETS) -> list[tuple[Board, Tensor]]:
        """Sheets, seeded by their indices."""
        return self._parts("sheets", count, _drawn_sheet)

    def boards(self, split: str, count: int, seed: int = 0) -> list[tuple[Board, Tensor]]:
        """The first `count` boards of a split."""
        return self._parts(f"{split}-{seed}", count, partial(_drawn_board, split, seed))

    def _parts(self, name: str, count: int, draw: Any) -> list[tuple[Board, Tensor]]:
        paths = {start: self.folder / f"{name}-{start:05d}.pt" for start in range(0, count, PART)}
        missing = [start for start, path in paths.items() if not path.is_file()]
        if missing:
            indices = [index for start in missing for index in range(start, start + PART)]
            with ProcessPoolExecutor(max(1, self.workers)) as pool:  # starts no process before it has work
                drawn = pool.map(draw, indices, chunksize=2) if self.workers else map(draw, indices)
                for start in missing:
                    began = time.process_time()
                    boards, images = zip(*(next(drawn) for _ in range(PART)), strict=True)
                    part = list(zip(boards, self._encode(images), strict=True))
                    torch.save(part, paths[start].with_suffix(".part"))
                    paths[start].with_suffix(".part").rename(paths[start])
                    spent = time.process_time() - began
                    print(f"{paths[start].name}: {spent:.0f} CPU seconds", flush=True)
        with torch.serialization.safe_globals([Board, Thing, Drawing]):
            return [item for path in paths.values() for item in torch.load(path, weights_only=True)][:count]

    def _encode(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        if self.network is None:
            self.network = load_network().to(self.device, memory_format=torch.channels_last)
        return encode(self.network, images, self.device)


def _drawn_sheet(index: int) -> tuple[Board, np.ndarray]:
    rng = random.Random(f"icons/sheet/{index}")
    sheet = draw_sheet(rng)
    return sheet, np.array(render(sheet, jittered(rng)))


def _drawn_board(split: str, seed: int, index: int) -> tuple[Board, np.ndarray]:
    board = make_board(split, index, seed=seed)
    return board, np.array(render(board))


def squares_of(sheets: Sequence[tuple[Board, Tensor]]) -> list[Square]:
    """The squares of sheets."""
    squares = []
    for sheet, tokens in sheets:
        at = {(thing.row, thing.column): thing for thing in sheet.things + sheet.blanks}
        for row in range(SIDE):
            for column in range(SIDE):
                squares.append(Square(at.get((row, column)), tokens[square_tokens(row, column)]))
    return squares


class Composer:
    """Puts squares of sheets together to boards; `tokens` [N, CHANNELS] holds them and then the whole boards."""

    def __init__(self, squares: list[Square], boards: Sequence[tuple[Board, Tensor]] = ()) -> None:
        self.tokens = torch.cat([square.tokens for square in squares] + [features for _, features in boards])
        self.boards = [board for board, _ in boards]
        self.first_board = 4 * len(squares)  # row of the first whole board
        self.things: dict[tuple[str, str], list[int]] = {}
        self.blanks: dict[str, list[int]] = {}
        self.empty = [k for k, square in enumerate(squares) if square.thing is None]
        for k, (thing, _) in enumerate(squares):
            if thing is None:
                continue
            if thing.drawing is None:
                self.blanks.setdefault(thing.color, []).append(k)
            else:
                self.things.setdefault((thing.name, thing.color), []).append(k)

    def compose(self, board: Board, rng: random.Random) -> list[int] | None:
        """Rows of `tokens` for a board's 144; None if no sheet shows one of its things."""
        on_square = [self.empty[rng.randrange(len(self.empty))] for _ in range(SIDE * SIDE)]
        for thing in board.things + board.blanks:
            same = (
                self.things.get((thing.name, thing.color)) if thing.drawing else self.blanks.get(thing.color)
            )
            if not same:
                return None
            on_square[thing.row * SIDE + thing.column] = rng.choice(same)
        rows = [0] * (4 * SIDE * SIDE)
        for square, source in enumerate(on_square):
            for k, token in enumerate(square_tokens(*divmod(square, SIDE))):
                rows[token] = 4 * source + k
        return rows

    def whole(self, index: int) -> list[int]:
        """Rows of `tokens` for a board that was rendered whole."""
        first = self.first_board + 4 * SIDE * SIDE * index
        return list(range(first, first + 4 * SIDE * SIDE))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw and encode all pictures of a run and of its measurement."
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw")
    parser.add_argument("--sheets", type=int, default=SHEETS)
    parser.add_argument("--train-boards", type=int, default=400)
    parser.add_argument("--measured-boards", type=int, default=60, help="of each split and data seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    options = parser.parse_args()
    features = Features(options.folder, options.device, options.workers)
    features.sheets(options.sheets)
    features.boards("train", options.train_boards)
    features.boards("validation", PART)
    for seed in options.seeds:
        for split in ("test", "new_drawings"):
            features.boards(split, options.measured_boards, seed)


if __name__ == "__main__":
    main()
