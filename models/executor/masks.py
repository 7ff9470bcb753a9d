"""Attention masks in compact coordinates, translated from those that the stock model prepared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PretrainedConfig
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.utils.generic import is_flash_attention_requested

from latefusion.models.executor.cache import Keys
from latefusion.models.executor.segment import Segment

Mask = Tensor | BlockMask | None


class _Lengths:
    """The lengths that `create_causal_mask` asks a cache for."""

    is_compileable = False

    def __init__(self, past: int):
        self.past = past

    def get_query_offset(self, layer_idx: int) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.past + query_length, 0


def attention_window(config: PretrainedConfig) -> int | None:
    """Tokens that the decoder's local attention layers look back, None if every layer sees everything."""
    text = config.get_text_config()
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((w for w in windows if w is not None), default=None)


def narrows(config: PretrainedConfig) -> bool:
    """Whether attention over frozen tokens runs on the text rows alone: flash attention's causal order needs all."""
    return not is_flash_attention_requested(config)


def segment_mask(
    mask: Mask,
    segment: Segment,
    keys: Keys,
    hidden_states: Tensor,
    *,
    config: PretrainedConfig,
    length: int,
    past: int,
    plain: bool,
    causal: bool,
) -> Mask:
    """The mask that one layer of a segment is handed.

    Args:
        mask: what the stock model hands the layer.
        segment: whose rows the layer computes.
        keys: what its attention will see.
        hidden_states: `[B, n, D]`, for batch, dtype and device.
        config: of the decoder.
        length: T, the forward's tokens.
        past: tokens before this forward.
        plain: the stock mask holds nothing but causal order and padding.
        causal: what the layer's attention takes None for; if not, None lets every token see every other.
    """
    if keys.complete and segment.layout is None:
        return mask  # no token is missing
    reading = segment.text is not None and narrows(config)
    plain = plain and segment.layout is not None and causal
    if not reading and needs_no_mask(mask, padded=keys.padded, plain=plain, config=config):
        return None

    def make() -> Mask:
        batch, device = hidden_states.shape[0], hidden_states.device
        columns = keys.columns(batch, device)  # [B, K]
        if reading and mask is None:
            first = past - keys.offset  # column of this forward's first token
            return reading_mask(segment.text_index() + first, columns, causal=causal)
        if reading:
            rows = segment.text_index()
        else:
            rows = rows_of(segment, batch, length, device)
        return compact_mask(mask, hidden_states, rows, columns, causal=causal, config=config)

    return segment.once("mask", (mask, keys.track), make, keys.number, keys.offset)


def rows_of(segment: Segment, batch: int, length: int, device: torch.device) -> Tensor:
    """Which of the forward's tokens the segment computes, int64 `[B, n]`."""
    if segment.layout is None:
        return torch.arange(length, device=device).expand(batch, -1)
    return segment.layout.index


def shared_mask(
    mask: Mask,
    segment: Segment,
    keys: Keys,
    hidden_states: Tensor,
    *,
    config: PretrainedConfig,
    length: int,
    past: int,
    causal: bool,
) -> Mask:
    """The mask of a layer whose keys are another's, which may have computed other tokens than its segment.

    Args:
        keys: what the layer before has stored; the others are those of `segment_mask`.
    """
    if keys.complete and segment.layout is None:
        return mask  # no token is missing

    def make() -> Mask:
        batch, device = hidden_states.shape[0], hidden_states.device
        columns, rows = keys.columns(batch, device), rows_of(segment, batch, length, device)
        if mask is None:
            return reading_mask(rows + past - keys.offset, columns, causal=causal)
        return compact_mask(mask, hidden_states, rows, columns, causal=causal, config=config)

    return segment.once("shared mask", (mask, keys.track), make, keys.number, keys.offset)


def needs_no_mask(mask: Mask, *, padded: bool, plain: bool, config: PretrainedConfig) -> bool:
    """Whether a segment can do without a mask.

    Order survives compaction. So where the stock model left the mask to the kernel (`is_causal`), so do we,
    unless samples hold different numbers of tokens (`padded`); and where its mask is causal but for padding
    (`plain`), which compaction drops, none is left.
    """
    if padded or isinstance(mask, BlockMask):
        return False
    return mask is None or (plain and config._attn_implementation != "eager")


def compact_mask(
    mask: Mask,
    hidden_states: Tensor,
    query_index: Tensor,
    key_index: Tensor,
    *,
    causal: bool,
    config: PretrainedConfig,
) -> Mask:
    """The stock mask's cells for some queries and keys.

    Args:
        mask: what the stock model hands the layer: None, bool or additive `[B|1, H|1, T, L]`, bool `[B, L]`
            (flash attention) or a `BlockMask`.
        hidden_states: `[B, n, D]`, for batch, dtype and device.
        query_index: int64 `[B, n]`, the rows of `mask` to use.
        key_index: int64 `[B, K]`, its columns; negative: not to be seen.
        causal: what the layer's attention takes None for; if not, None lets every token see every other.
        config: of the decoder.
    """
    seen = key_index >= 0  # [B, K]
    columns = key_index.clamp(min=0)
    if isinstance(mask, BlockMask):
        return _compact_block_mask(mask, query_index, columns, seen)
    if mask is None:
        if is_flash_attention_requested(config):
            return seen
        lengths: Any = _Lengths(key_index.shape[1] - query_index.shape[1])
        common: dict[str, Any] = {"config": config, "inputs_embeds": hidden_states, "attention_mask": seen}
        # skipping the mask would take a look at the device
        if causal:
            return create_causal_mask(
                **common, past_key_values=lengths, layer_idx=0, allow_is_causal_skip=False
            )
        return create_bidirectional_mask(**common, past_key_values=lengths, allow_is_bidirectional_skip=False)
    if mask.dim() == 2:
        return mask.gather(1, columns) & seen
    batch, n = query_index.shape
    rows = mask.expand(batch, *mask.shape[1:]).gather(
        2, query_index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    )  # [B, H|1, n, L]
    cells = rows.gather(3, columns[:, None, None, :].expand(-1, mask.shape[1], n, -1))  # [B, H|1, n, K]
    hidden = ~seen[:, None, None, :]
    return cells.masked_fill(hidden, False if cells.dtype == torch.bool else torch.finfo(cells.dtype).min)


def reading_mask(query_index: Tensor, key_index: Tensor, *, causal: bool) -> Tensor:
    """A mask for some rows of a segment, where the stock model has none: bool `[B, 1, n, K]`.

    Args:
        query_index: int64 `[B, n]`, positions of the rows.
        key_index: int64 `[B, K]`, positions of the keys; negative: not to be seen.
        causal: no row sees a key after it.
    """
    seen = (key_index >= 0)[:, None, None, :]
    if not causal:
        return seen.expand(-1, -1, query_index.shape[1], -1)
    return seen & (key_index[:, None, None, :] <= query_index[:, None, :, None])


def _compact_block_mask(mask: BlockMask, query_index: Tensor, columns: Tensor, seen: Tensor) -> BlockMask:
    stock = mask.mask_mod

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return stock(b, h, query_index[b, q], columns[b, k]) & seen[b, k]

    (batch, queries), keys = query_index.shape, columns.shape[1]
    return create_block_mask(
        mask_mod, B=batch, H=None, Q_LEN=queries, KV_LEN=keys, device=str(query_index.device)
    )
