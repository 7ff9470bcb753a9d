"""The hooks through which a policy reaches a model; the model's own forward runs untouched."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import is_flash_attention_requested

from latefusion.models.executor.attention import Probe
from latefusion.models.executor.cache import check_cache, is_scheduled
from latefusion.models.executor.forward import Forward
from latefusion.models.executor.frozen_rows import ReadingLayer
from latefusion.models.executor.masks import attention_window
from latefusion.models.executor.trace import PrefillTrace, TextTrace
from latefusion.models.executor.vision import VisionMask, find_vision, given_vision
from latefusion.models.policies.base import Policy, Prompt
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import entry_of


class Hooks:
    """Hooks on a multimodal model, its decoder, the decoder's layers and its last norm.

    Args:
        model: the Hugging Face model.
        decoder: its decoder, which has `layers`, each with `self_attn`, and `norm`.
        multimodal: what calls the decoder and sees the images; the decoder itself in a bare language model.
        policy: carried out on every forward that brings vision tokens.
        vision_mask: the user's own rule for what is vision, or None.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        decoder: PreTrainedModel,
        multimodal: PreTrainedModel,
        policy: Policy,
        vision_mask: VisionMask | None,
    ):
        self.model, self.decoder, self.multimodal = model, decoder, multimodal
        self.layers: list[nn.Module] = list(decoder.layers)  # type: ignore[arg-type]
        self.policy, self.vision_mask = policy, vision_mask
        self._queries: Tensor | None = None  # int64 [B, Q]
        self._answers: Tensor | None = None  # bool [B, T]
        self._last: PrefillTrace | TextTrace | None = None
        # of the running forward; None between forwards
        self._vision: Tensor | None = None  # bool [B, T]
        self._padding: Tensor | None = None  # the 2-D attention mask [B, past + T], or its last T columns
        self._forward: Forward | None = None
        self._probe: Probe | None = None
        self._reading: list[ReadingLayer] = []  # once a policy freezes
        self._handles = list(self._install())

    def detach(self) -> None:
        """Give the model back as it was."""
        for handle in [*self._handles, *(handle for layer in self._reading for handle in layer.handles)]:
            handle.remove()
        self._handles, self._reading = [], []

    def _install(self) -> Iterator[RemovableHandle]:
        decoder = self.decoder
        if self.multimodal is not decoder:
            yield self.multimodal.register_forward_pre_hook(self._before_multimodal, with_kwargs=True)
            yield self.multimodal.register_forward_hook(self._after_multimodal, always_call=True)
        yield decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        deepstack = "deepstack_visual_embeds" in inspect.signature(decoder.forward).parameters
        for i, layer in enumerate(self.layers):
            yield layer.register_forward_pre_hook(partial(self._before_layer, i), with_kwargs=True)
            if deepstack:
                yield layer.register_forward_hook(partial(self._after_layer, i))
        yield decoder.get_submodule("norm").register_forward_pre_hook(self._before_norm)
        yield decoder.register_forward_hook(self._after_decoder, always_call=True)

    def _before_multimodal(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._look(module, _named(module, args, kwargs))

    def _look(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Find the vision tokens of the forward, and refuse what cannot work, before anything is computed."""
        if self.vision_mask is not None:
            self._vision = given_vision(self.vision_mask, arguments)
        else:
            self._vision = find_vision(self.multimodal, arguments)
        self._padding = padding_of(arguments.get("attention_mask"))
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
        prompt = self._prompt(batch, length, past, tokens.device)
        window = attention_window(self.decoder.config)
        local = window is not None and past + length > window
        config = self.decoder.config
        if local and (prompt is not None or touched) and is_flash_attention_requested(config):
            raise ValueError(
                f"flash attention would count its sliding window of {window} over the tokens that are left, "
                f'not over all {past + length}: load the model with attn_implementation="sdpa".'
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
            deepstack=len(arguments.get("deepstack_visual_embeds") or ()),
            record=bool(record) or record == 0,
            enters=self.policy.enter if isinstance(self.policy, VisionSchedule) else 0,
        )
        if prompt is not None:
            assert decision is not None
            check_cache(cache)
            self._last = PrefillTrace(prompt, decision, forward.selections)
            if decision.watch:
                self._probe = Probe(
                    implementation=config._attn_implementation,
                    watched={layer.self_attn: i for i, layer in enumerate(self.layers)},
                    decision=decision,
                    indices=forward.indices,
                    plain=forward.plain,
                    replayed=torch.is_grad_enabled() and any(map(_checkpoints, self.layers)),
                )
        elif past == 0:
            self._last = TextTrace(self._real(batch, length, tokens.device), len(self.layers))
        self._forward = forward

    def _before_layer(self, i: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._forward is None:
            return None
        changed = self._forward.enter_layer(i, layer, args, kwargs)
        if self._forward.freezes and not self._reading:
            self._reading = [ReadingLayer(layer, self.decoder.config) for layer in self.layers]
        return changed

    def _after_layer(self, i: int, layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return None if self._forward is None else self._forward.leave_layer(i, output)

    def _before_norm(self, module: nn.Module, args: tuple) -> tuple | None:
        return None if self._forward is None else (self._forward.finish(args[0]), *args[1:])

    def _after_decoder(self, module: nn.Module, args: tuple, output: Any) -> None:
        forward, self._forward = self._forward, None
        if self._probe is not None:
            self._probe.close()
            self._probe = None
        if self.multimodal is self.decoder:
            self._vision = self._padding = None
        if forward is None or not forward.record or not isinstance(output, ModelOutput):
            return
        states = output.get("hidden_states")
        if states is not None:
            output["hidden_states"] = forward.expand_recorded(states, output["last_hidden_state"])

    # ---------------------------------------------------------------- what a policy may know

    def _prompt(self, batch: int, length: int, past: int, device: torch.device) -> Prompt | None:
        """The prompt of this forward, None if it brings no vision tokens. The only host sync, whatever the policy."""
        if self._vision is None:
            return None
        real = self._real(batch, length, device)
        vision = self._vision.to(device) & real
        last = length - 1 - real.int().flip(1).argmax(1, keepdim=True)  # [B, 1]
        queries = last if self._queries is None else self._queries
        if queries.shape[0] != batch:
            raise ValueError(f"queries name rows for {queries.shape[0]} samples, but the batch has {batch}.")
        queries = queries.to(device)
        text = real & ~vision & (vision.cumsum(1) > 0)
        text &= torch.arange(length, device=device) <= queries.amax(1, keepdim=True)
        if self._answers is not None:
            text &= ~self._answers.to(device)
        answer = real & ~vision & ~text & (vision.cumsum(1) > 0)
        tail = text.flip(1).long().cumprod(1)  # [B, T], ones as long as a row's end is text
        cut = vision[:, :1] & bool(past)  # [B, 1], begins inside an image
        if self._queries is None:
            cut |= vision.gather(1, last)  # or ends there
        numbers = torch.stack([mask.sum(1) for mask in (vision, real, text, answer, tail, cut)]).tolist()
        n_vision, n_real, n_text, n_answer, tails, cuts = map(tuple, numbers)
        if not any(n_vision):
            return None
        return Prompt(
            vision=vision,
            real=real,
            queries=queries,
            text=text,
            n_vision=n_vision,
            n_real=n_real,
            n_text=n_text,
            n_answer=n_answer,
            tail=min(tails),
            num_layers=len(self.layers),
            piece=any(cuts),
        )

    def _real(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Which tokens of this forward are no padding, bool `[B, T]`."""
        if self._padding is None:
            return torch.ones(batch, length, dtype=torch.bool, device=device)
        return self._padding[:, -length:].to(device=device, dtype=torch.bool).expand(batch, -1)


def padding_of(mask: Any) -> Tensor | None:
    """The 2-D attention mask that a forward is given, or that its 4-D one implies; None if it has neither.

    Padding is what no token sees, itself included: under a 4-D mask `[B|1, H|1, T, L]` (bool or additive), the tokens
    whose own cell is hidden.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask
    own = mask[:, 0].diagonal(offset=mask.shape[3] - mask.shape[2], dim1=1, dim2=2)  # [B, T]
    return own > torch.finfo(own.dtype).min / 2 if own.is_floating_point() else own


def _checkpoints(layer: nn.Module) -> bool:
    return isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training


def _named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    if not args:
        return kwargs
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False), **kwargs)
