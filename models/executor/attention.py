"""Shows a policy the attention of the layers it watches, whatever implementation computes it.

transformers' attention modules ask `AttentionInterface.get_interface` for the function that attends.
`let_modules_watch` extends it once a process, for good: the function then looks whether its module carries a watcher
(`WATCHER`), which is called in its place. Nothing process-wide changes from one forward to the next, so threads and
interrupted forwards cannot disturb each other, nor a model that has no policy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from latefusion.models.executor.masks import Mask
from latefusion.models.executor.packed import Attended, Samples
from latefusion.models.policies.base import AttentionCall, Decision, LooksAhead
from latefusion.models.policies.reading import in_float32

Attention = Callable[..., tuple[Tensor, Any]]

WATCHER = "_latefusion_watcher"
"""Attribute of an attention module: `(stock attention, module, query, key, value, mask, **kwargs)` -> its result, where
it is `awake`."""

_LOCK = threading.Lock()


def let_modules_watch() -> None:
    """Let every attention module have a watcher; a second call changes nothing."""
    with _LOCK:
        stock = AttentionInterface.get_interface
        if hasattr(stock, WATCHER):
            return

        @wraps(stock)
        def get_interface(
            self: AttentionInterface, attn_implementation: str, default: Attention
        ) -> Attention:
            return partial(_attend, stock(self, attn_implementation, default))

        setattr(get_interface, WATCHER, True)
        AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]


def _attend(attention: Attention, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    watcher = vars(module).get(WATCHER)
    if watcher is None or not watcher.awake:
        return attention(module, *args, **kwargs)
    return watcher(attention, module, *args, **kwargs)


class Watch:
    """Calls a decision's `attended` for one forward.

    Args:
        decision: whose `watch` names the layers.
        plain: masks hold nothing but causal order and padding.
        replayed: whether the backward pass computes the layers a second time (gradient checkpointing).
        samples: of a row, if it holds several; the decision then sees each in a row of its own.

    Attributes:
        looks_ahead: the layers that the decision looks at before they run (`LooksAhead`).
    """

    def __init__(self, *, decision: Decision, plain: bool, replayed: bool, samples: Samples | None = None):
        self.decision, self.plain, self.replayed, self.samples = decision, plain, replayed, samples
        self.looks_ahead: Collection[int] = getattr(decision, "ahead", ())  # isinstance would take 30 us
        self._attended: tuple[Tensor, Tensor, Attended] | None = (
            None  # of a segment: its indices, and their samples
        )
        self._due: tuple[int, nn.Module] | None = None  # the running layer, until its attention was seen
        self._ahead: int | None = None  # the layer that is looked at before it runs
        self._unseen = _Unseen()

    @contextmanager
    def ahead(self, layer: int) -> Iterator[None]:
        """Context in which the layer runs only up to its attention, which the decision looks at (`LooksAhead`).

        Raises:
            ValueError: the layer's attention did not pass here.
        """
        self._ahead = layer
        try:
            yield
        except _Looked:
            return
        finally:
            self._ahead = None
        raise ValueError(
            f"the policy looks at the attention of layer {layer}, which does not attend through transformers' "
            "attention interface (or is compiled): use a VisionSchedule without keep, or the model as it is."
        )

    def enter(self, layer: int, attention: nn.Module) -> None:
        """Before each layer, after `check`."""
        if layer in self.decision.watch:
            if not hasattr(attention, WATCHER):
                raise ValueError(
                    f"the policy looks at the attention of layer {layer}, but {type(attention).__name__} runs a "
                    "recurrence: let it look at layers that attend with a softmax (`Prompt.attention`)."
                )
            self._due = layer, attention

    def check(self) -> None:
        """Raise ValueError if the attention of the layer before was to be seen, but was not."""
        if self._due is not None:
            layer, attention = self._due
            raise ValueError(
                f"the policy looks at the attention of layer {layer}, but {type(attention).__name__} does not attend "
                "through transformers' attention interface (or is compiled): use a VisionSchedule without keep, or the "
                "model as it is."
            )

    def sees(self, layer: int) -> bool:
        """Whether the decision waits for the attention of this layer, which is running."""
        return self._ahead == layer or (self._due is not None and self._due[0] == layer)

    def attend(
        self,
        layer: int,
        indices: Callable[[int], tuple[Tensor, Tensor]],
        attention: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Mask = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """The attention of a layer that the decision `sees`, which may replace its output.

        Args:
            indices: number of keys -> `(query_index, key_index)` of the running layer, as in `AttentionCall`.
            attention: the stock function; what follows are its arguments.
        """
        mask, ahead = attention_mask, self._ahead == layer
        if not ahead:
            self._due = None
        query_index, key_index = indices(key.shape[2])
        rows_of_batch, samples = (query, key, value, mask), None
        if self.samples is not None:
            samples = self._samples_of(query_index, key_index)
            query, key, value, mask = samples.split(query, key, value, mask)
            query_index, key_index = samples.query_index, samples.key_index
        few = _Rows(module, query, key, mask, kwargs, self._unseen)
        weights: Any = None  # of the attention, where the implementation gives them

        def run(value: Tensor, rows: Tensor | int | None) -> Tensor:
            nonlocal weights
            if isinstance(rows, Tensor):
                return few.output(value, rows)
            if rows is not None and self._can_be_cut(few, module):
                seen = None if mask is None else mask[:, :, :rows, :rows]
                first = (states[:, :, :rows] for states in (query, key, value))
                return attention(module, *first, seen, **kwargs)[0]
            output, weights = attention(module, query, key, value, mask, **kwargs)
            return output if rows is None else output[:, :rows]

        call = AttentionCall(
            query=query,
            key=key,
            value=value,
            query_index=query_index,
            key_index=key_index,
            scaling=few.scaling,
            run=run,
            weights=few.weights,
            scores=few.scores,
            plain=samples is None and few.softcap is None and (self.plain or mask is None),
        )
        if ahead:
            assert isinstance(self.decision, LooksAhead)
            self.decision.looked(layer, call)
            raise _Looked
        replaced = self.decision.attended(layer, call)
        if replaced is None and samples is not None:
            return attention(module, *rows_of_batch, **kwargs)
        if replaced is None:
            return call.output, weights
        if self.replayed:
            raise ValueError(
                f"the policy replaces the attention output of layer {layer}, which gradient checkpointing "
                "cannot repeat: run it under torch.no_grad() or turn checkpointing off."
            )
        return replaced if samples is None else samples.join(replaced), weights

    def _samples_of(self, query_index: Tensor, key_index: Tensor) -> Attended:
        """The samples among a layer's queries and keys, made once for a segment, whose indices are the same objects."""
        before = self._attended
        if before is None or before[0] is not query_index or before[1] is not key_index:
            assert self.samples is not None
            self._attended = query_index, key_index, Attended(self.samples, query_index, key_index)
        assert self._attended is not None
        return self._attended[2]

    def _can_be_cut(self, rows: _Rows, module: Any) -> bool:
        """Whether the first query rows can be computed without the keys after them."""
        if module.config._attn_implementation != "sdpa" or rows.query.shape[2] != rows.key.shape[2]:
            return False
        return rows.causal if rows.mask is None else self.plain and isinstance(rows.mask, Tensor)


class _Looked(Exception):
    """Ends a layer that was only to be looked at."""


class _Unseen:
    """What the last few rows that were scored did not see: layers of one segment score the same rows under one mask.

    Masks, rows and keys are compared by identity, while this holds them.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, Tensor] | None = None

    def once(self, sources: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """`make()`, or what it gave for the same sources."""
        if self._last is None or not _same(self._last[0], sources):
            self._last = sources, make()
        return self._last[1]


def _same(sources: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return all(a is b or (isinstance(a, tuple) and a == b) for a, b in zip(sources, others, strict=True))


class _Rows:
    """A few query rows of one attention call."""

    def __init__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Mask,
        kwargs: Mapping[str, Any],
        unseen: _Unseen | None = None,
    ):
        self.query, self.key, self.mask, self.unseen = query, key, mask, unseen or _Unseen()
        scaling, causal = kwargs.get("scaling"), kwargs.get("is_causal")
        self.scaling: float = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        self.softcap: float | None = kwargs.get("softcap")
        self.sinks: Tensor | None = kwargs.get("s_aux")  # [H], scores of a key that holds nothing

    @torch.no_grad()
    def weights(self, index: Tensor) -> Tensor:
        """Attention probabilities of the rows `index` int64 `[B, R]`, float32 `[B, H, R, K]`."""
        return self._weights(index)

    def output(self, value: Tensor, index: Tensor) -> Tensor:
        """Attention output of the rows `index` with other values, `[B, R, H, D]`."""
        if self.softcap is None and self.sinks is None:
            mask, query = self._mask(index), self._query(index)
            grouped = self.query.shape[1] != self.key.shape[1]
            out = scaled_dot_product_attention(
                query, self.key, value, attn_mask=mask, scale=self.scaling, enable_gqa=grouped
            )
        else:
            weights = self._weights(index).unflatten(1, (value.shape[1], -1))  # [B, Hkv, G, R, K]
            out = (weights @ value.float()[:, :, None]).flatten(1, 2).to(value.dtype)
        return out.transpose(1, 2)

    def _query(self, index: Tensor) -> Tensor:
        heads, dim = self.query.shape[1], self.query.shape[3]
        return self.query.gather(2, index[:, None, :, None].expand(-1, heads, -1, dim))  # [B, H, R, D]

    @torch.no_grad()
    def scores(self, index: Tensor, keys: Tensor) -> Tensor:
        """Scores of the rows `index` before their softmax, at the `keys` int64 `[B, n]`, float32 `[B, H, R, n]`."""
        (batch, _, length, dim), n = self.key.shape, keys.shape[1]
        if batch == 1:
            chosen = self.key.index_select(2, keys[0])  # [1, Hkv, n, D]
        else:  # gather is ten times slower
            start = torch.arange(0, batch * length, length, device=keys.device)
            rows = self.key.transpose(1, 2).flatten(0, 1)  # [B * K, Hkv, D]
            chosen = rows.index_select(0, (keys + start[:, None]).flatten()).view(batch, n, -1, dim)
            chosen = chosen.transpose(1, 2)
        return self._scores(index, chosen, keys)

    def _weights(self, index: Tensor) -> Tensor:
        scores = self._scores(index, self.key, None)
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]

    def _scores(self, index: Tensor, key: Tensor, keys: Tensor | None) -> Tensor:
        query = self._query(index).float() * self.scaling  # [B, H, R, D]
        grouped = query.view(len(query), key.shape[1], -1, query.shape[3])  # [B, Hkv, G * R, D]
        with in_float32(query.device.type):
            scores = (grouped @ key.float().mT).view(*query.shape[:3], -1)  # [B, H, R, n]
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        shape = (self.query.shape[2], self.key.shape[2], self.causal)
        hidden = self.unseen.once((self.mask, index, keys, shape), lambda: self._hidden(index, keys))
        if hidden.dtype == torch.bool:
            return scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
        return scores.add_(hidden)

    def _hidden(self, index: Tensor, keys: Tensor | None) -> Tensor:
        """What these rows do not see (bool), or what is added to scores for it, `[B, H|1, R, n]`."""
        mask = self._mask(index, keys)
        return ~mask if mask.dtype == torch.bool else mask

    def _mask(self, index: Tensor, keys: Tensor | None = None) -> Tensor:
        """What these rows see of the keys `keys` `[B, n]` (None: all): bool or additive, `[B, H|1, R, n]`."""
        mask, first = self.mask, self.key.shape[2] - self.query.shape[2]
        column = (
            torch.arange(self.key.shape[2], device=index.device)[None] if keys is None else keys
        )  # [B|1, n]
        if isinstance(mask, BlockMask):
            sample = torch.arange(index.shape[0], device=index.device)[:, None, None]
            head = torch.zeros_like(sample)
            seen = mask.mask_mod(sample, head, index[:, :, None], column[:, None])
            return seen.expand(-1, -1, column.shape[1])[:, None]
        if mask is not None and mask.dim() == 4:
            mask = mask.expand(index.shape[0], *mask.shape[1:])
            mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            return mask if keys is None else mask.gather(3, keys[:, None, None].expand(*mask.shape[:3], -1))
        seen = column[:, None] <= index[:, :, None] + first  # [B, R, n]
        if not self.causal:
            seen = torch.ones_like(seen)
        if mask is not None:
            mask = mask.bool() if keys is None else mask.bool().gather(1, keys)
            seen = seen & mask[:, None]
        return seen[:, None]
