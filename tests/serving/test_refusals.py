"""What is not served is refused in a sentence, before anything is loaded."""

import logging
import sys
from types import SimpleNamespace

import pytest
from helpers.families import build

from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.whole import record
from latefusion.serving.plugin import Defaults, register
from latefusion.serving.refusals import check_config, check_model, check_stock

BAND = VisionSchedule(enter=1, exit=3)


def config_of(family="llava", schedule=BAND, **text):
    model = build(family)
    record(model, schedule)
    for name, value in text.items():
        setattr(model.config.get_text_config(), name, value)
    return model.config


def vllm_config(**changed):
    """A stand-in for `vllm.config.VllmConfig` with what vLLM 0.32 sets by default."""
    parallel = {
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "enable_dbo": False,
    }
    model = {"enable_prompt_embeds": False, "runner_type": "generate", "quantization": None}
    values = {"use_v2_model_runner": True, "lora_config": None, "speculative_config": None}
    values |= {"kv_transfer_config": None}
    cache = {"cache_dtype": "auto"}
    multimodal = SimpleNamespace(video_pruning_rate=changed.get("video_pruning_rate"))
    model["multimodal_config"] = multimodal
    for group in (parallel, model, values, cache):
        group |= {name: changed[name] for name in changed if name in group}
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config_of(), enforce_eager=False, **model),
        parallel_config=SimpleNamespace(**parallel),
        cache_config=SimpleNamespace(**cache),
        **values,
    )


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"use_v2_model_runner": False}, "V1 model runner"),
        ({"lora_config": object()}, "LoRA adapters"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=1"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"decode_context_parallel_size": 2}, "context parallel"),
        ({"prefill_context_parallel_size": 2}, "context parallel"),
        ({"enable_dbo": True}, "enable_dbo"),
        ({"kv_transfer_config": object()}, "kv_transfer_config"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"video_pruning_rate": 0.5}, "leave out video_pruning_rate"),
        ({"runner_type": "pooling"}, "runner=generate"),
        ({"quantization": "fp8"}, "quantised weights"),
        ({"cache_dtype": "fp8"}, "quantised KV cache"),
    ],
)
def test_an_option_that_was_not_shown_exact_is_refused(changed, sentence):
    with pytest.raises(
        ValueError, match=f"^a late-fusion model is not served like this: .*{sentence}"
    ) as error:
        check_config(vllm_config(**changed))
    assert str(error.value).count("\n") == 0 and str(error.value).endswith(".")
    check_config(vllm_config())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"schedule": VisionSchedule(enter=1, exit=4, keep={2: 1})},
            r"keep=\{2: 1\} ranks vision tokens by the question",
        ),
        ({"schedule": VisionSchedule(cross=[2], freeze_prefix=True)}, "freeze_prefix=True is not served"),
        ({"sliding_window": 8}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"family": "llava_mistral", "sliding_window": 8}, "sliding window"),
        ({"family": "llava_next"}, "a llava_next with a .* decoder is not served"),
        ({"family": "qwen3_vl"}, "a qwen3_vl with a .* decoder is not served"),
    ],
)
def test_a_student_that_cannot_be_served_says_why(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_model(config_of(**config))


def test_a_student_under_a_stock_type_is_refused():
    config = config_of()
    with pytest.raises(
        ValueError, match="of an earlier format, which vLLM would run dense, as a llava without"
    ):
        check_stock(config)
    check_stock(build("llava").config)


@pytest.mark.parametrize("family", ["llava", "llava_mistral", "llava_qwen2", "qwen2_5_vl"])
def test_what_is_served_passes(family):
    assert check_model(config_of(family)) == BAND


def test_another_vision_tower_is_refused():
    config = config_of()
    config.vision_config.model_type = "pixtral"
    with pytest.raises(
        ValueError, match="a llava with a pixtral vision tower is not served, only llava with"
    ):
        check_model(config)


def test_what_vllm_has_on_by_default_and_is_not_built_is_off(caplog):
    config = vllm_config()
    with caplog.at_level(logging.WARNING, "vllm.latefusion"):
        Defaults.verify_and_update_config(config)
    assert config.model_config.enforce_eager is True and "CUDA graphs are off" in caplog.text


def test_another_vllm_gets_no_late_fusion_model_and_a_sentence(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.33.1+cpu"))
    with caplog.at_level(logging.WARNING, "vllm.latefusion"):
        register()  # would fail where it asks this vllm for its registry
    assert "is for vLLM 0.32.0, and this is 0.33.1+cpu" in caplog.text
