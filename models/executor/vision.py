"""Which tokens of a forward are vision tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

VisionMask = Tensor | Callable[..., Tensor | None]

# these families write video frames with image placeholder tokens
VIDEO_AS_IMAGE = {"glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga", "glm5_next"}


def vision_token_ids(config: PretrainedConfig) -> dict[str, int]:
    """Placeholder token of each modality that the model's configuration names."""
    ids = {"image": getattr(config, "image_token_id", None), "video": getattr(config, "video_token_id", None)}
    if ids["image"] is None:  # Chameleon and Emu 3 name it in their vocabulary
        ids["image"] = (getattr(config, "vocabulary_map", None) or {}).get("<image>")
    if config.model_type in VIDEO_AS_IMAGE:
        ids["video"] = ids["image"]
    return {modality: token for modality, token in ids.items() if token is not None}


def vision_tokens(config: PretrainedConfig, input_ids: Tensor) -> Tensor:
    """The placeholder tokens of every modality, bool of the shape of `input_ids`."""
    ids = torch.tensor(sorted(set(vision_token_ids(config).values())), device=input_ids.device)
    return torch.isin(input_ids, ids)


def find_vision(model: PreTrainedModel, arguments: Mapping[str, Any]) -> Tensor | None:
    """The placeholder tokens of the modalities whose features come with this forward, bool `[B, T]`.

    None if no features come (decode, text): a placeholder token without features that stands behind the prompt, such
    as one that the model itself generated, is text, and a decode step costs no look at the tokens
    (`refuse_missing_pixels` looks at prompts).

    Args:
        model: the multimodal model (without its language modelling head).
        arguments: of its forward, by name.
    """
    encoded = arguments.get("mm_encoder_outputs")
    pixels = {"image": arguments.get("pixel_values"), "video": arguments.get("pixel_values_videos")}
    tokens = set()
    for modality, token in vision_token_ids(model.config).items():
        features = pixels[modality]
        if features is None and encoded is not None:
            features = encoded.get(modality) if isinstance(encoded, Mapping) else encoded
        if features is not None:
            tokens.add(token)
    if not tokens:
        return None
    input_ids, inputs_embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if input_ids is not None:
        first, *others = (input_ids == token for token in tokens)
        return torch.stack([first, *others]).any(0) if others else first
    if inputs_embeds is None:
        return None
    embed = model.get_input_embeddings()
    rows = [embed(torch.full((), t, dtype=torch.long, device=inputs_embeds.device)) for t in tokens]
    return torch.stack([(inputs_embeds == row).all(-1) for row in rows]).any(0)


def refuse_merged_images(vision: Tensor | None, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if a forward may hide images from us in `inputs_embeds` that bring no features with them."""
    embeds = arguments.get("inputs_embeds")
    if vision is None and arguments.get("input_ids") is None and embeds is not None and embeds.shape[1] > 1:
        raise ValueError(
            "inputs_embeds without pixel_values may have images merged into them, which cannot be told from text: say "
            "which tokens are vision with lf.attach(model, policy, vision_mask=mask), or that none are with "
            "vision_mask=lambda **inputs: None."
        )


def refuse_missing_pixels(
    model: PreTrainedModel, vision: Tensor | None, arguments: Mapping[str, Any], length: int | None
) -> None:
    """Raise ValueError if a prompt has placeholder tokens but brings no image or video: it would be answered blind.

    Args:
        model: the multimodal model.
        vision: what `find_vision` found.
        arguments: of its forward, by name.
        length: tokens of the prompt, those behind it are generated; None: all of the forward's are.
    """
    tokens, cache = arguments.get("input_ids"), arguments.get("past_key_values")
    if vision is not None or not isinstance(tokens, Tensor) or (cache is not None and cache.get_seq_length()):
        return
    count = int(vision_tokens(model.config, tokens[:, :length]).sum())
    if count:
        raise ValueError(
            f"the prompt has {count} placeholder tokens of images or videos but no pixel_values, so the model would "
            "not see them: pass all that the processor returns, as in model.generate(**inputs), or leave the "
            "placeholders out of the text."
        )


def vision_of_mask(vision_mask: VisionMask, arguments: Mapping[str, Any]) -> Tensor | None:
    """The user's own `vision_mask` for this forward, bool `[B, T]`; tokens after the prompt are text.

    Raises:
        ValueError: the mask does not fit the forward's tokens.
    """
    if not isinstance(vision_mask, Tensor):
        mask = vision_mask(**arguments)
        if mask is None:
            return None
    else:
        mask = vision_mask
    tokens = arguments.get("input_ids")
    tokens = tokens if tokens is not None else arguments.get("inputs_embeds")
    if tokens is None:
        return None
    batch, length = tokens.shape[:2]
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(
            f"vision_mask must be bool [batch, prompt tokens], not {mask.dtype} of shape {tuple(mask.shape)}."
        )
    if isinstance(vision_mask, Tensor):
        cache = arguments.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if past >= mask.shape[1]:
            return None
        mask = mask[:, past : past + length]
        mask = torch.nn.functional.pad(mask, (0, length - mask.shape[1]))  # what follows the prompt is text
    if batch % mask.shape[0] or mask.shape[1] != length:
        raise ValueError(
            f"vision_mask of shape {tuple(mask.shape)} does not fit a forward of {batch} x {length} tokens: "
            "attach with the mask of this batch, or with a callable of the forward's arguments."
        )
    return mask.to(tokens.device).repeat_interleave(batch // mask.shape[0], dim=0)  # beams
