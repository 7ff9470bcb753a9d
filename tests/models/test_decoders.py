"""Decoders whose layers are unlike Llama's: exact under every policy, or refused at `attach` with the true reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from helpers.families import LAYERS, close
from helpers.families import text as text_config
from helpers.oracle import band, masked

from latefusion import VisionSchedule
from latefusion.models.attach import attach
from latefusion.models.policies.base import AttentionCall, Prompt, Selection
from latefusion.models.policies.fastv import FastV

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    **EXPERTS,
}
SCALED = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 4,  # so that positions matter in a short prompt
    "llama_4_scaling_beta": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
FULL = {"layer_types": ["full_attention"] * LAYERS}
LOCAL = {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
GEMMA4: dict[str, Any] = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
GEMMA3N: dict[str, Any] = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 120,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
}

DECODERS: dict[
    str, tuple[Any, dict[str, Any], bool]
] = {  # configuration, values, whether tokens can be frozen
    "attention scaled by position_ids": (hf.Ministral3Config, {"rope_parameters": SCALED}, True),
    "layers without rope": (hf.SmolLM3Config, {"no_rope_layers": [1, 0, 1, 0, 1, 0]}, True),
    "attention sinks, experts that return a tuple": (
        hf.GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, **FULL},
        True,
    ),
    "complex rope, latent keys": (hf.DeepseekV2Config, LATENT, False),
    "a scale a layer": (hf.Gemma4TextConfig, {**GEMMA4, **LOCAL}, True),
    "experts beside the mlp": (
        hf.Gemma4TextConfig,
        {**GEMMA4, **LOCAL, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, **EXPERTS},
        True,
    ),
    "experts as the mlp": (hf.Qwen3MoeConfig, {"num_experts": 4, **EXPERTS}, True),
    "several states a token": (
        hf.Gemma3nTextConfig,
        {
            **LOCAL,
            "intermediate_size": [48] * LAYERS,
            "activation_sparsity_pattern": [0.5] * LAYERS,
            **GEMMA3N,
        },
        True,
    ),
    "fused projections": (hf.Phi3Config, {}, False),
    "keys hidden by their values": (hf.DogeConfig, {"keep_window_size": 4}, False),
}
every_decoder = pytest.mark.parametrize("name", DECODERS)

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
VISION = torch.zeros(2, 12, dtype=torch.bool)
VISION[0, 2:6] = VISION[1, 1:5] = True
MASK = torch.ones_like(IDS)
NEAR = 1e-4  # rounding differs by the number of threads, up to 2.2e-5; a wrong router is off by 3

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def build(name: str, **more: Any) -> Any:
    kind, values, _ = DECODERS[name]
    torch.manual_seed(0)
    config = text_config(kind, **{**values, **more})
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():  # norms and sinks as if trained
        if weight.dim() == 1:
            weight.data += 0.3 * torch.randn_like(weight)
    for buffer_name, buffer in model.named_buffers():
        if "layer_scalar" in buffer_name:
            buffer.fill_(0.7)
    return model


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        embeds = model.get_input_embeddings()(IDS)
        return model(inputs_embeds=embeds, attention_mask=MASK, **options).logits[~VISION]


@every_decoder
def test_bands_and_frozen_tokens_equal_the_masked_model(name: str) -> None:
    model, none = build(name), torch.zeros_like(VISION)
    seen = [none, VISION, VISION, none, VISION, none]
    cases = [(band(VISION, LAYERS, 1, 4), False, VisionSchedule(enter=1, exit=4))]
    if DECODERS[name][2]:
        cases.append((seen, True, VisionSchedule(cross=(1, 2, 4))))
    for layers, frozen, schedule in cases:
        with masked(model, VISION, layers, padding=MASK, frozen=frozen):
            expected = logits(model, use_cache=False)
        with attach(model, schedule, vision_mask=VISION):
            assert close(logits(model), expected, NEAR)
            assert close(logits(model, use_cache=False), expected, NEAR)


@every_decoder
def test_the_policy_is_shown_the_attention_weights_of_the_model(name: str) -> None:
    shown: list[torch.Tensor] = []

    class Look:
        watch, fusion_layer = range(LAYERS), None

        def validate(self, num_layers: int) -> None: ...

        def begin(self, prompt: Prompt) -> Look:
            return self

        def select(self, layer: int) -> Selection | None:
            return None

        def attended(self, layer: int, call: AttentionCall) -> None:
            shown.append(call.weights(torch.arange(12)[None].expand(2, -1)))

    model = build(name)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(IDS)  # as `logits`: Gemma 3n makes inputs of each layer of ids
        options = {"attention_mask": MASK, "use_cache": False, "output_attentions": True}
        stock = model(inputs_embeds=embeds, **options).attentions
    with attach(model, Look(), vision_mask=VISION):
        logits(model, use_cache=False)
    assert len(shown) == len(stock) == LAYERS
    assert all(close(a, b, 1e-5) for a, b in zip(shown, stock, strict=True))
    assert ("sinks" in name) == bool((shown[0].sum(-1) < 0.99).any())


def test_attention_that_needs_positions_is_refused_under_flash_attention() -> None:
    """Where ids with gaps look like packed rows."""
    model = build("attention scaled by position_ids")
    model.config._attn_implementation = "flash_attention_2"
    with (
        attach(model, VisionSchedule(enter=1), vision_mask=VISION),
        pytest.raises(
            ValueError, match=r"^Ministral3Attention computes with position_ids, which flash attention"
        ),
    ):
        logits(model, use_cache=False)


def test_a_part_of_the_attention_that_nobody_tried_is_refused() -> None:
    """Doge builds its mask from the values of all rows; with frozen rows it stopped in the first forward."""
    with pytest.raises(
        ValueError, match=r"DogeDecoderLayer has a part dt_proj, .*: use a schedule without cross"
    ):
        attach(build("keys hidden by their values"), VisionSchedule(cross=(1,)), vision_mask=VISION)


def test_what_cannot_be_frozen_is_refused_at_attach() -> None:
    for name, missing in (("fused projections", "q_proj"), ("complex rope, latent keys", "q_proj")):
        model = build(name)
        with pytest.raises(ValueError, match=f"has no {missing}, .*: use a schedule without cross"):
            attach(model, VisionSchedule(cross=(1,)), vision_mask=VISION)
        attachment = attach(model, VisionSchedule(), vision_mask=VISION)  # nothing was left behind
        with (
            pytest.raises(ValueError, match=f"has no {missing}"),
            attachment.using(VisionSchedule(cross=(1,))),
        ):
            pass


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            lambda: text_config(hf.Llama4TextConfig, num_local_experts=2, intermediate_size_mlp=48),
            r"^Llama4TextAttention scales its queries by the number of a row",
        ),
    ],
    ids=["llama 4"],
)
def test_what_a_policy_cannot_carry_is_refused_at_attach(config: Any, sentence: str) -> None:
    model = hf.AutoModelForCausalLM.from_config(config()).eval()
    with pytest.raises(ValueError, match=sentence):
        attach(model, VisionSchedule(enter=1), vision_mask=VISION)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_counts_rows_is_refused_before_any_try() -> None:
    """Inside a model of somebody's own: its scales differ from 8,192 tokens on, which no short try shows."""
    config = text_config(hf.Llama4TextConfig, num_local_experts=2, intermediate_size_mlp=48)
    model = build("fused projections")
    model.model = hf.Llama4TextModel(config)
    with pytest.raises(ValueError, match=r"^Llama4TextAttention scales its queries"):
        attach(model, VisionSchedule(enter=1), vision_mask=VISION)


def test_a_layer_that_attends_in_its_own_way_is_an_error_not_dense() -> None:
    model = build("fused projections")
    attention = model.model.layers[1].self_attn
    plain = attention.forward

    def other_attention(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        del kwargs  # no call of transformers' attention interface
        return torch.zeros_like(hidden_states), None

    attention.forward = other_attention
    with (
        attach(model, VisionSchedule(keep={2: 2}), vision_mask=VISION),
        pytest.raises(ValueError, match=r"^the policy looks at the attention of layer 1, but Phi3Attention"),
    ):
        logits(model)
    attention.forward = other_attention  # FastV decides right after the only layer that it watches
    with attach(model, FastV(layer=2), vision_mask=VISION):
        with pytest.raises(
            ValueError, match=r"^the policy looks at the attention of layer 1, but Phi3Attention"
        ):
            logits(model)
        attention.forward = plain
        logits(model)
