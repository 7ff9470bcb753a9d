"""What one comparison depends on, checked once, before any compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel

from latefusion.data.load import check_questions
from latefusion.eval.comparison.systems import System, model_of
from latefusion.eval.ledger import Processes
from latefusion.eval.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Systems, questions and how both are measured.

    Attributes:
        model: Hugging Face image-text-to-text model, PEFT-wrapped if a system has `adapters=True`.
        processor: its processor; prompts are made with its chat template, padded on the left.
        attachment: what `attach(model, ...)` returned; each system runs under `attachment.using(system.policy)`.
        systems: by key, in the order of the table, such as
            `{"dense": System(name="Dense base", policy=VisionSchedule()),
            "pruned": System(name="VisiPruner", policy=VisiPruner(...)),
            "student": System(name="Late fusion", policy=schedule, adapters=True)}`.
        tasks: the questions (`eval/tasks/`).
        output: folder for the report, made if missing.
        title: heading of the report, such as the recipe's name.
        checkpoint: where the student was saved, named in the report's "use it next", or None.
        reference, baseline, candidate: keys of the system that ratios refer to, of the one to beat, and of
            the one that the headline speaks of.
        batch_size: questions a batch (accuracy only; latency is measured at batch 1).
        latency_prompts, latency_repeats: prompts that latency and memory are measured on, and rounds over them.
        batches, lengths: batch sizes and text lengths that time is measured against; empty: not measured.
        controls: add rows without the image, and with random tokens at the methods' budgets.
        stored: an earlier `report.json` whose reference row this run's must reproduce before others are asked.
        processes: those that share the questions; the main one measures costs and writes.
        seed: of the run that trained the checkpoint, or None.
        note: free text on how the checkpoint was made (steps, time), shown in the report.
        base: fingerprint of the model's weights without adapters; of students, each system has its own `source`.

    Raises:
        ValueError: a role names no system, a task is empty, a policy does not fit its model, or a system has adapters
            and its model has none.
    """

    model: Any
    processor: Any
    attachment: Any
    systems: dict[str, System]
    tasks: Sequence[Task]
    output: Path
    title: str
    checkpoint: str | None = None
    reference: str = "dense"
    baseline: str = "pruned"
    candidate: str = "student"
    batch_size: int = 96
    latency_prompts: int = 4
    latency_repeats: int = 3
    batches: Sequence[int] = ()
    lengths: Sequence[int] = ()
    controls: bool = False
    stored: Mapping[str, Any] | None = None
    processes: Processes = field(default_factory=Processes)
    seed: int | None = None
    note: str = ""
    base: str = ""

    def __post_init__(self) -> None:
        roles = {"reference": self.reference, "baseline": self.baseline, "candidate": self.candidate}
        for role, key in roles.items():
            if key not in self.systems:
                raise ValueError(f"{role}={key!r} names no system; choose one of {', '.join(self.systems)}.")
        for task in self.tasks:
            check_questions(task.rows)
        for key, system in self.systems.items():
            self._check_system(key, system)

    def _check_system(self, key: str, system: System) -> None:
        model = model_of(self.model, system)
        try:
            system.policy.validate(model.config.get_text_config().num_hidden_layers)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if system.adapters and not isinstance(model, PeftModel):
            raise ValueError(
                f"system {key!r} needs adapters, but the model is a plain {type(model).__name__}; "
                "load the adapter folder of a training run."
            )
