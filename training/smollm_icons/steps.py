"""What each step trains on; a step's boards depend on its number and on where in the plan it stands."""

from __future__ import annotations

import random
from typing import Any

from torch.utils.data import Dataset

from latefusion.data.icons.board_questions import ask
from latefusion.data.icons.boards import SIDE, Board, draw_layout, split_layouts_of
from latefusion.training.smollm_icons.batch import Batch, Sample, collate
from latefusion.training.smollm_icons.features import Composer
from latefusion.training.smollm_icons.learner import tokens_that_matter
from latefusion.training.smollm_icons.question_tree import VISION, question_tree
from latefusion.training.smollm_icons.recipe import ROUNDS, Clock, Recipe
from latefusion.training.smollm_icons.targets import Targets


class Steps(Dataset[tuple[float, Batch]]):
    """Step number -> where in the plan it stands, and its batch."""

    def __init__(
        self, recipe: Recipe, clock: Clock, composer: Composer, targets: Targets, tokenizer: Any
    ) -> None:
        self.recipe, self.clock, self.tokenizer = recipe, clock, tokenizer
        self.composer, self.targets = composer, targets

    def __getitem__(self, step: int) -> tuple[float, Batch]:
        position = self.clock.position(step)
        return position, collate([self.sample(step, k, position) for k in range(self.recipe.boards)])

    def sample(self, step: int, k: int, position: float) -> Sample:
        """Board `k` of a step."""
        recipe, phase = self.recipe, self.recipe.phase(position)
        rng = random.Random(f"icons/train/{recipe.seed}/{step}" + (f"/{k}" if k else ""))
        board = self._draw(rng, position)
        rows = words = None
        if phase == "words":
            words, places = self.targets.word_board(board, rng)
        else:
            if phase == "all" and (step + k) % 2:
                index = rng.randrange(len(self.composer.boards))
                board, rows = self.composer.boards[index], self.composer.whole(index)
            while rows is None:
                rows = self.composer.compose(board, rng)
                board = board if rows is not None else self._draw(rng, position)
            if phase == "few":
                places = tokens_that_matter(board, rng, recipe.few_empty)
            else:
                places = list(range(VISION))
            rows = [rows[place] for place in places]
        tree = question_tree(ask(board, rng, ROUNDS), self.tokenizer)
        return Sample(tree, places, rows=rows, words=words)

    def _draw(self, rng: random.Random, position: float) -> Board:
        """A board of train; at first the windows are small."""
        growth = position * (SIDE - 1) / max(1, self.recipe.word_steps // 2)
        windows = min(SIDE, 2 + int(growth))
        while True:
            board = draw_layout(rng, "train", rng.randint(2, windows) if windows < SIDE else None)
            if split_layouts_of(board) == "train":
                return board
