"""What settings of VisiPruner do to one batch: prefills and passes that several settings have in common run once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from latefusion.data.prompt_batches import size
from latefusion.eval.thresholds import replay
from latefusion.eval.thresholds.replay import Batch, Outcome, Recorded, fusion_layers
from latefusion.eval.thresholds.settings import Arguments, Setting, policy_of, prefix
from latefusion.models.attach import Attachment


class Tried:
    """A batch and what is known of it so far.

    Args:
        make: the batch; called again where it was dropped and a pass needs it.

    Attributes:
        least: each layer's least cosine of a recorded prefill, by the layers under its shallow rule (0: dense).
        unpruned: the outcome of that prefill by itself.
        passes: outcomes of fusing in one layer with one threshold.
        held: bytes of the batch and its recorded prefills that are held; the rest of what is known is small.
    """

    def __init__(self, make: Callable[[], Batch], attachment: Attachment, arguments: Arguments):
        self.make, self.attachment, self.arguments = make, attachment, arguments
        self._batch: Batch | None = None
        self.least: dict[int, NDArray] = {}
        self.unpruned: dict[int, Outcome] = {}
        self.passes: dict[Any, Outcome] = {}
        self.prefills: dict[int, Recorded] = {}
        self.held = 0

    @property
    def batch(self) -> Batch:
        if self._batch is None:
            self._batch = self.make()
        return self._batch

    def recorded(self, shallow: int) -> Recorded:
        """The batch's prefill under the shallow rule of so many layers; 0: dense."""
        if shallow not in self.prefills:
            prefill = replay.record(self.batch, self.attachment, shallow, self.arguments.sink_rule)
            self.prefills[shallow] = prefill
            if shallow not in self.unpruned:  # judged by the trace of the prefill that ran last
                dense = prefill if shallow == 0 else self.prefills[0]
                self.unpruned[shallow] = replay.judge(
                    self.batch, self.attachment, prefill.logits, dense.logits
                )
                self.least[shallow] = prefill.least
        return self.prefills[shallow]

    def outcomes(self, settings: Sequence[Setting]) -> list[Outcome]:
        """Outcomes of these settings, in their order."""
        return [self._outcome(setting) for setting in settings]

    def hold(self, room: int) -> int:
        """Hold the batch and its prefills if they fit into so many bytes, else drop them; the bytes that they take."""
        parts = [(one.logits, one.states, one.norms) for one in self.prefills.values()]
        self.held = size(parts) + (0 if self._batch is None else size(self._batch.inputs))
        if self.held > room:
            self._batch, self.held = None, 0
            self.prefills.clear()
        return self.held

    def _outcome(self, setting: Setting) -> Outcome:
        shallow = prefix(setting)
        if shallow not in self.unpruned:
            self._both(shallow)
        fusion = fusion_layers(self.least[shallow], setting["boundary"], setting["layer_threshold"])
        outcome, last = self.unpruned[shallow], len(self.least[shallow]) - 1
        for layer in sorted({int(f) for f in fusion if f < last}):
            key = shallow, layer, setting["tokens_threshold"], "deep" in setting["stages"]
            if key not in self.passes:
                dense, prefill = self._both(shallow)
                policy = policy_of(setting, self.arguments)
                logits = replay.resume(self.batch, self.attachment, prefill, layer, policy)
                self.passes[key] = replay.judge(self.batch, self.attachment, logits, dense.logits)
            outcome = self.passes[key].where(fusion == layer, outcome)
        return outcome

    def _both(self, shallow: int) -> tuple[Recorded, Recorded]:
        """The dense prefill, which others are judged by, and that of a shallow rule."""
        return self.recorded(0), self.recorded(shallow)
