"""A decoder that the table of families does not know is tried at `attach`: exact, or refused in one sentence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload
from helpers.families import close
from helpers.families import text as text_config
from helpers.oracle import band, masked
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama

from latefusion import VisionSchedule
from latefusion.models.attach import attach
from latefusion.models.policies.fastv import FastV
from latefusion.models.self_check import check_decoder, is_shown

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
VISION = torch.zeros(2, 12, dtype=torch.bool)
VISION[0, 2:6] = VISION[1, 1:5] = True
BAND = VisionSchedule(enter=1, exit=4)


class Subclass(llama.LlamaDecoderLayer):
    """Harmless: a row of its output depends on that row alone, and on the attention."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 1.1 * super().forward(hidden_states, *args, **kwargs)


class RowNumbers(llama.LlamaDecoderLayer):
    """Adds something of a row's number among the rows that it is handed."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        number = torch.arange(hidden_states.shape[1], dtype=hidden_states.dtype)
        return super().forward(hidden_states + 0.1 * number[:, None].sin(), *args, **kwargs)


class TokenBefore(llama.LlamaDecoderLayer):
    """Adds some of the row before, whichever that is."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states + 0.1 * hidden_states.roll(1, 1), *args, **kwargs)


class OwnPositions(llama.LlamaDecoderLayer):
    """Turns its queries and keys by positions that it counts by itself."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rope = llama.LlamaRotaryEmbedding(self.self_attn.config)
        kwargs["position_embeddings"] = rope(hidden_states, torch.arange(hidden_states.shape[1])[None])
        return super().forward(hidden_states, *args, **kwargs)


class MeanOfRows(nn.Module):
    """A part that looks harmless from outside, and mixes rows."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states - hidden_states.mean(1, keepdim=True)


class ExtraInputs(llama.LlamaDecoderLayer):
    """Reads one more vector of each row, which its decoder has left in it."""

    extra: Tensor

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states + self.extra, *args, **kwargs)


class ExtraModel(llama.LlamaModel):
    def forward(
        self, input_ids: Any = None, inputs_embeds: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        for layer in self.layers:
            layer.extra = self.embed_tokens(input_ids).flip(-1)
        return super().forward(
            input_ids=input_ids, inputs_embeds=inputs_embeds, past_key_values=past_key_values, **kwargs
        )


def build(layer: type | None = None, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
    torch.manual_seed(0)
    config = text_config(hf.LlamaConfig)
    model = hf.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data.normal_(0, 0.2)
    if layer is not None:
        for old in model.model.layers:
            old.__class__ = layer
    for name, part in parts.items():
        for old in model.model.layers:
            setattr(old, name, part())
    return model.to(dtype)


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options).logits[~VISION]


def test_a_harmless_subclass_passes_and_is_exact() -> None:
    model = build(Subclass)
    assert not is_shown(model.model)
    with masked(model, VISION, band(VISION, 6, 1, 4)):
        expected = logits(model, use_cache=False)
    with attach(model, BAND, vision_mask=VISION):
        assert close(logits(model), expected, 1e-4)
    for policy in (VisionSchedule(cross=(1, 3)), FastV(layer=2)):
        with attach(model, policy, vision_mask=VISION):
            logits(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [RowNumbers, TokenBefore, OwnPositions])
def test_a_layer_that_counts_its_rows_is_refused(layer: type, dtype: torch.dtype) -> None:
    """These run under a policy without any error, and give other text."""
    model = build(layer, dtype)
    with pytest.raises(
        ValueError, match=r"^LlamaModel is not among the decoders .* differ by .*%.* check=False"
    ):
        attach(model, BAND, vision_mask=VISION)
    with attach(model, BAND, vision_mask=VISION, check=False):
        wrong = logits(model, use_cache=False)
    with masked(model, VISION, band(VISION, 6, 1, 4)):
        assert not close(wrong, logits(model, use_cache=False), 1e-2)


def test_a_part_of_a_layer_that_mixes_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^LlamaModel is not among the decoders .* differ by"):
        attach(build(input_layernorm=MeanOfRows), BAND, vision_mask=VISION)


def test_inputs_that_reach_layers_by_another_way_are_refused() -> None:
    model = build(ExtraInputs)
    model.model.__class__ = ExtraModel
    with pytest.raises(
        ValueError,
        match=r"^ExtraModel is not among .* a try on a dozen tokens ended in RuntimeError: The size",
    ):
        attach(model, BAND, vision_mask=VISION)


def test_what_mends_a_full_mask_does_not_hide_a_fault() -> None:
    """Padding that a layer ignores shows in rows of several lengths alone."""

    class NoMask(llama.LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(hidden_states, *args, **{**kwargs, "attention_mask": None})

    with pytest.raises(ValueError, match="is not among"):
        attach(build(NoMask), BAND, vision_mask=VISION)


def test_a_decoder_with_two_attentions_a_layer_is_refused() -> None:
    """LongCat-Flash: its cache has two layers for one of the decoder, and a policy would be shown neither."""
    config = text_config(
        hf.LongcatFlashConfig,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=16,
        n_routed_experts=4,
        zero_expert_num=1,
        moe_topk=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        head_dim=8,
        num_key_value_heads=4,
    )
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"^LongcatFlashModel is not among the decoders"):
        attach(model, VisionSchedule(enter=1, exit=2), vision_mask=VISION)


def sharper(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """An attention of somebody's own, whose scaling is not the one that it is called with."""
    weight = query.shape[-1] ** -0.5 * 3
    output = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        scale=weight,
        enable_gqa=True,
        is_causal=mask is None and query.shape[2] > 1,
    )
    return output.transpose(1, 2), None


def test_an_attention_that_shows_other_weights_must_not_rank() -> None:
    hf.AttentionInterface.register("sharper", sharper)
    hf.AttentionMaskInterface.register("sharper", hf.masking_utils.sdpa_mask)
    model = build()
    model.set_attn_implementation("sharper")
    with attach(model, BAND, vision_mask=VISION):
        logits(model)
    with (
        attach(model, FastV(layer=2), vision_mask=VISION),
        pytest.raises(ValueError, match=r"^LlamaModel is not among .* the attention weights of layer"),
    ):
        logits(model)


def test_frozen_rows_that_a_layer_changes_are_refused_under_cross_alone() -> None:
    class TwoMlps(llama.LlamaDecoderLayer):
        """Sends the whole row through its MLP once more, where no policy knows of it."""

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = super().forward(hidden_states, *args, **kwargs)
            return out + type(self.mlp).forward(self.mlp, hidden_states.flip(-1))

    model = build(TwoMlps)
    with attach(model, BAND, vision_mask=VISION):
        logits(model)
    with pytest.raises(ValueError, match=r"^LlamaModel is not among .* with frozen vision tokens"):
        attach(model, VisionSchedule(cross=(1, 3)), vision_mask=VISION)
    assert "forward" not in vars(model.model)
    with (
        attach(model, BAND, vision_mask=VISION) as attachment,
        pytest.raises(ValueError, match="with frozen vision tokens"),
        attachment.using(VisionSchedule(cross=(1, 3))),
    ):
        pass


def test_the_try_leaves_the_model_and_the_random_numbers_alone() -> None:
    model = build(Subclass).train()
    model.model.layers[0].mlp.eval()
    modes, weights = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    check_decoder(model.model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert not any(
        vars(m).keys() & {"forward", "_latefusion_hooks", "_latefusion_watcher"} for m in model.modules()
    )
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_shown_decoder_pays_nothing_with_adapters_neither(monkeypatch: Any) -> None:
    def nobody(decoder: Any) -> None:
        raise AssertionError("tried")

    monkeypatch.setattr("latefusion.models.attach.check_decoder", nobody)
    attach(build(), BAND, vision_mask=VISION).detach()
    attach(get_peft_model(build(), LoraConfig(target_modules="all-linear")), BAND, vision_mask=VISION)
    with pytest.raises(AssertionError, match="tried"):
        attach(build(Subclass), BAND, vision_mask=VISION)
    attach(build(Subclass), BAND, vision_mask=VISION, check=False)


def test_what_cannot_be_tried_is_refused() -> None:
    sharded = build(Subclass)
    sharded.model.layers[0].mlp.up_proj.weight.ds_id = 0  # as ZeRO-3 marks it
    with pytest.raises(ValueError, match=r"^LlamaModel is not among .* spread over processes .*check=False"):
        attach(sharded, BAND, vision_mask=VISION)
    with torch.device("meta"):
        weightless = build(Subclass)
        known = build()
    with pytest.raises(ValueError, match=r"^LlamaModel is not among .* on the meta device"):
        attach(weightless, BAND, vision_mask=VISION)
    attach(known, BAND, vision_mask=VISION)


def test_weights_that_are_offloaded_are_tried() -> None:
    model = cpu_offload(build(Subclass), execution_device="cpu")
    assert next(model.parameters()).is_meta
    attach(model, BAND, vision_mask=VISION)
    with pytest.raises(ValueError, match="differ by"):
        attach(cpu_offload(build(TokenBefore), execution_device="cpu"), BAND, vision_mask=VISION)
