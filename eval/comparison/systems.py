"""The systems of a comparison: a model under a policy, adapters on or off, asked with or without the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from latefusion.models.attach import attached
from latefusion.models.base_model import compute_dtype, load_base, twin
from latefusion.models.fingerprint import model_fingerprint, processor_fingerprint
from latefusion.models.locate import ADAPTER_CONFIG, BASE, adapter_settings, check_base
from latefusion.models.policies import tuned
from latefusion.models.policies.base import Policy
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Student
from latefusion.models.student.entry import entry_of
from latefusion.models.student.restore import load
from latefusion.models.student.save import load_student

NAMES = {
    "dense": "Dense base",
    "visipruner": "VisiPruner",
    "visipruner_13b": "VisiPruner 13B",
    "fastv": "FastV",
    "pyramiddrop": "PyramidDrop",
    "vtw": "VTW",
    "divprune": "DivPrune",
    "random": "Random half",
}


@dataclass(frozen=True, kw_only=True)
class System:
    """One thing to compare: the model at hand under a policy, with its trained adapters on or off.

    Attributes:
        name: what tables and figures call it.
        policy: which vision tokens each layer sees (`VisionSchedule()` is dense).
        adapters: LoRA and entry adapter active (the student) or disabled (the base, or a student without adapters).
        blind: asked without the image.
        control: shows what the tokens are worth, and is not timed.
        student: a further checkpoint, whose model is another; None: the model at hand.
        source: fingerprint of the checkpoint that was loaded; empty: the base alone.
    """

    name: str
    policy: Policy
    adapters: bool = False
    blind: bool = False
    control: bool = False
    student: Student | None = field(default=None, repr=False)
    source: str = ""

    def describe(self) -> dict[str, Any]:
        """What distinguishes it from another system, as JSON holds it."""
        return {
            "name": self.name,
            "policy": {"type": type(self.policy).__name__, **vars(self.policy)},
            "adapters": self.adapters,
            "blind": self.blind,
            "control": self.control,
            "source": self.source,
        }


@contextmanager
def running(model: Any, attachment: Any, system: System) -> Iterator[Any]:
    """Run the model as `system`: its policy attached, adapters on or off, no gradients; yields the model."""
    if system.student is not None:
        model, attachment = system.student.model, system.student.attachment
    off = isinstance(model, PeftModel) and not system.adapters
    with attachment.using(system.policy), model.disable_adapter() if off else nullcontext(), torch.no_grad():
        yield model


def policies_of(entries: Sequence[Any], thresholds: Mapping[str, Any]) -> dict[str, System]:
    """Systems of the base under policies of `recipes/policy/`.

    Args:
        entries: names, or `{name: {argument: value}}` where some of a recipe's arguments are replaced.
        thresholds: the model's own, for `visipruner`; empty: it has none.

    Raises:
        ValueError: there is no such policy or argument.
    """
    systems: dict[str, System] = {}
    titles: list[str] = []
    for entry in entries:
        name, changes = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        policy = tuned(name, thresholds, **(changes or {}))
        shown = ", ".join(f"{k}={v}" for k, v in (changes or {}).items() if isinstance(v, int | float | str))
        plain = NAMES.get(name) or f"{type(policy).__name__} ({Path(name).parent.name or name})"  # of a file
        title = f"{plain} ({shown})" if shown else plain
        titles.append(title)
        number = titles.count(title)
        key = name if name not in systems else f"{name}_{len(titles)}"
        systems[key] = System(name=title if number == 1 else f"{title} no. {number}", policy=policy)
    return systems


class Students:
    """Trained checkpoints; those of one base share its weights in memory.

    Args:
        bases: base models by the name that checkpoints know them by; they are not run themselves.
    """

    def __init__(self, bases: dict[str, PreTrainedModel] | None = None):
        self.bases = dict(bases or {})

    def load(self, folder: str | Path) -> Student:
        """The student in a folder, with modules of its own over its base's weights.

        Raises:
            FileNotFoundError: the folder holds no student, or its base is not there.
        """
        if (Path(folder) / ADAPTER_CONFIG).is_file():
            student = load_student(folder, base=self.base(adapter_settings(folder)[BASE]))
        else:  # all its weights were trained, or adapters merged into them
            model, processor = load(folder)
            attachment = attached(model)
            assert attachment is not None and isinstance(attachment.policy, VisionSchedule)
            student = Student(
                model=model, processor=processor, attachment=attachment, schedule=attachment.policy
            )
        if torch.cuda.is_available():
            student.model.cuda()
        return student

    def base(self, name: str) -> PreTrainedModel:
        """A model with hooks of its own over the weights of a base."""
        if name not in self.bases:
            check_base(name)
            self.bases[name], _ = load_base(name, dtype=compute_dtype())
        return twin(self.bases[name])


def further(
    students: Students, folders: Sequence[str | Path], processor: ProcessorMixin, taken: str = ""
) -> dict[str, System]:
    """A system for each further checkpoint, named as its folder is (and those above it, where that is not enough).

    Args:
        processor: of the model at hand; taken: a name that another system has.

    Raises:
        FileNotFoundError: a folder holds no student, or its base is not there.
        ValueError: it makes prompts differently from the model at hand.
    """
    paths = [Path(folder).resolve() for folder in folders]
    systems = {}
    for folder, path in zip(folders, paths, strict=True):
        ends = [taken, *("/".join(other.parts) for other in set(paths) - {path})]
        depth = 1
        while any(f"/{end}".endswith("/" + "/".join(path.parts[-depth:])) for end in ends):
            depth += 1
        student = students.load(folder)
        if processor_fingerprint(student.processor) != processor_fingerprint(processor):
            raise ValueError(
                f"the base of {folder} reads prompts in another way than this run's; compare it in a run of its own."
            )
        systems[str(folder)] = System(
            name="/".join(path.parts[-depth:]),
            policy=student.schedule,
            adapters=isinstance(student.model, PeftModel),
            student=student,
            source=model_fingerprint(folder),
        )
    return systems


def model_of(model: Any, system: System) -> Any:
    """The model that a system runs."""
    return model if system.student is None else system.student.model


def entry_adapter(model: Any, system: System) -> Any:
    """The entry adapter that a system runs, or None; the base inside a PEFT model runs without it."""
    active = model_of(model, system)
    return entry_of(active) if system.adapters or not isinstance(active, PeftModel) else None
