"""One forward under a policy: each layer computes the tokens of its segment, the model around the layers sees all.

`enter_layer` runs before each layer and `leave_layer` after it. Vision tokens enter, and are removed, in `_switch` and
nowhere else; `leave_layer` puts them back behind the last layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.utils.generic import is_flash_attention_requested

from latefusion.models.executor.attention import Attention, Watch
from latefusion.models.executor.cache import Keys, advance, without_effect
from latefusion.models.executor.entering import Entering
from latefusion.models.executor.forward_checks import check_choice, check_not_sharded, ranks
from latefusion.models.executor.frozen_rows import SILENT_ROWS, TEXT_ROWS
from latefusion.models.executor.layout import Layout
from latefusion.models.executor.masks import narrows, segment_mask, shared_mask
from latefusion.models.executor.partial import is_skipped
from latefusion.models.executor.recorded import Recorded
from latefusion.models.executor.recurrence import Gaps, mixer_of, recurrence_of
from latefusion.models.executor.segment import Segment
from latefusion.models.executor.selections import Selections
from latefusion.models.executor.shared_keys import LayerKeys
from latefusion.models.executor.tokens import Tokens
from latefusion.models.executor.traits import checkpoints
from latefusion.models.policies.base import Decision, Selection

TOKEN_TYPES = "moe_mm_token_type_ids"  # [B, T], which experts a token goes to (Ernie 4.5 VL)
POSITIONAL = (
    "position_embeddings",
    TOKEN_TYPES,
    "position_ids",
)  # arguments of layers, a part for each token


def first_state(hidden_states: Tensor) -> Tensor:
    """One state `[B, n, D]` of each token, of several under AltUp, `[A, B, n, D]`: before layer 0, its embedding."""
    return hidden_states if hidden_states.dim() == 3 else hidden_states[0]


class Forward:
    """The state of one forward of the decoder, from before its first layer to after its last.

    Between two layers the hidden states are either those of all tokens (`segment.layout is None`, the stock model's
    tensors untouched) or compact, with `segment.full` holding every token's state at the start of the segment. A
    token that enters late is in `full` all the time: it is the projector's output until its first layer.

    Args:
        config: of the decoder.
        tokens: the forward's tokens.
        plain: the stock mask holds nothing but causal order and padding.
        decision: what the policy says of the vision tokens; None if there are none, or all take part everywhere.
        entering: the entry adapter, if the model has one.
        full_after: the layers after which the model itself works on the states of all tokens.
        recorded: keeps what is needed to expand what the model records of every layer; None if it records nothing.
        replayed: whether the backward pass computes the layers a second time (gradient checkpointing).
        uniform: the cache's layers hold equally many tokens of every sample (`is_uniform`).
        gaps: padding that recurrent layers run over.
        shares_keys: whether any layer attends to the keys of a layer before.

    Attributes:
        segment: of the running layer; the first one computes all tokens.
        expanded: the running layer's output was handed to the model at full length.
        uniform: also, nothing but a mask has to be translated in any layer.
    """

    def __init__(
        self,
        *,
        config: PretrainedConfig,
        tokens: Tokens,
        plain: bool,
        decision: Decision | None,
        entering: Entering | None,
        full_after: frozenset[int],
        recorded: Recorded | None,
        replayed: bool,
        uniform: bool,
        gaps: Gaps,
        shares_keys: bool,
    ):
        self.config, self.tokens, self.plain, self.decision = config, tokens, plain, decision
        self.entering, self.full_after, self.recorded = entering, full_after, recorded
        self.replayed, self.gaps = replayed, gaps
        self.uniform = uniform and tokens.prompt is None and recorded is None
        self.keys = LayerKeys(tokens.length, tokens.past, shared=shares_keys)
        self.selections = None if tokens.policy_prompt is None else Selections(tokens.policy_prompt)
        self.watch: Watch | None = None
        if decision is not None and ranks(decision):
            self.watch = Watch(decision=decision, plain=plain, replayed=replayed, samples=tokens.samples)
        self.segment = Segment()
        self.expanded = False

    # ---------------------------------------------------------------- around a layer

    def enter_layer(
        self,
        i: int,
        layer: nn.Module,
        stock: Callable[..., Any],
        hidden_states: Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Any]]:
        """A layer's arguments in compact coordinates; the same objects if they stay as they are.

        Args:
            stock: the layer's own forward.
            kwargs: all other arguments, by name.
        """
        if (
            self.uniform
            and kwargs.get("attention_mask") is None
            and (self.entering is None or i != self.entering.idle_before)
        ):
            # a decode step: nothing to translate, and the cache counts new tokens
            return hidden_states, kwargs
        if self.watch is not None:
            self.watch.check()
            if i in self.watch.looks_ahead:
                self._look_ahead(i, layer, stock, hidden_states, kwargs)
        hidden_states = self._select(i, hidden_states)
        if self.segment.text is not None and self.entering is not None and self.entering.moves(i):
            hidden_states = self._move(i, hidden_states)
        if self.watch is not None and not is_skipped(stock):
            self.watch.enter(i, mixer_of(layer))
        if self.recorded is not None:
            self.recorded.enter(self.segment)
        cache = kwargs.get("past_key_values")
        if checkpoints(layer):
            cache = None  # the layer is about to drop it, too
        if self.segment.layout is None and not self.keys.lacks_some(i, layer, cache):
            return hidden_states, kwargs
        return hidden_states, self._compact(i, layer, hidden_states, kwargs, cache)

    def leave_layer(self, i: int, output: Any) -> Any:
        """A layer's output, at full length where the model goes on with it."""
        if i not in self.full_after:
            return output
        if isinstance(output, tuple):
            return (self._full(i, output[0]), *output[1:])
        return self._full(i, output)

    def _full(self, i: int, hidden_states: Tensor) -> Tensor:
        """The states behind layer i at full length."""
        if self.segment.layout is not None:
            self.expanded = True
            hidden_states = self.segment.expand(hidden_states)
            if self.recorded is not None:
                self.recorded.full_length.append(hidden_states)
        if i < max(self.full_after):
            return hidden_states
        if self.watch is not None:
            self.watch.check()
        return hidden_states if self.entering is None else self.entering.run_idle(hidden_states)

    # ---------------------------------------------------------------- which tokens

    def _select(self, i: int, hidden_states: Tensor) -> Tensor:
        """Ask the policy before layer i; the hidden states of the tokens that the layer computes."""
        embedded = getattr(self.decision, "embedded", None) if i == 0 else None  # `SeesEmbeddings`
        if embedded is not None:
            samples = self.tokens.samples
            embeddings = first_state(hidden_states)
            embedded(embeddings if samples is None else samples.split(embeddings))
        entering = self.entering
        if self.tokens.prompt is None and entering is not None and 0 < i == entering.idle_before:
            hidden_states = entering.run_idle(hidden_states)
        selection = None if self.decision is None else self.decision.select(i)
        if selection is not None:
            hidden_states = self._switch(i, selection, hidden_states)
        elif self.expanded:  # the model changed the full hidden states between two layers
            self.segment.full = hidden_states
            hidden_states = self.segment.take(hidden_states)
        self.expanded = False
        if i == 0 and selection is None and entering is not None:
            entering.all_computed()
        return hidden_states

    def _switch(self, i: int, selection: Selection, hidden_states: Tensor) -> Tensor:
        """Remove vision tokens, and let others enter: start the segment of the selection's tokens at layer i."""
        prompt, samples, selections = self.tokens.prompt, self.tokens.samples, self.selections
        assert prompt is not None and selections is not None
        chosen = selections.add(i, selection)
        selection = chosen if samples is None else samples.joined(chosen)
        counts, frozen = selection.counts, selection.frozen
        assert counts is not None
        full = hidden_states if self.expanded else self.segment.expand(hidden_states)
        if self.entering is not None:
            full = self.entering.map(i, selection, full)
        if counts == prompt.n_vision and not frozen:
            self.segment = Segment()
            return full
        check_choice(i, chosen, self.tokens, self.config)
        self.gaps.check()
        # Tokens that are not active leave: they are removed by `layout.take` at the end.
        active = torch.where(prompt.vision, selection.vision, prompt.real)  # bool [B, T]
        n_text = [real - vision for real, vision in zip(prompt.n_real, prompt.n_vision, strict=True)]
        layout = Layout.build(active, [text + count for text, count in zip(n_text, counts, strict=True)])
        text = None
        if frozen and any(counts):
            is_text = (prompt.real & ~prompt.vision).gather(1, layout.index)  # [B, n]
            text = Layout.build(is_text, n_text)
        silent = selection.silent
        if silent is not None:
            silent = silent.gather(1, layout.index)  # [B, n]
            silent = silent if text is None else silent.gather(1, text.index)
        self.segment = Segment(layout, full, text, silent)
        return layout.take(full)  # here they are removed: the segment's layers get the active rows alone

    def _move(self, i: int, hidden_states: Tensor) -> Tensor:
        """Hidden states whose frozen rows are as layer i expects them, by the entry adapter."""
        segment, entering, prompt = self.segment, self.entering, self.tokens.prompt
        assert entering is not None and prompt is not None and segment.text is not None
        layout, n_text = segment.layout, segment.text.counts
        assert layout is not None

        def make() -> tuple[Layout, Tensor]:
            vision = prompt.vision.gather(1, layout.index)  # [B, n]
            vision = vision if layout.valid is None else vision & layout.valid
            frozen = Layout.build(vision, [n - text for n, text in zip(layout.counts, n_text, strict=True)])
            return frozen, entering.order(layout.index.gather(1, frozen.index))

        frozen, order = segment.once("frozen", (), make)
        return frozen.put(hidden_states, entering.entry(frozen.take(hidden_states), order, i))

    # ---------------------------------------------------------------- what a layer is handed

    def _compact(
        self, i: int, layer: nn.Module, hidden_states: Tensor, kwargs: dict[str, Any], cache: Cache | None
    ) -> dict[str, Any]:
        """A layer's keyword arguments for the tokens of its segment; its cache learns which tokens are coming."""
        segment, kwargs = self.segment, dict(kwargs)
        if segment.layout is not None:
            names = tuple(name for name in POSITIONAL if kwargs.get(name) is not None)
            sources = tuple(kwargs[name] for name in names)
            kwargs |= segment.once(
                "arguments", sources, lambda: self._taken(dict(zip(names, sources, strict=True)))
            )
        if recurrence_of(layer) is not None:
            return {**kwargs, "attention_mask": self._rows_read(i, cache)}
        if segment.text is not None:
            kwargs[TEXT_ROWS] = segment.text
        if segment.silent is not None:
            kwargs[SILENT_ROWS] = segment.silent
        if kwargs.get("per_layer_input") is not None:
            kwargs["per_layer_input"] = segment.take(kwargs["per_layer_input"])
        reused = self.keys.reused_by(layer.self_attn) if self.keys.shared else None
        keys = reused or advance(cache, i, self.keys.start, segment.layout, self.tokens.length)
        if self.keys.shared:
            self.keys.keep(layer, keys)
        if self.recorded is not None:
            self.recorded.keys[i] = keys
        mask = kwargs.get("attention_mask")
        facts: dict[str, Any] = {
            "config": self.config,
            "length": self.tokens.length,
            "past": self.tokens.past,
            "causal": getattr(layer.self_attn, "is_causal", True),  # as transformers decides for its kernels
        }
        rows = first_state(hidden_states)
        if reused is not None:
            kwargs["attention_mask"] = shared_mask(mask, segment, keys, rows, **facts)
        else:
            kwargs["attention_mask"] = segment_mask(mask, segment, keys, rows, plain=self.plain, **facts)
        return kwargs

    def _taken(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The segment's part of arguments that say something of every token, whatever the layer."""
        segment, taken = self.segment, dict(arguments)
        if "position_embeddings" in taken:
            taken["position_embeddings"] = segment.take_embeddings(taken["position_embeddings"])
        if TOKEN_TYPES in taken:
            taken[TOKEN_TYPES] = segment.take_ids(taken[TOKEN_TYPES])
        if "position_ids" in taken:  # flash attention would take ids with gaps for packed sequences
            packs = is_flash_attention_requested(self.config)
            taken["position_ids"] = None if packs else segment.take_ids(taken["position_ids"])
        return taken

    def _rows_read(self, i: int, cache: Cache | None) -> Tensor | None:
        """The mask of a recurrent layer: which rows of its segment are tokens, bool `[B, n]`; None: all."""
        layout = self.segment.layout
        assert layout is not None
        if self.segment.text is not None:
            raise ValueError(
                f"layer {i} runs a recurrence, which frozen vision tokens would change: freeze them in layers that "
                "attend with a softmax."
            )
        if cache is not None:
            cache.layers[i].padded_behind = self.gaps.behind  # type: ignore[union-attr]
        return layout.valid

    # ---------------------------------------------------------------- for the policy

    @torch.no_grad()
    def _look_ahead(
        self,
        i: int,
        layer: nn.Module,
        stock: Callable[..., Any],
        hidden_states: Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        """Show the decision the attention of layer i on the tokens of the layer before; nothing else comes of it."""
        assert self.watch is not None
        check_not_sharded(layer)
        if self.expanded:
            hidden_states = self.segment.take(hidden_states)
        cache = kwargs.get("past_key_values")
        copied = None if cache is None or checkpoints(layer) else without_effect(cache, i)
        kwargs = self._compact(i, layer, hidden_states, {**kwargs, "past_key_values": copied}, copied)
        with self.watch.ahead(i):
            stock(hidden_states, **kwargs)

    def attend(self, i: int, attention: Attention, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """The attention of layer i, shown to the policy, which watches some; `args` are the function's."""
        assert self.watch is not None
        reused = self.keys.reused_by(args[0])
        if reused is not None and not reused.complete:
            return self.watch.attend(i, partial(self._indices_of_shared, reused), attention, *args, **kwargs)
        return self.watch.attend(i, self._indices, attention, *args, **kwargs)

    def _indices_of_shared(self, shared: Keys, keys: int) -> tuple[Tensor, Tensor]:
        """`_indices` of a layer whose keys are those of a layer before, which may have computed other tokens."""
        queries, _ = self._indices(keys)
        position = (
            shared.track.positions(queries.shape[0], queries.device)[:, -keys:] - self.tokens.past
        )  # [B, K]
        return queries, position.clamp(min=-1)

    def _indices(self, keys: int) -> tuple[Tensor, Tensor]:
        """`query_index` and `key_index` of the running layer, as in `AttentionCall`; the same in a whole segment."""
        prompt, segment = self.tokens.prompt, self.segment
        assert prompt is not None

        def make() -> tuple[Tensor, Tensor]:
            if segment.layout is not None:
                index = segment.layout.positions(0)
                queries = segment.query_index(narrowed=narrows(self.config))
            else:
                real = prompt.real
                index = queries = torch.where(real, torch.arange(real.shape[1], device=real.device), -1)
            if keys > index.shape[1]:
                earlier = index.new_full((index.shape[0], keys - index.shape[1]), -1)
                index = torch.cat([earlier, index], dim=1)
            return queries, index

        return segment.once("indices", (), make, keys)
