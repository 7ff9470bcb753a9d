"""What a prefill computed of what the dense model would: FLOPs, and attention that a vision token takes part in.

Counted as the pruning papers do, from the trace of a real run: nothing here assumes what a policy decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from latefusion.models.executor.trace import TraceRecord
from latefusion.models.flops import decoder_flops


@dataclass(frozen=True)
class Account:
    """Of one prompt, or the sum over several.

    Attributes:
        flops, dense_flops: of the decoder layers (`decoder_flops`).
        attention, dense_attention: pairs of a query and a key it may see (causal order), at least one of them a
            vision token, summed over layers: "vision-related attention".
        attention_after, dense_attention_after: the same in the layers after the last that computes all vision
            tokens (for VisiPruner: after the fusion layer).
        vision, dense_vision: vision tokens, summed over layers.
    """

    flops: int
    dense_flops: int
    attention: int
    dense_attention: int
    attention_after: int
    dense_attention_after: int
    vision: int
    dense_vision: int

    @property
    def flops_saved(self) -> float:
        """Share of the decoder's FLOPs."""
        return 1 - self.flops / self.dense_flops

    @property
    def attention_saved(self) -> float:
        """Share of the vision-related attention; 0 without vision tokens."""
        return 1 - self.attention / self.dense_attention if self.dense_attention else 0.0

    @property
    def attention_saved_after(self) -> float:
        """The same share in the layers after the last that computes all vision tokens; 0 if there are none."""
        return 1 - self.attention_after / self.dense_attention_after if self.dense_attention_after else 0.0


def account(config: PretrainedConfig, records: Iterable[TraceRecord]) -> Account:
    """What the prompts of these records cost and would have cost, all together."""
    totals = [0] * 8
    for record in records:
        n_text, n_vision = record.tokens[0] - record.vision[0], record.n_vision
        every = [n_vision] * len(record.tokens)
        full = [layer for layer, n in enumerate(record.vision) if n == n_vision]
        after = slice(full[-1] + 1 if full else 0, None)
        row = (
            decoder_flops(config, record.tokens, record.frozen),
            decoder_flops(config, [n_text + n for n in every]),
            vision_pairs(n_text, record.vision, record.frozen, record.reads),
            vision_pairs(n_text, every),
            vision_pairs(n_text, record.vision[after], record.frozen[after], record.reads[after]),
            vision_pairs(n_text, every[after]),
            sum(record.vision),
            sum(every),
        )
        totals = [total + value for total, value in zip(totals, row, strict=True)]
    return Account(*totals)


def vision_pairs(
    n_text: int, vision: Sequence[int], frozen: Sequence[int] = (), reads: Sequence[int] = ()
) -> int:
    """Causal pairs with a vision token in them: all pairs but those of text alone, wherever the tokens stand.

    Args:
        frozen, reads: as in `TraceRecord`; frozen tokens are keys alone. Empty: there are none.
    """
    computed = [n - f for n, f in zip(vision, frozen or [0] * len(vision), strict=True)]
    return sum(pairs(n_text + n) - pairs(n_text) for n in computed) + sum(reads)


def pairs(n: int) -> int:
    """Pairs of a query and a key not after it, among n tokens."""
    return n * (n + 1) // 2
