"""A decoder whose layers run on the rows that they see, on vLLM's own Llama layers.

Mistral's layers are Llama's, and Qwen2's are Llama's with biases (`models.py` says so to vLLM).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.v1.attention.backend import subclass_attention_backend_with_overrides

from latefusion.models.locate import SCHEDULE_KEY
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import ENTRY, EntryAdapter
from latefusion.serving.blocks import LateFusionSpec
from latefusion.serving.state import BAND, READING, TEXT_ONLY, Step


class LateFusionModel(LlamaModel):
    """Layers outside the band, or all of them if vision tokens are frozen, run on text rows alone."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **settings: Any):
        super().__init__(vllm_config=vllm_config, prefix=prefix, **settings)
        config = vllm_config.model_config.hf_config  # the text part; llava.py put the schedule there
        schedule = VisionSchedule.from_dict(getattr(config, SCHEDULE_KEY))
        self.enter = schedule.enter
        self.exit = len(self.layers) if schedule.exit is None else schedule.exit
        self.cross = None if schedule.cross is None else frozenset(schedule.cross)
        self.text_only: list[str] = []  # names of attention layers
        self.reading: list[str] = []
        for i, layer in enumerate(self.layers):
            attention = layer.self_attn.attn
            if attention.sliding_window is not None:
                raise ValueError(
                    f"layer {i} attends to a sliding window, which is not served with late fusion."
                )
            kind = BAND
            if self.cross is not None and i in self.cross:
                kind = READING
                self.reading.append(attention.layer_name)
            elif self.cross is not None or not self.enter <= i < self.exit:
                kind = TEXT_ONLY
                self.text_only.append(attention.layer_name)
            _name_backend(attention, kind)
        sizes = getattr(config, ENTRY)
        if sizes is not None:
            self.vision_entry = ServedEntry(hidden_size=config.hidden_size, **sizes).float()
        self.adapts = sizes is not None

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        step: Step | None = None,
    ) -> Tensor:
        """Hidden states `[rows, D]`; at vision tokens they are what the last layer that saw them left, not normed."""
        full = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        if step is None:  # vLLM measures memory
            return self.norm(self._run(0, len(self.layers), positions, full))
        slots = get_forward_context().slot_mapping
        slots.update(dict.fromkeys(self.text_only, step.text_slots))  # type: ignore[union-attr]
        slots.update(dict.fromkeys(self.reading, step.reading_slots))  # type: ignore[union-attr]
        if self.cross is not None:
            return self._read(positions, full, step)
        if len(step.vision) == 0:
            return self.norm(self._run(0, len(self.layers), positions, full))
        return self._band(positions, full, step)

    def _band(self, positions: Tensor, full: Tensor, step: Step) -> Tensor:
        full, text = full.clone(), step.text
        if len(text):
            full[text] = self._run(0, self.enter, positions[..., text], full[text])
        if self.adapts:
            full[step.vision] = self.vision_entry(full[step.vision], step.order)
        full = self._run(self.enter, self.exit, positions, full)
        if len(text):
            full[text] = self.norm(self._run(self.exit, len(self.layers), positions[..., text], full[text]))
        return full

    def _run(self, first: int, end: int, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Layers `first` to `end - 1` on these rows, their residual added."""
        residual = None
        for layer in self.layers[first:end]:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states if residual is None else hidden_states + residual

    def _read(self, positions: Tensor, full: Tensor, step: Step) -> Tensor:
        """Vision tokens stay what the projector made them; layers in `cross` write their keys, and text reads them."""
        assert self.cross is not None
        text = step.text
        hidden_states, residual, text_positions = full[text], None, positions[..., text]
        frozen, frozen_positions = full[step.vision], positions[..., step.vision]
        if self.adapts and len(frozen):
            frozen = self.vision_entry(frozen, step.order)
        for i, layer in enumerate(self.layers):
            if i not in self.cross or not len(frozen):
                if len(text):
                    hidden_states, residual = layer(text_positions, hidden_states, residual)
                continue
            if self.adapts and str(i) in self.vision_entry.later:
                frozen = self.vision_entry(frozen, step.order, i)
            attention = layer.self_attn
            _, k, v = _projected(attention, layer.input_layernorm(frozen), frozen_positions)
            if not len(text):
                _write_keys(attention.attn, k, v, step.reading_slots)
                continue
            if residual is None:
                normed, residual = layer.input_layernorm(hidden_states), hidden_states
            else:
                normed, residual = layer.input_layernorm(hidden_states, residual)
            q, text_k, text_v = _projected(attention, normed, text_positions)
            output = attention.attn(q, torch.cat([text_k, k]), torch.cat([text_v, v]))
            output, _ = attention.o_proj(output)
            hidden_states, residual = layer.post_attention_layernorm(output, residual)
            hidden_states = layer.mlp(hidden_states)
        full = full.clone()
        if len(text):
            full[text] = self.norm(hidden_states if residual is None else hidden_states + residual)
        return full


class ServedEntry(EntryAdapter):
    """The entry adapter, loaded by vLLM: its calibrated map is buffers, which vLLM leaves out."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        state = dict(weights)
        self.load_state_dict(state)
        return set(state)


class LateFusionForCausalLM(LlamaForCausalLM):
    """vLLM's, around the decoder above."""

    def _init_model(self, vllm_config: Any, prefix: str = "", **settings: Any) -> LateFusionModel:
        return LateFusionModel(vllm_config=vllm_config, prefix=prefix, **settings)


def _name_backend(attention: Any, kind: str) -> None:
    """Give the layer a backend class of its own name, and keys whose blocks are shared up to the first image."""
    backend: Any = attention.attn_backend

    def customize_spec(cls: Any, spec: Any) -> LateFusionSpec:
        return LateFusionSpec.of(backend.customize_spec(spec))

    attention.attn_backend = subclass_attention_backend_with_overrides(
        kind, backend, {"customize_spec": classmethod(customize_spec)}
    )


def _projected(attention: Any, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[rows, heads * D]`, rotated to their positions."""
    qkv, _ = attention.qkv_proj(normed)
    q, k, v = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    q, k = attention.rotary_emb(positions, q, k)
    return q, k, v


def _write_keys(attention: Any, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Put keys and values into the cache in a step in which nothing attends."""
    shape = (-1, attention.num_kv_heads, attention.head_size)
    attention.impl.do_kv_cache_update(
        attention, k.reshape(shape), v.reshape(shape), attention.kv_cache, slots
    )
