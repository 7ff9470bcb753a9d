"""Finds a policy that brings back vision tokens which left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latefusion.models.policies.base import Prompt, Selection


def looking_is_free(tensor: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


class Returns:
    """Which vision tokens of a prefill were computed so far.

    On a CPU, where looking is free, every token is looked at; elsewhere the counts alone, which the host knows.
    """

    def __init__(self, prompt: Prompt):
        self.prompt = prompt
        self._looks = looking_is_free(prompt.vision)
        self._now = Selection(prompt.vision, prompt.n_vision)  # of the running segment
        self._computed = torch.zeros_like(prompt.vision)  # bool [B, T]
        self._most = [0] * len(prompt.n_vision)  # tokens that were computed in one segment

    def check(self, layer: int, selection: Selection, counts: Sequence[int]) -> None:
        """Before a segment starts at `layer`.

        Raises:
            ValueError: it has tokens that were computed and left.
        """
        now = self._now
        assert now.counts is not None
        if layer > 0 and not now.frozen:
            self._most = [max(pair) for pair in zip(self._most, now.counts, strict=True)]
            if self._looks:
                self._computed = self._computed | now.vision
        possible = [
            here + n - most
            for here, n, most in zip(now.counts, self.prompt.n_vision, self._most, strict=True)
        ]
        wrong = [b for b, (count, most) in enumerate(zip(counts, possible, strict=True)) if count > most]
        if self._looks and not wrong:
            back = selection.vision & self._computed & ~now.vision
            wrong = back.any(1).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"the policy brings vision tokens of sample {wrong[0]} back in layer {layer} that were computed "
                "and left before: select among those that still take part, or that never did."
            )
        self._now = Selection(selection.vision, tuple(counts), selection.frozen)
