"""What one evaluation compares and on which questions, loaded as `eval/evaluate.py` was asked for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from latefusion.data.load import evaluation_questions
from latefusion.eval.comparison.run import evaluate_run
from latefusion.eval.comparison.systems import Students, System, further, policies_of
from latefusion.eval.ledger import Processes
from latefusion.eval.tasks import load_task
from latefusion.eval.tasks.base import Task
from latefusion.eval.tasks.exact import own
from latefusion.models.attach import attach
from latefusion.models.base_model import compute_dtype, load_base, twin
from latefusion.models.fingerprint import model_fingerprint
from latefusion.models.policies.configured import visipruner
from latefusion.models.schedule import VisionSchedule
from latefusion.recipes.schema import Config

if TYPE_CHECKING:
    from latefusion.eval.evaluate import Arguments


def compared(
    chosen: Arguments,
    config: Config | None,
    stored: Mapping[str, Any] | None,
    processes: Processes | None,
) -> dict[str, Any] | None:
    """Load the models, ask all of them the questions, and write the report; what the report holds.

    Args:
        config, stored: what `evaluate.checked` found.
        processes: those that share the questions; None: this one alone.
    """
    more = policies_of(chosen.policies)
    tasks = tasks_of(chosen, config)
    last: System | None
    systems: dict[str, System] = {"dense": System(name="Dense base", policy=VisionSchedule())}
    if config is not None:
        assert chosen.checkpoint is not None
        students = Students()
        student = students.load(chosen.checkpoint)
        model, processor, attachment = student.model, student.processor, student.attachment
        last = System(name=config.name, policy=student.schedule, adapters=True)
        source = model_fingerprint(chosen.checkpoint)
        if not isinstance(model, PeftModel):  # all weights were trained: the base is another model
            model = students.base(config.model.path)
            attachment = attach(model, VisionSchedule())
            last = System(name=config.name, policy=student.schedule, student=student)
            source += f" {model_fingerprint(config.model.path)}"
        systems["pruned"] = System(name="VisiPruner", policy=visipruner(config.model.visipruner))
        systems |= more
        title = config.name
    else:
        assert chosen.model is not None
        base, processor = load_base(chosen.model, dtype=compute_dtype())
        students, model = Students({chosen.model: base}), twin(base)
        attachment = attach(model, VisionSchedule())
        systems |= {key: system for key, system in more.items() if key != "dense"}
        last, title, source = None, Path(chosen.model).name, model_fingerprint(chosen.model)
    if torch.cuda.is_available():
        model.cuda()
    systems |= further(students, chosen.checkpoints, processor, taken="" if last is None else last.name)
    if last is not None:
        systems["student"] = last
    others = [key for key in systems if key != "dense"]
    what = Path(chosen.data).stem if chosen.data else "_".join(chosen.tasks) or chosen.split or "test"
    home = Path(chosen.checkpoint or "outputs")
    return evaluate_run(
        model=model,
        processor=processor,
        attachment=attachment,
        systems=systems,
        tasks=tasks,
        output_dir=chosen.output or home / f"evaluation_{what}",
        title=title,
        checkpoint=chosen.checkpoint,
        baseline="pruned" if config is not None else (others or ["dense"])[0],
        candidate="student" if config is not None else (others or ["dense"])[-1],
        batch_size=chosen.batch_size,
        batches=chosen.batches,
        lengths=chosen.lengths,
        with_controls=chosen.controls,
        stored=stored,
        processes=processes,
        seed=chosen.seed if config is None else config.train.seed,
        note="" if config is None else note_on(config),
        source=source,
    )


def tasks_of(chosen: Arguments, config: Config | None) -> list[Task]:
    """The questions: a user's, benchmarks, or those of the checkpoint's own run."""
    if chosen.data is not None:
        found = [own(chosen.data)]
    elif chosen.tasks or config is None:
        home = os.path.join(".", chosen.data_dir)  # what begins with a full stop is no hub id
        places = {name: chosen.sources.get(name, f"{home}/{name}") for name in chosen.tasks or ["scenes"]}
        found = [load_task(name, where, chosen.split) for name, where in places.items()]
    else:
        config.eval.split, config.eval.samples = chosen.split or "test", chosen.samples
        questions = evaluation_questions(config)
        if questions is None:
            raise ValueError(
                f"{chosen.checkpoint} was trained on data without questions to evaluate on; name them with "
                "tasks=[...] or data=FILE."
            )
        name = config.data.source.value
        return [
            Task(name=name, rows=questions, split=config.eval.split, source=config.data.eval_path or name)
        ]
    few = chosen.samples
    return [
        replace(task, rows=task.rows.shuffle(seed=0).select(range(few)))
        if few is not None and few < len(task.rows)
        else task
        for task in found
    ]


def note_on(config: Config) -> str:
    train = config.train
    return f"{train.steps} steps of {train.batch_size} x {train.accumulation} samples a device, seed {train.seed}"
