"""The models that vLLM builds: its own, around the late-fusion decoder."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from latefusion.models.locate import SCHEDULE_KEY
from latefusion.models.student.entry import ENTRY
from latefusion.serving.plugin import DECODER
from latefusion.serving.refusals import check_config
from latefusion.serving.state import LateFusionState

ENTRY_NAMES = {f"{ENTRY}.": f"language_model.model.{ENTRY}."}


class LateFusion:
    """Put before a model of vLLM: gives it the late-fusion decoder, and the state of its requests."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        check_config(vllm_config)
        if not vllm_config.model_config.enforce_eager:
            raise ValueError("a late-fusion model is not served with enforce_eager=False.")
        super().__init__(vllm_config=_with_decoder(vllm_config), prefix=prefix)  # type: ignore[call-arg]

    @staticmethod
    def get_model_state_cls() -> type[LateFusionState]:
        """The class of the model's request state; vLLM's Model Runner V2 asks for it."""
        return LateFusionState

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        step: Any = None,
        **inputs: Any,
    ) -> Tensor:
        """Hidden states `[rows, D]`."""
        decoder: Any = self.language_model.model  # type: ignore[attr-defined]
        return decoder(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds, step=step)


class _WithDecoder(VllmConfig):
    """vLLM's configuration: the language model that is built of it is the late-fusion decoder."""

    def with_hf_config(self, hf_config: Any, architectures: list[str] | None = None) -> VllmConfig:
        text, whole = copy.deepcopy(hf_config.get_text_config()), self.model_config.hf_config
        for key in (SCHEDULE_KEY, ENTRY):  # the decoder is given the text part alone
            setattr(text, key, getattr(whole, key, None))
        if text.model_type.startswith("qwen2"):  # a Qwen2 layer is Llama's, with biases
            text.qkv_bias = True
        stock = copy.copy(self)
        stock.__class__ = VllmConfig
        return stock.with_hf_config(text, [DECODER])


def _with_decoder(config: VllmConfig) -> VllmConfig:
    config = copy.copy(config)
    config.__class__ = _WithDecoder
    return config


@MULTIMODAL_REGISTRY.register_processor(
    _build_llava_or_pixtral_hf_processor,
    info=_build_llava_or_pixtral_hf_info,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class LateFusionLlavaForConditionalGeneration(LateFusion, LlavaForConditionalGeneration):
    """LLaVA."""

    # transformers writes vision_tower.embeddings..., where vLLM 0.32 has vision_tower.vision_model.embeddings...
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            **ENTRY_NAMES,
            "model.language_model.": "language_model.model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": "language_model.lm_head.",
        },
        orig_to_new_regex={
            re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"): "vision_tower.vision_model.",
        },
    )


class ImagesAlone(Qwen2_5_VLProcessingInfo):
    """No videos: served answers about them were not compared."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLMultiModalProcessor, info=ImagesAlone, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class LateFusionQwen2_5_VLForConditionalGeneration(LateFusion, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            **ENTRY_NAMES,
            **Qwen2_5_VLForConditionalGeneration.hf_to_vllm_mapper.orig_to_new_prefix,
        }
    )
