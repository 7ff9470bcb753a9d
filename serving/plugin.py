"""What vLLM calls when it starts: the late-fusion architectures and their defaults."""

from __future__ import annotations

import logging
from typing import Any

from latefusion.serving.refusals import VERSION, check_config, check_stock

DECODER = "LateFusionForCausalLM"
MODELS = ("LateFusionLlavaForConditionalGeneration", "LateFusionQwen2_5_VLForConditionalGeneration")
log = logging.getLogger("vllm.latefusion")


def register() -> None:
    """Register the architectures with vLLM; the entry point `vllm.general_plugins`."""
    import vllm

    if vllm.__version__.partition("+")[0] != VERSION:
        log.warning(
            "late-fusion checkpoints are not served: latefusion's plug-in is for vLLM %s, and this is %s.",
            VERSION,
            vllm.__version__,
        )
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    ModelRegistry.register_model(DECODER, f"latefusion.serving.decoder:{DECODER}")
    for name in MODELS:
        ModelRegistry.register_model(name, f"latefusion.serving.models:{name}")
        MODELS_CONFIG_MAP[name] = Defaults
    for name in ModelRegistry.get_supported_archs():
        MODELS_CONFIG_MAP.setdefault(name, Stock)


class Stock:
    """Refuses a student in the place of a stock model: earlier exports had the base's type, and would run dense."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Raise ValueError if the checkpoint has a schedule."""
        check_stock(model_config.hf_config)

    @staticmethod
    def verify_and_update_config(config: Any) -> None:
        """vLLM asks for it; nothing to change."""


class Defaults:
    """Checks a configuration of vLLM before anything is loaded, and switches off what is on by default."""

    @staticmethod
    def verify_and_update_config(config: Any) -> None:
        """Raise ValueError for what is not served; switch compilation and CUDA graphs off, which are not built."""
        check_config(config)
        if not config.model_config.enforce_eager:
            log.warning(
                "latefusion: compilation and CUDA graphs are off (enforce_eager), they are not built."
            )
            config.model_config.enforce_eager = True

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """vLLM asks for it; nothing to change."""
