"""The FLOPs counter against PyTorch's, on real runs, and against the literature's numbers."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers.data_rows import IMAGE_PART, grey_image, turn
from helpers.families import CONFIGS, HYBRID_FAMILIES, build_from
from helpers.flop_counter import CPU_ATTENTION, N_TEXT, N_VISION, counted_flops, flops_prompt, llama_config
from helpers.models_with_processors import collator_of, model_and_processor
from helpers.tiny_types import build_type
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from latefusion.models.attach import attach
from latefusion.models.base_model import with_blank_vision
from latefusion.models.flops import decoder_flops, encoder_flops, layer_flops
from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.models.schedule import VisionSchedule


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [4, 1], ids=["mha", "gqa"])
@pytest.mark.parametrize(
    "schedule",
    [
        VisionSchedule(),
        VisionSchedule(enter=1, exit=4),
        VisionSchedule(exit=5, keep={2: 40, 4: 3}),
        VisionSchedule(enter=1, keep={3: 10}),
    ],
    ids=["dense", "band", "keeps", "late"],
)
def test_schedule_flops_are_those_of_a_real_run(
    schedule: VisionSchedule, kv_heads: int, attention: str
) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(kv_heads, attention)).eval()
    inputs_embeds, vision = flops_prompt()
    with attach(model, schedule, vision_mask=vision):
        measured = counted_flops(model, inputs_embeds)
    assert schedule.flops(model.config, N_TEXT, N_VISION) == pytest.approx(measured, rel=0.01)


def test_dense_flops_are_exact_without_the_executor() -> None:
    model = LlamaForCausalLM(llama_config(2, "eager")).eval()
    assert VisionSchedule().flops(model.config, N_TEXT, N_VISION) == counted_flops(model, flops_prompt()[0])


@pytest.mark.parametrize("stages", [("middle", "deep"), ("shallow", "middle", "deep")], ids="+".join)
def test_visipruner_costs_what_its_trace_says(stages: tuple[str, ...]) -> None:
    """Deciding reads one row a layer; the shallow rule computes the text before the image twice."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(2, "sdpa")).eval()
    inputs_embeds, vision = flops_prompt()
    policy = VisiPruner(
        boundary=1, layer_threshold=1.0, tokens_threshold=0.0005, exit_threshold=1e-3, stages=stages
    )
    with attach(model, policy, vision_mask=vision) as att:
        measured = counted_flops(model, inputs_embeds)
        record = att.trace[0]
    assert record.exit_layer == 5, "the run should show all stages"
    expected = decoder_flops(model.config, record.tokens)
    if "shallow" in stages:
        twice = int(vision[0].int().argmax())  # text rows before the image
        expected += policy.boundary * 4 * model.config.hidden_size * (N_TEXT + N_VISION) * twice
    assert expected == pytest.approx(measured, rel=0.01)


def test_decode_steps_pay_for_the_cache_they_read() -> None:
    dense = llama_config(2, "sdpa")
    assert layer_flops(dense, 1, past=99) - layer_flops(dense, 1) == 4 * 99 * dense.hidden_size


def test_the_literatures_numbers_for_llava_1_5_7b() -> None:
    """3.82T for the dense model and 0.42T for HiDrop's published schedule, vision tokens only, in MACs."""
    llava = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    dense = VisionSchedule().flops(llava, 64, 576, convention="vision_only")
    hidrop = VisionSchedule(enter=8, exit=24, keep={10: 215, 14: 10, 16: 5, 18: 1})
    assert round(dense / 1e12, 2) == 3.82
    assert round(hidrop.flops(llava, 64, 576, convention="vision_only") / 1e12, 2) == 0.42


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3"])
def test_an_encoder_of_zeros_is_counted_like_the_real_one(family: str) -> None:
    model, _ = model_and_processor(family)
    sample = {
        "messages": [turn("user", IMAGE_PART, "how many?"), turn("assistant", "2")],
        "images": [grey_image(90).resize((28, 28))],
    }
    batch = collator_of(family)([sample])
    blank = with_blank_vision(model)
    assert {weight.device.type for weight in blank.get_decoder().parameters()} == {"meta"}
    assert encoder_flops(blank, dict(batch)) == encoder_flops(model, dict(batch)) > 0


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^convention='tops' is unknown; use 'computed' or 'vision_only'\.$"
    ):
        VisionSchedule().flops(llama_config(2, "sdpa"), 1, 1, convention="tops")


@pytest.mark.parametrize("name", ["gemma3n", "gemma3n, no shared keys"])
def test_states_inputs_and_shared_keys_of_gemma3n_cost_what_pytorch_counts(name: str) -> None:
    model = build_type(name)
    text, tokens = model.config.get_text_config(), 120
    decoder = model.get_decoder()
    embeddings = {"inputs_embeds": torch.randn(1, tokens, text.hidden_size), "use_cache": False}
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.no_grad():
        decoder(**embeddings)
    hidden, around = text.hidden_size, 2 * (text.altup_num_inputs - 1)  # states made before and joined after
    around = (
        2 * tokens * hidden * (around * hidden + text.num_hidden_layers * text.hidden_size_per_layer_input)
    )
    formula = decoder_flops(model.config, [tokens] * text.num_hidden_layers)
    assert formula == pytest.approx(counter.get_total_flops() - around, rel=0.01)


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_recurrent_layers_cost_what_pytorch_counts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the delta rule itself, which stock computes in chunks: its `6 d_k d_v` are in the formula alone."""
    config = CONFIGS[family]()
    config.text_config.hidden_size = 128  # so that a kernel's few taps past the end count for little
    model = build_from(config)
    text, tokens = model.config.text_config, 120
    rule = 0
    if family == "qwen3_5":
        state = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
        rule = text.layer_types.count("linear_attention") * tokens * 6 * state
        module = sys.modules[type(model.get_decoder()).__module__]
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", lambda q, k, v, **kwargs: (v, None))
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.no_grad():
        model.get_decoder()(inputs_embeds=torch.randn(1, tokens, 128), use_cache=False)
    formula = decoder_flops(model.config, [tokens] * text.num_hidden_layers) - rule
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.01)
