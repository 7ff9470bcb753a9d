"""Recurrent layers as the textbook has them: a loop over tokens in float64, from the modules' own weights.

Nothing is shared with transformers or the executor: no chunks, no cache, no padding. A token that takes no part is not
in the loop.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu, softplus


def weight(module: Any, name: str) -> Tensor:
    """Also of a projection inside PEFT: its base weight and the LoRA update of the active adapter."""
    part = getattr(module, name)
    if not hasattr(part, "base_layer"):
        return part.weight.double()
    whole = part.base_layer.weight.double()
    for adapter in [] if part.disable_adapters else part.active_adapters:
        update = part.lora_B[adapter].weight.double() @ part.lora_A[adapter].weight.double()
        whole = whole + part.scaling[adapter] * update
    return whole


def short_convolution(mixer: Any, tokens: Tensor) -> Tensor:
    """`y_t = W_out (C_t * sum_k w_k (B_{t-k} * x_{t-k}))` (LFM2, arXiv 2511.23404), float64 `[n, D]` -> `[n, D]`."""
    kernel = mixer.conv.weight.double()[:, 0]  # [D, K], the newest token last
    read: list[Tensor] = []
    outputs = []
    for token in tokens:
        gate_in, gate_out, x = linear(token, weight(mixer, "in_proj")).chunk(3)
        read.append(gate_in * x)
        window = read[-kernel.shape[1] :]
        mixed = sum(kernel[:, -1 - age] * value for age, value in enumerate(reversed(window)))
        outputs.append(linear(gate_out * mixed, weight(mixer, "out_proj")))
    return torch.stack(outputs) if outputs else tokens


def gated_delta(mixer: Any, tokens: Tensor) -> Tensor:
    """`S_t = a_t S_{t-1} (1 - b_t k_t k_t') + b_t v_t k_t'`, `o_t = S_t q_t` (arXiv 2412.06464), float64 `[n, D]`."""
    keys, values = mixer.num_k_heads, mixer.num_v_heads
    width_k, width_v = mixer.head_k_dim, mixer.head_v_dim
    kernel = mixer.conv1d.weight.double()[:, 0]  # [channels, K]
    state = tokens.new_zeros(values, width_v, width_k)
    read: list[Tensor] = []
    outputs = []
    for token in tokens:
        read.append(linear(token, weight(mixer, "in_proj_qkv")))
        window = read[-kernel.shape[1] :]
        mixed = silu(sum(kernel[:, -1 - age] * value for age, value in enumerate(reversed(window))))
        q, k, v = mixed.split([keys * width_k, keys * width_k, values * width_v])
        q, k = (unit(part.view(keys, width_k)).repeat_interleave(values // keys, 0) for part in (q, k))
        v, q = v.view(values, width_v), q / width_k**0.5
        strength = linear(token, weight(mixer, "in_proj_b")).sigmoid()  # b [heads]
        step = softplus(linear(token, weight(mixer, "in_proj_a")) + mixer.dt_bias.double())
        decay = (-mixer.A_log.double().exp() * step).exp()  # a [heads]
        heads = []
        for h in range(values):
            forgotten = torch.eye(width_k, dtype=torch.float64) - strength[h] * torch.outer(k[h], k[h])
            heads.append(decay[h] * state[h] @ forgotten + strength[h] * torch.outer(v[h], k[h]))
        state = torch.stack(heads)
        out = torch.einsum("hvk,hk->hv", state, q)
        out = out / (out.square().mean(-1, keepdim=True) + mixer.layer_norm_epsilon).sqrt()
        gate = linear(token, weight(mixer, "in_proj_z")).view(values, width_v)
        out = mixer.norm.weight.double() * out * silu(gate)
        outputs.append(linear(out.flatten(), weight(mixer, "out_proj")))
    return torch.stack(outputs) if outputs else tokens


def unit(vectors: Tensor) -> Tensor:
    return vectors / (vectors.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def scan(mixer: Any, hidden_states: Tensor, active: Tensor) -> Tensor:
    """The module over the `active` tokens (bool `[B, T]`) of each row `[B, T, D]`; zeros elsewhere."""
    textbook = gated_delta if hasattr(mixer, "A_log") else short_convolution
    output = torch.zeros_like(hidden_states)
    for b, taking_part in enumerate(active):
        rows = taking_part.nonzero().flatten()
        mixed = textbook(mixer, hidden_states[b, rows].double())
        output = output.index_put((torch.full_like(rows, b), rows), mixed.to(output.dtype))
    return output


class _Float64:
    """The module torch, in which float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def compute_in_float64(monkeypatch: Any, model: Any) -> Any:
    """The model in float64, also where its code asks for float32 (norms, softmax, the delta rule)."""
    monkeypatch.setattr(sys.modules[type(model.get_decoder()).__module__], "torch", _Float64())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return model.double()
