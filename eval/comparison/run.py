"""One comparison: every system answers every question, costs are measured side by side, the report is written."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from latefusion.data.frame_cost import frames_in_words
from latefusion.data.prompts import images_of, prompt_inputs, prompt_text, videos_of
from latefusion.data.videos import Video
from latefusion.eval.comparison import cost, results, sweeps
from latefusion.eval.comparison.answers import answer_questions, check_longest, progress_bar
from latefusion.eval.comparison.encoded import EncodedPrompts
from latefusion.eval.comparison.settings import Settings
from latefusion.eval.comparison.systems import System
from latefusion.eval.ledger import Ledger
from latefusion.eval.report.markdown import write_markdown
from latefusion.eval.report.page import write_report
from latefusion.eval.report.tables import print_table
from latefusion.eval.tasks.base import Answer, Task
from latefusion.eval.tasks.clusters import with_clusters
from latefusion.models.flops import encoder_flops
from latefusion.models.folder_contents import REPORT
from latefusion.models.inputs import unwrapped
from latefusion.models.policies import named
from latefusion.models.schedule import VisionSchedule
from latefusion.recipes.launcher import local_world_size

SCHEMA = 3  # of report.json; raise it when a key changes its meaning
FIRST = 16  # questions with videos whose frames are counted
NEW_TOKENS = 6  # generated while timing: the first and five further ones
UNFINISHED = "unfinished.jsonl"  # answers of an evaluation that was interrupted
NEAR = (
    0.05  # of the vision tokens: budgets so near to each other share a row of random tokens, the larger one's
)
TOLERANCE = 0.005  # by which the dense base may miss a stored reference


def run_comparison(settings: Settings) -> dict[str, Any] | None:
    """Evaluate the systems on the tasks, print the table and write the report.

    Writes `report.json` (every number), `report.html`, `report.md` and `predictions.jsonl` (one line a question and
    system). Interrupted, it goes on where it stopped when it is called in the same way again. The model is put into
    eval mode and given back in the mode it came in.

    Returns:
        What `report.json` holds; None for processes that are not the main one.

    Raises:
        ValueError: the stored reference is not reproduced, or a question is longer than the model has positions.
    """
    started = time.perf_counter()
    settings = replace(settings, tasks=with_clusters(settings.tasks))
    model, processes, tasks = settings.model, settings.processes, settings.tasks
    data, identity = results.describe_data(tasks), results.describe_identity(settings)
    if settings.stored is not None:
        results.check_same(settings.stored, data, identity)
    for task in tasks:
        check_longest(model, settings.processor, task)
    settings.output.mkdir(parents=True, exist_ok=True)
    described = {key: system.describe() for key, system in settings.systems.items()}
    ledger = Ledger(settings.output / UNFINISHED, results.plain([identity, described, data]), processes)
    if ledger.resumed and processes.main:
        where = settings.output
        print(f"Going on with {ledger.resumed:,} answers of an interrupted run in {where}.", flush=True)
    was_training = model.training
    model.eval()
    try:
        systems, answers = answer_all(settings, ledger)
        if not processes.main:
            return None
        rows, films = prompts_to_time(settings), films_in_words(settings, answers[settings.reference])
        with threads_of_all():
            threads = torch.get_num_threads()
            costs, swept, vision = measure_costs(settings, systems, rows)
    finally:
        model.train(was_training)
    report = {
        "schema": SCHEMA,
        "title": settings.title,
        "note": " ".join(filter(None, [settings.note, films])),
        "checkpoint": settings.checkpoint,
        "roles": {
            "reference": settings.reference,
            "baseline": settings.baseline,
            "candidate": settings.candidate,
        },
        "data": data,
        "model": results.describe_model(model, answers[settings.reference]) | vision | {"identity": identity},
        **results.describe_answers(settings, systems, answers, costs, vision["vision_flops"]),
        "sweeps": swept,
        "settings": {
            "decoding": "greedy",
            "prompts": {task.name: prompt_text(settings.processor, task.rows[0]) for task in tasks},
            "batch_size": settings.batch_size,
            "latency_prompts": len(rows),
            "latency_repeats": settings.latency_repeats,
            "latency_new_tokens": NEW_TOKENS,
            "seed": settings.seed,
            "reference_reproduced": settings.stored is not None,
        },
        "environment": results.describe_environment(
            model, time.perf_counter() - started, processes.count, threads
        ),
    }
    write(settings, report, answers)
    ledger.close()
    print_table(report)
    if films:
        print(films)
    print(settings.output / "report.html")
    return report


def answer_all(settings: Settings, ledger: Ledger) -> tuple[dict[str, System], dict[str, list[Answer]]]:
    """All systems, controls included, and their answers; the reference first where it has to be reproduced."""
    systems, prompts = dict(settings.systems), EncodedPrompts()
    if settings.stored is not None:
        first = answer_tasks(settings, {settings.reference: systems[settings.reference]}, ledger, prompts)
        results.check_reference(settings.stored, first[settings.reference], settings.tasks, TOLERANCE)
    answers = answer_tasks(settings, systems, ledger, prompts)
    if settings.controls:
        extra = controls(systems, answers, settings.reference)
        answers |= answer_tasks(settings, extra, ledger, prompts)
        systems |= extra
    return systems, answers


def answer_tasks(
    settings: Settings, systems: dict[str, System], ledger: Ledger, prompts: EncodedPrompts
) -> dict[str, list[Answer]]:
    """`answer_questions` for each task; a system's answers follow each other in the order of the tasks."""
    answers: dict[str, list[Answer]] = {key: [] for key in systems}
    for task in settings.tasks:
        of_task = answer_questions(
            model=settings.model,
            processor=settings.processor,
            attachment=settings.attachment,
            systems=systems,
            task=task,
            batch_size=settings.batch_size,
            ledger=ledger,
            prompts=prompts,
        )
        for key, more in of_task.items():
            answers[key] += more
    return answers


def controls(
    systems: dict[str, System], answers: dict[str, list[Answer]], reference: str
) -> dict[str, System]:
    """Systems that show what the vision tokens are worth: no image, and random tokens at the budget of each method.

    A budget is a method's mean number of vision tokens a layer; a random row keeps as many in every layer.
    """
    dense = tokens_a_layer(answers[reference])
    shares = {
        round(tokens_a_layer(answers[key]) / dense, 3) if dense else 1.0
        for key, system in systems.items()
        if key != reference and not system.control
    }
    extra = {"blind": System(name="No image", policy=VisionSchedule(), blind=True, control=True)}
    for share in budgets(shares):
        extra[f"random_{share:g}"] = System(
            name=f"Random {100 * share:.3g}%", policy=named("random", keep_ratio=share), control=True
        )
    return extra


def budgets(shares: Collection[float]) -> list[float]:
    """The budgets to ask about, largest first: one stands for those that are up to `NEAR` below it."""
    kept: list[float] = []
    for share in sorted(shares, reverse=True):
        if 0 < share < 1 and not (kept and kept[-1] - share <= NEAR):
            kept.append(share)
    return kept


def tokens_a_layer(answers: Sequence[Answer]) -> float:
    """Vision tokens a layer, mean over questions."""
    return fmean(fmean(answer.vision_tokens) for answer in answers)


def prompts_to_time(settings: Settings) -> list[dict[str, Any]]:
    """Rows that latency and memory are measured on: about as many of each task, spread over it."""
    each = -(-settings.latency_prompts // len(settings.tasks))
    return [row for task in settings.tasks for row in spread_over(task, each)]


def films_in_words(settings: Settings, answers: Sequence[Answer]) -> str:
    """What the frames of the first questions with videos alone cost the reference; empty if none has any."""
    every = [
        (task, i) for task in settings.tasks for i in range(len(task.rows))
    ]  # in the order of the answers
    videos: list[Video] = []
    counts: list[tuple[int, int]] = []
    example: dict[str, Any] | None = None
    for (task, i), answer in zip(every, answers, strict=True):
        if "videos" not in task.rows.column_names or len(counts) == FIRST:
            continue
        row = task.rows[i]
        if row["videos"] and not images_of(row):
            videos += videos_of(row)
            counts.append((answer.text_tokens, answer.tokens[0] - answer.text_tokens))
            example = example or row
    if example is None:
        return ""
    encoder = encoder_flops(
        unwrapped(settings.model), prompt_inputs(settings.model, settings.processor, [example])
    )
    return frames_in_words(settings.model.config, videos, counts, encoder=encoder, encoded=counts[0][1])


def spread_over(task: Task, n: int) -> list[dict[str, Any]]:
    """`n` rows, or all if there are fewer, spread evenly over the task."""
    n = min(n, len(task.rows))
    return [task.rows[i * len(task.rows) // n] for i in range(n)]


@contextmanager
def threads_of_all() -> Iterator[None]:
    """The threads that all processes of this machine had together, for one of them while the others wait."""
    own = torch.get_num_threads()
    torch.set_num_threads(own * local_world_size())
    try:
        yield
    finally:
        torch.set_num_threads(own)


def measure_costs(
    settings: Settings, systems: dict[str, System], rows: list[dict[str, Any]]
) -> tuple[dict[str, cost.Cost], dict[str, Any], dict[str, float | None]]:
    """Latency and memory of every system except the controls, the sweeps, and the time of the vision tower.

    Adapters are off for every system: merged into the weights, as a student is deployed, LoRA costs nothing, and costs
    do not depend on the values of weights. The entry adapter runs where a schedule enters late.
    """
    model, processor, repeats = settings.model, settings.processor, settings.latency_repeats
    prompts = [prompt_inputs(model, processor, [row]) for row in rows]
    rounds = len(prompts) + len(settings.batches) + len(settings.lengths)
    with progress_bar() as progress:
        steps = rounds * (repeats + 1)
        bar = progress.add_task("Latency, memory", total=steps)
        common: dict[str, Any] = {
            "model": model,
            "attachment": settings.attachment,
            "systems": {k: replace(s, adapters=False) for k, s in systems.items() if not s.control},
            "reference": settings.reference,
            "repeats": repeats,
            "new_tokens": NEW_TOKENS,
            "advance": lambda: progress.advance(bar),
        }
        costs = cost.measure(prompts=prompts, **common)
        common |= {"processor": processor}
        swept = {
            "batch": sweeps.against_batch(rows=rows, sizes=settings.batches, **common),
            "text": sweeps.against_text(row=rows[0], lengths=settings.lengths, **common),
        }
        progress.update(bar, completed=steps)
    vision = {
        "vision_seconds": cost.vision_seconds(model, prompts * repeats),
        "vision_flops": cost.vision_flops(model, prompts),
    }
    return costs, swept, vision


def write(settings: Settings, report: dict[str, Any], answers: dict[str, list[Answer]]) -> None:
    """Write the report's files."""
    folder = settings.output
    text = json.dumps(results.plain(report), indent=2, allow_nan=False)
    (folder / REPORT).write_text(text + "\n")
    with (folder / "predictions.jsonl").open("w") as lines:
        for of_system in answers.values():
            lines.writelines(json.dumps(answer.to_dict()) + "\n" for answer in of_system)
    write_report(folder / "report.html", report, settings.tasks, answers)
    write_markdown(folder / "report.md", report)
