"""What each vision token should say at first, in the language model's own word embeddings.

Of a thing's 2 x 2 tokens one diagonal says its name and the other its colour; all of them add the letter and
digit of their square. Empty squares say "nothing". The projector starts as a regression onto these targets, and
the language model's first boards are made of them ("word boards": no picture, no encoder, no limit).
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from latefusion.data.icons.boards import COLORS, SIDE, Board, Thing, address
from latefusion.data.icons.pictures import NAMES
from latefusion.training.smollm_icons.features import square_tokens

WORDS = (*NAMES, *COLORS, "nothing")
NOTHING = len(WORDS) - 1
PLACE_WEIGHT = 0.7


class Targets:
    """Word and place embeddings, from the input embeddings of the language model."""

    def __init__(self, embeddings: Tensor, tokenizer) -> None:
        def embed(word: str) -> Tensor:
            return embeddings[tokenizer(word, add_special_tokens=False).input_ids].float().mean(0)

        self.words = torch.stack([embed(f" {word}") for word in WORDS])
        squares = [address(row, column) for row in range(SIDE) for column in range(SIDE)]
        places = torch.stack([embed(f" {square[0]}") + embed(square[1]) for square in squares])
        self.places = PLACE_WEIGHT * places  # by square

    def token_words(self, thing: Thing | None) -> list[int]:
        """The words that the 4 tokens of a square say, as indices into WORDS."""
        if thing is None:
            return [NOTHING] * 4
        name = WORDS.index(thing.name) if thing.drawing else NOTHING
        color = WORDS.index(thing.color)
        return [name, color, color, name]

    def square(self, thing: Thing | None, square: int) -> Tensor:
        """Targets [4, width] of a square's tokens. Empty squares do not say where they are."""
        words = self.words[self.token_words(thing)]
        return words + self.places[square] if thing else words

    def word_board(self, board: Board, rng: random.Random, noise: float = 0.35) -> tuple[Tensor, list[int]]:
        """Two tokens of each thing (name, colour) and some empty ones [K, width], with their places of 144."""
        tokens, places = [], []
        taken = set()
        for thing in board.things + board.blanks:
            square = thing.row * SIDE + thing.column
            taken.add(square)
            target, where = self.square(thing, square), square_tokens(thing.row, thing.column)
            for k in (rng.choice((0, 3)), rng.choice((1, 2))):
                tokens.append(target[k])
                places.append(where[k])
        free = [square for square in range(SIDE * SIDE) if square not in taken]
        for square in rng.sample(free, min(4, len(free))):
            tokens.append(self.words[NOTHING])
            places.append(rng.choice(square_tokens(*divmod(square, SIDE))))
        order = sorted(range(len(places)), key=places.__getitem__)
        stacked = torch.stack(tokens)[order]
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        stacked = stacked + noise * self.words.std() * torch.randn(stacked.shape, generator=generator)
        return stacked, [places[k] for k in order]
