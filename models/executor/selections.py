"""`Selections`: what a policy selected in one prefill, layer by layer; no token that was computed and left returns."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from latefusion.models.executor.layout import looking_is_free
from latefusion.models.policies.base import Prompt, Selection


class Selections:
    """The selections of one prefill so far.

    A token that was computed and left has an outdated state, so a policy may not bring it back. On a CPU, where looking
    is free, every token is checked; elsewhere only the counts, which the host knows.

    Attributes:
        steps: `(layer, selection)`, each with its counts.
        freezes: whether a selection had frozen tokens, or announced that later ones will.
    """

    def __init__(self, prompt: Prompt):
        self.prompt = prompt
        self.steps: list[tuple[int, Selection]] = []
        self.freezes = False
        self._looks = looking_is_free(prompt.vision)
        self._now = Selection(prompt.vision, prompt.n_vision)  # of the running segment
        self._computed: Tensor | None = None  # bool [B, T], None: no token yet
        self._most = [0] * len(prompt.n_vision)  # tokens that were computed in one segment

    def add(self, layer: int, selection: Selection) -> Selection:
        """The selection with its counts (a host sync if the policy does not know them), once it is checked.

        Raises:
            ValueError: it brings back a token that was computed and left.
        """
        if selection.counts is None:
            counts = (selection.vision & self.prompt.vision).sum(1).tolist()
            selection = replace(selection, counts=tuple(counts))
        self._check(layer, selection)
        self.steps.append((layer, selection))
        self.freezes = self.freezes or selection.frozen
        self._now = selection
        return selection

    def _check(self, layer: int, selection: Selection) -> None:
        now = self._now
        assert now.counts is not None and selection.counts is not None
        if layer > 0 and not now.frozen:
            self._most = [max(pair) for pair in zip(self._most, now.counts, strict=True)]
            if self._looks and any(now.counts):
                self._computed = now.vision if self._computed is None else self._computed | now.vision
        possible = [
            here + n - most
            for here, n, most in zip(now.counts, self.prompt.n_vision, self._most, strict=True)
        ]
        pairs = zip(selection.counts, possible, strict=True)
        wrong = [b for b, (count, most) in enumerate(pairs) if count > most]
        computed = None if self._computed is now.vision else self._computed  # those now have not left
        if computed is not None and not wrong and any(selection.counts):
            back = selection.vision & computed & ~now.vision
            wrong = back.any(1).nonzero().flatten().tolist() if back.any() else []
        if wrong:
            raise ValueError(
                f"the policy brings back vision tokens of sample {wrong[0]} in layer {layer} that were computed and "
                "left before: select among those that still take part, or that never did."
            )
