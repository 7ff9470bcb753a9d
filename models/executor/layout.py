"""`Layout`: which of a forward's tokens a run of layers computes; rows from full to compact and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def looking_is_free(tensor: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens of one segment: order kept, right-aligned, a row with fewer tokens padded on the left.

    Attributes:
        index: int64 `[B, n]`, position of each compact token among the forward's `length` tokens. Padding
            columns point at tokens that are not part of the segment, so a row never names a token twice.
        valid: bool `[B, n]`, false for padding; None: no row is padded.
        rows: int64 `[B * n]`, the same positions counted over the flattened batch.
        length: T, the forward's tokens.
        counts: of each sample, its tokens in the segment.
    """

    index: Tensor
    valid: Tensor | None
    rows: Tensor
    length: int
    counts: tuple[int, ...]

    @classmethod
    def build(cls, active: Tensor, counts: Sequence[int]) -> Layout:
        """Lay out the tokens `active` (bool `[B, T]`), `counts` of them per sample, without a host sync."""
        batch, length = active.shape
        n = max(1, *counts)  # kernels want at least one column
        if batch == 1 and counts[0] and looking_is_free(active):  # half the time of a sort
            rows = active[0].nonzero().view(n)
            return cls(rows[None], None, rows, length, tuple(counts))
        index = torch.argsort(active.to(torch.int8), dim=1, stable=True)[:, length - n :]  # [B, n]
        valid = None if min(counts) == n else active.gather(1, index)
        start = torch.arange(0, batch * length, length, device=index.device)[:, None]  # [B, 1]
        return cls(index, valid, (index + start).flatten(), length, tuple(counts))

    def take(self, full: Tensor) -> Tensor:
        """`[..., B, T, D]` (or one row `[..., 1, T, D]` for all samples) -> `[..., B, n, D]`."""
        rows = self.rows if full.shape[-3] == self.index.shape[0] else self.index.flatten()
        taken = full.flatten(-3, -2).index_select(-2, rows)  # [..., B * n, D]
        return taken.view(*taken.shape[:-2], *self.index.shape, taken.shape[-1])

    def put(self, full: Tensor, compact: Tensor) -> Tensor:
        """A copy of `full` `[..., B, T, D]` in which the segment's rows are `compact` `[..., B, n, D]`."""
        full = full.to(compact.dtype)
        if self.valid is not None:
            compact = torch.where(self.valid[..., None], compact, self.take(full))
        rows = full.flatten(-3, -2).index_copy(-2, self.rows, compact.flatten(-3, -2))
        return rows.view(full.shape)

    def positions(self, offset: int) -> Tensor:
        """Logical positions after `offset` earlier tokens, -1 for padding, int64 `[B, n]`."""
        index = self.index + offset if offset else self.index
        return index if self.valid is None else torch.where(self.valid, index, -1)
