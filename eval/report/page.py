"""`report.html`: one self-contained file, written from what `report.json` holds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from latefusion.eval.comparison.cost import PEAK_PROMPTS
from latefusion.eval.report import figures, svg, tables
from latefusion.eval.report.gallery import disagreements
from latefusion.eval.report.methods import methods
from latefusion.eval.tasks.base import Answer, Task

HERE = Path(__file__).parent


def write_report(
    path: str | Path, results: dict[str, Any], tasks: Sequence[Task], answers: dict[str, list[Answer]]
) -> None:
    """Render the report.

    Args:
        results: what `report.json` holds.
        tasks: the questions, for the gallery's images; answers: of each system, in the order of the tasks.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=tables.percent,
        points=tables.points,
        si=tables.si,
        times=tables.times,
        python=repr,
        shell=shlex.quote,
    )
    columns, rows = methods(results)
    examples, counts = disagreements(results, tasks, answers)
    questions = {answer.question for answer in answers[results["roles"]["candidate"]]}
    page = environment.get_template("template.html").render(
        results=results,
        headline=tables.headline(results),
        columns=columns,
        methods=rows,
        groups=[
            (name, list(group))
            for name, group in groupby(tables.rows(results), key=lambda row: row.group)
            if name != "Cost"
        ],
        picture=Markup(figures.accuracy_against_flops(results)),
        steps=Markup(figures.tokens_per_layer(results)),
        types=Markup(figures.accuracy_by_type(results)),
        sweeps=_sweeps(results),
        peak_prompts=min(PEAK_PROMPTS, results["settings"]["latency_prompts"]),
        style=Markup((HERE / "page.css").read_text() + svg.STYLE),
        script=Markup((HERE / "page.js").read_text()),
        question=repr(min(sorted(questions), key=len)),
        examples=examples,
        counts=counts,
    )
    Path(path).write_text(page)


def _sweeps(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Title, drawing and caption of each figure of times that was measured."""
    shown, sweeps = [], results["sweeps"]
    if sweeps["batch"]:
        drawing = Markup(figures.prefill_against(results, "batch"))
        shown.append(("Latency against batch", drawing, "A batch's time divided by its questions."))
        drawing = Markup(figures.throughput(results))
        shown.append(("Throughput against batch", drawing, "Up is better; images were encoded before."))
    if sweeps["text"]:
        drawing = Markup(figures.prefill_against(results, "text"))
        shown.append(("Latency against text length", drawing, "The question repeated; the image is one."))
    return [{"title": title, "drawing": drawing, "caption": text} for title, drawing, text in shown]
