"""Questions that a method answers differently from the dense base, with their images, chosen by rule."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from latefusion.data.prompts import images_of, videos_of
from latefusion.eval.metrics import normalise
from latefusion.eval.tasks.base import Answer, Task

THUMBNAIL = 224  # pixels, longest side
EACH = 40  # of a system


@dataclass(frozen=True)
class Example:
    """A question of the gallery.

    Attributes:
        kinds: `(SYSTEM, "lost")` (dense right, it wrong), `"won"` or `"other"` (another answer, as good or bad).
        image: a data URI, or nothing for a question without an image.
        answers: name, answer and score of each system.
    """

    kinds: tuple[tuple[str, str], ...]
    image: str
    question: str
    answer: str
    type: str
    answers: list[tuple[str, str, float]]


def disagreements(
    results: dict[str, Any], tasks: Sequence[Task], answers: dict[str, list[Answer]]
) -> tuple[list[Example], dict[str, dict[str, int]]]:
    """Examples, and for each system how many disagreements of each kind there are.

    For each system except the controls: its losses, then its wins, then the rest, in the order of the data, each image
    once; up to `EACH`.
    """
    reference = answers[results["roles"]["reference"]]
    shown = [
        k for k, s in results["systems"].items() if not s["control"] and k != results["roles"]["reference"]
    ]
    shown.sort(key=lambda key: key != results["roles"]["candidate"])  # the candidate's come first
    kinds: dict[int, list[tuple[str, str]]] = {}
    counts: dict[str, dict[str, int]] = {}
    for key in shown:
        differing: dict[str, list[int]] = {"lost": [], "won": [], "other": []}
        for i, (base, other) in enumerate(zip(reference, answers[key], strict=True)):
            if normalise(base.prediction) != normalise(other.prediction):
                kind = "lost" if other.score < base.score else "won" if other.score > base.score else "other"
                differing[kind].append(i)
        counts[key] = {kind: len(rows) for kind, rows in differing.items()}
        for kind, rows in differing.items():
            room = EACH // 2 if kind == "lost" else EACH // 4
            for i in _varied(rows, reference)[:room]:
                kinds.setdefault(i, [])
        for kind, rows in differing.items():
            for i in rows:
                if i in kinds:
                    kinds[i].append((key, kind))
    at = [(task, i) for task in tasks for i in range(len(task.rows))]
    systems = results["systems"]
    examples = []
    for i, why in kinds.items():
        base, (task, row) = reference[i], at[i]
        images = images_of(task.rows[row])
        shown = [
            (systems[key]["name"], of_system[i].prediction, of_system[i].score)
            for key, of_system in answers.items()
        ]
        kind = base.type if len(tasks) == 1 else f"{task.name}, {base.type}"
        videos = [] if images else videos_of(task.rows[row])
        if videos:  # the frame in the middle
            images = [Image.fromarray(videos[0].frames[len(videos[0].frames) // 2])]
        uri = data_uri(images[0]) if images else ""
        examples.append(Example(tuple(why), uri, base.question, base.answer, kind, shown))
    return examples, counts


def _varied(rows: Sequence[int], answers: Sequence[Answer]) -> list[int]:
    """Each image once."""
    first: dict[tuple[str, str], int] = {}
    for i in rows:
        first.setdefault((answers[i].task, answers[i].scene), i)
    return list(first.values())


def data_uri(image: Any) -> str:
    """A small copy, as PNG or JPEG, whichever is smaller."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    png, jpeg = io.BytesIO(), io.BytesIO()
    small.save(png, format="PNG", optimize=True)
    small.save(jpeg, format="JPEG", quality=82)
    if len(png.getvalue()) <= len(jpeg.getvalue()):
        return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
