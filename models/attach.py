"""`attach`: puts a policy on a Hugging Face model, in place."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latefusion.models.executor.around import Around
from latefusion.models.executor.cache import is_scheduled
from latefusion.models.executor.forward import TOKEN_TYPES
from latefusion.models.executor.hooks import HOOKS, Hooks
from latefusion.models.executor.prompt import PromptEnd
from latefusion.models.executor.recurrence import check_recurrence, mixer_of, recurrence_of
from latefusion.models.executor.trace import PrefillTrace, TextTrace, TraceRecord
from latefusion.models.executor.unfit import (
    check_reads_its_images,
    check_stepwise,
    counted_rows,
    reason_unfit,
)
from latefusion.models.executor.vision import VisionMask, vision_token_ids
from latefusion.models.inputs import unwrapped
from latefusion.models.policies.base import Policy
from latefusion.models.self_check import check_decoder, is_shown
from latefusion.models.student.entry import check_entry


def attach(
    model: nn.Module, policy: Policy, *, vision_mask: VisionMask | None = None, check: bool = True
) -> Attachment:
    """Put a policy on a model, in place, until `detach`.

    Outputs keep their shapes. What stands at a vision token is meaningful as long as the token takes part: a
    logit or a hidden state after it left is the last it had (a label must not be predicted from there).

    Args:
        model: any image-text-to-text model of Hugging Face, or that model inside PEFT; or a causal language
            model with a `vision_mask`. Wrappers (PEFT, DDP, DeepSpeed) may come later.
        policy: which vision tokens each decoder layer sees, e.g. a `VisionSchedule`.
        vision_mask: replaces the search for placeholder tokens: bool `[batch, prompt tokens]`, or a callable
            of the forward's keyword arguments (the multimodal model's; a bare language model's decoder's)
            that returns bool `[batch, tokens]` or None. Tokens after the prompt are text.
        check: try a decoder that docs/families.md does not show exact on a dozen tokens, here and now, and refuse it
            if its text comes out differently than under masks. False: trust it.

    Returns:
        The attachment, also a context manager that detaches at its end.

    Raises:
        ValueError: the model has a policy already, or has no decoder or no vision tokens that this can work
            with, or the policy does not fit it; or it is a student without its entry adapter; or its decoder is not
            exact, or cannot be tried.
    """
    inner = _hugging_face_model(model)
    if attached(inner) is not None:
        raise ValueError(
            f"{type(inner).__name__} has a policy already: detach it, or use its `using(policy)`."
        )
    decoder, multimodal = _decoder(inner), inner.base_model
    if vision_mask is None and not vision_token_ids(multimodal.config):
        raise ValueError(
            f"{type(inner).__name__} has no image_token_id or video_token_id to tell vision tokens by: "
            "pass vision_mask."
        )
    if not (vision_mask is None or isinstance(vision_mask, Tensor) or callable(vision_mask)):
        raise ValueError(
            f"vision_mask is a {type(vision_mask).__name__}; pass a bool tensor [batch, prompt tokens], or a callable "
            "of the forward's arguments that returns one."
        )
    _check_policy(inner, policy, len(decoder.layers))  # type: ignore[arg-type]
    return Attachment(
        model=inner,
        decoder=decoder,
        multimodal=multimodal,
        policy=policy,
        vision_mask=vision_mask,
        inexact=check_decoder(decoder) if check and not is_shown(decoder) else {},
    )


@dataclass(eq=False)
class Scope:
    """What holds inside `using` and `queries`, and inside `generate`: the policy, and where prompts end."""

    policy: Policy
    end: PromptEnd = field(default_factory=PromptEnd)
    outer: Scope | None = None  # None: outside of all
    ended: bool = False


class Attachment(Hooks):
    """A policy on a model. A deep copy of the model has its own, with the same policy: `attached(copy)`.

    Several threads may use one attached model at a time. `using` and `queries` hold in the thread (or asyncio task)
    that entered them: a thread that is started inside runs under the attached policy.
    """

    def __init__(self, *, policy: Policy, **parts: Any):
        self._scope = Scope(policy)
        self._scopes: ContextVar[Scope | None] = ContextVar("scope", default=None)
        super().__init__(**parts)
        try:
            self._prepare(policy)
        except ValueError:
            self.detach()
            raise
        if hasattr(self.model, "generate"):
            self._handles.append(Around(self.model, "generate", self._generate))

    @property
    def policy(self) -> Policy:
        """What the forwards of this thread run under."""
        return self._here.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        """Replace the attached policy, outside of every `using`."""
        self._scope = replace(self._scope, policy=policy)

    @property
    def _here(self) -> Scope:
        return self._scopes.get() or self._scope

    @property
    def prompt_end(self) -> PromptEnd:
        return self._here.end

    @contextmanager
    def using(self, policy: Policy) -> Iterator[Attachment]:
        """Another policy for the forwards inside."""
        _check_policy(self.model, policy, len(self.layers))
        self._prepare(policy)
        with self._inside(policy=policy):
            yield self

    def _prepare(self, policy: Policy) -> None:
        if getattr(policy, "freezes", False):
            self.prepare_reading()
            if "freezing" in self.inexact:
                raise ValueError(self.inexact["freezing"])

    @contextmanager
    def queries(
        self, index: Tensor, answers: Tensor | None = None, samples: Tensor | None = None
    ) -> Iterator[Attachment]:
        """Say where prompts end in the forwards inside, if not at the last token of each sample.

        Args:
            index: int64 `[B, Q]`, positions in the (padded) rows: the tokens that an answer follows; -1 fills rows
                with fewer of them. Of a sample without any, a keep of a `VisionSchedule` removes nothing.
            answers: bool `[B, T]`, the answers' tokens where several turns follow each other: no policy may
                choose vision tokens by them. None: what comes before the last query is prompt.
            samples: int64 `[B, T]`, where several samples are packed into a row: the number of each token's sample,
                from 0 over the whole batch, -1 for padding. Their `position_ids` must begin again with each. The policy
                then treats each sample as it would in a row of its own. None: a row is a sample.
        """
        if not isinstance(index, Tensor):
            raise ValueError(f"queries must be an int64 tensor [batch, rows], not a {type(index).__name__}.")
        if index.dim() != 2 or index.dtype != torch.long:
            raise ValueError(
                f"queries must be int64 [batch, rows], not {index.dtype} with shape {tuple(index.shape)}."
            )
        with self._inside(end=PromptEnd(index, answers, samples=samples)):
            yield self

    def _generate(self, stock: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The stock `generate`; `detach` in another thread waits for its end."""
        thread = threading.get_ident()
        if thread in self._generating:
            return self._with_prompt(stock, args, kwargs)
        self._generating.add(thread)
        try:
            if not self._ending:
                return self._with_prompt(stock, args, kwargs)
        finally:
            self._generating.discard(thread)
        return stock(*args, **kwargs)

    def _with_prompt(self, stock: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The stock `generate`: tokens behind its inputs, drafted or generated, choose no vision tokens."""
        if is_scheduled(kwargs.get("past_key_values")) and getattr(self.last, "by_question", False):
            warnings.warn(
                "past_key_values hold only the vision tokens that an earlier question needed, and this one may need "
                "others: to read the image again, call generate with the whole conversation, its images and no "
                'past_key_values (docs/inference.md, "A second question").',
                stacklevel=4,
            )
        inputs = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
        lengths = [tokens.shape[1] for tokens in inputs if isinstance(tokens, Tensor) and tokens.dim() > 1]
        if not lengths or self.prompt_end.queries is not None:
            return stock(*args, **kwargs)
        with self._inside(end=PromptEnd(length=max(lengths))):
            return stock(*args, **kwargs)

    @contextmanager
    def _inside(self, **changes: Any) -> Iterator[None]:
        outer = self._scopes.get()
        scope = replace(self._here, outer=outer, **changes)
        self._scopes.set(scope)
        try:
            yield
        finally:
            scope.ended, innermost = True, self._scopes.get()
            last = innermost
            while last is not None and last.ended:
                last = last.outer
            self._scopes.set(last)
            if (
                innermost is not scope
            ):  # a generator that was left half-way, or that another thread goes on with
                raise RuntimeError(
                    "`using` and `queries` ended in another order, thread or task than they began, so a forward may "
                    "have run under another policy: put them around calls of the model, not around a yield."
                )

    @property
    def last(self) -> PrefillTrace | TextTrace | None:
        """The last prefill: this thread's, or if it has run none, any thread's."""
        return self._running.last or self._last

    @property
    def trace(self) -> list[TraceRecord]:
        """What happened in the last prefill (this thread's, if it ran one), one record a sample."""
        return [] if self.last is None else self.last.records()

    @property
    def sizes(self) -> list[tuple[list[int], list[int]]]:
        """For each sample of the last prefill, the tokens that enter each layer (text and vision), and how many of
        them are only read; cheaper than `trace`."""
        return [] if self.last is None else self.last.sizes()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name != "_scopes"
        }  # it belongs to this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._scopes = ContextVar("scope", default=None)
        for threads in (self._busy, self._watched, self._generating):  # of the original
            threads.clear()


def attached(model: nn.Module) -> Attachment | None:
    """The attachment of a model (or of the model inside PEFT), or None."""
    attachment: Attachment | None = vars(_hugging_face_model(model).get_decoder()).get(HOOKS)
    return attachment


def _check_policy(model: PreTrainedModel, policy: Policy, num_layers: int) -> None:
    """Raise ValueError if the policy does not fit, or needs an entry adapter that the model has lost."""
    if isinstance(policy, type) or not hasattr(policy, "begin"):
        raise ValueError(
            f"policy={policy!r} is no policy; give an object such as policies.named('fastv') or VisionSchedule(exit=8)."
        )
    policy.validate(num_layers)
    attention = [recurrence_of(layer) is None for layer in model.get_decoder().layers]
    check_attention = getattr(policy, "check_attention", None)
    if check_attention is not None and not all(attention):
        check_attention(attention)
    if getattr(policy, "enter", 0) > 0:
        check_entry(model)


def _hugging_face_model(model: nn.Module) -> PreTrainedModel:
    inner: object = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a Hugging Face model; attach to the model before it is wrapped."
        )
    return inner


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder, once it is sure that hooks on its layers can work."""
    decoder = model.get_decoder()
    layers = decoder._modules.get("layers")
    fits = isinstance(layers, nn.ModuleList) and not model.config.is_encoder_decoder
    check_reads_its_images(model, decoder)
    root = next((name for name, module in model.named_modules() if module is layers), "")
    placed = vars(model).get(
        "hf_device_map", {}
    )  # module -> where accelerate computes it, or keeps its weights
    devices = {
        str(device)
        for name, device in placed.items()
        if (root.startswith(name) or name.startswith(root)) and device not in ("cpu", "disk")
    }
    if len(devices) > 1:
        raise ValueError(
            f"the decoder's layers are on several devices ({', '.join(sorted(devices))}), where no policy can follow: "
            'load the model on one, with device_map={"": 0}; weights on "cpu" or "disk" are fine.'
        )
    for layer in layers if fits else ():  # type: ignore[union-attr]
        fits = fits and mixer_of(layer) is not None
        if fits:
            check_arguments(layer)
            check_recurrence(layer)
    if not fits:
        raise ValueError(reason_unfit(model, decoder))
    check_stepwise(decoder)
    return decoder


HANDED_ON = {
    "hidden_states",
    "attention_mask",
    "position_embeddings",
    "position_ids",
    "past_key_values",
    "past_key_value",
    "cache_position",  # older code's
    "use_cache",
    "output_attentions",
    "output_router_logits",
    "per_layer_input",
    "shared_kv_states",
    TOKEN_TYPES,
}
"""Arguments of a decoder layer that the executor translates, or that say nothing of single tokens."""


def check_arguments(layer: Any) -> None:
    """Raise ValueError if a decoder layer takes more of every token than the executor hands on."""
    config = getattr(mixer_of(layer), "config", None)
    if getattr(config, "num_kv_shared_layers", 0) and not hasattr(layer.self_attn, "is_kv_shared_layer"):
        raise ValueError(
            f"{type(layer).__name__} shares keys and values between layers in a way that has not been tested: no "
            "policy can be carried out on it yet."
        )
    reason = counted_rows(layer)
    if reason is not None:
        raise ValueError(reason)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for name, parameter in inspect.signature(layer.forward).parameters.items():
        if name == "conv_mask":
            raise ValueError(
                f"{type(layer).__name__} runs convolutions over neighbouring tokens beside its attention (conv_mask): "
                "what they make of a text without some tokens has not been shown exact, so no policy can be carried "
                "out on it yet."
            )
        if name not in HANDED_ON and parameter.kind not in kinds:
            raise ValueError(
                f"{type(layer).__name__} takes {name}, which would have to follow the tokens that stay: no policy can "
                "be carried out on it yet."
            )
