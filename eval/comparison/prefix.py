"""The layers that several systems compute alike on the same prompts, computed once.

FastV, PyramidDrop, VTW or VisiPruner begin like the dense model: until they have looked at a layer's attention, or let
tokens leave, their layers compute what the dense model's do, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from latefusion.models.attach import Attachment
from latefusion.models.executor.around import Around, beneath
from latefusion.models.executor.trace import PrefillTrace
from latefusion.models.policies.base import LooksAhead

LIMIT = 2**30  # bytes of states, keys and values that are kept


@dataclass(frozen=True)
class Step:
    """What a layer made of a batch: hidden states `[B, T, D]` before and after, keys and values `[B, Hkv, T, d]`."""

    before: Tensor
    after: Tensor
    keys: Tensor
    values: Tensor
    version: int  # of `after`, which the model may change in place


class SharedPrefix:
    """Layers' results on one batch, for further prefills of the same prompts with the same weights.

    A layer is taken over where its input is equal, bit for bit, no token has left and the policy does not look at the
    layer. What does not fit into `limit` bytes is computed each time, and so are layers that run a recurrence.
    """

    def __init__(self, attachment: Attachment, limit: int = LIMIT):
        self.attachment, self.room = attachment, limit
        self.steps: dict[int, Step] = {}

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Prefills inside keep their first layers' results, and take over those that are there."""
        with ExitStack() as stack:
            for i, layer in enumerate(self.attachment.layers):
                top = layer.forward
                stock = top.stock if isinstance(top, Around) else top  # what the policy runs around
                stack.enter_context(beneath(layer, "forward", partial(self._run, i, stock)))
            yield

    def _run(self, i: int, stock: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is None or not _is_empty(cache, i) or not self._as_dense(i):
            return stock(*args, **kwargs)
        step = self.steps.get(i)
        if step is None:
            before, after = args[0], stock(*args, **kwargs)
            self._keep(i, before, after, cache.layers[i])
            return after
        if step.version != step.after._version or not torch.equal(step.before, args[0]):
            return stock(*args, **kwargs)
        cache.update(step.keys, step.values, i)
        return step.after

    def _as_dense(self, i: int) -> bool:
        """Whether the running prefill has removed nothing so far, and its policy does not look at layer i."""
        prefill = self.attachment.last
        if not isinstance(prefill, PrefillTrace) or prefill.selections:
            return False
        decision = prefill.decision
        ahead = decision.ahead if isinstance(decision, LooksAhead) else ()
        return decision is None or not (i in decision.watch or i in ahead)

    def _keep(self, i: int, before: Tensor, after: Any, store: Any) -> None:
        if not isinstance(after, Tensor) or type(store) is not DynamicLayer:
            return
        assert store.keys is not None and store.values is not None
        tensors = (before, after, store.keys, store.values)
        self.room -= sum(tensor.numel() * tensor.element_size() for tensor in tensors[1:])
        if self.room >= 0:
            self.steps[i] = Step(*tensors, version=after._version)


def _is_empty(cache: Cache, i: int) -> bool:
    """Whether layer i of a cache is going to hold keys and values, and holds none yet."""
    store = cache.layers[i] if i < len(cache.layers) else None
    return store is None or (type(store) is DynamicLayer and not store.get_seq_length())
