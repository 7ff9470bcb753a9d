"""Questions about a board, with answers that follow from its description alone.

Eight types. Six of them (`existence`, `where`, `square`, `color`, `category`, `neighbor`) are about one small
thing, `relation` about two, `counting` about all.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple

from latefusion.data.icons.boards import VERSION, Board, address, make_board
from latefusion.data.icons.pictures import CATEGORIES, CATEGORY_OF, NAMES

TYPES = ("existence", "where", "square", "color", "category", "neighbor", "relation", "counting")
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


class Question(NamedTuple):
    """One question; `type` is one of `TYPES`."""

    type: str
    question: str
    answer: str


def ask(board: Board, rng: random.Random, rounds: Mapping[str, int] | None = None) -> list[Question]:
    """About 11 different questions on a board, grouped by type; `rounds` of a type gives more of it."""
    questions = [
        question
        for kind in TYPES
        for _ in range((rounds or {}).get(kind, 1))
        for question in _ASK[kind](board, rng)
    ]
    return list({question.question: question for question in questions}.values())


def board_questions(split: str, index: int, seed: int = 0) -> list[Question]:
    """The questions on board `index` of a split: one round, the same everywhere."""
    rng = random.Random(f"icons/questions/{VERSION}/{seed}/{split}/{index}")
    return ask(make_board(split, index, seed=seed), rng)


def _existence(board: Board, rng: random.Random) -> list[Question]:
    present = [thing.name for thing in board.things]
    absent = [name for name in NAMES if name not in present]
    return [
        Question("existence", f"Is there {_article(name)}?", answer)
        for name, answer in ((rng.choice(present), "yes"), (rng.choice(absent), "no"))
    ]


def _where(board: Board, rng: random.Random) -> list[Question]:
    return [
        Question("where", f"Where is the {thing.name}?", address(thing.row, thing.column))
        for thing in rng.sample(board.things, 2)
    ]


def _square(board: Board, rng: random.Random) -> list[Question]:
    return [
        Question("square", f"What is at {address(thing.row, thing.column)}?", thing.name)
        for thing in rng.sample(board.things, 2)
    ]


def _color(board: Board, rng: random.Random) -> list[Question]:
    thing = rng.choice(board.things)
    return [Question("color", f"What color is behind the {thing.name}?", thing.color)]


def _category(board: Board, rng: random.Random) -> list[Question]:
    categories = [CATEGORY_OF[thing.name] for thing in board.things]
    single = [thing for thing in board.things if categories.count(CATEGORY_OF[thing.name]) == 1]
    if not single:
        return []
    thing = rng.choice(single)
    return [Question("category", f"Which {CATEGORY_OF[thing.name]} is there?", thing.name)]


def _neighbor(board: Board, rng: random.Random) -> list[Question]:
    at = {(thing.row, thing.column): thing for thing in board.things}
    pairs = [
        Question("neighbor", f"What is {step} the {thing.name}?", at[square].name)
        for thing in board.things
        for step, (down, right) in STEPS.items()
        if (square := (thing.row + down, thing.column + right)) in at
    ]
    return [rng.choice(pairs)] if pairs else []


def _relation(board: Board, rng: random.Random) -> list[Question]:
    first, second = rng.sample(board.things, 2)
    possible = []
    if first.column != second.column:
        possible.append(("left of", first.column < second.column))
    if first.row != second.row:
        possible.append(("above", first.row < second.row))
    relation, holds = rng.choice(possible)
    question = f"Is the {first.name} {relation} the {second.name}?"
    return [Question("relation", question, "yes" if holds else "no")]


def _counting(board: Board, rng: random.Random) -> list[Question]:
    categories = [CATEGORY_OF[thing.name] for thing in board.things]
    category = rng.choice(list(CATEGORIES) if rng.random() < 0.3 else categories)
    return [Question("counting", f"How many {category}s are there?", str(categories.count(category)))]


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


_ASK = {
    "existence": _existence,
    "where": _where,
    "square": _square,
    "color": _color,
    "category": _category,
    "neighbor": _neighbor,
    "relation": _relation,
    "counting": _counting,
}
