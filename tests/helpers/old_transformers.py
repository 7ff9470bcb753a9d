"""Encoded images (`mm_encoder_outputs`) for models of a transformers before 5.23, which takes pixels alone."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import transformers

TAKES_ENCODED = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
ONE_TENSOR = ("smolvlm", "idefics3")  # there


def taking_encoded(model: Any, placeholders: tuple[int, ...]) -> Any:
    """The model, which takes `mm_encoder_outputs` in the place of pixels: its towers return them."""
    inner, forward = model.base_model, model.forward
    encoded: dict[str, Any] = {}

    @functools.wraps(forward)
    def with_features(*args: Any, mm_encoder_outputs: Any = None, **inputs: Any) -> Any:
        encoded.clear()
        ids = inputs.get("input_ids")
        if ids is None and args:
            ids = args[0]
        if mm_encoder_outputs and ids is not None and torch.isin(ids, torch.tensor(placeholders)).any():
            encoded.update(mm_encoder_outputs)
            for modality, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
                if modality in encoded:
                    inputs[name] = torch.zeros(1)
        return forward(*args, **inputs)

    def output(modality: str, *args: Any, **settings: Any) -> Any:
        features = encoded[modality]
        if deep := features.get("deepstack_features"):
            joined = [torch.cat(list(layer)) for layer in deep]
            return type(features)(pooler_output=features.pooler_output, deepstack_features=joined)
        if model.config.model_type in ONE_TENSOR:
            features = type(features)(pooler_output=torch.stack(list(features.pooler_output)))
        return features

    signature = inspect.signature(forward)
    encoded_name = inspect.Parameter("mm_encoder_outputs", inspect.Parameter.KEYWORD_ONLY, default=None)
    *named, last = signature.parameters.values()
    with_features.__signature__ = signature.replace(parameters=[*named, encoded_name, last])  # type: ignore[attr-defined]
    model.forward = with_features
    for modality in ("image", "video"):
        setattr(inner, f"get_{modality}_features", functools.partial(output, modality))
    return model
