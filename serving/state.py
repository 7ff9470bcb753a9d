"""Attention metadata of the text rows, beside vLLM's own of all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from latefusion.serving.rows import Sequences, StepRows, step_rows

# Layers with a backend of their own name get their own group of attention metadata, over the same KV-cache blocks
BAND, TEXT_ONLY, READING = "Band", "TextOnly", "Reading"


@dataclass(frozen=True)
class Step:
    """Which rows of a step are text, which are vision tokens, and where their keys go.

    Attributes:
        text: int64 `[n]`, the rows of text.
        vision: int64 `[k]`, the rows of vision tokens.
        order: int64 `[k]`, the number of each among the vision tokens of its request.
        text_slots: int64 `[n]`, where layers without vision tokens write their keys.
        reading_slots: int64 `[n + k]`, where layers that read frozen vision tokens do: text, then vision.
    """

    text: Tensor
    vision: Tensor
    order: Tensor
    text_slots: Tensor
    reading_slots: Tensor


class LateFusionState(DefaultModelState):
    """vLLM's state of a model's requests, with a second and a third attention metadata in each step."""

    step: Step | None = None

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
        **more: Any,
    ) -> dict[str, Any]:
        """The metadata of every layer: vLLM's in the band, that of the text rows elsewhere."""
        assert cudagraph_mode == CUDAGraphMode.NONE and not for_capture and ubatch_idx == 0, (
            "eager steps only"
        )
        number = next(i for i, groups in enumerate(attn_groups) if groups)
        assert sum(map(bool, attn_groups)) == 1, "one KV-cache group"
        band, outside, reading = (
            [[group for group in groups if _kind(group) == kind] for groups in attn_groups]
            for kind in (BAND, TEXT_ONLY, READING)
        )
        metadata = {}
        if any(band):
            metadata = super().prepare_attn(
                input_batch, cudagraph_mode, block_tables, slot_mappings, band, kv_cache_config, **more
            )
        n = input_batch.num_reqs
        rows = step_rows(
            input_batch.query_start_loc_np[:n],
            input_batch.num_computed_tokens_np[:n],
            input_batch.num_scheduled_tokens[:n],
            [self._vision_ranges(request) for request in input_batch.req_ids[:n]],
        )
        block_size = kv_cache_config.kv_cache_groups[number].kv_cache_spec.block_size
        table = block_tables[number][:n]  # [requests, blocks]
        self.step = self._step(rows, table, block_size, slot_mappings[number])
        for groups, sequences, slots in (
            (outside, rows.compact, self.step.text_slots),
            (reading, rows.runs, self.step.reading_slots),
        ):
            if any(groups) and len(sequences):
                metadata |= self._metadata(
                    groups, sequences, slots, table, number, block_tables, input_batch, rows, kv_cache_config
                )
        return metadata

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """The model's keyword arguments: vLLM's, and the step."""
        step, self.step = self.step, None
        assert step is not None, "vLLM prepares a step's attention before its inputs"
        return super().prepare_inputs(input_batch, req_states) | {"step": step}

    def _vision_ranges(self, request: str) -> list[tuple[int, int]]:
        assert self.encoder_cache is not None
        features = self.encoder_cache.mm_features.get(request, ())
        return sorted(
            stretch for feature in features for stretch in feature.mm_position.extract_embeds_range()
        )

    def _step(self, rows: StepRows, table: Tensor, block_size: int, slots: Tensor) -> Step:
        text, vision, order, request, place = (
            self._sent(array) for array in (rows.text, rows.vision, rows.order, rows.request, rows.place)
        )
        blocks = table[request, place // block_size].to(torch.int64)
        return Step(
            text=text,
            vision=vision,
            order=order,
            text_slots=blocks * block_size + place % block_size,
            reading_slots=torch.cat([slots[text], slots[vision]]),
        )

    def _metadata(
        self,
        groups: list[list[Any]],
        sequences: Sequences,
        slots: Tensor,
        table: Tensor,
        number: int,
        block_tables: tuple[Tensor, ...],
        input_batch: Any,
        rows: StepRows,
        kv_cache_config: Any,
    ) -> dict[str, Any]:
        starts_cpu, lengths_cpu = torch.from_numpy(sequences.starts), torch.from_numpy(sequences.lengths)
        tables = list(block_tables)
        tables[number] = table[self._sent(sequences.requests)].contiguous()
        n = input_batch.num_reqs
        return build_attn_metadata(
            attn_groups=groups,
            num_reqs=len(sequences),
            num_tokens=len(rows.text),
            query_start_loc_gpu=self._sent(sequences.starts),
            query_start_loc_cpu=starts_cpu,
            max_query_len=sequences.longest,
            seq_lens=self._sent(sequences.lengths),
            max_seq_len=int(sequences.lengths.max()),
            block_tables=tables,
            slot_mappings=[slots] * len(tables),  # type: ignore[arg-type]
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=lengths_cpu,
            positions=input_batch.positions[self._sent(rows.text)],
            is_prefilling=torch.from_numpy(input_batch.is_prefilling_np[:n][sequences.requests]),
        )

    def _sent(self, array: np.ndarray[Any, Any]) -> Tensor:
        """The array on the model's device."""
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _kind(group: Any) -> str:
    name = group.backend.__name__
    return next(kind for kind in (BAND, TEXT_ONLY, READING) if name.startswith(kind))
