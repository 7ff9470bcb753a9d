"""`motion`: short rendered videos and questions that the order of their frames alone answers.

    python data/motion.py output=FOLDER train=600 test=200

A video is 4 frames of 96 x 96 pixels: 2 or 3 coloured shapes, each in a lane of its own, that move along it and come
in again on the other side. "where does the red circle go?" is asked of each shape that moves, and of videos in which
one shape moves after the other "what color moves first?".

A video and its reversal are equally likely, and have opposite answers; where a shape stands in any one frame is
uniform, whichever way it goes. So half of the answers is the most that one frame, or the frames in no order, can give
on average. As in `scenes`, a video is a function of (seed, split, index) alone, and a hash of what stands where, but
not of how it moves, assigns it to its split.

The command writes what training and evaluation read: folders of frames, `train.jsonl` (a row a video) and `test.jsonl`
(a row a question).
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from latefusion.data.scene_questions import COLORS, SHAPES, Question
from latefusion.data.scenes import CELL, SIZE, SPLITS, ZOOM, draw_shape
from latefusion.recipes.compose import check_words, parse_words
from latefusion.recipes.launcher import run_to_exit
from latefusion.recipes.printable import error_line

VERSION = 1  # raise it when a video, a question or a pixel changes
FRAMES = 4
WAYS = {"across": {-1: "left", 1: "right"}, "down": {-1: "top", 1: "bottom"}}
# pixels from frame to frame; less than half of the picture, so that no way is ambiguous
TOGETHER, IN_TURN = (10, 14), (20, 28)


@dataclass
class Arguments:
    """The command line of this script, as `key=value`.

    Attributes:
        output: folder.
        train, test: videos of each.
        seed: of the drawn videos.
    """

    output: str = "outputs/motion"
    train: int = 600
    test: int = 200
    seed: int = 0


class Mover(NamedTuple):
    """A shape in a lane; `start` is where it stands along it at first, in pixels, and `steps` how far it then goes."""

    color: str
    shape: str
    lane: int
    start: int
    steps: tuple[int, ...]
    radius: int

    def along(self, frame: int) -> int:
        """Where it stands along its lane in a frame."""
        return (self.start + sum(self.steps[:frame])) % SIZE


class Clip(NamedTuple):
    """The shapes of a video; their lanes are rows (`across`) or columns (`down`)."""

    axis: str
    movers: tuple[Mover, ...]
    background: tuple[int, int, int]

    def layout(self) -> str:
        """Name what lies in which lane; a clip's split follows from it, so that its reversal has the same."""
        lanes = sorted((mover.lane, f"{mover.color} {mover.shape}") for mover in self.movers)
        return f"{self.axis};" + ";".join(f"{lane} {what}" for lane, what in lanes)

    def reversed(self) -> Clip:
        """The same frames, last first."""
        movers = tuple(
            mover._replace(
                start=mover.along(FRAMES - 1), steps=tuple(-step for step in reversed(mover.steps))
            )
            for mover in self.movers
        )
        return self._replace(movers=movers)


def draw_clip(rng: random.Random) -> Clip:
    """A random clip: 3 shapes that move all the time, or 2 of which one moves, then the other."""
    together = rng.random() < 0.5
    n = 3 if together else 2
    lanes, colors, shapes = (rng.sample(list(some), n) for some in (range(SIZE // CELL), COLORS, SHAPES))
    movers = []
    for i in range(n):
        step = rng.choice((-1, 1)) * rng.randint(*(TOGETHER if together else IN_TURN))
        steps = [step] * (FRAMES - 1) if together else [0] * (FRAMES - 1)
        steps[0 if i == 0 else -1] = step
        start, radius = rng.randrange(SIZE), rng.choice([8, 10, 12])
        movers.append(Mover(colors[i], shapes[i], lanes[i], start, tuple(steps), radius))
    return Clip(rng.choice(list(WAYS)), tuple(movers), tuple(rng.randint(215, 245) for _ in range(3)))  # type: ignore[arg-type]


def make_clip(split: str, index: int, *, seed: int = 0) -> Clip:
    """Clip `index` (any integer from 0) of a split."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"motion/{VERSION}/{seed}/{split}/{index}")
    while True:
        clip = draw_clip(rng)
        bucket = int.from_bytes(hashlib.blake2b(clip.layout().encode(), digest_size=8).digest(), "big") % 10
        if bucket in SPLITS[split]:
            return clip


def ask(clip: Clip) -> list[Question]:
    """Every question on a clip; `type` is `direction` or `first`."""
    questions = [
        Question(
            "direction", f"where does the {mover.color} {mover.shape} go?", WAYS[clip.axis][way_of(mover)]
        )
        for mover in clip.movers
    ]
    starts = {mover.color: next(i for i, step in enumerate(mover.steps) if step) for mover in clip.movers}
    if len(set(starts.values())) > 1:
        questions.append(Question("first", "what color moves first?", min(starts, key=starts.__getitem__)))
    return questions


def way_of(mover: Mover) -> int:
    """1 if the coordinate along its lane grows, else -1."""
    return 1 if sum(mover.steps) > 0 else -1


def render(clip: Clip) -> list[Image.Image]:
    """The frames, RGB, each SIZE x SIZE; a shape that is cut by an edge stands at the opposite one, too."""
    frames = []
    for t in range(FRAMES):
        image = Image.new("RGB", (SIZE * ZOOM, SIZE * ZOOM), clip.background)
        draw = ImageDraw.Draw(image)
        for mover in clip.movers:
            across = mover.lane * CELL + CELL // 2
            for along in (mover.along(t) - SIZE, mover.along(t), mover.along(t) + SIZE):
                x, y = (along, across) if clip.axis == "across" else (across, along)
                draw_shape(draw, mover.shape, COLORS[mover.color], x * ZOOM, y * ZOOM, mover.radius * ZOOM)
        frames.append(image.resize((SIZE, SIZE), Image.Resampling.BOX))
    return frames


def write_clips(folder: Path, split: str, n: int, *, seed: int = 0) -> None:
    """Write the first `n` clips of a split: folders of frames and, beside them, `SPLIT.jsonl`.

    A row of `train` is a video with all its questions and answers, one of any other split a question.
    """
    rows: list[dict[str, Any]] = []
    for index in range(n):
        clip = make_clip(split, index, seed=seed)
        name = f"{split}/{seed}-{index:05d}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        for t, frame in enumerate(render(clip)):
            frame.save(folder / name / f"{t}.png", compress_level=1)
        questions = ask(clip)
        if split == "train":
            turns = [
                (role, text)
                for q in questions
                for role, text in (("user", q.question), ("assistant", q.answer))
            ]
            messages = [{"role": role, "content": text} for role, text in turns]
            messages[0]["content"] = f"<video>{messages[0]['content']}"
            rows.append({"id": name, "videos": [name], "messages": messages})
            continue
        rows += [
            {
                "id": f"{name}-{k}",
                "video": name,
                "question": q.question,
                "answers": [q.answer],
                "type": q.type,
            }
            for k, q in enumerate(questions)
        ]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(words: list[str]) -> None:
    """Run from the command line; what cannot work ends in one sentence."""
    words = check_words(words, Arguments, str(__doc__))
    try:
        arguments = parse_words(words, Arguments)
        for split in ("train", "test"):
            if (n := getattr(arguments, split)) < 1:
                raise ValueError(f"{split}={n} must be at least 1.")
        folder = Path(arguments.output)
        for split in ("train", "test"):
            write_clips(folder, split, getattr(arguments, split), seed=arguments.seed)
        print(f"{folder / 'train.jsonl'}, {folder / 'test.jsonl'}")
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))


if __name__ == "__main__":
    run_to_exit(lambda: main(sys.argv[1:]))
