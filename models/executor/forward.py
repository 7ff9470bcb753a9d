"""One forward under a policy: each layer computes the tokens of its segment, the model around the layers sees all.

`enter_layer` runs before each layer and `leave_layer` after it, `finish` before the decoder's last norm. Vision tokens
enter, and are removed, in `_switch` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import is_flash_attention_requested

from latefusion.models.executor.attention import Attention, Watch
from latefusion.models.executor.cache import (
    Keys,
    Track,
    advance,
    all_keys,
    is_scheduled_layer,
    without_effect,
)
from latefusion.models.executor.entering import Entering
from latefusion.models.executor.frozen_rows import SILENT_ROWS, TEXT_ROWS
from latefusion.models.executor.layout import Layout
from latefusion.models.executor.masks import narrows, segment_mask, shared_mask
from latefusion.models.executor.packed import Samples
from latefusion.models.executor.partial import is_skipped
from latefusion.models.executor.recorded import Recorded
from latefusion.models.executor.recurrence import Gaps, mixer_of, recurrence_of
from latefusion.models.executor.segment import Segment
from latefusion.models.executor.selections import Selections
from latefusion.models.executor.shared_keys import is_reusing, kind_of, reuses_keys, stores_keys
from latefusion.models.policies.base import Decision, LooksAhead, Prompt, SeesEmbeddings, Selection


class Forward:
    """The state of one forward of the decoder, from before its first layer to after its last.

    Between two layers the hidden states are either those of all tokens (`segment.layout is None`, the stock model's
    tensors untouched) or compact, with `segment.full` holding every token's state at the start of the segment. A
    token that enters late is in `full` all the time: it is the projector's output until its first layer.

    Args:
        config: of the decoder.
        length: T, tokens of this forward.
        past: tokens that the cache has seen before.
        plain: the stock mask holds nothing but causal order and padding.
        prompt, decision: the vision tokens and what the policy says of them; None if the forward brings none.
        policy_prompt: the prompt that the policy sees: `prompt`, or where rows hold several samples, one with a row
            for each of them.
        samples: which tokens of a row belong to which sample, where rows hold several; else None.
        prompt_marked: `queries` names where the prompts of a row end.
        entry: the entry adapter, if the model has one.
        enters: in a forward without vision tokens, the layer before which the entry adapter runs; 0: after the last.
        deepstack: the layers after which the model itself adds to the full hidden states.
        recorded: keeps what is needed to expand what the model records of every layer; None if it records nothing.
        replayed: whether the backward pass computes the layers a second time (gradient checkpointing).
        uniform: the cache's layers hold equally many tokens of every sample (`is_uniform`).
        gaps: padding that recurrent layers run over.
        shares_keys: whether any layer attends to the keys of a layer before (`shared_keys.py`).
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
        policy_prompt: Prompt | None,
        samples: Samples | None,
        prompt_marked: bool,
        entry: nn.Module | None,
        enters: int,
        deepstack: frozenset[int],
        recorded: Recorded | None,
        replayed: bool,
        uniform: bool,
        gaps: Gaps,
        shares_keys: bool,
    ):
        self.config, self.length, self.past, self.plain = config, length, past, plain
        self.prompt, self.decision, self.prompt_marked = prompt, decision, prompt_marked
        self.policy_prompt, self.samples = policy_prompt, samples
        self.entering = None if entry is None else Entering(entry, prompt, samples)
        self.enters, self.deepstack, self.recorded = enters, deepstack, recorded
        self.selections = None if policy_prompt is None else Selections(policy_prompt)
        self.ahead = decision.ahead if decision is not None and isinstance(decision, LooksAhead) else ()
        self.watch: Watch | None = None
        self.replayed, self.shares_keys = replayed, shares_keys
        if decision is not None and (decision.watch or self.ahead):
            self.watch = Watch(decision=decision, plain=plain, replayed=replayed, samples=samples)
        self.segment = Segment()  # of the running layer; this one computes all tokens
        self.expanded = False  # the running layer's output was handed to the model at full length
        self.start = Track(tail=past, length=past)
        self.shared: dict[
            Any, Keys
        ] = {}  # by kind of layer, what the layer holds whose keys later ones reuse
        self.uniform = uniform and prompt is None and recorded is None
        self.gaps = gaps
        self.can_rest = self.uniform and self.entering is None  # nothing is left to do without a mask

    # ---------------------------------------------------------------- around a layer

    def enter_layer(
        self,
        i: int,
        layer: nn.Module,
        stock: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A layer's arguments in compact coordinates; the same objects if they stay as they are.

        Args:
            stock: the layer's own forward.
        """
        if (
            self.uniform
            and kwargs.get("attention_mask") is None
            and (i != self.enters or self.entering is None)
        ):
            return args, kwargs  # a decode step: no mask to translate, and the cache counts new tokens itself
        if self.watch is not None:
            self.watch.check()
        if i in self.ahead:
            self._look_ahead(i, layer, stock, args, kwargs)
        hidden_states = self._select(i, args[0])
        if self.watch is not None and not is_skipped(stock):
            self.watch.enter(i, mixer_of(layer))
        if self.recorded is not None:
            self.recorded.enter(self.segment)
        cache = kwargs.get("past_key_values")
        if checkpoints(layer):
            cache = None  # the layer is about to drop it, too
        if self.segment.layout is None and not self._lacks_keys(i, layer, cache):
            return (args if hidden_states is args[0] else (hidden_states, *args[1:])), kwargs
        compact = self._compact(i, layer, hidden_states, kwargs, cache)
        return (hidden_states, *self._compact_inputs(args[1:])), compact

    def _lacks_keys(self, i: int, layer: nn.Module, cache: Cache | None) -> bool:
        """Whether a layer that computes all tokens attends to fewer; what a source layer holds is noted."""
        if not self.shares_keys:
            return is_scheduled_layer(cache, i)
        if reuses_keys(layer):
            return not self.shared[kind_of(layer)].complete
        lacks = is_scheduled_layer(cache, i)
        if stores_keys(layer) and not lacks:
            self.shared[kind_of(layer)] = all_keys(cache, i, self.start, self.length)
        return lacks

    def _compact_inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a layer is handed by position after its hidden states: Gemma 4's `per_layer_input` `[B, T, P]`."""
        return tuple(self.segment.take(arg) if isinstance(arg, Tensor) else arg for arg in args)

    def leave_layer(self, i: int, output: Any) -> Any:
        """A layer's output, at full length where the model is going to add to it."""
        if self.segment.layout is None or i not in self.deepstack:
            return output
        self.expanded = True
        output = self.segment.expand(output)
        if self.recorded is not None:
            self.recorded.full_length.append(output)
        return output

    def finish(self, hidden_states: Tensor) -> Tensor:
        """The last layer's output at full length."""
        if self.watch is not None:
            self.watch.check()
        if not self.expanded:
            hidden_states = self.segment.expand(hidden_states)
        return hidden_states if self.entering is None else self.entering.run_idle(hidden_states)

    # ---------------------------------------------------------------- which tokens

    def _select(self, i: int, hidden_states: Tensor) -> Tensor:
        """Ask the policy before layer i; the hidden states of the tokens that the layer computes."""
        if i == 0 and self.decision is not None and isinstance(self.decision, SeesEmbeddings):
            packed = self.samples
            self.decision.embedded(hidden_states if packed is None else packed.split(hidden_states))
        if self.prompt is None and self.entering is not None and 0 < i == self.enters:
            hidden_states = self.entering.run_idle(hidden_states)
        selection = None if self.decision is None else self.decision.select(i)
        if selection is not None:
            hidden_states = self._switch(i, selection, hidden_states)
        elif self.expanded:  # the model changed the full hidden states between two layers
            self.segment.full = hidden_states
            hidden_states = self.segment.take(hidden_states)
        self.expanded = False
        if i == 0 and selection is None and self.entering is not None:
            self.entering.all_computed()
        return hidden_states

    def _switch(self, i: int, selection: Selection, hidden_states: Tensor) -> Tensor:
        """Remove vision tokens, and let others enter: start the segment of the selection's tokens at layer i."""
        prompt, selections = self.prompt, self.selections
        assert prompt is not None and selections is not None
        chosen = selections.add(i, selection)
        selection = chosen if self.samples is None else self.samples.joined(chosen)
        counts, frozen = selection.counts, selection.frozen
        assert counts is not None
        full = hidden_states if self.expanded else self.segment.expand(hidden_states)
        if self.entering is not None:
            full = self.entering.map(i, selection, full)
        if counts == prompt.n_vision and not frozen:
            self.segment = Segment()
            return full
        self._check_choice(i, chosen)
        self.gaps.check()
        # Tokens that are not active leave: they are removed by `layout.take` at the end.
        active = prompt.real & (selection.vision | ~prompt.vision)  # [B, T]
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

    def _check_choice(self, i: int, selection: Selection) -> None:
        """Raise ValueError if the policy cannot have chosen rightly.

        That is where a row holds several samples, whose tokens would be mixed up, and where an image comes after the
        question by whose text its tokens would have to be chosen.
        """
        prompt = self.policy_prompt
        assert prompt is not None and selection.counts is not None
        some = any(0 < count < total for count, total in zip(selection.counts, prompt.n_vision, strict=True))
        if some and prompt.late:
            raise ValueError(
                f"the policy chooses among the vision tokens of a row in layer {i}, but an image comes after the last "
                "of the queries: no text of the prompt has read it. Use a policy that keeps all vision tokens or none, "
                "such as VisionSchedule(enter=..., exit=...)."
            )
        if not prompt.packed and self.samples is None:
            return
        if is_flash_attention_requested(self.config):
            raise ValueError(
                "several samples are packed into a row with images (position_ids begin again), and flash attention "
                "would let them see each other once vision tokens leave: put them into rows of their own, or load the "
                'model with attn_implementation="sdpa".'
            )
        if some and not self.prompt_marked and self.samples is None:
            raise ValueError(
                f"the policy chooses among the vision tokens of a row in layer {i}, but several samples are packed "
                "into the row (position_ids begin again): put them into rows of their own, or use a policy that keeps "
                "all vision tokens or none, such as VisionSchedule(enter=..., exit=...)."
            )

    # ---------------------------------------------------------------- what a layer is handed

    def _compact(
        self, i: int, layer: nn.Module, hidden_states: Tensor, kwargs: dict[str, Any], cache: Cache | None
    ) -> dict[str, Any]:
        """A layer's keyword arguments for the tokens of its segment; its cache learns which tokens are coming."""
        segment, kwargs = self.segment, dict(kwargs)
        if segment.layout is not None:
            kwargs["position_embeddings"] = segment.take_embeddings(kwargs["position_embeddings"])
            ids = kwargs.get("position_ids")
            if ids is not None:  # flash attention would take ids with gaps for packed sequences
                packs = is_flash_attention_requested(self.config)
                kwargs["position_ids"] = None if packs else segment.take_ids(ids)
        if recurrence_of(layer) is not None:
            return {**kwargs, "attention_mask": self._rows_read(i, cache)}
        if segment.text is not None:
            kwargs[TEXT_ROWS] = segment.text
        if segment.silent is not None:
            kwargs[SILENT_ROWS] = segment.silent
        if kwargs.get("per_layer_input") is not None:
            kwargs["per_layer_input"] = segment.take(kwargs["per_layer_input"])
        reused = self.shared[kind_of(layer)] if self.shares_keys and reuses_keys(layer) else None
        keys = reused or advance(cache, i, self.start, segment.layout, self.length)
        if self.shares_keys and stores_keys(layer):
            self.shared[kind_of(layer)] = keys
        if self.recorded is not None:
            self.recorded.keys[i] = keys
        mask = kwargs.get("attention_mask")
        facts: dict[str, Any] = {
            "config": self.config,
            "length": self.length,
            "past": self.past,
            "causal": getattr(layer.self_attn, "is_causal", True),  # as transformers decides for its kernels
        }
        if reused is not None:
            kwargs["attention_mask"] = shared_mask(mask, segment, keys, hidden_states, **facts)
        else:
            kwargs["attention_mask"] = segment_mask(
                mask, segment, keys, hidden_states, plain=self.plain, **facts
            )
        return kwargs

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
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Show the decision the attention of layer i on the tokens of the layer before; nothing else comes of it."""
        assert self.watch is not None
        check_whole(layer)
        hidden_states = self.segment.take(args[0]) if self.expanded else args[0]
        cache = kwargs.get("past_key_values")
        copied = None if cache is None or checkpoints(layer) else without_effect(cache, i)
        kwargs = self._compact(i, layer, hidden_states, {**kwargs, "past_key_values": copied}, copied)
        with self.watch.ahead(i):
            stock(hidden_states, *args[1:], **kwargs)

    def attend(self, i: int, attention: Attention, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """The attention of layer i, shown to the policy, which watches some; `args` are the function's."""
        assert self.watch is not None
        module = args[0]
        reused = self.shared.get(getattr(module, "layer_type", None)) if is_reusing(module) else None
        if reused is not None and not reused.complete:
            return self.watch.attend(i, partial(self._indices_of_shared, reused), attention, *args, **kwargs)
        return self.watch.attend(i, self._indices, attention, *args, **kwargs)

    def _indices_of_shared(self, shared: Keys, keys: int) -> tuple[Tensor, Tensor]:
        """`_indices` of a layer whose keys are those of a layer before, which may have computed other tokens."""
        queries, _ = self._indices(keys)
        position = shared.track.positions(queries.shape[0], queries.device)[:, -keys:] - self.past  # [B, K]
        return queries, position.clamp(min=-1)

    def _indices(self, keys: int) -> tuple[Tensor, Tensor]:
        """`query_index` and `key_index` of the running layer, as in `AttentionCall`; the same in a whole segment."""
        prompt, segment = self.prompt, self.segment
        assert prompt is not None

        def make() -> tuple[Tensor, Tensor]:
            if segment.layout is not None:
                index = segment.layout.positions(0)
                queries = segment.query_index(narrowed=narrows(self.config))
            else:
                real = prompt.real
                index = queries = torch.where(real, torch.arange(real.shape[1], device=real.device), -1)
            earlier = index.new_full((index.shape[0], max(0, keys - index.shape[1])), -1)
            return queries, torch.cat([earlier, index], dim=1)

        return segment.once("indices", (), make, keys)


def checkpoints(layer: nn.Module) -> bool:
    """Whether the backward pass computes this layer a second time.

    Raises:
        ValueError: it would do so on the tokens that the layer was called with, not on those that it computed.
    """
    again = layer.training and isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    if again and "__call__" in vars(GradientCheckpointingLayer):  # an earlier transformers
        raise ValueError(
            f"gradient checkpointing of transformers {transformers.__version__} would compute layers again without "
            "the policy: install transformers 5.23, or turn it off (model.gradient_checkpointing_disable())."
        )
    return again


def in_shards(module: nn.Module) -> bool:
    """Whether the module's weights are spread over processes, which gather them at a call of the module itself."""
    return isinstance(module, FSDPModule) or any(
        hasattr(weight, "ds_id") or isinstance(weight, DTensor) for weight in module.parameters()
    )


def check_whole(layer: nn.Module) -> None:
    """Raise ValueError if the layer's weights lie in shards, which only a call of the layer itself gathers."""
    if in_shards(layer):
        raise ValueError(
            'ranking="hidrop" looks into a layer before it runs, which weights in shards (ZeRO-3, FSDP2) do not allow: '
            'use ZeRO-2 or DDP, or ranking="reading".'
        )
