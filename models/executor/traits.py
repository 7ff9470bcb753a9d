"""`DecoderTraits`: what is fixed about a decoder, read once when a policy is attached to it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from latefusion.models.executor.masks import attention_window
from latefusion.models.executor.recurrence import recurrence_of
from latefusion.models.executor.shared_keys import reuses_keys


class DecoderTraits:
    """A decoder's properties, the same in every forward.

    Attributes:
        layers: its layers.
        attention: per layer, whether it attends with a softmax; others run a recurrence.
        recurrent: whether any layer runs a recurrence.
        shares_keys: whether any layer attends to the keys of a layer before (`shared_keys.py`).
        takes_ids: whether any layer's attention computes with position_ids.
        window: tokens that its local attention layers look back; None: every layer sees everything.
        one_mask: whether all layers are handed the same mask.
    """

    def __init__(self, decoder: PreTrainedModel):
        self.layers: list[nn.Module] = list(decoder.layers)  # type: ignore[arg-type]
        self.attention = tuple(recurrence_of(layer) is None for layer in self.layers)
        self.recurrent = not all(self.attention)
        self.shares_keys = any(map(reuses_keys, self.layers))
        self.takes_ids = any(map(_needs_positions, self.layers))
        self.window = attention_window(decoder.config)
        self.one_mask = self.window is None and not self.recurrent


def parameters_of(module: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a module's forward, by name."""
    return inspect.signature(module.forward).parameters


def arguments_by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's call, by name."""
    if not args:
        return kwargs
    return dict(zip(parameters_of(module), args, strict=False), **kwargs)


@cache
def positional(kind: type) -> tuple[str, ...]:
    """What a layer of this class can be handed by position, by name; a subclass may hand all of it on (`*args`)."""
    for base in kind.__mro__:
        forward = vars(base).get("forward")
        takes = {} if forward is None else inspect.signature(forward).parameters
        if takes and inspect.Parameter.VAR_POSITIONAL not in {p.kind for p in takes.values()}:
            return tuple(takes)[1:]  # without self
    raise AssertionError(f"{kind.__name__} has no forward")


def layers_before_additions(arguments: Mapping[str, Any]) -> frozenset[int]:
    """Layers after which the model itself adds image features to the hidden states of all tokens (deepstack)."""
    after = range(len(arguments.get("deepstack_visual_embeds") or ()))
    before = arguments.get("deepstack_features") or ()  # Granite 4's, by the layer that gets them
    return frozenset([*after, *(layer - 1 for layer in before)])


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


def runs_on_every_process(entry: nn.Module) -> bool:
    """Whether a forward without vision tokens has to run the entry adapter, for its gradients or its shards."""
    return torch.is_grad_enabled() or in_shards(entry)


def _needs_positions(layer: Any) -> bool:
    """Whether attention computes with position_ids: others take them for flash attention alone, and do without."""
    if recurrence_of(layer) is not None:
        return False
    ids = parameters_of(layer.self_attn).get("position_ids")
    return ids is not None and ids.default is inspect.Parameter.empty
