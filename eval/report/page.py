"""`report.html`: one self-contained file, written from what `evaluate_run` found."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from latefusion.eval.efficiency import PEAK_PROMPTS
from latefusion.eval.predict import Answer, images_of
from latefusion.eval.report import figures, tables

THUMBNAIL = 336  # pixels, longest side


@dataclass(frozen=True)
class Example:
    """A question of the gallery: why it was chosen, its image as a data URI, and what each system said."""

    why: str
    image: str
    question: str
    answer: str
    type: str
    predictions: list[tuple[str, str, bool]]


def write_report(
    path: str | Path, results: dict[str, Any], dataset: Dataset, answers: dict[str, list[Answer]]
) -> None:
    """Render the report.

    Args:
        results: what `results.json` holds.
        dataset: the questions, for the gallery's images; answers: of each system, in the order of `dataset`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=tables.percent, points=tables.points, si=tables.si)
    asked = {answer.question for answer in answers[results["roles"]["candidate"]]}
    page = environment.get_template("template.html").render(
        results=results,
        headline=tables.headline(results),
        groups=[
            (name, list(rows)) for name, rows in groupby(tables.rows(results), key=lambda row: row.group)
        ],
        figures=[
            Markup(figure(results))
            for figure in (figures.tokens_per_layer, figures.accuracy_against_flops, figures.accuracy_by_type)
        ],
        peak_prompts=min(PEAK_PROMPTS, results["settings"]["latency_prompts"]),
        style=Markup(figures.STYLE),
        question=json.dumps(min(sorted(asked), key=len)),
        examples=gallery(results, dataset, answers),
    )
    Path(path).write_text(page)


def gallery(
    results: dict[str, Any], dataset: Dataset, answers: dict[str, list[Answer]], *, each: int = 3
) -> list[Example]:
    """Up to `each` examples of a kind: lost by the candidate, won against the baseline, missed by all, right.

    The rule is fixed, so that nobody picks: the first of a kind in the order of the data, a scene and a
    question type once.
    """
    candidate, baseline = answers[results["roles"]["candidate"]], answers[results["roles"]["baseline"]]
    reference = answers[results["roles"]["reference"]]
    name = results["systems"][results["roles"]["candidate"]]["name"]
    other = results["systems"][results["roles"]["baseline"]]["name"]
    base = results["systems"][results["roles"]["reference"]]["name"]
    rows = range(len(candidate))
    kinds = (
        (
            f"{name} wrong, {base} right",
            [i for i in rows if reference[i].correct and not candidate[i].correct],
        ),
        (
            f"{name} right, {other} wrong",
            [i for i in rows if candidate[i].correct and not baseline[i].correct],
        ),
        ("all wrong", [i for i in rows if not any(found[i].correct for found in answers.values())]),
        ("all right", [i for i in rows if all(found[i].correct for found in answers.values())]),
    )
    seen: set[str] = set()
    examples = []
    for why, indices in kinds:
        for i in _varied(indices, candidate, seen)[:each]:
            seen.add(candidate[i].scene)
            said = [
                (results["systems"][key]["name"], found[i].prediction, found[i].correct)
                for key, found in answers.items()
            ]
            asked = candidate[i]
            image = _data_uri(images_of(dataset[i])[0])
            examples.append(Example(why, image, asked.question, asked.answer, asked.type, said))
    return examples


def _varied(indices: Sequence[int], answers: Sequence[Answer], seen: set[str]) -> list[int]:
    """`indices` with every scene and every question type once, and no scene of `seen`."""
    scenes, types, chosen = set(seen), set(), []
    for i in indices:
        if answers[i].scene not in scenes and answers[i].type not in types:
            scenes.add(answers[i].scene)
            types.add(answers[i].type)
            chosen.append(i)
    return chosen


def _data_uri(image: Any) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
