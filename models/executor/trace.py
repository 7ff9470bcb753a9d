"""Records what happened in the last prefill, and reads it out only when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from latefusion.models.policies.base import Decision, Prompt, Selection


@dataclass(frozen=True)
class TraceRecord:
    """One sample of the last prefill.

    Attributes:
        fusion_layer: the layer where the policy found fusion; None if it found none or does not look for it.
        kept: logical positions (in the padded row) of the vision tokens that were chosen to go on, ascending;
            None if nothing was chosen among them.
        exit_layer: first layer that no longer sees vision tokens; None if the last does or there are none.
        tokens: tokens that enter each layer, padding not counted.
        vision: the number of vision tokens among them.
        n_vision: the number of vision tokens in the prompt.
        frozen: the number of `vision` that are only read in each layer.
        reads: pairs of a text token and a frozen one before it, in each layer.
    """

    fusion_layer: int | None
    kept: list[int] | None
    exit_layer: int | None
    tokens: list[int]
    vision: list[int]
    n_vision: int
    frozen: list[int]
    reads: list[int]


@dataclass(frozen=True)
class TextTrace:
    """A prefill without vision tokens: `real` is false for padding, `[B, T]`."""

    real: Tensor
    num_layers: int

    def records(self) -> list[TraceRecord]:
        none = [0] * self.num_layers
        return [TraceRecord(None, None, None, tokens, none, 0, none, none) for tokens, _ in self.sizes()]

    def sizes(self) -> list[tuple[list[int], list[int]]]:
        """For each sample, the tokens that enter each layer and how many of them are only read."""
        none = [0] * self.num_layers
        return [([int(n)] * self.num_layers, none) for n in self.real.sum(1).tolist()]


@dataclass(frozen=True)
class PrefillTrace:
    """A prefill with vision tokens, its masks still on the device.

    Attributes:
        by_question: the policy looked at the model's attention, so what is left depends on the question.
    """

    prompt: Prompt
    decision: Decision | None
    selections: Sequence[tuple[int, Selection]]
    by_question: bool = False

    def records(self) -> list[TraceRecord]:
        layers = None if self.decision is None else self.decision.fusion_layer
        fusion = [None] * len(self.prompt.n_real) if layers is None else list(layers)
        return [self._record(sample, layer) for sample, layer in enumerate(fusion)]

    def sizes(self) -> list[tuple[list[int], list[int]]]:
        """For each sample, the tokens that enter each layer and how many of them are only read; known on the host."""
        sizes = []
        for sample, (real, total) in enumerate(zip(self.prompt.n_real, self.prompt.n_vision, strict=True)):
            runs = self._runs(sample)
            tokens = [real - total + count for count, _ in runs]
            sizes.append(
                (tokens, [count if selection and selection.frozen else 0 for count, selection in runs])
            )
        return sizes

    def _runs(self, sample: int) -> list[tuple[int, Selection | None]]:
        """Vision tokens of each layer, and the selection that set them."""
        starts = {
            layer: (selection.counts[sample], selection)
            for layer, selection in self.selections
            if selection.counts is not None
        }
        now: tuple[int, Selection | None] = self.prompt.n_vision[sample], None
        return [now := starts.get(layer, now) for layer in range(self.prompt.num_layers)]

    def _record(self, sample: int, fusion_layer: int | None) -> TraceRecord:
        total, layers = self.prompt.n_vision[sample], self.prompt.num_layers
        steps = [
            (layer, selection.counts[sample], selection)
            for layer, selection in self.selections
            if selection.counts is not None
        ]
        runs = self._runs(sample)
        vision = [count for count, _ in runs]
        seeing = [layer for layer, count in enumerate(vision) if count]
        exit_layer = seeing[-1] + 1 if seeing and seeing[-1] + 1 < layers else None
        text = self.prompt.n_real[sample] - total
        return TraceRecord(
            fusion_layer=fusion_layer,
            kept=self._kept(sample, steps, total, fusion_layer),
            exit_layer=exit_layer,
            tokens=[text + count for count in vision],
            vision=vision,
            n_vision=total,
            frozen=[count if selection and selection.frozen else 0 for count, selection in runs],
            reads=self._reads(sample, runs),
        )

    def _reads(self, sample: int, runs: list[tuple[int, Selection | None]]) -> list[int]:
        """Pairs of a text token and a frozen one before it, in each layer."""
        text = self.prompt.real[sample] & ~self.prompt.vision[sample]
        pairs = {
            layer: int(selection.vision[sample].cumsum(0)[text].sum())
            for layer, selection in self.selections
            if selection.frozen and selection.counts is not None
        }
        frozen = [selection is not None and selection.frozen for _, selection in runs]
        now = 0
        return [(now := pairs.get(layer, now)) if is_frozen else 0 for layer, is_frozen in enumerate(frozen)]

    def _kept(self, sample: int, steps: list, total: int, fusion_layer: int | None) -> list[int] | None:
        if fusion_layer is not None:
            steps = [step for step in steps if step[0] > fusion_layer]
            chosen = steps[0][2] if steps else None  # what went on from the fusion layer
        else:
            some = [selection for _, count, selection in steps if 0 < count < total]
            chosen = some[-1] if some else None
        return None if chosen is None else chosen.vision[sample].nonzero().flatten().tolist()
