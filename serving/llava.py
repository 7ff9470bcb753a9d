"""LLaVA around the late-fusion decoder: names of weights, and where vLLM finds the state of its requests."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from latefusion.models.locate import SCHEDULE_KEY
from latefusion.models.student.entry import ENTRY
from latefusion.serving.plugin import INNER
from latefusion.serving.refusals import check_config
from latefusion.serving.state import LateFusionState


@MULTIMODAL_REGISTRY.register_processor(
    _build_llava_or_pixtral_hf_processor,
    info=_build_llava_or_pixtral_hf_info,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class LateFusionLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """vLLM's LLaVA with a late-fusion decoder."""

    # transformers writes vision_tower.embeddings..., where vLLM 0.32 has vision_tower.vision_model.embeddings...
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            f"{ENTRY}.": f"language_model.model.{ENTRY}.",
            "model.language_model.": "language_model.model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": "language_model.lm_head.",
            "model.vision_tower.vision_model.": "vision_tower.vision_model.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "vision_tower.vision_model.": "vision_tower.vision_model.",
            "vision_tower.": "vision_tower.vision_model.",
        }
    )

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        check_config(vllm_config)
        for name, value in (
            ("enable_prefix_caching", vllm_config.cache_config.enable_prefix_caching),
            ("enforce_eager=False", not vllm_config.model_config.enforce_eager),
        ):
            if value:
                raise ValueError(f"a late-fusion model is not served with {name}.")
        config = vllm_config.model_config.hf_config
        config.text_config.architectures = [INNER]
        for key in (SCHEDULE_KEY, ENTRY):  # the decoder is given the text part alone
            setattr(config.text_config, key, getattr(config, key, None))
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @staticmethod
    def get_model_state_cls() -> type[LateFusionState]:
        """What vLLM's Model Runner V2 asks a model for."""
        return LateFusionState

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        step: Any = None,
        **inputs: Any,
    ) -> Tensor:
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds, step=step
        )
