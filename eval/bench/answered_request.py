"""A whole answered request at a given shape: processor, tower, prefill, answer; see `end_to_end.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from latefusion.eval.bench.phases import clock
from latefusion.eval.bench.training_run import Runs, Settings, band_of, published_work
from latefusion.eval.bench.whole_model import picture, question
from latefusion.models.attach import attach
from latefusion.models.base_model import twin
from latefusion.models.flops import head_flops
from latefusion.models.inputs import encode_images
from latefusion.models.policies.configured import schedule_of
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.save import merge_adapters

DENSE, PRUNED = "dense", "VisiPruner"
MERGED, ADAPTERS = "merged", "adapters"
REQUEST_PHASES = ("processor", "tower", "prefill", "decode")


@dataclass
class Answered:
    """Seconds of one request.

    Attributes:
        until: until as many tokens of the answer are there.
        processor, tower: of these alone, the tower measured by itself.
    """

    until: dict[int, float]
    processor: float
    tower: float

    def phases(self, tokens: int) -> dict[str, float]:
        """Where the time goes of an answer with as many tokens."""
        first = self.until[1]
        prefill = first - self.processor - self.tower
        return dict(
            zip(
                REQUEST_PHASES, (self.processor, self.tower, prefill, self.until[tokens] - first), strict=True
            )
        )


class Clock(BaseStreamer):
    """Times at which `generate` hands out tokens, which a GPU has finished by then; the first brings the prompt."""

    def __init__(self, device: str):
        self.device = device
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(clock(self.device))

    def end(self) -> None: ...


class Requests:
    """Requests to systems of one base, whose weights they share.

    Args:
        runs: which build the students.
        processor: of the base.
    """

    def __init__(self, runs: Runs, processor: Any):
        self.runs, self.processor = runs, processor
        self.systems: dict[str, Any] = {}

    def system(self, name: str, cell: Settings) -> Any:
        """A model that answers under the name's policy, built once."""
        if name not in self.systems:
            self.systems[name] = self._built(name, cell)
        return self.systems[name]

    def _built(self, name: str, cell: Settings) -> Any:
        if name == DENSE:
            return twin(self.runs.model)
        if name == PRUNED:
            model = twin(self.runs.model)
            attach(model, published_work(cell.shape.layers))
            return model
        recipe, _, how = name.partition(", ")
        student = self.runs.student(self.runs.configured(recipe, "", cell), cell.shape)
        if how == ADAPTERS:
            return student.model.eval()
        del self.runs.students[recipe, self.runs.configured(recipe, "", cell).teacher.value]
        model = merge_adapters(student).model
        attach(model, student.schedule)
        return model

    @torch.no_grad()
    def answer(self, name: str, cell: Settings, tokens: Sequence[int]) -> Answered:
        """One batch of requests, answered to the last of `tokens`."""
        model = self.system(name, cell).eval()
        pictures = [picture(i) for i in range(cell.batch)]
        texts = [
            self.processor.apply_chat_template(question(cell.text, i), add_generation_prompt=True)
            for i in range(cell.batch)
        ]
        streamer = Clock(cell.device)
        begun = clock(cell.device)
        inputs = self.processor(text=texts, images=pictures, return_tensors="pt", padding=True)
        inputs = inputs.to(cell.device, model.dtype)
        ready = clock(cell.device)
        most = max(tokens)
        model.generate(**inputs, min_new_tokens=most, max_new_tokens=most, do_sample=False, streamer=streamer)
        times = streamer.times[1:]
        until = {n: times[n - 1] - begun for n in tokens}
        before = clock(cell.device)
        encode_images(model, inputs)
        return Answered(until, ready - begun, clock(cell.device) - before)

    @torch.no_grad()
    def prefill(self, name: str, cell: Settings) -> Callable[[], Any]:
        """The prefill of a request, tower included, on inputs that are there; for the device's own time and memory."""
        model = self.system(name, cell).eval()
        texts = [
            self.processor.apply_chat_template(question(cell.text, i), add_generation_prompt=True)
            for i in range(cell.batch)
        ]
        inputs = self.processor(
            text=texts, images=[picture(i) for i in range(cell.batch)], return_tensors="pt", padding=True
        ).to(cell.device, model.dtype)

        def run() -> Any:
            with torch.no_grad():
                return model(**inputs, use_cache=True, logits_to_keep=1)

        return run

    def flops(self, name: str, cell: Settings) -> float:
        """FLOPs of a request to its first token: tower, entry adapter, decoder with ranking, head."""
        config, layers, vision = self.runs.model.config, cell.shape.layers, cell.shape.vision
        entry = 0.0
        if name == DENSE:
            schedule = VisionSchedule()
        elif name == PRUNED:
            schedule = band_of(published_work(layers))
        else:
            schedule = schedule_of(self.runs.configured(name.partition(", ")[0], "", cell).schedule)
            if schedule.enter:
                entry = 2 * vision * cell.shape.hidden * (cell.shape.hidden + 2 * 16)
        decoder = schedule.flops(config, cell.text, vision)
        return decoder + entry + head_flops(config, 1) + self.runs.tower_flops(cell.shape)
