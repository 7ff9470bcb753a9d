"""Where a policy reaches a model: around the forwards of its parts, which run untouched (`Around`).

Everything that belongs to one forward is held in `Running`, one for every thread, and dropped when the forward ends,
also where it is interrupted: one attached model can serve several threads.
"""

from __future__ import annotations

import threading
import time
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
from latefusion.models.executor.entering import Entering
from latefusion.models.executor.forward import Forward
from latefusion.models.executor.forward_checks import (
    check_flash_attention,
    check_prompt,
    check_recurrence_takes,
    ranks,
)
from latefusion.models.executor.frozen_rows import ReadingLayer, check_parts
from latefusion.models.executor.masks import narrows
from latefusion.models.executor.prompt import PromptEnd, earlier_tokens, padding_of
from latefusion.models.executor.recorded import Recorded
from latefusion.models.executor.recurrence import (
    Gaps,
    by_length,
    check_continued,
    recurrence_of,
)
from latefusion.models.executor.threads import PerThread
from latefusion.models.executor.tokens import Tokens, read_tokens
from latefusion.models.executor.trace import PrefillTrace, TextTrace
from latefusion.models.executor.traits import (
    DecoderTraits,
    arguments_by_name,
    checkpoints,
    layers_before_additions,
    positional,
    runs_on_every_process,
)
from latefusion.models.executor.vision import (
    VisionMask,
    find_vision,
    refuse_merged_images,
    refuse_missing_pixels,
    vision_of_mask,
)
from latefusion.models.policies.base import Decision, Policy, Selection
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
    """The hooks of one attached model: around its forward, its decoder's, and each layer's.

    Args:
        model: the Hugging Face model.
        decoder: its decoder, which has `layers`, each with attention or a recurrence.
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
        self.traits = DecoderTraits(decoder)
        self.layers, self.vision_mask = self.traits.layers, vision_mask
        self._threads = PerThread(Running)
        # threads in a forward with a state; asked first, as most decode steps have none
        self._busy: set[int] = set()
        self._watched: set[int] = set()  # those of them whose policy looks at attention
        self._readers: set[int | str] = set()  # those of them that read frozen tokens, and REPLAYS
        self._generating: set[int] = set()  # threads in `generate`
        # `detach` waits for other threads; forwards that begin now run without the policy
        self._ending = False
        self._last: PrefillTrace | TextTrace | None = None  # the last prefill of any thread
        self._reading: dict[int, ReadingLayer] = {}  # of softmax layers, once a policy freezes
        self._labels_noted = False
        self._watchers_set = False
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
        """Give the model back as it was; forwards and generations of other threads end under the policy first.

        Raises:
            RuntimeError: it is called inside of this thread's `generate`, whose cache stock layers cannot go on with.
        """
        thread = threading.get_ident()
        if thread in self._generating:
            raise RuntimeError("detach was called inside of generate: call it once generate has ended.")
        self._ending = True
        while ((self._busy | self._generating) - {thread}) & {t.ident for t in threading.enumerate()}:
            time.sleep(0.001)
        for handle in [*self._handles, *self._reading.values()]:
            handle.remove()
        for layer, attends in zip(self.layers, self.traits.attention, strict=True):
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
        running.labels = arguments_by_name(self.model, args, kwargs).get("labels")
        try:
            return stock(*args, **kwargs)
        finally:
            running.labels = None

    def _run_multimodal(self, stock: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The stock forward, once its vision tokens are found."""
        self._look(self.multimodal, arguments_by_name(self.multimodal, args, kwargs))
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
            refuse_missing_pixels(self.multimodal, running.vision, arguments, self.prompt_end.length)
        running.padding = padding_of(arguments.get("attention_mask"))
        if running.vision is not None:
            check_cache(arguments.get("past_key_values"))

    def _run_decoder(self, stock: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The stock forward under the policy; what it holds of it is dropped at its end, whatever ends it."""
        arguments = arguments_by_name(self.decoder, args, kwargs)
        if self.multimodal is self.decoder:
            self._look(self.decoder, arguments)
        forward = None
        try:
            forward = self._begin(arguments)
            if forward is not None and self.traits.shares_keys:
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
        """Set the state of a forward with these arguments for this thread; None: nothing of ours takes part in it."""
        running, traits, config = self._running, self.traits, self.decoder.config
        if running.forward is not None:
            self._set_forward(None)
        cache, entry = arguments.get("past_key_values"), self.model._modules.get(ENTRY)
        past = 0 if cache is None else cache.get_seq_length()
        touched = is_scheduled(cache)
        if traits.recurrent and past:
            check_continued(cache)
        if running.vision is None and entry is not None and not runs_on_every_process(entry):
            entry = None
        if running.vision is None and entry is None and not touched and past:
            return None  # a decode step under a policy that removed nothing
        tokens = read_tokens(
            arguments,
            past=past,
            vision=running.vision,
            padding=running.padding,
            labels=running.labels,
            end=self.prompt_end,
            traits=traits,
        )
        prompt = tokens.prompt
        if (prompt is not None or touched) and is_flash_attention_requested(config):
            check_flash_attention(traits, tokens)
        decision = self._ask(tokens)
        if prompt is not None:
            check_cache(cache)
        if decision is None and entry is None and not touched:  # every token takes part in every layer
            self._note(tokens, None, ())
            return None
        gaps = Gaps()
        if traits.recurrent and prompt is not None:
            check_recurrence_takes(tokens)
            gaps = Gaps.of(prompt.real, earlier_tokens(running.padding, tokens.length, past))
        entering = None
        if entry is not None:
            first = getattr(self.policy, "enter", 0)
            entering = Entering(entry, prompt, tokens.samples, idle_before=first)
        forward = Forward(
            config=config,
            tokens=tokens,
            plain=self._is_plain(arguments.get("attention_mask"), tokens),
            decision=decision,
            entering=entering,
            full_after=layers_before_additions(arguments) | {len(self.layers) - 1},
            recorded=Recorded(traits.attention) if _records(arguments, config) else None,
            replayed=torch.is_grad_enabled() and any(map(checkpoints, self.layers)),
            uniform=is_uniform(cache),
            gaps=gaps,
            shares_keys=traits.shares_keys,
        )
        self._set_forward(forward)
        if self._ending and threading.get_ident() not in self._generating:
            self._set_forward(None)
            return None
        if forward.watch is not None:
            self._let_layers_be_watched()
        self._note(tokens, decision, () if forward.selections is None else forward.selections.steps)
        return forward

    def _ask(self, tokens: Tokens) -> Decision | None:
        """The policy's decision on a forward's vision tokens, once it is sure that the forward shows what it needs."""
        policy, prompt = self.policy, tokens.policy_prompt
        if prompt is None:
            return None
        decision = policy.begin(prompt)
        if "ranking" in self.inexact and ranks(decision):
            raise ValueError(self.inexact["ranking"])
        check_prompt(
            policy,
            decision,
            tokens,
            prompt_length=self.prompt_end.length,
            training=self.model.training and torch.is_grad_enabled(),
        )
        if tokens.labels is not None and ranks(decision):
            self._note_labels(policy)
        return decision

    def _is_plain(self, mask: Any, tokens: Tokens) -> bool:
        """Whether a forward's mask holds nothing but causal order and padding."""
        window = self.traits.window
        sees_all = window is None or tokens.length <= window
        return tokens.past == 0 and sees_all and isinstance(mask, Tensor) and mask.dim() == 2

    def _note(
        self, tokens: Tokens, decision: Decision | None, steps: Sequence[tuple[int, Selection]]
    ) -> None:
        """Keep what the attachment's trace tells of a prefill."""
        if tokens.policy_prompt is not None:
            last: PrefillTrace | TextTrace = PrefillTrace(
                tokens.policy_prompt, decision, steps, by_question=ranks(decision)
            )
        elif tokens.real is not None and not tokens.past:
            last = TextTrace(tokens.real, len(self.layers))
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
        names = positional(type(layer))[1 : len(args)] if len(args) > 1 else ()
        if names:  # Gemma 3n hands on three more by position
            kwargs = {**dict(zip(names, args[1:], strict=True)), **kwargs}
        if (
            i == 0
            and forward.uniform
            and forward.entering is None
            and self.traits.one_mask
            and kwargs.get("attention_mask") is None
        ):
            self._set_forward(None)  # a decode step without a mask: no layer has anything to translate
            return stock(args[0], **kwargs)
        states, kwargs = forward.enter_layer(i, layer, stock, args[0], kwargs)
        if forward.selections is not None and forward.selections.freezes:
            self._begin_reading(i, forward.replayed)
        # by position again: checkpointing may give gradients to such arguments alone
        output = stock(states, *(kwargs.pop(name) for name in names), **kwargs)
        if forward.segment.text is not None:
            output = self._reading[i].restore(forward.segment.text, states, output)
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
        if self._watchers_set:
            return
        let_modules_watch()
        for i, attends in enumerate(self.traits.attention):
            if attends and WATCHER not in vars(self.layers[i].self_attn):
                setattr(self.layers[i].self_attn, WATCHER, Watcher(self, i))
        self._watchers_set = True

    def prepare_reading(self) -> None:
        """Let layers read frozen tokens.

        Raises:
            ValueError: they are not made of parts that allow it.
        """
        with _LOCK:
            if not self._reading:
                layers = {i: self.layers[i] for i, attends in enumerate(self.traits.attention) if attends}
                for layer in layers.values():
                    check_parts(layer)
                self._reading = {i: ReadingLayer(layer, self._readers) for i, layer in layers.items()}
                self._let_layers_be_watched()

    def attend(self, i: int, attention: Attention, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In place of layer i's stock attention: shown to the policy, and on text rows alone over frozen tokens."""
        forward = self._threads.get().forward
        if forward is not None and forward.watch is not None and forward.watch.sees(i):
            attention = partial(forward.attend, i, attention)
        # a layer that checkpointing computes again runs outside any forward
        reads = self._reading and (forward is None or forward.segment.text is not None)
        if reads and narrows(self.decoder.config):
            return self._reading[i].attend(attention, module, *args, **kwargs)
        return attention(module, *args, **kwargs)

    def _recur(self, mixer: Any, stock: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The stock recurrence of a layer; rows of several lengths that go on from a cache, one length at a time."""
        forward = self._threads.get().forward
        layout = None if forward is None or not forward.tokens.past else forward.segment.layout
        if layout is None or layout.valid is None:
            return stock(*args, **kwargs)
        return by_length(stock, layout, mixer.layer_idx, arguments_by_name(mixer, args, kwargs))


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


def _records(arguments: Mapping[str, Any], config: Any) -> bool:
    """Whether the decoder is asked for every layer's hidden states or attention maps."""
    states = arguments.get("output_hidden_states", getattr(config, "output_hidden_states", False))
    maps = arguments.get("output_attentions", getattr(config, "output_attentions", False))
    return (states is not None and states is not False) or (maps is not None and maps is not False)
