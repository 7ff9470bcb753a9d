"""Where a policy reaches a model: around the forwards of its parts, which run untouched (`Around`).

Everything that belongs to one forward is held in `Running`, one for every thread, and dropped when the forward ends,
also where it is interrupted: one attached model can serve several threads.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import is_flash_attention_requested

from latefusion.models.executor.around import NOT_EXPORTED, Around
from latefusion.models.executor.attention import WATCHER, Attention, let_modules_watch
from latefusion.models.executor.cache import check_cache, is_scheduled, is_uniform
from latefusion.models.executor.forward import Forward, checkpoints, in_shards
from latefusion.models.executor.forward_checks import (
    check_flash_attention,
    check_labels,
    check_whole,
    ranks,
)
from latefusion.models.executor.frozen_rows import ReadingLayer, check_parts
from latefusion.models.executor.masks import attention_window, narrows
from latefusion.models.executor.packed import Samples
from latefusion.models.executor.prompt import (
    PromptEnd,
    earlier_tokens,
    end_of_labels,
    padding_of,
    read_prompt,
    real_tokens,
)
from latefusion.models.executor.recorded import Recorded
from latefusion.models.executor.recurrence import (
    Gaps,
    by_length,
    check_continued,
    last_norm,
    recurrence_of,
)
from latefusion.models.executor.shared_keys import reuses_keys
from latefusion.models.executor.threads import PerThread
from latefusion.models.executor.trace import PrefillTrace, TextTrace
from latefusion.models.executor.vision import VisionMask, find_vision, refuse_merged_images, vision_of_mask
from latefusion.models.policies.base import Decision, Policy, Prompt, Selection
from latefusion.models.student.entry import ENTRY

HOOKS = "_latefusion_hooks"
"""Attribute of a decoder that has a policy: its `Hooks`."""

REPLAYS = "replays"  # checkpointing may compute a layer again that read frozen tokens, outside of any forward
_LOCK = threading.Lock()


class Running:
    """The forward that a thread is in: what its hooks hand to each other."""

    def __init__(self) -> None:
        self.vision: Tensor | None = None  # bool [B, T]
        self.labels: Any = None  # of a forward with a loss
        self.padding: Tensor | None = None  # the 2-D attention mask [B, past + T], or its last T columns
        self.forward: Forward | None = None
        self.last: PrefillTrace | TextTrace | None = None  # the thread's last prefill


class Hooks:
    """What stands around the forwards of a multimodal model, its decoder and the decoder's layers, and before its norm.

    Args:
        model: the Hugging Face model.
        decoder: its decoder, which has `layers`, each with attention or a recurrence, and a last norm.
        multimodal: what calls the decoder and sees the images; the decoder itself in a bare language model.
        vision_mask: the user's own rule for what is vision, or None.
        inexact: why the decoder does not do what policies may ask for: `ranking`, `freezing` (`self_check`).
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        decoder: PreTrainedModel,
        multimodal: PreTrainedModel,
        vision_mask: VisionMask | None,
        inexact: Mapping[str, str] | None = None,
    ):
        self.model, self.decoder, self.multimodal = model, decoder, multimodal
        self.inexact = inexact or {}
        self.layers: list[nn.Module] = list(decoder.layers)  # type: ignore[arg-type]
        self.shares_keys = any(map(reuses_keys, self.layers))
        self.vision_mask = vision_mask
        self._threads = PerThread(Running)
        # threads in a forward with a state; asked first, as most decode steps have none
        self._busy: set[int] = set()
        self._watched: set[int] = set()  # those of them whose policy looks at attention
        self._readers: set[int | str] = set()  # those of them that read frozen tokens, and REPLAYS
        self._last: PrefillTrace | TextTrace | None = None  # the last prefill of any thread
        self._reading: dict[int, ReadingLayer] = {}  # of softmax layers, once a policy freezes
        self._labels_noted = False
        recurrences = [recurrence_of(layer) for layer in self.layers]
        self.attention = tuple(mixer is None for mixer in recurrences)  # per layer: it attends with a softmax
        self._takes_ids = any(map(_needs_positions, self.layers))
        self._window = attention_window(decoder.config)
        self._one_mask = self._window is None and all(self.attention)  # the layers are handed the same
        self._deepstack = bool(
            {"deepstack_visual_embeds", "deepstack_features"} & _parameters(decoder).keys()
        )
        self._handles = list(self._install())

    @property
    def _running(self) -> Running:
        return self._threads.get()

    @property
    def policy(self) -> Policy:
        """What the calling thread's forwards run under."""
        raise NotImplementedError

    @property
    def prompt_end(self) -> PromptEnd:
        """Where the calling thread's prompts end."""
        raise NotImplementedError

    def detach(self) -> None:
        """Give the model back as it was."""
        for handle in [*self._handles, *self._reading.values()]:
            handle.remove()
        for layer, attends in zip(self.layers, self.attention, strict=True):
            if attends:
                vars(layer.self_attn).pop(WATCHER, None)
        vars(self.decoder).pop(HOOKS, None)
        self._handles, self._reading = [], {}

    # ---------------------------------------------------------------- where the hooks are

    def _install(self) -> Iterator[Any]:
        decoder = self.decoder
        setattr(decoder, HOOKS, self)
        if self.model is not self.multimodal:
            yield Around(self.model, "forward", self._keep_labels)
        if self.multimodal is not decoder:
            yield Around(self.multimodal, "forward", self._run_multimodal)
        yield Around(decoder, "forward", self._run_decoder)
        for i, layer in enumerate(self.layers):
            yield Around(layer, "forward", partial(self._run_layer, i, layer), occasions=self._busy)
            mixer = recurrence_of(layer)
            if mixer is not None:
                yield Around(mixer, "forward", partial(self._recur, mixer), occasions=self._busy)
        norm = last_norm(decoder)
        assert norm is not None
        yield norm.register_forward_pre_hook(self._before_norm)

    @torch.compiler.disable  # dynamo would take one thread's number for that of all
    def _set_forward(self, forward: Forward | None) -> None:
        """The calling thread's forward begins, or ends (None)."""
        self._running.forward = forward
        thread = threading.get_ident()
        for threads, there in (
            (self._busy, forward is not None),
            (self._watched, forward is not None and forward.watch is not None),
            (self._readers, False),  # until a selection freezes
        ):
            (threads.add if there else threads.discard)(thread)

    # ---------------------------------------------------------------- the hooks, in the order of a forward

    def _keep_labels(self, stock: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The stock forward of the whole model, whose labels say where prompts end."""
        running = self._running
        running.labels = _named(self.model, args, kwargs).get("labels")
        try:
            return stock(*args, **kwargs)
        finally:
            running.labels = None

    def _run_multimodal(self, stock: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The stock forward, once its vision tokens are found."""
        self._look(self.multimodal, _named(self.multimodal, args, kwargs))
        try:
            return stock(*args, **kwargs)
        finally:
            self._running.vision = self._running.padding = None

    def _look(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Find the vision tokens of the forward, and refuse what cannot work, before anything is computed."""
        if torch.jit.is_tracing():
            raise ValueError(NOT_EXPORTED)
        running = self._running
        if self.vision_mask is not None:
            running.vision = vision_of_mask(self.vision_mask, arguments)
        else:
            running.vision = find_vision(self.multimodal, arguments)
            refuse_merged_images(running.vision, arguments)
        running.padding = padding_of(arguments.get("attention_mask"))
        if running.vision is not None:
            check_cache(arguments.get("past_key_values"))

    def _run_decoder(self, stock: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The stock forward under the policy; what it holds of it is dropped at its end, whatever ends it."""
        arguments = _named(self.decoder, args, kwargs)
        if self.multimodal is self.decoder:
            self._look(self.decoder, arguments)
        forward = None
        try:
            forward = self._begin(arguments)
            if forward is not None and self.shares_keys:
                kwargs = {**kwargs, "logits_to_keep": None}  # Gemma 4 would leave out rows between its layers
            output = stock(*args, **kwargs)
        except BaseException:
            for layer in self._reading.values():
                layer.forget()
            raise
        finally:
            if self._busy:
                self._set_forward(None)
            if self.multimodal is self.decoder:
                self._running.vision = self._running.padding = None
        if forward is not None and forward.recorded is not None and isinstance(output, ModelOutput):
            states, maps = output.get("hidden_states"), output.get("attentions")
            if states is not None:
                output["hidden_states"] = forward.recorded.hidden_states(states, output["last_hidden_state"])
            if maps is not None:
                output["attentions"] = forward.recorded.attentions(
                    maps, narrowed=narrows(self.decoder.config)
                )
        return output

    def _begin(self, arguments: dict[str, Any]) -> Forward | None:
        """The state of a forward with these arguments, set for this thread; None: nothing of ours takes part in it."""
        running = self._running
        if running.forward is not None:
            self._set_forward(None)
        cache, entry = arguments.get("past_key_values"), self.model._modules.get(ENTRY)
        past = 0 if cache is None else cache.get_seq_length()
        touched = is_scheduled(cache)
        recurrent = not all(self.attention)
        if recurrent and past:
            check_continued(cache)
        if running.vision is None and entry is not None and not _counts_on_every_process(entry):
            entry = None
        if running.vision is None and entry is None and not touched and past:
            return None  # a decode step under a policy that removed nothing
        tokens = arguments.get("inputs_embeds")
        tokens = arguments["input_ids"] if tokens is None else tokens
        batch, length = tokens.shape[:2]
        real = None  # bool [B, T]
        if running.vision is not None or not past:
            real = real_tokens(running.padding, batch, length, tokens.device)
        prompt, end, labels, samples = None, self.prompt_end, None, None
        if end.samples is not None and real is not None:
            samples = Samples(end.samples.to(tokens.device))
            real = real & (samples.number >= 0)
        if running.vision is not None and real is not None:
            vision = running.vision.to(tokens.device)
            if (
                end.queries is None
                and isinstance(running.labels, Tensor)
                and running.labels.shape == real.shape
            ):
                labels = running.labels.to(tokens.device)
                end = end_of_labels(labels, vision & real)
            prompt = read_prompt(
                vision,
                real,
                past=past,
                end=end,
                position_ids=arguments.get("position_ids") if samples is None else None,
                num_layers=len(self.layers),
                attention=self.attention if recurrent else (),
            )
        policy_prompt = prompt
        if samples is not None:
            policy_prompt = None if prompt is None else samples.prompt(prompt, end)
            real = samples.valid
        config = self.decoder.config
        local = self._window is not None and past + length > self._window
        if (prompt is not None or touched) and is_flash_attention_requested(config):
            check_flash_attention(
                self.layers[0],
                window=self._window if local else None,
                length=past + length,
                has_vision=prompt is not None,
                takes_ids=self._takes_ids,
                shares_keys=self.shares_keys,
            )
        policy = self.policy
        decision = None if policy_prompt is None else policy.begin(policy_prompt)
        if self.inexact and "ranking" in self.inexact and ranks(decision):
            raise ValueError(self.inexact["ranking"])
        if prompt is not None and self.prompt_end.queries is None and ranks(decision):
            if labels is not None or (self.model.training and torch.is_grad_enabled()):
                check_labels(policy, prompt, labels)
            if labels is not None:
                self._note_labels(policy)
        if prompt is not None and past + length < (self.prompt_end.length or 0):
            check_whole(policy, decision)
        if prompt is not None:
            check_cache(cache)
        if decision is None and entry is None and not touched:  # every token takes part in every layer
            self._note(policy_prompt, None, (), real, past)
            return None
        gaps = Gaps()
        if recurrent and prompt is not None:
            if prompt.packed or samples is not None:
                raise ValueError(
                    "several samples are packed into a row (position_ids begin again), and the recurrent layers of "
                    "this decoder would read one after the other: put them into rows of their own."
                )
            gaps = Gaps.of(prompt.real, earlier_tokens(running.padding, length, past))
        mask = arguments.get("attention_mask")
        records = [
            arguments.get(name, getattr(config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        ]
        forward = Forward(
            config=config,
            length=length,
            past=past,
            plain=past == 0 and not local and isinstance(mask, Tensor) and mask.dim() == 2,
            prompt=prompt,
            decision=decision,
            policy_prompt=policy_prompt,
            samples=samples if policy_prompt is not None else None,
            prompt_marked=self.prompt_end.queries is not None,
            entry=entry,
            enters=getattr(policy, "enter", 0),
            deepstack=_layers_before_additions(arguments),
            recorded=Recorded(self.attention)
            if any(r is not None and r is not False for r in records)
            else None,
            replayed=torch.is_grad_enabled() and any(map(checkpoints, self.layers)),
            uniform=is_uniform(cache),
            gaps=gaps,
            shares_keys=self.shares_keys,
        )
        self._set_forward(forward)
        if forward.watch is not None:
            self._let_layers_be_watched()
        self._note(
            policy_prompt,
            decision,
            () if forward.selections is None else forward.selections.steps,
            real,
            past,
        )
        return forward

    def _note(
        self,
        prompt: Prompt | None,
        decision: Decision | None,
        steps: Sequence[tuple[int, Selection]],
        real: Tensor | None,
        past: int,
    ) -> None:
        """Keep what the attachment's trace tells of a prefill."""
        if prompt is not None:
            last: PrefillTrace | TextTrace = PrefillTrace(
                prompt, decision, steps, by_question=ranks(decision)
            )
        elif real is not None and not past:
            last = TextTrace(real, len(self.layers))
        else:
            return
        self._running.last = self._last = last

    def _note_labels(self, policy: Policy) -> None:
        """Say once that the labels tell where prompts end."""
        if not self._labels_noted:
            self._labels_noted = True
            warnings.warn(
                f"{type(policy).__name__} chooses vision tokens by what comes before the first answer after an image, "
                "as the labels of this forward say; attachment.queries(index) would name other places.",
                stacklevel=2,
            )

    def _run_layer(self, i: int, layer: nn.Module, stock: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The stock layer on the tokens of its segment."""
        forward = self._threads.get().forward
        if forward is None:
            return stock(*args, **kwargs)
        if i == 0 and forward.can_rest and self._one_mask and kwargs.get("attention_mask") is None:
            self._set_forward(None)  # a decode step without a mask: no layer has anything to translate
            return stock(*args, **kwargs)
        args, kwargs = forward.enter_layer(i, layer, stock, args, kwargs)
        if forward.selections is not None and forward.selections.freezes:
            self._begin_reading(i, forward.replayed)
        output = stock(*args, **kwargs)
        if forward.segment.text is not None:
            output = self._reading[i].restore(forward.segment.text, args[0], output)
        return forward.leave_layer(i, output)

    @torch.compiler.disable
    def _begin_reading(self, i: int, replayed: bool) -> None:
        """Layer i of this thread's forward may read frozen tokens."""
        self.prepare_reading()
        self._readers.add(threading.get_ident())
        if replayed:
            self._readers.add(REPLAYS)
        if i in self._reading:
            self._reading[i].put_on_top()

    def _let_layers_be_watched(self) -> None:
        """Give attention modules their watchers, which stay until `detach`."""
        let_modules_watch()
        for i, attends in enumerate(self.attention):
            if attends and WATCHER not in vars(self.layers[i].self_attn):
                setattr(self.layers[i].self_attn, WATCHER, Watcher(self, i))

    def prepare_reading(self) -> None:
        """Let layers read frozen tokens.

        Raises:
            ValueError: they are not made of parts that allow it.
        """
        with _LOCK:
            if not self._reading:
                layers = {i: self.layers[i] for i, attends in enumerate(self.attention) if attends}
                for layer in layers.values():
                    check_parts(layer)
                self._reading = {i: ReadingLayer(layer, self._readers) for i, layer in layers.items()}
                self._let_layers_be_watched()

    def attend(self, i: int, attention: Attention, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In place of layer i's stock attention: shown to the policy, and on text rows alone over frozen tokens."""
        forward = self._threads.get().forward
        if forward is not None and forward.watch is not None:
            attention = partial(forward.attend, i, attention)
        # a layer that checkpointing computes again runs outside any forward
        reads = self._reading and (forward is None or forward.segment.text is not None)
        if reads and narrows(self.decoder.config):
            return self._reading[i].attend(attention, module, *args, **kwargs)
        return attention(module, *args, **kwargs)

    def _recur(self, mixer: Any, stock: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The stock recurrence of a layer; rows of several lengths that go on from a cache, one length at a time."""
        forward = self._threads.get().forward
        layout = None if forward is None or not forward.past else forward.segment.layout
        if layout is None or layout.valid is None:
            return stock(*args, **kwargs)
        return by_length(stock, layout, mixer.layer_idx, _named(mixer, args, kwargs))

    def _before_norm(self, module: nn.Module, args: tuple) -> tuple | None:
        forward = self._running.forward
        return None if forward is None else (forward.finish(args[0]), *args[1:])


class Watcher:
    """A layer's `WATCHER`: hands its attention to the hooks while any of them has to see it."""

    def __init__(self, hooks: Hooks, layer: int):
        self.hooks, self.layer = hooks, layer

    @property
    def awake(self) -> bool:
        """Whether any thread's attention may have to be shown to a policy, or run on some rows alone."""
        return bool(self.hooks._watched or self.hooks._readers)

    def __call__(self, attention: Attention, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.hooks.attend(self.layer, attention, module, *args, **kwargs)


def _counts_on_every_process(entry: nn.Module) -> bool:
    """Whether a forward without vision tokens has to run the entry adapter, for its gradients or its shards."""
    return torch.is_grad_enabled() or in_shards(entry)


def _needs_positions(layer: Any) -> bool:
    """Whether attention computes with position_ids: others take them for flash attention alone, and do without."""
    if recurrence_of(layer) is not None:
        return False
    ids = _parameters(layer.self_attn).get("position_ids")
    return ids is not None and ids.default is inspect.Parameter.empty


def _layers_before_additions(arguments: Mapping[str, Any]) -> frozenset[int]:
    """Layers after which the model itself adds image features to the hidden states of all tokens (deepstack)."""
    after = range(len(arguments.get("deepstack_visual_embeds") or ()))
    before = arguments.get("deepstack_features") or ()  # Granite 4's, by the layer that gets them
    return frozenset([*after, *(layer - 1 for layer in before)])


def _parameters(module: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


def _named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    if not args:
        return kwargs
    return dict(zip(_parameters(module), args, strict=False), **kwargs)
