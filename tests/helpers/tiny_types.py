"""A tiny random model of every image-text type that transformers has, its configuration shrunk without knowing it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as hf
from helpers.families import IMAGE, VIDEO, VOCAB, build_from
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

TYPES = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
HIDDEN, LAYERS, HEAD = 32, 6, 16
TOKENS_PER_IMAGE = 4

DECODER = {
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "dense_intermediate_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "num_sliding_attention_heads": 4,
    "head_dim": HEAD,
    "global_head_dim": HEAD,
    "swa_head_dim": HEAD,
    "rotary_dim": HEAD,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_chunk_size": 8,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "moe_hidden_size": 16,
    "moe_latent_size": 16,
    "share_expert_dim": 16,
    "shared_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": HEAD,
    "qk_rope_head_dim": HEAD,
    "qk_head_dim": 2 * HEAD,
    "v_head_dim": HEAD,
    "index_topk": 64,
    "index_head_dim": HEAD,
    "index_n_heads": 2,
    "laurel_rank": 8,
    "query_pre_attn_scalar": HEAD,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "num_kv_shared_layers": 2,
    "block_multiple_of": 8,
}
TOWER = {
    "hidden_size": 16,
    "embed_dim": 16,
    "d_model": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "encoder_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "encoder_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": HIDDEN,
    "projection_dim": HIDDEN,
    "vocab_size": VOCAB,
}

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
SPECIAL: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": IMAGE}},  # names its placeholder in the vocabulary
    "emu3": {"vocabulary_map": {"<image>": IMAGE}},
    # defaults that no model can be made of
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}
    },
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", *["sparse"] * (LAYERS - 1)],
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        }
    },
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 1], [0, 2]],
        "downsample_rate": "1/1",
        "vision_config": {"hidden_size": 64},  # its connector has a head for each 64
    },
    "hunyuan_vl": {
        "text_config": {"head_dim": HEAD, "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}}
    },
    "mistral4": {"head_dim": 2 * HEAD},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": HEAD,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        }
    },
    "step3p7": {"text_config": {"sliding_window": 8}},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 16},
        "audio_config": {"adapter_input_size": 16},
        "text_config": {"swa_head_dim": 2 * HEAD},
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 103},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 103},
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 16}}},
    # values that name layers of the tower, which has one
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 0]}, "image_patch_id": IMAGE},
}
"""What a type's configuration needs besides small sizes."""

SCALED = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4,  # so that positions matter in a short prompt
    "llama_4_scaling_beta": 0.5,
}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
LOCAL = ["sliding_attention", "full_attention"] * 3
VARIANTS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "gemma3n, no shared keys": ("gemma3n", None, {"num_kv_shared_layers": 0}),
    "gemma4, no per-layer inputs": ("gemma4", None, {"hidden_size_per_layer_input": 0}),
    "gemma4, experts": ("gemma4", None, {"hidden_size_per_layer_input": 0, **EXPERTS}),
    "gemma4, per-layer inputs and shared keys": (
        "gemma4",
        None,
        {"num_kv_shared_layers": 2, "layer_types": LOCAL},
    ),
    "internvl, gpt_oss": ("internvl", "gpt_oss", {"layer_types": LOCAL}),
    "internvl, qwen3_moe": ("internvl", "qwen3_moe", {}),
    "lfm2_vl, convolutions": ("lfm2_vl", None, {"layer_types": ["conv", "full_attention", "conv"] * 2}),
    "llava, deepseek_v2": ("llava", "deepseek_v2", {"num_key_value_heads": 4, "num_experts_per_tok": 2}),
    "llava, gemma2": ("llava", "gemma2", {}),
    "llava, olmo2": ("llava", "olmo2", {}),
    "llava, phi3": ("llava", "phi3", {}),
    "llava, qwen3": ("llava", "qwen3", {}),
    "llava, smollm3": ("llava", "smollm3", {"no_rope_layers": [1, 0, 1, 0, 1, 0]}),
    "minimax_m3_vl, sparse": (
        "minimax_m3_vl",
        None,
        {"layer_types": ["minimax_m3_sparse", "full_attention"] * 3},
    ),
    "mistral3, ministral3": ("mistral3", "ministral3", {"rope_parameters": SCALED}),
    "mistral3, mistral4": (
        "mistral3",
        "mistral4",
        {"head_dim": 2 * HEAD, "num_key_value_heads": 4, "rope_parameters": SCALED},
    ),
}
"""Rows of the table besides the types' defaults: (type, another decoder, changes of its configuration)."""
ROWS = (*TYPES, *VARIANTS)


@contextmanager
def no_timm() -> Iterator[None]:
    """Image towers that come from timm are left out: no test needs them, and nothing here installs timm."""
    stock = hf.TimmWrapperModel.__init__

    def nothing(self: Any, config: Any) -> None:
        hf.PreTrainedModel.__init__(self, config)

    hf.TimmWrapperModel.__init__ = nothing
    try:
        yield
    finally:
        hf.TimmWrapperModel.__init__ = stock


def shrunk(model_type: str, decoder: str | None = None, **changes: Any) -> Any:
    """The type's default configuration with every size made small.

    Args:
        decoder: the type of another decoder to put in.
        changes: in the decoder's configuration.
    """
    default = CONFIG_MAPPING[model_type]()
    values, text = default.to_dict(), default.get_text_config()
    place = next((name for name in default.sub_configs if getattr(default, name, None) is text), None)
    values = {**values, **numbered(values)}
    for name in default.sub_configs:
        if name == place:
            base = values[name] if decoder is None else CONFIG_MAPPING[decoder]().to_dict()
            values[name] = {**decoder_values(base), **changes}
        elif isinstance(values.get(name), dict):
            values[name] = tower_values(values[name], text.hidden_size)
    if place is None:
        values = {**decoder_values(values), **changes}
    sizes = {name: DECODER[name] for name in ("hidden_size", "vocab_size") if values.get(name)}
    values.update(sizes)
    for name, value in SPECIAL.get(model_type, {}).items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    return type(default)(**named(values))


def numbered(values: dict[str, Any]) -> dict[str, int]:
    """Token numbers inside the small vocabulary: the placeholders of `families.prompt`, and others above 102."""
    fixed = {"pad": 0, "bos": 1, "eos": 2, "image": IMAGE, "img": IMAGE, "video": VIDEO}
    numbers: dict[str, int] = {}
    for name, value in values.items():
        if name.endswith(("_token_id", "_token_index", "_token_idx")) and isinstance(value, (int, list)):
            numbers[name] = fixed.get(name.split("_token")[0], 102 + len(numbers))
    return numbers


def decoder_values(values: dict[str, Any]) -> dict[str, Any]:
    """A decoder's configuration with small sizes; lists of one entry a layer show every kind of layer."""
    small = {**values, **numbered(values)}
    small.pop("per_layer_config", None)  # made again from the other values
    layers = values["num_hidden_layers"]
    lists = {
        name: value for name, value in values.items() if isinstance(value, list) and len(value) == layers
    }
    chosen = some_of_each(list(zip(*lists.values(), strict=True)))
    small.update({name: [value[i] for i in chosen] for name, value in lists.items()})
    for name, size in DECODER.items():
        if values.get(name):
            small[name] = [size] * len(small[name]) if isinstance(values[name], list) else size
    if values.get("num_key_value_heads") == values.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    rope = small.get("rope_parameters")
    if (
        isinstance(rope, dict) and "rope_type" in rope
    ):  # with sections, for decoders whose positions have axes
        head = HEAD if small.get("head_dim") else HIDDEN // small["num_attention_heads"]
        half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
        small["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    return small


def some_of_each(kinds: list[Any]) -> list[int]:
    """`LAYERS` indices in order, the first two of each kind among them."""
    places: dict[str, list[int]] = {}
    for i, kind in enumerate(kinds):
        places.setdefault(str(kind), []).append(i)
    chosen = sorted(i for indices in places.values() for i in indices[:2])[:LAYERS]
    return sorted([*chosen, *[i for i in range(len(kinds)) if i not in chosen][: LAYERS - len(chosen)]])


def tower_values(values: dict[str, Any], text_hidden: int) -> dict[str, Any]:
    """The configuration of anything that is not the decoder, with small sizes."""
    small = {name: value for name, value in values.items() if name != "per_layer_config"}
    layers = values.get("num_hidden_layers")
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            small[name] = tower_values(value, text_hidden)
        elif isinstance(value, list) and len(value) == layers:
            small[name] = value[:1]
        elif isinstance(value, int) and value == text_hidden and ("text" in name or "out" in name):
            small[name] = HIDDEN
        elif name in TOWER and isinstance(value, int):
            small[name] = TOWER[name]
    return small


def named(values: dict[str, Any]) -> dict[str, Any]:
    """Without what a configuration says of itself."""
    return {
        name: value for name, value in values.items() if name not in ("transformers_version", "model_type")
    }


def build_type(row: str, attention: str = "sdpa") -> Any:
    """The tiny random model of a row of the table."""
    model_type, decoder, changes = VARIANTS.get(row, (row, None, {}))
    with no_timm():
        config = shrunk(model_type, decoder, **changes)
        try:
            model = build_from(config, attention)
        except ValueError as error:
            if "attention implementation" not in str(error):
                raise
            model = build_from(config, "eager")
    for name, weight in model.named_parameters():
        if name.endswith("correct_output_scale"):  # zeros, with which Gemma 3n's per-layer inputs do nothing
            torch.nn.init.normal_(weight.data)
    return model


def weightless(model_type: str) -> Any:
    """A type's default model on the meta device: enough to ask whether its structure is refused."""
    with no_timm(), torch.device("meta"):
        kind = getattr(hf, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
        return kind(CONFIG_MAPPING[model_type]())


def prompt_for(model: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """Two rows, one padded, with an image each, as the model's own forward takes them; and its vision tokens.

    Features are random and need no tower. A model whose placeholders do not work in its own forward gets text, some of
    which is to be taken for vision (`vision_mask`): the third value says whether the placeholders work.
    """
    rows = [[5, 7, *[IMAGE] * TOKENS_PER_IMAGE, 11, 13, 17], [0, 19, *[IMAGE] * TOKENS_PER_IMAGE, 23, 29, 31]]
    return inputs_for(model, torch.tensor(rows))


def inputs_for(model: Any, ids: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    """What a processor would give with these tokens `[2, T]`, an image in each row; and its vision tokens."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    takes = inspect.signature(model.forward).parameters
    vision = ids == IMAGE
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
        if name in takes:
            inputs[name] = vision.int() if name.startswith("mm") else vision.long()
    if model.config.model_type == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)  # its prefix, bidirectional
    if "image_grid_thw" in takes:
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
    return inputs, vision


def encoded_images() -> Iterator[dict[str, Any]]:
    """Random projected features of two images, in each container that some family expects."""
    generator = torch.Generator().manual_seed(1)
    pooled = torch.randn(2, TOKENS_PER_IMAGE, HIDDEN, generator=generator)
    deep = [list(torch.randn(2, TOKENS_PER_IMAGE, HIDDEN, generator=generator)) for _ in range(3)]
    for features in (list(pooled), pooled, pooled.flatten(0, 1)):
        for extra in (deep, [torch.stack(layer) for layer in deep], [torch.cat(layer) for layer in deep]):
            output = BaseModelOutputWithDeepstackFeatures(pooler_output=features, deepstack_features=extra)
            output.router_logits = None  # Granite-Docling's
            output.visual_indicator_features = pooled[0]  # Ovis 2's
            yield {"image": output}
        yield {"image": BaseModelOutputWithPooling(pooler_output=features)}
    granite = BaseModelOutputWithPooling(pooler_output=list(pooled))
    granite.deepstack_features = [(1, list(deep[0])), (3, list(deep[1]))]  # by layer
    yield {"image": granite}
