"""Shows a policy the attention of the layers it watches, whatever implementation computes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from latefusion.models.policies.base import AttentionCall, Decision

Mask = Tensor | BlockMask | None


class StandIn:
    """`attend` in place of an attention implementation, until `remove`.

    Args:
        implementation: its name ("sdpa", "eager", ...).
        attend: called as the implementation is.
    """

    def __init__(self, implementation: str, attend: Callable[..., tuple[Tensor, Any]]):
        self.implementation = implementation
        # eager attention is not registered: each model file has its own
        self._stock = ALL_ATTENTION_FUNCTIONS.get(implementation)
        ALL_ATTENTION_FUNCTIONS[implementation] = attend

    def stock(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """What this stands in for."""
        attention = self._stock
        if attention is None:
            attention = sys.modules[type(module).__module__].eager_attention_forward
        return attention(module, *args, **kwargs)

    def remove(self) -> None:
        """Put the stock implementation back."""
        del ALL_ATTENTION_FUNCTIONS[self.implementation]
        if (
            ALL_ATTENTION_FUNCTIONS.get(self.implementation) is not self._stock
        ):  # an override of somebody else
            ALL_ATTENTION_FUNCTIONS[self.implementation] = self._stock


class Probe:
    """Stands in for an attention implementation while a forward runs whose policy watches layers.

    Args:
        implementation: name of the attention implementation ("sdpa", "eager", ...).
        watched: attention module -> its layer.
        decision: whose `attended` is called.
        indices: number of keys -> `(query_index, key_index)` of the running layer, as in `AttentionCall`.
        plain: masks hold nothing but causal order and padding.
        replayed: whether the backward pass computes the layers a second time (gradient checkpointing).
    """

    def __init__(
        self,
        *,
        implementation: str,
        watched: Mapping[nn.Module, int],
        decision: Decision,
        indices: Callable[[int], tuple[Tensor, Tensor]],
        plain: bool,
        replayed: bool,
    ):
        self.implementation, self.watched, self.decision = implementation, watched, decision
        self.indices, self.plain, self.replayed = indices, plain, replayed
        self._stand_in = StandIn(implementation, self.attend)

    def close(self) -> None:
        """Put the stock implementation back."""
        self._stand_in.remove()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """The stock attention; a watched layer's goes by the decision, which may replace its output."""
        attention = self._stand_in.stock
        layer = self.watched.get(module)
        if layer is None or layer not in self.decision.watch:
            return attention(module, query, key, value, mask, **kwargs)
        query_index, key_index = self.indices(key.shape[2])
        few = _Rows(module, query, key, mask, kwargs)
        cut = self._can_be_cut(few)
        weights: Any = None  # of the attention, where the implementation gives them

        def run(value: Tensor, rows: Tensor | int | None) -> Tensor:
            nonlocal weights
            if isinstance(rows, Tensor):
                return few.output(value, rows)
            if rows is not None and cut:
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
        )
        replaced = self.decision.attended(layer, call)
        if replaced is None:
            return call.output, weights
        if self.replayed:
            raise ValueError(
                f"the policy replaces the attention output of layer {layer}, which gradient checkpointing "
                "cannot repeat: run it under torch.no_grad() or turn checkpointing off."
            )
        return replaced, weights

    def _can_be_cut(self, rows: _Rows) -> bool:
        """Whether the first query rows can be computed without the keys after them."""
        if self.implementation != "sdpa" or rows.query.shape[2] != rows.key.shape[2]:
            return False
        return rows.causal if rows.mask is None else self.plain and isinstance(rows.mask, Tensor)


class _Rows:
    """A few query rows of one attention call."""

    def __init__(self, module: nn.Module, query: Tensor, key: Tensor, mask: Mask, kwargs: Mapping[str, Any]):
        self.query, self.key, self.mask = query, key, mask
        scaling, causal = kwargs.get("scaling"), kwargs.get("is_causal")
        self.scaling: float = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.causal = bool(module.is_causal if causal is None else causal)
        self.softcap: float | None = kwargs.get("softcap")

    @torch.no_grad()
    def weights(self, index: Tensor) -> Tensor:
        """Attention probabilities of the rows `index` int64 `[B, R]`, float32 `[B, H, R, K]`."""
        return self._weights(index)

    def output(self, value: Tensor, index: Tensor) -> Tensor:
        """Attention output of the rows `index` with other values, `[B, R, H, D]`."""
        if self.softcap is None:
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

    def _weights(self, index: Tensor) -> Tensor:
        query = self._query(index).float().unflatten(1, (self.key.shape[1], -1))  # [B, Hkv, G, R, D]
        scores = query @ self.key.float()[:, :, None].mT * self.scaling
        scores = scores.flatten(1, 2)  # [B, H, R, K]
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        mask = self._mask(index)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
        return scores.softmax(-1)

    def _mask(self, index: Tensor) -> Tensor:
        """What these rows see: bool or additive, `[B, H|1, R, K]`."""
        mask, queries, keys = self.mask, self.query.shape[2], self.key.shape[2]
        column = torch.arange(keys, device=index.device)
        if isinstance(mask, BlockMask):
            sample = torch.arange(index.shape[0], device=index.device)[:, None, None]
            head = torch.zeros_like(sample)
            return mask.mask_mod(sample, head, index[:, :, None], column).expand(-1, -1, keys)[:, None]
        if mask is not None and mask.dim() == 4:
            mask = mask.expand(index.shape[0], *mask.shape[1:])
            return mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        seen = column <= index[:, :, None] + (keys - queries)  # [B, R, K]
        if not self.causal:
            seen = torch.ones_like(seen)
        return (seen if mask is None else seen & mask[:, None, :].bool())[:, None]
