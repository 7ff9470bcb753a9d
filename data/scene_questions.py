"""Questions about a scene, with answers that follow from its description alone.

Eight types, after the public benchmarks they stand in for: `existence` (POPE; many negatives are
adversarial: colour and shape occur in the scene, but not together), `attribute`, `relation` and
`neighbor` (GQA), `counting`, `reading` (TextVQA), `where` and `open` (spatial answers of several words).
"""

from __future__ import annotations

import random
from typing import NamedTuple

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 180),
    "orange": (245, 140, 30),
    "cyan": (50, 200, 210),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
WORDS = (
    "cat", "dog", "sun", "bus", "car", "hat", "cup", "key", "map", "pen", "box", "egg", "fox",
    "jam", "log", "net", "owl", "pig", "rug", "toy", "van", "web", "zoo", "bed", "fan", "ice",
    "gym", "lip", "oak", "tea",
)  # fmt: skip
CELLS = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
TYPES = ("existence", "attribute", "relation", "neighbor", "where", "counting", "reading", "open")


class Item(NamedTuple):
    """A coloured shape in a cell of the 3 x 3 grid; `dx`, `dy` and `radius` in pixels."""

    color: str
    shape: str
    row: int
    column: int
    dx: int
    dy: int
    radius: int


class Sign(NamedTuple):
    """A white sign in a cell of the grid; `kind` is "word" or "number"."""

    kind: str
    text: str
    row: int
    column: int
    dx: int
    dy: int


class Scene(NamedTuple):
    """2 to 6 items and one sign, each in a cell of its own, on a plain background."""

    items: tuple[Item, ...]
    sign: Sign
    background: tuple[int, int, int]

    def layout(self) -> str:
        """Name what stands where, without jitter, sizes and background; a scene's split follows from it."""
        cells = sorted((i.row, i.column, f"{i.color} {i.shape}") for i in self.items)
        cells.append((self.sign.row, self.sign.column, f"sign {self.sign.text}"))
        return ";".join(f"{row}{column} {what}" for row, column, what in cells)


class Question(NamedTuple):
    """One question; `type` is one of `TYPES`."""

    type: str
    question: str
    answer: str


def ask(scene: Scene, rng: random.Random) -> list[Question]:
    """About 13 different questions on a scene, in random order."""
    questions: list[Question] = []
    for kind in (_existence, _attribute, _relation, _neighbor, _where, ask_counting, _reading, _open):
        questions += kind(scene, rng)
    questions = list({question.question: question for question in questions}.values())
    rng.shuffle(questions)
    return questions


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _unique(scene: Scene) -> list[Item]:
    pairs = [(i.color, i.shape) for i in scene.items]
    return [i for i in scene.items if pairs.count((i.color, i.shape)) == 1]


def _existence(scene: Scene, rng: random.Random) -> list[Question]:
    present = [(i.color, i.shape) for i in scene.items]
    colors, shapes = sorted({c for c, _ in present}), sorted({s for _, s in present})
    adversarial = [(c, s) for c in colors for s in shapes if (c, s) not in present]
    absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
    questions = []
    for _ in range(2):
        if rng.random() < 0.5:
            (color, shape), answer = rng.choice(present), "yes"
        else:
            some = adversarial if adversarial and rng.random() < 0.6 else absent
            (color, shape), answer = rng.choice(some), "no"
        questions.append(Question("existence", f"is there {_article(color)} {color} {shape}?", answer))
    return questions


def _attribute(scene: Scene, rng: random.Random) -> list[Question]:
    colors, shapes = [i.color for i in scene.items], [i.shape for i in scene.items]
    questions = []
    if lone := [i for i in scene.items if shapes.count(i.shape) == 1]:
        item = rng.choice(lone)
        questions.append(Question("attribute", f"what color is the {item.shape}?", item.color))
    if lone := [i for i in scene.items if colors.count(i.color) == 1]:
        item = rng.choice(lone)
        questions.append(Question("attribute", f"what shape is the {item.color} object?", item.shape))
    return questions


def _relation(scene: Scene, rng: random.Random) -> list[Question]:
    unique = _unique(scene)
    questions = []
    for _ in range(3 if len(unique) >= 2 else 0):
        a, b = rng.sample(unique, 2)
        holds = {}
        if a.column != b.column:
            holds.update({"left of": a.column < b.column, "right of": a.column > b.column})
        if a.row != b.row:
            holds.update({"above": a.row < b.row, "below": a.row > b.row})
        positive = rng.random() < 0.5
        relation = rng.choice([r for r, true in holds.items() if true == positive])
        text = f"is the {a.color} {a.shape} {relation} the {b.color} {b.shape}?"
        questions.append(Question("relation", text, "yes" if positive else "no"))
    return questions


def _neighbor(scene: Scene, rng: random.Random) -> list[Question]:
    at = {(i.row, i.column): i for i in scene.items}
    pairs = []
    for item in _unique(scene):
        for relation, (down, right) in STEPS.items():
            if other := at.get((item.row + down, item.column + right)):
                pairs.append((item, relation, other))
    rng.shuffle(pairs)
    questions = []
    for item, relation, other in pairs[:2]:
        what = rng.choice(["color", "shape"])
        text = f"what {what} is the object just {relation} the {item.color} {item.shape}?"
        questions.append(Question("neighbor", text, other.color if what == "color" else other.shape))
    return questions


def _where(scene: Scene, rng: random.Random) -> list[Question]:
    unique = _unique(scene)
    return [
        Question("where", f"where is the {i.color} {i.shape}?", CELLS[i.row][i.column])
        for i in rng.sample(unique, min(2, len(unique)))
    ]


def ask_counting(scene: Scene, rng: random.Random) -> list[Question]:
    """Counts that many scenes allow (0, 1) are chosen less often, so that answers are near balance."""
    by_count: dict[int, list[str]] = {}
    for color in COLORS:
        by_count.setdefault(sum(i.color == color for i in scene.items), []).append(color)
    for shape in SHAPES:
        by_count.setdefault(sum(i.shape == shape for i in scene.items), []).append(shape)
    counts = sorted(by_count)
    weights = [(2, 3, 4, 6)[min(count, 3)] for count in counts]
    questions = []
    for _ in range(2):
        count = rng.choices(counts, weights)[0]
        questions.append(Question("counting", f"how many {rng.choice(by_count[count])} objects?", str(count)))
    return questions


def _reading(scene: Scene, rng: random.Random) -> list[Question]:
    return [Question("reading", f"what {scene.sign.kind} is on the sign?", scene.sign.text)]


def _open(scene: Scene, rng: random.Random) -> list[Question]:
    filled = {(i.row, i.column): f"{_article(i.color)} {i.color} {i.shape}" for i in scene.items}
    filled[scene.sign.row, scene.sign.column] = "a sign"
    free = [
        (r, c) for r in range(3) for c in range(3) if (r, c) not in {(i.row, i.column) for i in scene.items}
    ]
    questions = []
    for _ in range(2):
        if rng.random() < 0.85:
            item = rng.choice(scene.items)
            row, column = item.row, item.column
        else:
            row, column = rng.choice(free)
        questions.append(
            Question("open", f"what is at the {CELLS[row][column]}?", filled.get((row, column), "nothing"))
        )
    return questions
