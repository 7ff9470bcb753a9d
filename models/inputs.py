"""Helpers around a model's inputs: unwrap PEFT, encode images once, copy inputs for a forward, stop tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}  # the model's inputs, by kind


def unwrapped(model: nn.Module) -> Any:
    """The Hugging Face model inside PEFT's wrapper, or the model itself if it is not wrapped."""
    get_base: Any = getattr(model, "get_base_model", None)
    return model if get_base is None else get_base()


def encode_images(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the pixels of images and videos by the features that the decoder receives, encoded once.

    Args:
        model: an image-text model, with or without PEFT's wrapper.
        inputs: the model's keyword arguments; without pixels they are returned as they are.

    Returns:
        The inputs with `mm_encoder_outputs` in place of pixels; the grids stay, M-RoPE needs them.
    """
    return with_features(unwrapped(model).base_model, inputs)


def with_features(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Replace pixels by features (`encode_images`), computed by the modules of `model` itself."""
    encoded = {kind: vision_features(model, inputs, kind) for kind, name in PIXELS.items() if name in inputs}
    if not encoded:
        return dict(inputs)
    rest = {name: value for name, value in inputs.items() if name not in PIXELS.values()}
    return {**rest, "mm_encoder_outputs": encoded}


def vision_features(model: Any, inputs: Mapping[str, Any], kind: str = "image") -> Any:
    """Call `model.get_image_features` (or `get_video_features`) with those of the inputs that it takes.

    What goes into the decoder is its `pooler_output`.
    """
    method = f"get_{kind}_features"
    encoder = getattr(
        unwrapped(model).base_model, method
    )  # FSDP2 hides the arguments of its own, outer method
    names = [name for name in inspect.signature(encoder).parameters if name in inputs]
    return getattr(model, method)(**{name: inputs[name] for name in names}, return_dict=True)


def fresh_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the inputs for one forward or `generate`, which may write into `mm_encoder_outputs`."""
    if "mm_encoder_outputs" not in inputs:
        return dict(inputs)
    return {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}


def stop_ids(generation_config: Any) -> list[int]:
    """The ids of the tokens at which `generate` stops."""
    stop = generation_config.eos_token_id
    return [] if stop is None else [stop] if isinstance(stop, int) else list(stop)


def stop_tokens(generation_config: Any, processor: Any) -> list[str]:
    """The tokens at which `generate` stops, as the collator takes them."""
    return processor.tokenizer.convert_ids_to_tokens(stop_ids(generation_config))
