"""One comparison: every system answers every question, costs are measured side by side, the report is written."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from latefusion.data.prompts import prompt_inputs, prompt_text
from latefusion.eval import metrics
from latefusion.eval.comparison import cost as efficiency
from latefusion.eval.comparison import results as found
from latefusion.eval.comparison import sweeps
from latefusion.eval.comparison.answers import Answer, answer_questions, check, progress_bar
from latefusion.eval.comparison.systems import System, controls
from latefusion.eval.ledger import Ledger, Processes
from latefusion.eval.report.markdown import write_markdown
from latefusion.eval.report.page import write_report
from latefusion.eval.report.tables import print_table
from latefusion.eval.tasks.base import Task

SCHEMA = 2  # of report.json; raise it when a key changes its meaning
NEW_TOKENS = 6  # generated while timing: the first and five further ones
UNFINISHED = "unfinished.jsonl"  # answers of an evaluation that was interrupted
TOLERANCE = 0.005  # by which the dense base may miss a stored reference


def evaluate_run(
    *,
    model: Any,
    processor: Any,
    attachment: Any,
    systems: dict[str, System],
    tasks: Sequence[Task],
    output_dir: str | Path,
    title: str,
    checkpoint: str | Path | None = None,
    reference: str = "dense",
    baseline: str = "pruned",
    candidate: str = "student",
    batch_size: int = 96,
    latency_prompts: int = 6,
    latency_repeats: int = 3,
    batches: Sequence[int] = (),
    lengths: Sequence[int] = (),
    with_controls: bool = False,
    stored: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
    seed: int = 0,
    note: str = "",
    source: str = "",
) -> dict[str, Any] | None:
    """Evaluate `systems` on `tasks`, print the table and write the report.

    Writes into `output_dir`: `report.json` (every number), `report.html`, `report.md`, `predictions.jsonl` (one line
    a question and system). Interrupted, it goes on where it stopped when it is called in the same way again. The model
    is put into eval mode and given back in the mode it came in.

    Args:
        model: Hugging Face image-text-to-text model, PEFT-wrapped if a system has `adapters=True`.
        processor: its processor; prompts are made with its chat template, padded on the left.
        attachment: what `attach(model, ...)` returned; each system runs under
            `attachment.using(system.policy)`.
        systems: by key, in the order of the table, such as
            `{"dense": System(name="Dense base", policy=VisionSchedule()),
            "pruned": System(name="VisiPruner", policy=VisiPruner(...)),
            "student": System(name="Late fusion", policy=schedule, adapters=True)}`.
        tasks: what is asked (`eval/tasks/`).
        output_dir: made if missing.
        title: heading of the report, such as the recipe's name.
        checkpoint: where the student was saved, named in the report's "use it next"; None: there is none.
        reference, baseline, candidate: keys of the system that ratios refer to, of the one to beat, and of
            the one that the headline speaks of.
        batch_size: questions a batch (accuracy only; latency is measured at batch 1).
        latency_prompts, latency_repeats: prompts that latency and memory are measured on, and rounds over
            them.
        batches, lengths: batch sizes and text lengths that time is measured against; none by default.
        with_controls: add rows without the image, and with random tokens at each method's budget.
        stored: an earlier `report.json` whose reference row this one's must reproduce before others are asked.
        processes: those that share the questions; the main one measures costs and writes.
        seed: of the bootstrap.
        note: free text on how the checkpoint was made (steps, time), shown in the report.
        source: what the model was loaded from, so that an interrupted run is not resumed with another.

    Returns:
        What `report.json` holds; None for processes that are not the main one.

    Raises:
        ValueError: a key names no system, a task is empty, adapters are asked of a model without them, or the
            reference is not reproduced.
    """
    for role, key in (("reference", reference), ("baseline", baseline), ("candidate", candidate)):
        if key not in systems:
            raise ValueError(f"{role}={key!r} names no system; choose one of {', '.join(systems)}.")
    for task in tasks:
        check(model, systems, task.rows)
    started = time.perf_counter()
    folder, processes = Path(output_dir), processes or Processes()
    data = found.describe_data(tasks)
    if stored is not None:
        found.check_same_data(stored, data)
    folder.mkdir(parents=True, exist_ok=True)
    systems = dict(systems)
    identity = [source, str(model.dtype), {k: s.describe() for k, s in systems.items()}, data]
    ledger = Ledger(folder / UNFINISHED, found.plain(identity), processes)
    if ledger.resumed and processes.main:
        print(f"Going on with {ledger.resumed:,} answers of an interrupted run in {folder}.", flush=True)
    was_training = model.training
    model.eval()
    try:
        asked = {"model": model, "processor": processor, "attachment": attachment}
        asked |= {"batch_size": batch_size, "ledger": ledger}
        if stored is not None:
            first = answer_tasks(tasks, systems={reference: systems[reference]}, **asked)
            found.check_reference(stored, first[reference], tasks, TOLERANCE)
        answers = answer_tasks(tasks, systems=systems, **asked)
        if with_controls:
            extra = controls(systems, answers, reference)
            answers |= answer_tasks(tasks, systems=extra, **asked)
            systems |= extra
        if not processes.main:
            return None
        rows = [row for task in tasks for row in _spread(task, -(-latency_prompts // len(tasks)))]
        costs, sweep, vision = measure_costs(
            model=model,
            processor=processor,
            attachment=attachment,
            systems=systems,
            reference=reference,
            rows=rows,
            repeats=latency_repeats,
            batches=batches,
            lengths=lengths,
        )
    finally:
        model.train(was_training)
    units = {
        key: [unit for task in tasks for unit in task.units([a for a in said if a.task == task.name])]
        for key, said in answers.items()
    }
    results = {
        "schema": SCHEMA,
        "title": title,
        "note": note,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "roles": {"reference": reference, "baseline": baseline, "candidate": candidate},
        "data": data,
        "model": found.describe_model(model, answers[reference]) | {"vision_seconds": vision},
        "systems": found.describe_systems(model, systems, tasks, answers, units, costs, reference, seed),
        "paired": {
            key: found.compare(units[candidate], units[key], seed) for key in systems if key != candidate
        },
        "against": {
            key: found.compare(units[key], units[reference], seed) for key in systems if key != reference
        },
        "sweeps": sweep,
        "settings": {
            "decoding": "greedy",
            "prompts": {task.name: prompt_text(processor, task.rows[0]) for task in tasks},
            "batch_size": batch_size,
            "latency_prompts": len(rows),
            "latency_repeats": latency_repeats,
            "latency_new_tokens": NEW_TOKENS,
            "bootstrap_resamples": metrics.RESAMPLES,
            "seed": seed,
            "reference_reproduced": stored is not None,
        },
        "environment": found.describe_environment(model, time.perf_counter() - started, processes.count),
    }
    (folder / "report.json").write_text(json.dumps(found.plain(results), indent=2, allow_nan=False) + "\n")
    with (folder / "predictions.jsonl").open("w") as lines:
        for said in answers.values():
            lines.writelines(json.dumps(answer.to_dict()) + "\n" for answer in said)
    write_report(folder / "report.html", results, tasks, answers)
    write_markdown(folder / "report.md", results)
    ledger.close()
    print_table(results)
    print(folder / "report.html")
    return results


def answer_tasks(tasks: Sequence[Task], **asked: Any) -> dict[str, list[Answer]]:
    """`answer_questions` for each task; a system's answers follow each other in the order of the tasks."""
    answers: dict[str, list[Answer]] = {}
    for task in tasks:
        said = answer_questions(
            dataset=task.rows,
            task=task.name,
            score=task.score,
            max_new_tokens=task.max_new_tokens,
            **asked,
        )
        for key, given in said.items():
            answers.setdefault(key, []).extend(given)
    return answers


def measure_costs(
    *,
    model: Any,
    processor: Any,
    attachment: Any,
    systems: dict[str, System],
    reference: str,
    rows: list[dict[str, Any]],
    repeats: int,
    batches: Sequence[int],
    lengths: Sequence[int],
) -> tuple[dict[str, efficiency.Cost], dict[str, Any], float]:
    """Latency and memory of every system that is no control, the sweeps, and the vision tower's seconds.

    Adapters are off for every system: merged into the weights, as a student is deployed, LoRA costs nothing, and costs
    do not depend on the values of weights. The entry adapter runs where a schedule enters late.
    """
    timed = {key: replace(system, adapters=False) for key, system in systems.items() if not system.control}
    common: dict[str, Any] = {
        "model": model,
        "attachment": attachment,
        "systems": timed,
        "reference": reference,
    }
    prompts = [prompt_inputs(model, processor, [row]) for row in rows]
    with progress_bar() as progress:
        steps = len(prompts) * (repeats + 1) + (len(batches) + len(lengths)) * (repeats + 1)
        bar = progress.add_task("Latency, memory", total=steps)
        common |= {"repeats": repeats, "new_tokens": NEW_TOKENS, "advance": lambda: progress.advance(bar)}
        costs = efficiency.measure(prompts=prompts, **common)
        common |= {"processor": processor}
        sweep = {
            "batch": sweeps.against_batch(rows=rows, sizes=batches, **common),
            "text": sweeps.against_text(row=rows[0], lengths=lengths, **common),
        }
        progress.update(bar, completed=steps)
    return costs, sweep, efficiency.vision_seconds(model, prompts * repeats)


def _spread(task: Task, n: int) -> list[dict[str, Any]]:
    """`n` rows, or all if there are fewer, spread evenly over the task."""
    n = min(n, len(task.rows))
    return [task.rows[i * len(task.rows) // n] for i in range(n)]
