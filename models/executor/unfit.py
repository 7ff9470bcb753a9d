"""Why no policy can be carried out on a model: the reason, before anything is computed."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel

from latefusion.models.executor.cache import SUPPORTED, UNCHANGED
from latefusion.models.executor.recurrence import mixer_of

CROSS = re.compile(r"crossattention|CrossAttention")  # in the name of a module or of its class


def reason_unfit(model: PreTrainedModel, decoder: Any) -> str:
    """One sentence for a model whose decoder is not a list of layers that mix tokens in a known way."""
    name, kind = type(model).__name__, type(decoder).__name__
    if model.config.is_encoder_decoder:
        return (
            f"{name} is an encoder-decoder model: its text reads the image through cross-attention, so there are no "
            "vision tokens among the decoder's to remove; use a decoder-only model such as LLaVA or Qwen2-VL."
        )
    inner = getattr(decoder, "get_decoder", lambda: decoder)()
    if inner is not decoder and isinstance(inner, nn.Module):  # a language model inside of the model
        decoder, kind = inner, type(inner).__name__
    layers = getattr(decoder, "_modules", {}).get("layers")
    if not isinstance(layers, nn.ModuleList):
        reasons = (counted_rows(module) for module in decoder.modules())
        scaled = next((reason for reason in reasons if reason is not None), None)
        if scaled is not None:
            return scaled
        return f"{name} has no decoder with a list `layers` for a policy to work between (its decoder is {kind})."
    i, layer = next(((i, layer) for i, layer in enumerate(layers) if mixer_of(layer) is None), (0, None))
    if layer is None:
        return f"{name} keeps its decoder ({kind}) inside of another model, where no policy has been tried."
    return (
        f"layer {i} of {kind}, {type(layer).__name__}, mixes tokens in none of the known ways (self_attn, "
        f"linear_attn, conv) but has {', '.join(dict(layer.named_children()))}: what it does without some "
        "tokens has not been shown exact."
    )


def check_reads_its_images(model: PreTrainedModel, decoder: Any) -> None:
    """Raise ValueError if the decoder has no vision tokens of its own, or nothing says which they are."""
    if model.config.is_encoder_decoder:
        return  # for its own reason
    if "qformer" in model.base_model._modules:
        raise ValueError(
            f"{type(model).__name__}.generate hands its language model embeddings alone, where nothing says which of "
            "them are vision tokens: use a model that writes token by token itself, such as LLaVA or Qwen2-VL."
        )
    reader = next(
        (part for name, part in decoder.named_modules() if CROSS.search(f"{name} {type(part).__name__}")),
        None,
    )
    if reader is not None:
        raise ValueError(
            f"{type(model).__name__} reads what it is shown through cross-attention ({type(reader).__name__}), so "
            "there are no vision tokens among the decoder's to remove; use a model whose images are tokens, such as "
            "LLaVA or Qwen2-VL."
        )


def counted_rows(layer: nn.Module) -> str | None:
    """Why no policy can be carried out on a layer whose attention counts rows (Llama 4's); None for others.

    From 8,192 tokens on its scales grow, which no try on a few tokens shows.
    """
    attention = layer._modules.get("self_attn")
    if not getattr(attention, "attn_temperature_tuning", False):
        return None
    return (
        f"{type(attention).__name__} scales its queries by the number of a row among those that it is handed "
        "(attn_temperature_tuning), not by its position: no policy can be carried out on it yet."
    )


def check_stepwise(decoder: Any) -> None:
    """Raise ValueError if a decoder does not write token by token, on a cache whose layers may hold fewer tokens."""
    takes = inspect.signature(decoder.forward).parameters
    if not {"inputs_embeds", "past_key_values"} <= takes.keys() or "encoder_hidden_states" in takes:
        raise ValueError(
            f"{type(decoder).__name__} does not write token by token on embeddings and a cache of its own, which a "
            "policy needs; use a decoder-only model such as LLaVA or Qwen2-VL."
        )
    kinds = {type(layer) for layer in DynamicCache(config=decoder.config).layers}
    unknown = sorted(kind.__name__ for kind in kinds - set(SUPPORTED) - UNCHANGED)
    if unknown:
        raise ValueError(
            f"{type(decoder).__name__} keeps more than keys and values, or not all of them, in its cache "
            f"({', '.join(unknown)}): what it attends to without some tokens has not been shown exact, so no policy "
            "can be carried out on it yet."
        )
