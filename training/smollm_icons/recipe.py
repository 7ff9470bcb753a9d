"""All numbers of a run, and where in its plan a step stands."""

from __future__ import annotations

import time
from dataclasses import dataclass

ROUNDS = {  # of questions a board: more of what is learned last
    "existence": 2, "where": 2, "square": 2, "color": 4, "category": 2, "neighbor": 10, "relation": 5, "counting": 8,
}  # fmt: skip


@dataclass
class Recipe:
    """The plan: three phases with their numbers of steps, and a rate that falls at the end."""

    seed: int = 0
    blind: bool = False  # control: the model never sees a picture
    freeze_language: bool = False  # control: no LoRA, the projector alone learns
    untrained: bool = False  # control: a language model of the same shape with random weights, trained whole
    boards: int = 1  # a step
    seconds: float = 0  # 0: as many steps as planned; else the plan is stretched or squeezed to this time
    word_steps: int = 500  # boards of word embeddings; windows grow from 2 x 2 squares to 6 x 6
    few_steps: int = 700  # composed pictures, the tokens of things and 12 others
    all_steps: int = 220  # all 144 tokens, half of the boards rendered whole
    decay_steps: int = 360  # the last ones: the rate falls linearly to 3%
    learning_rate: float = 1e-3
    projector_rate: float = 1e-4
    few_empty: int = 12
    sheets: int = 280
    train_boards: int = 400
    measure_every: int = 1000
    measure_boards: int = 20
    save_every: int = 50

    def __post_init__(self) -> None:
        if self.freeze_language:
            self.word_steps = 0  # boards of words would train nothing: they pass the projector by

    @property
    def steps(self) -> int:
        return self.word_steps + self.few_steps + self.all_steps

    def phase(self, position: float) -> str:
        if position < self.word_steps:
            return "words"
        return "few" if position < self.word_steps + self.few_steps else "all"

    def rate(self, position: float, steps_taken: int) -> float:
        """Fraction of the peak learning rate; `steps_taken`: since the optimiser was new."""
        decay = max(0.03, min(1, (self.steps - position) / self.decay_steps))
        return min(1, (steps_taken + 1) / 20) * decay


class Clock:
    """Where in the plan a step stands: at its own number, or where the time is in a run with a time limit."""

    def __init__(self, recipe: Recipe, elapsed: float = 0) -> None:
        self.recipe, self.began = recipe, time.time() - elapsed

    @property
    def elapsed(self) -> float:
        return time.time() - self.began

    def position(self, step: int) -> float:
        if not self.recipe.seconds:
            return step
        return self.recipe.steps * self.elapsed / self.recipe.seconds
