"""Every measurement of a profile, batch by batch, kept in the ledger as it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from latefusion.data.prompt_batches import Batch, Group
from latefusion.eval.fusion.blind import Runner
from latefusion.eval.fusion.effects import Answers
from latefusion.eval.fusion.knockouts import band_effects, effects, knock_outs, reading_effects
from latefusion.eval.fusion.looks import AverageImage, observe
from latefusion.eval.fusion.plan import HELD, Plan, reading_prefills
from latefusion.eval.ledger import Ledger
from latefusion.models.attach import Attachment
from latefusion.models.executor.trace import PrefillTrace
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import CalibratedEntry
from latefusion.models.student.entry_fit import installed

EXAMPLES = 6  # samples whose maps are kept


@dataclass
class Measurer:
    """Measures on all batches, each encoded once if it fits into memory; what the ledger holds is not measured again.

    Args:
        groups: the batches.
        plan: what each leaves out, and the prefills it takes.
        advance: called with the prefills that a step took.
    """

    model: PreTrainedModel
    attachment: Attachment
    groups: Sequence[Group]
    ledger: Ledger
    plan: Plan
    advance: Callable[[float], None] = lambda prefills: None

    def __post_init__(self) -> None:
        self.layers = len(self.attachment.layers)
        self._batches: dict[int, Batch] = {}
        self._room = HELD
        self._dense: dict[int, Answers] = {}
        self._average: AverageImage | None = None

    def looks(self) -> list[dict[str, Any]]:
        """What the dense model attends to and what its states say, of each sample (`looks.observe`)."""
        names = [f"looks / {i}" for i in range(len(self.groups))]
        if names[0] in self.ledger.values and any(name not in self.ledger.values for name in names):
            self._observe(0)  # its average image is what the other batches are compared with
        return self._gathered("looks", self._observe, [1.0] * len(self.groups))["samples"]

    def knock_outs(self) -> dict[str, Any]:
        """`kl` and `right` of each sample under each knock-out `KIND LAYER`, and under `dense`.

        None for the samples of a batch that leaves a kind out.
        """
        keys = knock_outs(self.layers)

        def measure(i: int) -> dict[str, Any]:
            runner = self._runner(i)
            dense, changed = effects(runner, [key for key in keys if key[0] not in self.plan.left_out[i]])
            nothing = {"kl": [None] * runner.batch.size, "right": [None] * runner.batch.size}
            named = {
                f"{key[0]} {key[1]}": asdict(changed[key]) if key in changed else nothing for key in keys
            }
            return {"dense": asdict(dense), **named}

        return self._gathered("knock-outs", measure, self.plan.knock_outs)

    def bands(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """`kl` and `right` of each sample if text sees vision only in the layers [a, b), for each band `a b`."""

        def measure(i: int) -> dict[str, Any]:
            return {f"{a} {b}": asdict(effect) for (a, b), effect in band_effects(self._runner(i), pairs)}

        return self._gathered(f"bands {list(pairs)}", measure, self.plan.bands)

    def reading(self, sets: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
        """`kl` and `right` of each sample if text sees vision only in these layers, for each set of them."""

        def measure(i: int) -> dict[str, Any]:
            return {str(read): asdict(effect) for read, effect in reading_effects(self._runner(i), sets)}

        cost = [reading_prefills(len(sets))] * len(self.groups)
        effects = self._gathered(f"reading {list(sets)}", measure, cost)
        return [effects[str(read)] for read in sets]

    def schedule(
        self, schedule: VisionSchedule, entry: CalibratedEntry | None, flops: float
    ) -> tuple[list[float], list[bool]]:
        """KL and correctness of each sample under a schedule, carried out as in use.

        Args:
            flops: of the schedule in parts of a dense prefill, for the progress bar.
        """

        def measure(i: int) -> dict[str, Any]:
            runner = self._runner(i)
            dense = self._dense_answers(i, runner)
            with installed(self.model, entry) if entry is not None else nullcontext():
                return asdict(dense.effect(runner.answers(schedule)))

        name = f"schedule {schedule.to_dict()} {'calibrated' if entry is not None else 'raw'}"
        effect = self._gathered(name, measure, [flops] * len(self.groups))
        return effect["kl"], effect["right"]

    def kept(self, schedule: VisionSchedule, entry: CalibratedEntry | None) -> list[list[Any] | None]:
        """`[first layer, vision tokens]` of each segment of the schedule, of the first few samples; None for others."""

        def measure(i: int) -> dict[str, Any]:
            numbers = self.groups[i].numbers
            if all(number >= EXAMPLES for number in numbers):
                return {"kept": [None] * len(numbers)}
            runner = self._runner(i)
            with installed(self.model, entry) if entry is not None else nullcontext():
                runner.answers(schedule)
            trace, vision = self.attachment.last, runner.batch.vision
            segments = trace.selections if isinstance(trace, PrefillTrace) else []
            return {
                "kept": [
                    None
                    if number >= EXAMPLES
                    else [
                        [layer, selection.vision[b][vision[b]].nonzero().flatten().tolist()]
                        for layer, selection in segments
                    ]
                    for b, number in enumerate(numbers)
                ]
            }

        name = f"kept {schedule.to_dict()} {'calibrated' if entry is not None else 'raw'}"
        return self._gathered(name, measure, [0.0] * len(self.groups))["kept"]

    def _observe(self, i: int) -> dict[str, Any]:
        with_maps = [number < EXAMPLES for number in self.groups[i].numbers]
        samples, self._average = observe(self._runner(i), with_maps, self._average)
        return {"samples": samples}

    def _gathered(
        self, name: str, measure: Callable[[int], dict[str, Any]], prefills: Sequence[float]
    ) -> dict[str, Any]:
        """What `measure` says of every batch, each list joined over batches and in the order of the samples.

        Args:
            measure: from the number of a batch to (a tree of) lists over its samples.
            prefills: a sample of each batch.
        """
        parts = []
        for i, (group, share) in enumerate(zip(self.groups, prefills, strict=True)):
            parts.append(self.ledger.get(f"{name} / {i}", lambda i=i: measure(i)))
            self.advance(share * len(group.numbers))
        order = np.argsort([number for group in self.groups for number in group.numbers])

        def joined(values: list[Any]) -> Any:
            if isinstance(values[0], dict):
                return {key: joined([value[key] for value in values]) for key in values[0]}
            flat = [item for value in values for item in value]
            return [flat[i] for i in order]

        return joined(parts)

    def _runner(self, i: int) -> Runner:
        batch = self._batches.get(i)
        if batch is None:
            batch = self.groups[i].make()
            if batch.bytes <= self._room:
                self._batches[i] = batch
                self._room -= batch.bytes
        return Runner(self.model, self.attachment, batch)

    def _dense_answers(self, i: int, runner: Runner) -> Answers:
        if not self.plan.hold and i not in self._dense:
            self._dense.clear()
        if i not in self._dense:
            self._dense[i] = runner.answers(VisionSchedule()).to("cpu")
        return self._dense[i].to(runner.batch.labels.device)
