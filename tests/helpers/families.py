"""Tiny random models of every supported family, and prompts for them; image features need no vision tower."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as hf
from helpers.old_transformers import TAKES_ENCODED, taking_encoded
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

HIDDEN, VOCAB, LAYERS = 32, 120, 6
IMAGE, VIDEO = 100, 101
TOKENS_PER_IMAGE = 4  # 2 x 2
MIXED = ["tt I ttt", "tttt", "t I t I tt"]  # rows of `prompt`: one image, none, two
EVEN = ["tt I ttt", "t I tttt"]  # without padding
TOLERANCE = 2e-6  # logits are of order 1

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 16,
    "out_hidden_size": HIDDEN,
    "num_heads": 2,
    "intermediate_size": 16,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
WITH_VIDEO = {"image_token_id": IMAGE, "video_token_id": VIDEO}
GLM_MARKS = {
    "image_start_token_id": 110,
    "image_end_token_id": 111,
    "video_start_token_id": 112,
    "video_end_token_id": 113,
}


def text(kind: type, **overrides: Any) -> Any:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return kind(**{**values, **overrides})


def text_dict(parent: type, **overrides: Any) -> dict[str, Any]:
    return text(type(parent().text_config), **overrides).to_dict()


def clip() -> Any:
    return hf.CLIPVisionConfig(**TOWER)


def siglip(**more: Any) -> Any:
    return hf.SiglipVisionConfig(**TOWER, **more)


def llava(kind: type, **more: Any) -> Any:
    return hf.LlavaConfig(vision_config=clip(), text_config=text(kind, **more), image_token_id=IMAGE)


def gemma3(sliding_window: int = 8) -> Any:
    types = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    config = text(
        hf.Gemma3TextConfig, sliding_window=sliding_window, layer_types=types, query_pre_attn_scalar=8
    )
    return hf.Gemma3Config(
        vision_config=siglip(),
        text_config=config,
        image_token_id=IMAGE,
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        boi_token_index=110,
        eoi_token_index=111,
    )


def lfm2_vl(layer_types: list[str]) -> Any:
    config = text(hf.Lfm2Config, layer_types=layer_types, num_hidden_layers=len(layer_types))
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.Lfm2VlConfig(
        vision_config=hf.Siglip2VisionConfig(**tower, patch_size=14, num_patches=16),
        text_config=config,
        image_token_id=IMAGE,
        projector_hidden_size=HIDDEN,
    )


def qwen3_5(layer_types: list[str], kind: type = hf.Qwen3_5Config, **more: Any) -> Any:
    config = text_dict(
        kind,
        layer_types=layer_types,
        num_hidden_layers=len(layer_types),
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters={**MROPE, "partial_rotary_factor": 1.0},
        **more,
    )
    return kind(vision_config={**QWEN_TOWER, "num_position_embeddings": 16}, text_config=config, **WITH_VIDEO)


CONFIGS = {
    "llava": lambda: llava(hf.LlamaConfig),
    "llava_mistral": lambda: llava(hf.MistralConfig, sliding_window=None),
    "llava_qwen2": lambda: llava(hf.Qwen2Config),
    "llava_next": lambda: hf.LlavaNextConfig(
        vision_config=clip(), text_config=text(hf.LlamaConfig), image_token_id=IMAGE
    ),
    "llava_onevision": lambda: hf.LlavaOnevisionConfig(
        vision_config=siglip(), text_config=text(hf.Qwen2Config), **WITH_VIDEO
    ),
    "qwen2_vl": lambda: hf.Qwen2VLConfig(
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 14},
        text_config=text_dict(hf.Qwen2VLConfig, rope_parameters=MROPE),
        **WITH_VIDEO,
    ),
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLConfig(
        vision_config=QWEN_TOWER,
        text_config=text_dict(hf.Qwen2_5_VLConfig, rope_parameters=MROPE),
        **WITH_VIDEO,
    ),
    "qwen3_vl": lambda: hf.Qwen3VLConfig(
        vision_config={**QWEN_TOWER, "depth": 3, "deepstack_visual_indexes": [0, 1, 2]},
        text_config=text_dict(hf.Qwen3VLConfig, rope_parameters=MROPE),
        **WITH_VIDEO,
    ),
    "internvl": lambda: hf.InternVLConfig(
        vision_config=TOWER, text_config=text(hf.Qwen2Config), image_token_id=IMAGE
    ),
    "smolvlm": lambda: hf.SmolVLMConfig(
        vision_config=TOWER, text_config=text(hf.LlamaConfig), image_token_id=IMAGE, scale_factor=1
    ),
    "idefics3": lambda: hf.Idefics3Config(
        vision_config=TOWER, text_config=text(hf.LlamaConfig), image_token_id=IMAGE, scale_factor=1
    ),
    "gemma3": gemma3,
    "paligemma": lambda: hf.PaliGemmaConfig(
        vision_config=siglip(projection_dim=HIDDEN),
        text_config=text(hf.GemmaConfig),
        image_token_id=IMAGE,
        projection_dim=HIDDEN,
    ),
    "mistral3": lambda: hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**TOWER),
        text_config=text(hf.MistralConfig),
        image_token_id=IMAGE,
    ),
    "glm4v": lambda: hf.Glm4vConfig(
        vision_config={**QWEN_TOWER, "image_size": 28, "patch_size": 14},
        text_config=text_dict(hf.Glm4vConfig, rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
        **WITH_VIDEO,
        **GLM_MARKS,
    ),
    "lfm2_vl": lambda: lfm2_vl(["conv", "full_attention"] * (LAYERS // 2)),
    "qwen3_5": lambda: qwen3_5(["linear_attention", "full_attention"] * (LAYERS // 2)),
}
FAMILIES = list(CONFIGS)
MROPE_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "qwen3_5")
HYBRID_FAMILIES = ("lfm2_vl", "qwen3_5")  # recurrent layers before each softmax layer: 1, 3, 5


def gradient_tolerance(family: str) -> float:
    """Float32 chunks of the delta rule round apart from the loop by as much; in float64 both agree (test_hybrids)."""
    return 2e-5 if family in HYBRID_FAMILIES else TOLERANCE


def softmax(family: str, layer: int) -> int:
    """This layer, or in a hybrid the next that attends with a softmax: for tests that look at attention."""
    return layer | 1 if family in HYBRID_FAMILIES else layer


def build_from(config: Any, attention: str = "sdpa", auto: type = hf.AutoModelForImageTextToText) -> Any:
    """A fresh random model in eval mode, its weights large enough that attention is not uniform."""
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "embed_tokens" not in name and "lm_head" not in name:
                weight.mul_(4.0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]  # random models write anything
    return model.eval() if TAKES_ENCODED else taking_encoded(model.eval(), (IMAGE, VIDEO))


def build(family: str, attention: str = "sdpa") -> Any:
    return build_from(CONFIGS[family](), attention)


@cache
def shared(family: str, attention: str = "sdpa") -> Any:
    """As `build`, once a process: for tests that leave the model as it was."""
    return build(family, attention)


def prompt(family: str, rows: list[str], side: str = "left", seed: int = 1) -> dict[str, Any]:
    """Model inputs for rows such as "tt I t": t a text token, I an image, V a video of one frame.

    Features are random, so a row's images differ; the arguments are those that the family's processor gives.
    """
    generator = torch.Generator().manual_seed(seed)
    vision_token = {"I": IMAGE, "V": IMAGE if family == "glm4v" else VIDEO}
    ids, modality_of = [], {"t": 0, "I": 1, "V": 2}
    types = []
    for row in rows:
        tokens: list[int] = []
        for mark in row.replace(" ", ""):
            if mark == "t":
                tokens.append(int(torch.randint(3, 90, (1,), generator=generator)))
            else:
                tokens += [vision_token[mark]] * TOKENS_PER_IMAGE
        ids.append(tokens)
        marks = [[mark] * (1 if mark == "t" else TOKENS_PER_IMAGE) for mark in row.replace(" ", "")]
        types.append([modality_of[mark] for token in marks for mark in token])
    length = max(map(len, ids))
    input_ids = torch.zeros(len(ids), length, dtype=torch.long)
    attention_mask, token_types = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for b, (tokens, kinds) in enumerate(zip(ids, types, strict=True)):
        at = slice(length - len(tokens), length) if side == "left" else slice(0, len(tokens))
        input_ids[b, at], token_types[b, at] = torch.tensor(tokens), torch.tensor(kinds)
        attention_mask[b, at] = 1
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    for mark, modality in (("I", "image"), ("V", "video")):
        number = sum(row.count(mark) for row in rows)
        if number:
            kind = f"{family} {modality}"
            inputs.setdefault("mm_encoder_outputs", {})[modality] = features(kind, number, generator)
            if family in MROPE_FAMILIES:
                inputs[f"{modality}_grid_thw"] = torch.tensor([[1, 4, 4]] * number)
    if family in MROPE_FAMILIES:
        inputs["mm_token_type_ids"] = token_types.int()
    if family == "gemma3":
        inputs["token_type_ids"] = token_types
    if family == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(input_ids)
    return inputs


STACKED = ("gemma3 image", "paligemma image", "internvl image", "llava_onevision video")


def features(kind: str, number: int, generator: torch.Generator) -> Any:
    """Random projected features in the container that the family's model expects."""
    pooled = torch.randn(number, TOKENS_PER_IMAGE, HIDDEN, generator=generator)
    if kind in STACKED:
        return BaseModelOutputWithPooling(pooler_output=pooled)
    if kind.startswith("qwen3_vl"):
        deep = [list(torch.randn(number, TOKENS_PER_IMAGE, HIDDEN, generator=generator)) for _ in range(3)]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=list(pooled), deepstack_features=deep)
    return BaseModelOutputWithPooling(pooler_output=list(pooled))


def vision_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def text_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """Real tokens that are text: where a policy and its oracle must agree."""
    return inputs["attention_mask"].bool() & ~vision_tokens(inputs)


def continued(family: str, inputs: dict[str, Any], new: torch.Tensor) -> dict[str, Any]:
    """The prompt followed by text tokens `new` `[B, n]`, as one forward over everything."""
    batch, n = new.shape
    out = dict(inputs, input_ids=torch.cat([inputs["input_ids"], new], 1))
    out["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(batch, n, dtype=torch.long)], 1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            kind = 1 if family == "paligemma" else 0  # a PaliGemma suffix is causal
            out[name] = torch.cat([inputs[name], torch.full((batch, n), kind, dtype=inputs[name].dtype)], 1)
    if family not in MROPE_FAMILIES:
        out["position_ids"] = positions(family, out["attention_mask"])
    return out


def positions(family: str, attention_mask: torch.Tensor) -> torch.Tensor:
    """The positions that `generate` gives."""
    first = 1 if family == "paligemma" else 0
    return (attention_mask.cumsum(-1) - 1).clamp(min=0) + first


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return (a - b).abs().max().item() <= tolerance
