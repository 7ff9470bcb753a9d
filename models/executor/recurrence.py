"""Layers that run a recurrence in place of softmax attention: Gated DeltaNet (Qwen3.5), short convolutions (LFM2).

Such a layer reads its tokens in their original order into a state, so it runs over the tokens of its segment and over
nothing else: text alone outside the band, all that is left inside. Padding is what it is in the stock model: states
that the attention mask sets to zero before they are read. That changes nothing in front of a row's first token, which
is where a compact layout has its padding. In rows that go on from a cache it would, so rows of one length run together
there (`by_length`); and where a batch has padding after tokens, the stock recurrence goes on over it (`Gaps`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from latefusion.models.executor.layout import Layout

MIXERS = ("linear_attn", "conv")  # what a layer calls the module that runs its recurrence
EXACT = (  # parts and parameters of the recurrences that have been shown exact
    {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "A_log", "dt_bias", "norm", "out_proj"},
    {"in_proj", "conv", "out_proj"},
)
STATES = ("conv_states", "recurrent_states")  # of a cache layer
NORMS = ("norm", "embedding_norm", "final_layernorm")  # what decoders call the norm after their last layer


def mixer_of(layer: nn.Module) -> nn.Module | None:
    """The module of a decoder layer that mixes its tokens: attention or a recurrence."""
    return next((layer._modules[name] for name in ("self_attn", *MIXERS) if name in layer._modules), None)


def recurrence_of(layer: nn.Module) -> nn.Module | None:
    """The module that runs a layer's recurrence; None if the layer attends with a softmax."""
    return None if "self_attn" in layer._modules else mixer_of(layer)


def last_norm(decoder: nn.Module) -> nn.Module | None:
    """The norm after a decoder's last layer."""
    return next((decoder._modules[name] for name in NORMS if name in decoder._modules), None)


def check_recurrence(layer: nn.Module) -> None:
    """Raise ValueError if the layer's recurrence is not one of `EXACT`.

    Also if padding in front of a row would change what it makes of the row.
    """
    mixer = recurrence_of(layer)
    if mixer is None:
        return
    if {name.partition(".")[0] for name, _ in mixer.named_parameters()} not in EXACT:
        raise ValueError(
            f"{type(mixer).__name__} runs a recurrence that has not been shown exact without some tokens; those of "
            "Qwen3.5 (Gated DeltaNet) and LFM2 (short convolutions) have."
        )
    for name, part in mixer.named_modules():
        if name != "out_proj" and isinstance(getattr(part, "bias", None), Tensor):
            raise ValueError(
                f"{name} of {type(mixer).__name__} has a bias, so the padding of a batch changes its rows, and no "
                "policy can be exact: use a model whose recurrent layers have none."
            )


@dataclass(frozen=True)
class Gaps:
    """Padding that the stock recurrence runs over.

    Attributes:
        inside: between two tokens of a row.
        behind: after a row's last token.
    """

    inside: bool = False
    behind: bool = False

    @classmethod
    def of(cls, real: Tensor, earlier: Tensor | bool) -> Gaps:
        """Find the gaps in a forward's rows, bool `[B, T]`; `earlier`: rows with tokens in the cache, bool `[B, 1]`."""
        before = (real.cumsum(1) > 0) | earlier
        after = real.flip(1).cumsum(1).flip(1) > 0
        gaps = ~real & before
        inside, behind = torch.stack([(gaps & after).any(), (gaps & ~after).any()]).tolist()
        return cls(inside, behind)

    def check(self) -> None:
        """Raise ValueError where a policy, which removes padding, would change what the recurrence makes of a row."""
        if self.inside:
            raise ValueError(
                "padding lies between the tokens of a row, and the recurrent layers of this decoder read it: pad "
                "prompts on the left, and ask a padded batch again one row at a time."
            )


def check_continued(cache: Cache | None) -> None:
    """Raise ValueError if a cache's rows ended in padding when a policy removed tokens of them."""
    if cache is not None and any(getattr(layer, "padded_behind", False) for layer in cache.layers):
        raise ValueError(
            "the rows of this cache end in padding, which the recurrent layers of this decoder read in some layers "
            "and a policy removed in others: pad prompts on the left."
        )


def by_length(stock: Callable[..., Tensor], layout: Layout, layer_idx: int, kwargs: dict[str, Any]) -> Tensor:
    """A recurrence over rows of several lengths that go on from a cache: rows of one length together, unpadded.

    Args:
        stock: the module's forward, which takes keyword arguments.
        layout: whose rows are padded on the left.
        layer_idx: of the cache.
        kwargs: of the call.
    """
    hidden_states = kwargs["hidden_states"]  # [B, n, D]
    name, cache = next((name, value) for name, value in kwargs.items() if isinstance(value, Cache))
    output = torch.zeros_like(hidden_states)
    for n in sorted({count for count in layout.counts if count}):
        rows = [b for b, count in enumerate(layout.counts) if count == n]
        index = torch.tensor(rows, device=hidden_states.device)
        part = _rows_of(cache, layer_idx, index)
        call = {**kwargs, name: part, "hidden_states": hidden_states[index, -n:], "attention_mask": None}
        output[index, -n:] = stock(**call)
        _write_back(cache.layers[layer_idx], part.layers[layer_idx], index)
    return output


def _rows_of(cache: Cache, layer_idx: int, index: Tensor) -> Cache:
    """The cache with these rows' states of one layer, which may be overwritten."""
    part, layer = copy.copy(cache), copy.copy(cache.layers[layer_idx])
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(layer, name, dict(value))
    for name in STATES:
        states = getattr(layer, name)
        states.update({i: state[index] for i, state in states.items() if state is not None})
    part.layers = [*cache.layers]
    part.layers[layer_idx] = layer
    return part


def _write_back(layer: Any, part: Any, index: Tensor) -> None:
    for name in STATES:
        for i, state in getattr(layer, name).items():
            if state is not None:
                state.index_copy_(0, index, getattr(part, name)[i].to(state.dtype))
