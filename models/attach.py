"""`attach`: puts a policy on a Hugging Face model by hooks; the model's own forward runs untouched."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import is_flash_attention_requested

from latefusion.models.cache import check_cache, is_scheduled
from latefusion.models.entry import entry_of
from latefusion.models.executor import Forward
from latefusion.models.masks import attention_window
from latefusion.models.policies.base import Decision, Policy, Prompt
from latefusion.models.probe import Probe
from latefusion.models.trace import PrefillTrace, TraceRecord
from latefusion.models.vision import VisionMask, find_vision, given_vision, vision_token_ids


def attach(model: nn.Module, policy: Policy, *, vision_mask: VisionMask | None = None) -> Attachment:
    """Put a policy on a model, in place, until `detach`.

    Args:
        model: any image-text-to-text model of Hugging Face, or that model inside PEFT; or a causal language
            model with a `vision_mask`. Wrappers (PEFT, DDP, DeepSpeed, ...) may also come later.
        policy: which vision tokens each decoder layer sees, e.g. a `VisionSchedule`.
        vision_mask: bool `[batch, prompt tokens]`, or a callable of the forward's keyword arguments (of the
            multimodal model, or of a bare language model's decoder) that returns bool `[batch, tokens]` or None;
            it replaces the search for placeholder tokens. Tokens after the prompt are text.

    Returns:
        The attachment, also a context manager that detaches at the end.

    Raises:
        ValueError: the model has one already, or has no decoder or vision tokens that this can work with, or
            the policy does not fit it.
    """
    return Attachment(model, policy, vision_mask)


class Attachment:
    """A policy on a model. A deep copy of the model carries its own (`attached(copy)`), with the same policy."""

    def __init__(self, model: nn.Module, policy: Policy, vision_mask: VisionMask | None):
        self.model = _hugging_face_model(model)
        self.decoder = _decoder(self.model)
        self.multimodal: PreTrainedModel = self.model.base_model
        if self.multimodal is self.decoder and vision_mask is None:
            raise ValueError(
                f"{type(self.model).__name__} is a language model, which cannot tell vision tokens; pass vision_mask."
            )
        if vision_mask is None and not vision_token_ids(self.multimodal.config):
            raise ValueError(
                f"{type(self.multimodal.config).__name__} has neither image_token_id nor video_token_id; "
                "pass vision_mask."
            )
        policy.validate(len(self.decoder.layers))
        self.policy, self.vision_mask = policy, vision_mask
        self._queries: Tensor | None = None
        self._vision: Tensor | None = None  # of the running forward, bool [B, T]
        self._padding: Tensor | None = None  # its 2-D attention mask
        self._forward: Forward | None = None
        self._probe: Probe | None = None
        self._last: PrefillTrace | None = None
        self._handles = list(self._install())

    # ---------------------------------------------------------------- public

    @contextmanager
    def using(self, policy: Policy) -> Iterator[Attachment]:
        """Another policy for the forwards inside."""
        policy.validate(len(self.decoder.layers))
        before, self.policy = self.policy, policy
        try:
            yield self
        finally:
            self.policy = before

    @contextmanager
    def queries(self, index: Tensor) -> Iterator[Attachment]:
        """Score vision tokens by these rows for the forwards inside, not by the last token of each sample.

        Args:
            index: int64 `[B, Q]`, positions in the (padded) rows; in training, of the tokens that an answer
                follows.
        """
        if index.dim() != 2 or index.dtype != torch.long or index.shape[1] == 0:
            raise ValueError(
                f"queries must be int64 [batch, rows], not {index.dtype} with shape {tuple(index.shape)}."
            )
        before, self._queries = self._queries, index
        try:
            yield self
        finally:
            self._queries = before

    @property
    def trace(self) -> list[TraceRecord]:
        """What happened in the last prefill, one record a sample."""
        return [] if self._last is None else self._last.records()

    def detach(self) -> None:
        """Give the model back as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    # ---------------------------------------------------------------- hooks, in the order of a forward

    def _install(self) -> Iterator[RemovableHandle]:
        decoder = self.decoder
        if self.multimodal is not decoder:
            yield self.multimodal.register_forward_pre_hook(self._before_multimodal, with_kwargs=True)
            yield self.multimodal.register_forward_hook(self._after_multimodal, always_call=True)
        yield decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        deepstack = "deepstack_visual_embeds" in inspect.signature(decoder.forward).parameters
        for i, layer in enumerate(decoder.layers):
            yield layer.register_forward_pre_hook(partial(self._before_layer, i), with_kwargs=True)
            if deepstack:
                yield layer.register_forward_hook(self._after_layer)
        yield decoder.norm.register_forward_pre_hook(self._before_norm)
        yield decoder.register_forward_hook(self._after_decoder, always_call=True)

    def _before_multimodal(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._look(module, _named(module, args, kwargs))

    def _look(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Find the vision tokens of the forward, and refuse what cannot work, before anything is computed."""
        if self.vision_mask is not None:
            self._vision = given_vision(self.vision_mask, arguments)
        else:
            self._vision = find_vision(self.multimodal, arguments)
        mask = arguments.get("attention_mask")
        self._padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if self._vision is not None:
            check_cache(arguments.get("past_key_values"))

    def _after_multimodal(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._vision = self._padding = None

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments = _named(module, args, kwargs)
        if self.multimodal is self.decoder:
            self._look(module, arguments)
        cache, entry = arguments.get("past_key_values"), entry_of(self.model)
        touched = is_scheduled(cache)
        if (
            self._vision is None
            and entry is None
            and not touched
            and cache is not None
            and cache.get_seq_length()
        ):
            return  # a decode step under a policy that removed nothing
        tokens = arguments.get("inputs_embeds")
        tokens = arguments["input_ids"] if tokens is None else tokens
        batch, length = tokens.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        prompt = self._prompt(batch, length, tokens.device)
        window = attention_window(self.decoder.config)
        local = window is not None and past + length > window
        config = self.decoder.config
        if local and (prompt is not None or touched) and is_flash_attention_requested(config):
            raise ValueError(
                f"flash attention counts its sliding window of {window} over the tokens that are left, not over all "
                f'{past + length}: load the model with attn_implementation="sdpa".'
            )
        decision = None if prompt is None else self.policy.begin(prompt)
        mask = arguments.get("attention_mask")
        record = arguments.get("output_hidden_states", config.output_hidden_states)
        forward = Forward(
            config=config,
            length=length,
            past=past,
            plain=past == 0 and not local and isinstance(mask, Tensor) and mask.dim() == 2,
            prompt=prompt,
            decision=decision,
            entry=entry,
            record=bool(record) or record == 0,
        )
        if prompt is not None:
            assert decision is not None
            check_cache(cache)
            self._last = PrefillTrace(prompt, decision, forward.selections)
            if decision.watch:
                self._probe = Probe(
                    implementation=config._attn_implementation,
                    watched={layer.self_attn: i for i, layer in enumerate(self.decoder.layers)},
                    decision=decision,
                    indices=forward.indices,
                    replayed=torch.is_grad_enabled() and any(map(_checkpoints, self.decoder.layers)),
                )
        elif past == 0:
            self._last = None
        self._forward = forward

    def _before_layer(self, i: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return None if self._forward is None else self._forward.enter_layer(i, layer, args, kwargs)

    def _after_layer(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return None if self._forward is None else self._forward.leave_layer(output)

    def _before_norm(self, module: nn.Module, args: tuple) -> tuple | None:
        return None if self._forward is None else (self._forward.finish(args[0]), *args[1:])

    def _after_decoder(self, module: nn.Module, args: tuple, output: Any) -> Any:
        forward, self._forward = self._forward, None
        if self._probe is not None:
            self._probe.close()
            self._probe = None
        if self.multimodal is self.decoder:
            self._vision = self._padding = None
        if forward is not None and forward.record and forward.segments and output is not None:
            if output.hidden_states is not None:
                output.hidden_states = forward.expand_recorded(output.hidden_states, output.last_hidden_state)
        return None

    # ---------------------------------------------------------------- what a policy may know

    def _prompt(self, batch: int, length: int, device: torch.device) -> Prompt | None:
        """The prompt of this forward, None if it brings no vision tokens. The only host sync of a prefill."""
        if self._vision is None:
            return None
        if self._padding is None:
            real = torch.ones(batch, length, dtype=torch.bool, device=device)
        else:
            real = self._padding[:, -length:].to(device=device, dtype=torch.bool)
        vision = self._vision.to(device) & real
        n_vision, n_real = torch.stack([vision.sum(1), real.sum(1)]).tolist()
        if not any(n_vision):
            return None
        queries = self._queries
        if queries is None:
            queries = length - 1 - real.int().flip(1).argmax(1, keepdim=True)  # [B, 1]
        elif queries.shape[0] != batch:
            raise ValueError(f"queries name rows for {queries.shape[0]} samples, but the batch has {batch}.")
        return Prompt(
            vision=vision,
            real=real,
            queries=queries.to(device),
            n_vision=tuple(n_vision),
            n_real=tuple(n_real),
            num_layers=len(self.decoder.layers),
        )


def attached(model: nn.Module) -> Attachment | None:
    """The attachment of a model (or of the model inside PEFT), or None."""
    for hook in _hugging_face_model(model).get_decoder()._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Attachment):
            return owner
    return None


def _hugging_face_model(model: nn.Module) -> PreTrainedModel:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a Hugging Face model; attach to the model before it is wrapped."
        )
    return inner


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
    decoder = model.get_decoder()
    if attached(model) is not None:
        raise ValueError(
            f"this {type(model).__name__} has a policy attached already; detach it, or use its `using(policy)`."
        )
    layers = getattr(decoder, "layers", None)
    fits = (
        isinstance(layers, nn.ModuleList) and hasattr(decoder, "norm") and not model.config.is_encoder_decoder
    )
    for layer in layers if fits else ():
        takes = inspect.signature(layer.forward).parameters
        fits = fits and hasattr(layer, "self_attn") and "position_embeddings" in takes
    if not fits:
        raise ValueError(
            f"{type(model).__name__} has no decoder of self-attention layers with rotary positions, which vision "
            "policies work on; use a decoder-only model such as LLaVA or Qwen2-VL."
        )
    return decoder


def _checkpoints(layer: nn.Module) -> bool:
    return isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training


def _named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    if not args:
        return kwargs
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False), **kwargs)
