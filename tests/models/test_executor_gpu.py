"""What only a GPU can run: real flash kernels, compiled flex attention, waits for a real device."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.families import EVEN, IMAGE, MIXED, build_from, llava, prompt, text_tokens, vision_tokens
from helpers.oracle import Fixed

from latefusion import VisionSchedule
from latefusion.models.attach import attach
from latefusion.models.policies.divprune import DivPrune
from latefusion.models.policies.fastv import FastV
from latefusion.models.policies.random import Random
from latefusion.models.policies.visipruner.settings import VisiPruner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

needs_flash = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed"
)

POLICIES = {
    "dense": VisionSchedule(),
    "band": VisionSchedule(enter=2, exit=4),
    "keeps": VisionSchedule(enter=1, exit=5, keep={2: 3, 4: 2}),
    "cross": VisionSchedule(cross=(1, 3)),
    "visipruner": VisiPruner(boundary=1, layer_threshold=0.9999, tokens_threshold=0.01),
    "fastv": FastV(),
    "random": Random(layer=3),
    "divprune": DivPrune(),
}


def on_gpu(attention: str, dtype: torch.dtype) -> Any:
    model = build_from(llava(hf.LlamaConfig, head_dim=32, num_attention_heads=4), "sdpa")
    model = model.to("cuda", dtype)
    model.set_attn_implementation({"text_config": attention})
    return model


def to_gpu(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    out = {name: value.cuda() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    features = inputs["mm_encoder_outputs"]["image"]
    features.pooler_output = [image.to("cuda", dtype) for image in features.pooler_output]
    return {**out, "mm_encoder_outputs": {"image": features}}


def check(
    attention: str, dtype: torch.dtype, tolerance: float, policy: str, rows: list[str], side: str
) -> None:
    """Against sdpa on the same device: logits of a prefill and of decode steps over the same tokens."""
    inputs = to_gpu(prompt("llava", rows, side), dtype)
    text = text_tokens(inputs)
    logits_on = {}
    for implementation in ("sdpa", attention):
        model = on_gpu(implementation, dtype)
        with torch.no_grad(), attach(model, POLICIES[policy]):
            out = model(**inputs)
            mask, steps = inputs["attention_mask"], []
            for token in (5, 6):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                ids = torch.full((len(rows), 1), token, device="cuda")
                steps.append(
                    model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values).logits
                )
        logits_on[implementation] = out.logits[text].float(), torch.cat(steps).float()
    for a, b in zip(logits_on["sdpa"], logits_on[attention], strict=True):
        assert (a - b).abs().max() <= tolerance


@needs_flash
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rows", [MIXED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_flash_attention_2(policy: str, rows: list[str], side: str) -> None:
    check("flash_attention_2", torch.bfloat16, 0.1, policy, rows, side)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rows", [MIXED, EVEN], ids=["ragged", "even"])
def test_flex_attention(policy: str, rows: list[str]) -> None:
    check("flex_attention", torch.float32, 1e-3, policy, rows, "left")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_that_keeps_everything_changes_no_bit(dtype: torch.dtype) -> None:
    model, inputs = on_gpu("sdpa", dtype), to_gpu(prompt("llava", MIXED), dtype)
    with torch.no_grad():
        expected = model(**inputs).logits
        with attach(model, VisionSchedule()):
            assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("policy", ["band", "keeps", "visipruner", "fastv", "random", "divprune"])
def test_layers_never_wait_for_the_device(policy: str) -> None:
    """CUDA itself raises at a wait inside a layer, but for those that VisiPruner asks for by name (an event)."""
    model, inputs = on_gpu("sdpa", torch.bfloat16), to_gpu(prompt("llava", MIXED), torch.bfloat16)
    allowed = torch.cuda.get_sync_debug_mode()
    layers = model.get_decoder().layers
    with torch.no_grad(), attach(model, POLICIES[policy]):
        model(**inputs)  # warm up
        # from before the executor's hook on layer 0 until after the last layer
        first = layers[0].register_forward_pre_hook(
            lambda *a: torch.cuda.set_sync_debug_mode("error"), prepend=True
        )
        last = layers[-1].register_forward_hook(
            lambda *a: torch.cuda.set_sync_debug_mode(allowed), always_call=True
        )
        try:
            cache = model(**inputs).past_key_values
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            ids = torch.full((len(MIXED), 1), 5, device="cuda")
            step = model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        finally:
            first.remove()
            last.remove()
            torch.cuda.set_sync_debug_mode(allowed)
    assert step.logits.isfinite().all()  # and no wait raised on the way


def test_gradients_equal_those_on_the_cpu() -> None:
    inputs = prompt("llava", MIXED, "right")
    labels = inputs["input_ids"].masked_fill(~text_tokens(inputs) | (inputs["input_ids"] == IMAGE), -100)
    labels[:, :7] = -100
    seen = [
        vision_tokens(inputs) & (torch.arange(inputs["input_ids"].shape[1]) % k == 0)
        for k in (1, 1, 2, 2, 4, 8)
    ]
    grads = []
    for device in ("cpu", "cuda"):
        model = build_from(llava(hf.LlamaConfig)).to(device)
        placed = inputs if device == "cpu" else to_gpu(inputs, torch.float32)
        with attach(model, Fixed([mask.to(device) for mask in seen])):
            model(**placed, labels=labels.to(device), use_cache=False).loss.backward()
        grads.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    assert all((grads[0][name] - grads[1][name]).abs().max() < 1e-4 for name in grads[0])
