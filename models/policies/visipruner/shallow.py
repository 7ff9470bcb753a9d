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
        self._rows: tuple[Tensor, Tensor] | None = None  # of text, as `_first` gives them
        self._unruled: tuple[Tensor, Tensor] | None = None  # of text before the image and of answers

    def __call__(self, layer: int, call: AttentionCall) -> Tensor:
        """The layer's attention output under the rule, `[B, N, H, D]`."""
        prompt, value = self.prompt, call.value
        earlier = value.shape[2] - prompt.vision.shape[1]  # keys of forwards before this one
        keys = pad(prompt.vision, (earlier, 0))[:, None, :, None]  # bool [B, 1, K, 1]
        hidden = value.masked_fill(keys, 0)  # [B, Hkv, K, D]
        if layer > 0:
            return self._join(call, self._others(call, value), hidden)
        others = self._others(call, hidden)  # vision tokens, which read text alone
        if self._unruled is None:
            plain = (prompt.real & ~prompt.vision & ~prompt.text)[:, : others.shape[1]]
            self._unruled = _first(plain, self._most_unruled())
        rows, valid = self._unruled
        if rows.shape[1]:
            others = _put(others, rows, valid, call.run(value, rows))
        return self._join(call, others, self._sink(keys, value))

    def _most_unruled(self) -> int:
        prompt = self.prompt
        return max(
            real - vision - text if vision else 0  # a sample without vision has nothing hidden
            for real, vision, text in zip(prompt.n_real, prompt.n_vision, prompt.n_text, strict=True)
        )

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
            self._rows = _first(self.prompt.text, most)
        rows, valid = self._rows
        text = call.run(text_value, rows)  # [B, R, H, D]
        if most == tail:  # the last rows of every sample
            return torch.cat([others, text], 1)
        return _put(pad(others, (0, 0, 0, 0, 0, tail)), rows, valid, text)


def _first(mask: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first `most` rows of a mask `[B, N]` in each sample, int64 `[B, R]`, and which of them are not filling."""
    rows = mask.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return rows, mask.gather(1, rows)


def _put(output: Tensor, rows: Tensor, valid: Tensor, new: Tensor) -> Tensor:
    """`output` `[B, N, H, D]` with `new` `[B, R, H, D]` in its rows."""
    index = rows[:, :, None, None].expand(-1, -1, *output.shape[2:])
    return output.scatter(1, index, torch.where(valid[:, :, None, None], new, output.gather(1, index)))
