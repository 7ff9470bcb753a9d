"""What the plug-in does not serve, each in one sentence, before weights are loaded: it was not shown exact."""

from __future__ import annotations

from typing import Any

from latefusion.models.locate import SCHEDULE_KEY
from latefusion.models.schedule import VisionSchedule

VERSION = "0.32.0"  # of vLLM; the hooks that the plug-in uses are vLLM's own, and may move in any release
DECODERS = {"llava": ("llama", "mistral", "qwen2"), "qwen2_5_vl": ("qwen2_5_vl_text",)}  # by type of model
TOWERS = {"llava": ("clip_vision_model", "siglip_vision_model"), "qwen2_5_vl": ("qwen2_5_vl_vision",)}


def check_config(config: Any) -> None:
    """Raise ValueError if a student would not be served exactly under this `vllm.config.VllmConfig`."""
    model, parallel = config.model_config, config.parallel_config
    check_model(model.hf_config)
    options = [
        (
            not config.use_v2_model_runner,
            "vLLM's V1 model runner has no place for it; unset VLLM_USE_V2_MODEL_RUNNER, and leave out the options "
            "that vLLM names as not supported by Model Runner V2 (it needs Triton, so a GPU)",
        ),
        (
            config.lora_config is not None,
            "LoRA adapters map tokens by their rows; merge them into the checkpoint",
        ),
        (config.speculative_config is not None, "speculative decoding was not tested; leave it out"),
        (parallel.pipeline_parallel_size > 1, "the decoder is not divided; use pipeline_parallel_size=1"),
        (parallel.data_parallel_size > 1, "data parallelism was not tested; start one server for each GPU"),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism divides keys by position; use context parallel sizes of 1",
        ),
        (parallel.enable_dbo, "dual batch overlap was not tested; leave out enable_dbo"),
        (
            config.kv_transfer_config is not None,
            "a KV connector knows no compact keys; leave out kv_transfer_config",
        ),
        (
            model.enable_prompt_embeds,
            "prompt embeddings name no vision tokens; leave out enable_prompt_embeds",
        ),
        (
            bool(model.multimodal_config.video_pruning_rate),
            "vision tokens are removed by its schedule alone; leave out video_pruning_rate",
        ),
        (model.runner_type != "generate", "only runner=generate was tested"),
        (model.quantization is not None, "quantised weights were not tested; leave out quantization"),
        (
            str(config.cache_config.cache_dtype) not in ("auto", "float32", "float16", "bfloat16"),
            "a quantised KV cache was not tested; use kv_cache_dtype=auto",
        ),
    ]
    for refused, reason in options:
        if refused:
            raise ValueError(f"a late-fusion model is not served like this: {reason}.")


def check_stock(config: Any) -> None:
    """Raise ValueError if a checkpoint of a stock architecture is a student: vLLM would run it without its schedule."""
    if getattr(config, SCHEDULE_KEY, None) is not None:
        raise ValueError(
            f"this checkpoint is a late-fusion student of an earlier format, which vLLM would run dense, as a "
            f"{config.model_type} without its {SCHEDULE_KEY}: export its adapters again with latefusion export."
        )


def check_model(config: Any) -> VisionSchedule:
    """The schedule in a checkpoint's configuration; ValueError if the plug-in does not serve it."""
    schedule = VisionSchedule.from_dict(getattr(config, SCHEDULE_KEY))
    text = config.get_text_config()
    schedule.validate(text.num_hidden_layers)
    if schedule.keep:
        raise ValueError(
            f"keep={dict(schedule.keep)} ranks vision tokens by the question, which vLLM's chunked prefill does not "
            "have as a whole: train a student without it (schedule.keep={} or recipe=cross_only)."
        )
    if schedule.freeze_prefix:
        raise ValueError("freeze_prefix=True is not served: train a student without it.")
    for name, part, table in (("decoder", text, DECODERS), ("vision tower", config.vision_config, TOWERS)):
        if part.model_type not in table.get(config.model_type, ()):
            served = "; ".join(f"{model} with {', '.join(parts)}" for model, parts in table.items())
            raise ValueError(
                f"a {config.model_type} with a {part.model_type} {name} is not served, only {served}: run this "
                "student with latefusion.load."
            )
    kinds = set(getattr(text, "layer_types", None) or ())
    if getattr(text, "sliding_window", None) is not None or kinds - {"full_attention"}:
        raise ValueError(
            "a sliding window counts the tokens that a layer has, which differ here: run this student with "
            "latefusion.load."
        )
    return schedule
