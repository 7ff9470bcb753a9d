"""VisiPruner's shallow rule: in the first layers, text does not look at vision (arXiv 2510.17205)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from latefusion.models.policies.base import AttentionCall, Prompt


class ShallowRule:
    """The rule for one prefill, as the same attention over other values: a zero value is a zeroed weight.

    It drops attention to vision tokens without renormalising the rest. Nothing may have been removed before, so
    that a row's number is its place in the prompt. Text at the end of all rows, the usual case, is computed once,
    since the layer's own kernel stops before it; elsewhere a few text rows are computed a second time.

    Args:
        prompt: whose `text` is ruled.
        sink_rule: what text may see of vision in layer 0, as `VisiPruner` has it.
    """

    def __init__(self, prompt: Prompt, sink_rule: str):
        self.prompt, self.sink_rule = prompt, sink_rule
        self._rows: tuple[Tensor, Tensor] | None = None  # text rows int64 [B, R], and which are no filling

    def __call__(self, layer: int, call: AttentionCall) -> Tensor:
        """The layer's attention output under the rule, `[B, N, H, D]`."""
        prompt, value = self.prompt, call.value
        earlier = value.shape[2] - prompt.vision.shape[1]  # keys of forwards before this one
        keys = pad(prompt.vision, (earlier, 0))[:, None, :, None]  # bool [B, 1, K, 1]
        hidden = value.masked_fill(keys, 0)  # [B, Hkv, K, D]
        if layer > 0:
            return self._join(call, self._others(call, value), hidden)
        if not any(prompt.n_answer):  # what stands before the first vision token has none to see
            return self._join(call, self._others(call, hidden), self._sink(keys, value))
        vision = prompt.vision[:, : call.query.shape[2] - prompt.tail, None, None]
        others = torch.where(vision, self._others(call, hidden), self._others(call, value))
        return self._join(call, others, self._sink(keys, value))

    def _others(self, call: AttentionCall, value: Tensor) -> Tensor:
        """The rows before the text at the end, `[B, N - tail, H, D]`."""
        return call.run(value, call.query.shape[2] - self.prompt.tail)

    def _sink(self, keys: Tensor, value: Tensor) -> Tensor:
        """What text reads in layer 0, `[B, Hkv, K, D]`."""
        if self.sink_rule == "half":
            rank, total = keys.cumsum(2), keys.sum(2, keepdim=True)
            return value.masked_fill(keys & (rank <= total // 2), 0)
        first = keys.int().argmax(2, keepdim=True)  # [B, 1, 1, 1]
        return torch.where(keys, value.gather(2, first.expand(-1, value.shape[1], -1, value.shape[3])), value)

    def _join(self, call: AttentionCall, others: Tensor, text_value: Tensor) -> Tensor:
        """All rows `[B, N, H, D]`: `others`, and the prompt's text reading `text_value`."""
        most, tail = max(self.prompt.n_text), self.prompt.tail
        if not most:
            return others
        if self._rows is None:
            ruled = self.prompt.text
            rows = ruled.int().argsort(dim=1, descending=True, stable=True)[:, :most]
            self._rows = rows, ruled.gather(1, rows)
        rows, valid = self._rows
        text = call.run(text_value, rows)  # [B, R, H, D]
        if most == tail:  # the last rows of every sample
            return torch.cat([others, text], 1)
        output = pad(others, (0, 0, 0, 0, 0, tail))
        index = rows[:, :, None, None].expand(-1, -1, *output.shape[2:])
        return output.scatter(1, index, torch.where(valid[:, :, None, None], text, output.gather(1, index)))
