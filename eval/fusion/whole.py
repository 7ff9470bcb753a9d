"""Knock-outs by forwards over the whole prompt: any model, any prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from latefusion.eval.fusion.answers import Answers
from latefusion.eval.fusion.knockout import KnockOut, frozen
from latefusion.eval.fusion.paths import Key
from latefusion.models.executor.partial import input_of_layer, starting_at
from latefusion.models.policies.base import Policy
from latefusion.models.schedule import VisionSchedule

if TYPE_CHECKING:
    from latefusion.eval.fusion.causal import Runner


class Whole:
    """`paths.Way` for prompts with text between images, or where images see the text behind them (PaliGemma)."""

    def __init__(self, runner: Runner):
        self.runner, self.layers = runner, len(runner.layers)

    def part(self, hidden: Collection[int], first: int, state: Tensor | None, last: int) -> Tensor:
        return self._part(self._policy(hidden), first, state, last)

    def answers(self, hidden: Collection[int], first: int, state: Tensor | None) -> Answers:
        return self._answers(self._policy(hidden), first, state)

    def entering(self, wanted: Sequence[Key]) -> Iterator[tuple[Key, Answers]]:
        """Before layer a, `late a` is text alone and `frozen a` has its vision tokens as they came."""
        runner, n = self.runner, self.layers
        text: Tensor | None = None  # as the policy below has it: compact
        still: Tensor | None = None
        alone = VisionSchedule(enter=n - 1)
        stills = any(kind == "frozen" for kind, _ in wanted)
        for i in range(n):
            if ("late", i) in wanted:
                yield ("late", i), self._answers(VisionSchedule(enter=i), i, text)
            if ("frozen", i) in wanted:
                yield ("frozen", i), self.answers((), i, still)
            if i < n - 1:
                text = self._part(alone, i, text, i + 1)
                if stills:
                    with frozen(runner.layers[i : i + 1], runner.batch.vision):
                        still = self.part((), i, still, i + 1)

    def _policy(self, hidden: Collection[int]) -> Policy:
        if not hidden:
            return VisionSchedule()
        if min(hidden) > 0 and set(hidden) == set(range(min(hidden), self.layers)):
            return VisionSchedule(exit=min(hidden))  # what no text sees need not be computed
        return KnockOut(hidden)

    def _part(self, policy: Policy, first: int, state: Tensor | None, last: int) -> Tensor:
        layers: Any = self.runner.layers
        with starting_at(layers, first, state):
            return input_of_layer(layers, last, lambda: self.runner.answers(policy))

    def _answers(self, policy: Policy, first: int, state: Tensor | None) -> Answers:
        with starting_at(self.runner.layers, first, state):
            return self.runner.answers(policy)
