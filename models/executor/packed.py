"""`Samples`: several samples side by side in a row; a policy sees each of them as if it had a row of its own.

The executor computes rows. A policy is asked about samples: its prompt, its selections and the attention that it looks
at have a sample in each row, `[S, L]`, padded on the right. `split` and `joined` lead from one to the other.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from latefusion.models.executor.masks import Mask
from latefusion.models.executor.prompt import PromptEnd, read_prompt
from latefusion.models.policies.base import Prompt, Selection


class Samples:
    """Which tokens of rows `[B, T]` belong to which sample.

    Args:
        number: int64 `[B, T]`, the sample of each token, counted from 0 over the whole batch; -1 for padding.
        total: S, if the number of samples is known.

    Attributes:
        valid: bool `[S, L]`, false behind a sample's last token.

    Raises:
        ValueError: the tokens of a sample do not stand side by side.
    """

    def __init__(self, number: Tensor, total: int | None = None):
        flat, device = number.flatten(), number.device
        self.number, self.width = number, number.shape[1]
        total = int(flat.max()) + 1 if total is None else total  # a host sync
        place = torch.arange(len(flat), device=device)
        bins = torch.where(flat < 0, total, flat)  # padding has one of its own
        counts = torch.zeros(total + 1, dtype=torch.long, device=device).index_add_(
            0, bins, bins.new_ones(len(bins))
        )
        first = torch.full_like(counts, len(flat)).scatter_reduce_(0, bins, place, "amin")
        last = torch.zeros_like(counts).scatter_reduce_(0, bins, place, "amax")
        apart = ((last - first + 1 != counts) & (counts > 0))[:total].any()
        most, broken = torch.stack([counts[:total].max(), apart.long()]).tolist()  # a host sync
        if broken:
            raise ValueError(
                "samples must name each sample's tokens side by side in one row, -1 for padding."
            )
        column = torch.arange(max(1, most), device=device)
        self.valid = column < counts[:total, None]  # bool [S, L]
        self.index = torch.where(
            self.valid, first[:total, None] + column, 0
        )  # int64 [S, L], into the flat rows
        within = place - first[bins]
        self._inverse = torch.where(
            flat < 0, 0, flat * len(column) + within
        )  # int64 [B * T], into the flat samples

    def split(self, values: Tensor) -> Tensor:
        """`[B, T, ...]` by sample, `[S, L, ...]`; behind a sample's end stands anything (of a bool: False)."""
        taken = values.flatten(0, 1).index_select(0, self.index.flatten()).unflatten(0, self.index.shape)
        return taken & self.valid if values.dtype == torch.bool else taken

    def join(self, values: Tensor, padding: Tensor) -> Tensor:
        """`[S, L, ...]` by row, with `padding` `[B, T, ...]` where no sample is."""
        taken = values.flatten(0, 1).index_select(0, self._inverse).unflatten(0, self.number.shape)
        real = (self.number >= 0).view(*self.number.shape, *[1] * (taken.dim() - 2))
        return torch.where(real, taken, padding)

    def joined(self, selection: Selection) -> Selection:
        """A selection of the samples' tokens as one of the rows' tokens."""
        nothing = torch.zeros_like(self.number, dtype=torch.bool)
        assert selection.counts is not None
        counts = [0] * len(self.number)
        for row, count in zip(self.rows, selection.counts, strict=True):
            counts[row] += count
        silent = None if selection.silent is None else self.join(selection.silent, nothing)
        return replace(
            selection, vision=self.join(selection.vision, nothing), counts=tuple(counts), silent=silent
        )

    def prompt(self, prompt: Prompt, end: PromptEnd) -> Prompt:
        """The prompt of rows as the policy sees it: each sample in a row of its own, padded on the right.

        Args:
            end: where the prompts end, in rows.

        Raises:
            ValueError: tokens came before this forward, or nothing says where prompts end.
        """
        if prompt.past or end.queries is None:
            raise ValueError(
                "samples packed into a row have to come in one forward, with attachment.queries(index, samples=...)."
            )
        answers = None if end.answers is None else self.split(end.answers.to(self.number.device))
        per_sample = read_prompt(
            self.split(prompt.vision),
            self.valid,
            past=0,
            end=PromptEnd(self.queries(end.queries.to(self.number.device)), answers),
            position_ids=None,
            num_layers=prompt.num_layers,
        )
        assert per_sample is not None  # the rows have vision tokens
        return per_sample

    @cached_property
    def row(self) -> Tensor:
        """The row of each sample, int64 `[S]`."""
        return self.index[:, 0] // self.width

    @cached_property
    def rows(self) -> list[int]:
        """`row` as a list, on the host."""
        return self.row.tolist()

    def queries(self, queries: Tensor) -> Tensor:
        """Queries `[B, Q]` of rows (negative: none) as each sample's own, `[S, Q]`, -1 where it has fewer."""
        number = torch.where(queries < 0, -1, self.number.gather(1, queries.clamp(min=0)))[self.row]  # [S, Q]
        fits = number == torch.arange(len(self.row), device=queries.device)[:, None]
        return torch.where(fits, queries[self.row] - self.start, -1)

    @cached_property
    def start(self) -> Tensor:
        """The column at which each sample begins, int64 `[S, 1]`."""
        return self.index[:, :1] % self.width


class Attended:
    """The samples of one layer's attention: queries `[B, N]` and keys `[B, K]` in compact order.

    Args:
        samples: of the full rows.
        query_index, key_index: as in `AttentionCall`, for rows.
    """

    def __init__(self, samples: Samples, query_index: Tensor, key_index: Tensor):
        total = len(samples.valid)
        self.of_queries = Samples(self._numbers(samples, query_index), total)
        self.of_keys = Samples(self._numbers(samples, key_index), total)
        self.query_index, self.key_index = (
            torch.where(part.valid, part.split(index) - samples.start, -1)
            for part, index in ((self.of_queries, query_index), (self.of_keys, key_index))
        )  # int64 [S, N'], [S, K']
        self._masks: tuple[object, Mask] | None = None

    @staticmethod
    def _numbers(samples: Samples, index: Tensor) -> Tensor:
        return torch.where(index < 0, -1, samples.number.gather(1, index.clamp(min=0)))

    def split(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor, Mask]:
        """A layer's states `[B, H, N, D]` and its mask by sample, `[S, H, N', D]`."""
        parts = ((query, self.of_queries), (key, self.of_keys), (value, self.of_keys))
        query, key, value = (part.split(states.transpose(1, 2)).transpose(1, 2) for states, part in parts)
        return query, key, value, self.mask(mask)

    def join(self, output: Tensor) -> Tensor:
        """The output of attention `[S, N', H, D]` by row, `[B, N, H, D]`, zero at padding."""
        shape = (*self.of_queries.number.shape, *output.shape[2:])
        return self.of_queries.join(output, output.new_zeros(()).expand(shape))

    def mask(self, mask: Mask) -> Mask:
        """A layer's mask for its rows as one for its samples; rows behind a sample's end see everything.

        None stays None: what stands on the right is behind all that a causal row sees.
        """
        if self._masks is None or self._masks[0] is not mask:
            self._masks = mask, self._mask(mask)
        return self._masks[1]

    def _mask(self, mask: Mask) -> Mask:
        if mask is None:
            return None
        queries, keys, row = self.of_queries, self.of_keys, self.of_keys.row
        query, key = queries.index % queries.width, keys.index % keys.width  # [S, N'], [S, K']
        if isinstance(mask, BlockMask):
            stock = mask.mask_mod

            def mask_mod(s: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return stock(row[s], h, query[s, q], key[s, k]) & keys.valid[s, k]

            n, k = query.shape[1], key.shape[1]
            return create_block_mask(mask_mod, B=len(row), H=None, Q_LEN=n, KV_LEN=k, device=str(row.device))
        if mask.dim() == 2:  # flash attention's: which keys are real
            return keys.valid
        mask = mask.expand(int(queries.number.shape[0]), *mask.shape[1:])
        cells = mask.permute(0, 2, 3, 1)[
            row[:, None, None], query[:, :, None], key[:, None, :]
        ]  # [S, N', K', H|1]
        seen = (keys.valid[:, None] | ~queries.valid[:, :, None])[..., None]
        free = ~queries.valid[:, :, None, None]
        if cells.dtype == torch.bool:
            cells = (cells & seen) | free
        else:
            cells = cells.masked_fill(~seen, torch.finfo(cells.dtype).min).masked_fill(free, 0)
        return cells.permute(0, 3, 1, 2)
