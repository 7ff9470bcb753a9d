"""One forward under a policy: each layer computes the tokens of its segment, the model around it sees all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from latefusion.models.executor.cache import (
    ScheduledLayer,
    ScheduledSlidingLayer,
    Track,
    scheduled_layer,
    stored,
)
from latefusion.models.executor.frozen_rows import TEXT_ROWS, narrows
from latefusion.models.executor.layout import Layout
from latefusion.models.executor.masks import compact_mask, needs_no_mask, reading_mask
from latefusion.models.executor.returns import Returns
from latefusion.models.policies.base import Decision, Prompt, SeesEmbeddings, Selection


class Forward:
    """The state of one forward of the decoder, from before its first layer to after its last.

    Between two layers the hidden states are either those of all tokens (`layout is None`, the stock model's
    tensors untouched) or compact, with `full` holding every token's state at the start of the segment. A
    token that enters late is in `full` all the time: the projector's output, until its first layer.

    Args:
        config: of the decoder.
        length: T, tokens of this forward.
        past: tokens that the cache has seen before.
        plain: no mask but causal order and padding.
        prompt, decision: what is known and decided of the vision tokens; None if the forward brings none.
        entry: the entry adapter, if the model has one.
        deepstack: so many first layers after which the model itself adds to the full hidden states.
        record: keep what is needed to expand the recorded hidden states of every layer.
        enters: the layer before which the entry adapter runs in forwards with vision tokens, if that is known.
    """

    def __init__(
        self,
        *,
        config: PretrainedConfig,
        length: int,
        past: int,
        plain: bool,
        prompt: Prompt | None,
        decision: Decision | None,
        entry: nn.Module | None,
        deepstack: int,
        record: bool,
        enters: int = 0,
    ):
        self.config, self.length, self.past, self.plain = config, length, past, plain
        self.prompt, self.decision, self.entry = prompt, decision, entry
        self.deepstack, self.record, self.enters = deepstack, record, enters
        self.layout: Layout | None = None
        self.full: Tensor | None = None  # [B, T, D]
        self.freezes = False  # the policy has frozen tokens, or will
        self.text: Layout | None = None  # the segment's text rows, if its vision tokens are frozen
        self.expanded = False  # the running layer's output was handed to the model at full length
        self.entered = False  # the entry adapter has run
        self.unseen: tuple[Tensor, Sequence[int]] | None = (
            None  # what the entry adapter may still have to map
        )
        if prompt is not None and entry is not None:
            self.unseen = prompt.vision, prompt.n_vision
        self.returns = None if prompt is None else Returns(prompt)
        self.name = object()
        self.start = Track(tail=past, length=past)
        self.selections: list[tuple[int, Selection]] = []  # (layer, selection with counts)
        self.segments: list[tuple[Layout | None, Tensor | None]] = []  # per layer, when recording
        self.lengthened: list[Tensor] = []  # outputs handed to the model at full length, when recording
        self._memo: dict[tuple[Any, ...], tuple[Any, Any]] = {}  # masks and RoPE of the segment

    # ---------------------------------------------------------------- around a layer

    def enter_layer(self, i: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer's arguments in compact coordinates; None if they stay as they are."""
        hidden_states = args[0]
        if i == 0 and isinstance(self.decision, SeesEmbeddings):
            self.decision.embedded(hidden_states)
        if self.prompt is None and 0 < i == self.enters:
            hidden_states = self._run_idle(hidden_states)
        selection = None if self.decision is None else self.decision.select(i)
        if selection is not None:
            hidden_states = self._switch(i, selection, hidden_states)
        elif self.expanded:  # the model changed the full hidden states between two layers
            assert self.layout is not None
            self.full = hidden_states
            hidden_states = self.layout.take(hidden_states)
        self.expanded = False
        if self.unseen is not None and not self.selections:
            self.unseen = None  # layer 0 computes all vision tokens
        if self.record:
            self.segments.append((self.layout, self.full))

        cache = kwargs.get("past_key_values")
        if layer.training and isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            cache = None  # which the layer is about to drop, too
        if self.layout is None and not _is_scheduled_layer(cache, i):
            return None if hidden_states is args[0] else ((hidden_states, *args[1:]), kwargs)

        kwargs = dict(kwargs)
        if self.layout is not None:
            kwargs["position_embeddings"] = self._rope(kwargs["position_embeddings"])
        kwargs["attention_mask"] = self._mask(i, layer, kwargs.get("attention_mask"), cache, hidden_states)
        if self.layout is not None:
            kwargs["position_ids"] = None  # ids with gaps would look like packed sequences
        if self.text is not None:
            kwargs[TEXT_ROWS] = self.text
        return (hidden_states, *args[1:]), kwargs

    def leave_layer(self, i: int, output: Tensor) -> Tensor | None:
        """A layer's output at full length where the model is going to add to it; None if it stays as it is."""
        if self.layout is None or i >= self.deepstack:
            return None
        self.expanded = True
        output = self._expand(output)
        if self.record:
            self.lengthened.append(output)
        return output

    def finish(self, hidden_states: Tensor) -> Tensor:
        """The last layer's output at full length."""
        if self.layout is not None and not self.expanded:
            hidden_states = self._expand(hidden_states)
        return self._run_idle(hidden_states)

    # ---------------------------------------------------------------- segments

    def _run_idle(self, hidden_states: Tensor) -> Tensor:
        """Run an entry adapter that has nothing to map: every process runs it once a forward, in the same place."""
        if self.entry is None or self.entered:
            return hidden_states
        self.entered = True
        none = torch.zeros(len(hidden_states), 0, dtype=torch.long, device=hidden_states.device)
        nothing = self.entry(hidden_states[:, :0], none).sum()
        return hidden_states + nothing.to(hidden_states.dtype) if nothing.requires_grad else hidden_states

    def _expand(self, hidden_states: Tensor) -> Tensor:
        assert self.layout is not None and self.full is not None
        return self.layout.put(self.full, hidden_states)

    def _switch(self, i: int, selection: Selection, hidden_states: Tensor) -> Tensor:
        """Start a segment with the selection's tokens."""
        prompt = self.prompt
        assert prompt is not None
        known, frozen = selection.counts, selection.frozen
        counts = tuple((selection.vision & prompt.vision).sum(1).tolist() if known is None else known)
        assert self.returns is not None
        self.returns.check(i, selection, counts)
        self.selections.append((i, replace(selection, counts=counts)))
        everything = counts == prompt.n_vision and not frozen
        entering = self._entering(i, selection.vision, counts)
        if everything and self.layout is None and entering is None:
            return hidden_states
        full = hidden_states if self.layout is None or self.expanded else self._expand(hidden_states)
        if entering is not None and self.entry is not None:
            order = (prompt.vision.cumsum(1) - 1).gather(1, entering.index).clamp(min=0)  # [B, n]
            full = entering.put(full, self.entry(entering.take(full), order))
            self.entered = True
        self._memo.clear()
        self.text, self.freezes = None, self.freezes or frozen
        if everything:
            self.layout, self.full = None, None
            return full
        active = prompt.real & (selection.vision | ~prompt.vision)
        texts = [r - v for r, v in zip(prompt.n_real, prompt.n_vision, strict=True)]
        totals = [text + c for text, c in zip(texts, counts, strict=True)]
        self.layout, self.full = Layout.build(active, totals), full
        if frozen and any(counts):
            text = (prompt.real & ~prompt.vision).gather(1, self.layout.index)  # [B, n]
            self.text = Layout.build(text, texts)
        return self.layout.take(full)

    def _entering(self, i: int, vision: Tensor, counts: Sequence[int]) -> Layout | None:
        """The tokens that take part for the first time, after layer 0; None if there are none."""
        if self.unseen is None or not any(counts):
            return None
        unseen, unseen_counts = self.unseen
        assert self.prompt is not None
        new = unseen & vision
        if tuple(unseen_counts) != self.prompt.n_vision:  # only the device knows what is new
            counts = new.sum(1).tolist()
        rest = [u - c for u, c in zip(unseen_counts, counts, strict=True)]
        self.unseen = (unseen & ~vision, rest) if any(rest) else None
        return Layout.build(new, counts) if i > 0 and any(counts) else None

    # ---------------------------------------------------------------- what a layer is handed

    def _rope(self, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The layer's `(cos, sin)`."""
        key = ("rope", id(embeddings))
        if key not in self._memo:
            assert self.layout is not None
            cos, sin = embeddings  # [B|1, T, D]
            self._memo[key] = embeddings, (self.layout.take(cos), self.layout.take(sin))
        return self._memo[key][1]

    def _mask(
        self, i: int, layer: nn.Module, mask: Any, cache: Cache | None, hidden_states: Tensor
    ) -> Tensor | BlockMask | None:
        """The layer's mask; also tells its cache which tokens are coming."""
        batch, n = hidden_states.shape[:2]
        before, offset, keys = self.start, 0, n
        if cache is not None:
            store = scheduled_layer(cache, i, self.start)
            before, offset, keys = store.track, store.get_mask_sizes(self.length)[1], stored(store, n)
        track = before.append(self.layout, self.length, self.name)
        if cache is not None:
            store.track = track
        if track.complete and self.layout is None:
            return mask
        padded = track.ragged or offset > 0
        causal = getattr(layer.self_attn, "is_causal", True)  # as transformers decides for its kernels
        plain = self.plain and self.layout is not None and causal
        reading = self.text is not None and narrows(self.config)
        if not reading and needs_no_mask(mask, padded=padded, plain=plain, config=self.config):
            return None
        key = ("mask", id(mask), id(track), keys, offset)
        if key not in self._memo:
            device = hidden_states.device
            if self.layout is None:
                query_index = torch.arange(self.length, device=device).expand(batch, -1)
            else:
                query_index = self.layout.index
            columns = track.positions(batch, device)[:, track.size - keys :] - offset  # [B, K]
            if reading and mask is None:
                first = self.past - offset  # column of this forward's first token
                translated = reading_mask(self._text_index() + first, columns, causal=causal)
            else:
                translated = compact_mask(
                    mask,
                    hidden_states,
                    self._text_index() if reading else query_index,
                    columns,
                    causal=causal,
                    config=self.config,
                )
            self._memo[key] = (mask, track), translated
        return self._memo[key][1]

    def _text_index(self) -> Tensor:
        """Logical position of each text row of a frozen segment, int64 `[B, n]`."""
        assert self.layout is not None and self.text is not None
        return self.layout.index.gather(1, self.text.index)

    # ---------------------------------------------------------------- for the policy

    def indices(self, keys: int) -> tuple[Tensor, Tensor]:
        """`query_index` and `key_index` of the running layer, as in `AttentionCall`."""
        assert self.prompt is not None
        if self.layout is not None:
            index = self.layout.positions(0)
        else:
            real = self.prompt.real
            index = torch.where(real, torch.arange(real.shape[1], device=real.device), -1)
        earlier = index.new_full((index.shape[0], keys - index.shape[1]), -1)
        key_index = torch.cat([earlier, index], dim=1)
        if self.text is not None and narrows(self.config):
            index = self._text_index()
            index = index if self.text.valid is None else torch.where(self.text.valid, index, -1)
        return index, key_index

    def expand_recorded(
        self, states: tuple[Tensor | None, ...], last_hidden_state: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Recorded hidden states (input of layer 0, outputs of all layers) at full length.

        A vision token that a layer does not compute has the state it had before.
        """
        full_length = {id(state) for state in (last_hidden_state, *self.lengthened)}

        def expand(state: Tensor | None, layout: Layout | None, full: Tensor | None) -> Tensor | None:
            if state is None or layout is None or full is None or id(state) in full_length:
                return state
            return layout.put(full, state)

        segments = [self.segments[0], *self.segments]
        return tuple(expand(state, *segment) for state, segment in zip(states, segments, strict=True))


def _is_scheduled_layer(cache: Cache | None, i: int) -> bool:
    return (
        cache is not None
        and i < len(cache.layers)
        and isinstance(cache.layers[i], (ScheduledLayer, ScheduledSlidingLayer))
    )
