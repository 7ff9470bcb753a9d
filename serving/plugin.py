"""What vLLM calls when it starts: the late-fusion architectures and their defaults."""

from __future__ import annotations

import logging
from typing import Any

from latefusion.serving.refusals import VERSION, check_config

OUTER, INNER = "LateFusionLlavaForConditionalGeneration", "LateFusionLlamaForCausalLM"
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

    ModelRegistry.register_model(OUTER, "latefusion.serving.llava:LateFusionLlavaForConditionalGeneration")
    ModelRegistry.register_model(INNER, "latefusion.serving.decoder:LateFusionLlamaForCausalLM")
    MODELS_CONFIG_MAP[OUTER] = Defaults


class Defaults:
    """Checks a configuration of vLLM before anything is loaded, and switches off what is on by default."""

    @staticmethod
    def verify_and_update_config(config: Any) -> None:
        """Raise ValueError for what is not served.

        Prefix caching: text behind an image has its keys in blocks that hold the image, so another question about
        the same image would read the first question's keys. Compilation and CUDA graphs: not built.
        """
        check_config(config)
        if config.cache_config.enable_prefix_caching:
            log.warning(
                "latefusion: prefix caching is off, a block of an image also holds its question's keys."
            )
            config.cache_config.enable_prefix_caching = False
        if not config.model_config.enforce_eager:
            log.warning(
                "latefusion: compilation and CUDA graphs are off (enforce_eager), they are not built."
            )
            config.model_config.enforce_eager = True

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """vLLM asks for it; nothing to change."""
