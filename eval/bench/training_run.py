"""A recipe's training run at a given shape, timed step by step and phase by phase; see `end_to_end.py`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from latefusion.data.bad_rows import Checked, Guard
from latefusion.data.load import training_data
from latefusion.eval.bench.phases import Phases, clock
from latefusion.eval.bench.training import stretch
from latefusion.eval.bench.triggered import Triggered
from latefusion.eval.bench.whole_model import Shape, processor_for, write_rows
from latefusion.models.base_model import twin
from latefusion.models.flops import encoder_flops
from latefusion.models.policies.configured import schedule_of
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Student
from latefusion.models.student.entry import CalibratedEntry
from latefusion.recipes.compose import compose_config
from latefusion.recipes.schema import Config, Layers, Teacher
from latefusion.training import assemble
from latefusion.training.engines import accelerate as engine
from latefusion.training.engines.accelerate import StudentTrainer
from latefusion.training.objective import Objective
from latefusion.training.signals import Signals
from latefusion.training.step_cost import training_flops
from latefusion.training.vision_tower import VisionTower

MODEL = "llava_1_5_7b"  # whose schedules are stretched
ANSWER = 8  # learnt tokens of a row
ROWS = 16  # in the training set
CHECKPOINT = "checkpoint"
WATCHED = {
    (Checked, "__getitem__"): "loading",
    (Guard, "__call__"): "loading",
    (VisionTower, "encode"): "tower",
    (Objective, "teacher_rows"): "teacher",
    (Objective, "__call__"): "student",
    (Accelerator, "backward"): "backward",
    (StudentTrainer, "_clip_grad_norm"): "optimizer",
    (AcceleratedOptimizer, "step"): "optimizer",
    (StudentTrainer, "_save_checkpoint"): CHECKPOINT,
}
PHASES = ("loading", "tower", "teacher", "student", "backward", "optimizer", "rest")


@dataclass
class Settings:
    """The settings of one cell: rows of `text` tokens, `batch` of them a step."""

    shape: Shape
    device: str
    dtype: str
    batch: int
    text: int
    steps: int
    checkpointing: bool = False  # activations of layers are computed again in the backward pass


class Runs:
    """Training runs of recipes on one base, whose weights they share; a student is built once.

    Args:
        model: the base.
        folder: for data and checkpoints.
    """

    def __init__(self, model: Any, folder: Path):
        self.model, self.folder = model, folder
        self.students: dict[tuple[str, str], Student] = {}
        self.datasets: dict[int, Any] = {}

    def configured(self, recipe: str, teacher: str, cell: Settings) -> Config:
        """The configuration of the run; `teacher`: as the recipe has it if empty."""
        data = self.folder / f"text_{cell.text}"
        if not (data / "rows.jsonl").exists():
            write_rows(data, rows=ROWS, text=cell.text, answer=ANSWER)
        config = deepcopy(composed(recipe, teacher, cell.dtype))
        config.data.path, config.data.images = str(data / "rows.jsonl"), str(data)
        config.train.batch_size, config.train.steps = cell.batch, cell.steps
        config.train.save_every = cell.steps
        config.train.gradient_checkpointing = cell.checkpointing
        config.output_dir = str(self.folder / "run")
        schedule = stretch(schedule_of(config.schedule), cell.shape.layers, cell.shape.vision)
        options = config.schedule
        options.enter, options.exit = schedule.enter, schedule.exit
        options.keep = dict(schedule.keep)
        options.cross = None if schedule.cross is None else list(schedule.cross)
        return config

    def student(self, config: Config, shape: Shape) -> Student:
        """Its entry adapter has a calibrated start, as the recipes ask, with the identity in it."""
        key = (config.name, config.teacher.value)
        if key not in self.students:
            with torch.device(self.model.device):
                start = CalibratedEntry(hidden_size=shape.hidden, places=shape.vision)
            student = assemble.student_from(config, twin(self.model), processor_for(shape), start)
            student.model.to(self.model.device)
            self.students[key] = student
        return self.students[key]

    def objective(self, config: Config, student: Student, layers: int) -> Objective:
        """The objective of the run, with a VisiPruner that finds what the paper reports."""
        objective = assemble.objective_of(config, student)
        if objective.kl.policy is not None and config.teacher is Teacher.visipruner:
            objective.kl.policy = published_work(layers)
        return objective

    def run(self, recipe: str, teacher: str, cell: Settings, phases: Phases | None = None) -> dict[str, Any]:
        """Train for `cell.steps` steps.

        Args:
            phases: count into these, from the end of the first step on; None: time the steps.

        Returns:
            `steps`, the seconds of each step but the first; on a GPU `peak`, the memory beyond weights in bytes.
        """
        config = self.configured(recipe, teacher, cell)
        student = self.student(config, cell.shape)
        objective = self.objective(config, student, cell.shape.layers)
        if cell.text not in self.datasets:
            self.datasets[cell.text] = training_data(config.data)
        dataset = self.datasets[cell.text]
        with ExitStack() as held:
            held.enter_context(redirect_stdout(io.StringIO()))
            # a signal ends the benchmark, instead of this run alone once its step is saved
            held.enter_context(patch.object(Signals, "listen", lambda self: None))
            context = engine.prepare(config, dtype=assemble.dtype_of(config))
            guard = assemble.guarded(config, assemble.collator_of(student, config), dataset)
            marks = held.enter_context(step_ends(cell.device, phases))
            if phases is not None:
                held.enter_context(phases.watching(WATCHED))
            else:  # what comes after the last step is not timed
                for method in ("_save_checkpoint", "_save"):
                    held.enter_context(patch.object(StudentTrainer, method, lambda *args, **kwargs: None))
            before = 0
            if cell.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            engine.fit(config, context, student, dataset, guard, objective, None)
        student.model.zero_grad()
        result: dict[str, Any] = {"steps": marks.seconds()}
        if cell.device == "cuda":
            result["peak"] = torch.cuda.max_memory_allocated() - before
        return result

    def phases(self, recipe: str, teacher: str, cell: Settings) -> dict[str, float]:
        """Seconds of each phase of the second of two steps, and of a checkpoint."""
        phases = Phases(cell.device)
        cell = replace(cell, steps=2)
        steps = len(self.run(recipe, teacher, cell, phases)["steps"])
        each = {name: phases.noted[name] / steps for name in PHASES}
        each["loading"] = (
            phases.forgotten["loading"] + phases.seconds["loading"]
        ) / cell.steps  # a batch ahead
        return {**each, CHECKPOINT: phases.seconds[CHECKPOINT]}

    def flops(self, recipe: str, teacher: str, cell: Settings) -> float:
        """FLOPs a sample, of tower, teacher, student and backward pass, as its schedules say."""
        config = self.configured(recipe, teacher, cell)
        schedule = schedule_of(config.schedule)
        layers, vision = cell.shape.layers, cell.shape.vision
        seen = schedule.vision_tokens(layers, 1)
        first = next(i for i, n in enumerate(seen) if n or config.lora.layers is Layers.all)
        flops = training_flops(self.model.config, schedule, cell.text, vision, answers=ANSWER, first=first)
        if config.teacher is not Teacher.none:
            teaching = (
                band_of(published_work(layers)) if config.teacher is Teacher.visipruner else VisionSchedule()
            )
            whole = training_flops(self.model.config, teaching, cell.text, vision, answers=ANSWER)
            flops += whole // 2  # forward alone
        return flops + self.tower_flops(cell.shape)

    def tower_flops(self, shape: Shape) -> int:
        """FLOPs of tower and projector on one picture."""
        pixels = torch.zeros(
            1, 3, shape.pixels, shape.pixels, dtype=self.model.dtype, device=self.model.device
        )
        return encoder_flops(self.model, {"pixel_values": pixels}) or 0


@cache
def composed(recipe: str, teacher: str, dtype: str) -> Config:
    """The configuration before it knows its cell."""
    words = [
        f"model={MODEL}",
        f"recipe={recipe}",
        "data=dataset",
        "data.path=rows.jsonl",
        f"train.dtype={dtype}",
    ]
    fixed = ["train.batch_size=1", "train.steps=1", "train.trackers=[]", "train.learning_rate=1e-4"]
    return compose_config([*words, *fixed, *([f"teacher={teacher}"] if teacher else [])])


def published_work(layers: int) -> Triggered:
    """VisiPruner with the paper's findings on LLaVA-1.5-7B, at the same relative depths."""
    return Triggered(
        fusion=3 * layers // 8, kept=10, leave=3 * layers // 4, boundary=max(1, 3 * layers // 16)
    )


def band_of(work: Triggered) -> VisionSchedule:
    """A schedule with as many tokens in each layer; only its FLOPs count."""
    return VisionSchedule(exit=work.leave, keep={work.fusion + 1: work.kept}, ranking="hidrop")


class Marks:
    """The ends of optimizer steps: events of the stream on a GPU, else this thread's time."""

    def __init__(self, device: str):
        self.device = device
        self.ends: list[Any] = []

    def add(self) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ends.append(event)
        else:
            self.ends.append(clock(self.device))

    def seconds(self) -> list[float]:
        """Between one end and the next."""
        if self.device != "cuda":
            return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.ends, self.ends[1:], strict=False)]


@contextmanager
def step_ends(device: str, phases: Phases | None) -> Iterator[Marks]:
    """Mark the end of each optimizer step, where the stopwatch begins (the first) and is read (the others)."""
    marks = Marks(device)

    def ended(*_: Any) -> None:
        marks.add()
        if phases is not None:
            if len(marks.ends) == 1:
                phases.reset()
            phases.note()

    handle = register_optimizer_step_post_hook(ended)
    try:
        yield marks
    finally:
        handle.remove()
