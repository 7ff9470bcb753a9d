"""Prompts of many layouts, a sharp random Llama, and VisiPruner's oracle on them, for its tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from helpers.reference_visipruner import ReferenceLlama, Run, Settings
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from latefusion.models.policies.visipruner.settings import VisiPruner

# One prompt each: runs of text (t) and vision (v) tokens. Together in a batch they fuse in different layers.
PROMPTS = {
    "one image": "t3 v12 t4",
    "short": "t2 v7 t3",
    "two images": "t2 v6 v6 t5",
    "interleaved": "v5 t3 v6 t2 v4 t4",
    "text only": "t9",
    "image first": "v10 t6",
}
STAGES = [("middle",), ("middle", "deep"), ("shallow",), ("shallow", "middle", "deep")]
NEW_TOKENS = 4


def layout_mask(layout: str) -> Tensor:
    return torch.tensor([run[0] == "v" for run in layout.split() for _ in range(int(run[1:]))])


def build(attention: str = "sdpa", seed: int = 3) -> LlamaForCausalLM:
    """A random Llama with grouped heads, sharp enough that a single vision token can turn the output."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"attn_implementation": attention}
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.15,
        max_position_embeddings=128,
        eos_token_id=None,
        **options,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 2
    return model


def oracle(model: LlamaForCausalLM) -> ReferenceLlama:
    config = model.config
    assert config.rope_parameters is not None
    return ReferenceLlama(
        {name: weight.float().numpy() for name, weight in model.state_dict().items()},
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        eps=config.rms_norm_eps,
        theta=config.rope_parameters["rope_theta"],
    )


def settings_of(stages: tuple[str, ...], sink_rule: str = "first") -> Settings:
    return Settings(
        boundary=2,
        layer_threshold=0.9,
        tokens_threshold=0.3,
        exit_threshold=0.97,
        stages=stages,
        sink_rule=sink_rule,
    )


def policy_of(settings: Settings) -> VisiPruner:
    return VisiPruner(**vars(settings))


@dataclass
class Batch:
    inputs_embeds: Tensor  # [B, T, H]
    attention_mask: Tensor  # [B, T]
    vision: Tensor  # [B, T]
    offsets: list[int]  # where each prompt starts
    lengths: list[int]

    @property
    def inputs(self) -> dict[str, Any]:
        return {"inputs_embeds": self.inputs_embeds, "attention_mask": self.attention_mask}


def prompts(hidden_size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    masks = [layout_mask(layout) for layout in PROMPTS.values()]
    return [(torch.randn(len(mask), hidden_size, generator=generator), mask) for mask in masks]


def single(sample: tuple[Tensor, Tensor]) -> Batch:
    embeds, mask = sample
    real = torch.ones(1, len(mask), dtype=torch.long)
    return Batch(embeds[None], real, mask[None], [0], [len(mask)])


def collate(samples: list[tuple[Tensor, Tensor]], side: str) -> Batch:
    """Pad with noise, which must not matter."""
    length = max(len(mask) for _, mask in samples) + 1
    embeds = torch.randn(len(samples), length, samples[0][0].shape[1])
    real, vision = torch.zeros(2, len(samples), length, dtype=torch.bool)
    offsets, lengths = [], []
    for i, (sample, mask) in enumerate(samples):
        start = length - len(mask) if side == "left" else 0
        here = slice(start, start + len(mask))
        embeds[i, here], real[i, here], vision[i, here] = sample, True, mask
        offsets.append(start)
        lengths.append(len(mask))
    return Batch(embeds, real.long(), vision, offsets, lengths)


def references(model: LlamaForCausalLM, settings: Settings, new_tokens: int = NEW_TOKENS) -> list[Run]:
    runs = [
        oracle(model).run(embeds.numpy(), vision.numpy(), settings, new_tokens)
        for embeds, vision in prompts()
    ]
    assert min(run.margin for run in runs) > 1e-4, "a decision hangs on rounding; choose another seed"
    return runs


def check_trace(trace: list, runs: list[Run], offsets: list[int]) -> None:
    for record, run, offset in zip(trace, runs, offsets, strict=True):
        assert record.fusion_layer == run.fusion_layer
        assert record.exit_layer == run.exit_layer
        assert list(record.tokens) == run.tokens
        expected = None if run.kept is None else [offset + i for i in run.kept]
        if run.fusion_layer != len(run.tokens) - 1:
            assert (None if record.kept is None else list(record.kept)) == expected


def generate(model: LlamaForCausalLM, batch: Batch, **options):
    return model.generate(  # type: ignore[misc]
        **batch.inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
