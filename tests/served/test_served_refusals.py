"""vLLM itself ends with the plug-in's sentence, from its own configuration, before it loads weights."""

import json
import shutil

import numpy as np
import pytest
from helpers.served_bases import base
from helpers.served_models import engine, save_student

from latefusion.models.schedule import VisionSchedule

NGRAMS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_student(
        tmp_path_factory.mktemp("student"), VisionSchedule(enter=4, exit=11), base("embedded")
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"enable_lora": True}, "LoRA adapters|V1 model runner"),
        ({"speculative_config": NGRAMS}, "speculative decoding|V1 model runner"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=1"),
        ({"kv_cache_dtype": "fp8"}, "quantised KV cache|V1 model runner"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds|V1 model runner"),
        ({"quantization": "fp8"}, "quantised weights|V1 model runner"),
        (
            {"hf_overrides": {"vision_schedule": {"enter": 1, "exit": 4, "keep": {2: 9}}}},
            "ranks vision tokens",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_ends_in_the_sentence(folder, settings, sentence):
    with pytest.raises(ValueError, match=sentence), engine(folder, **settings):
        pass


def test_the_runner_without_a_place_for_it_is_refused(folder, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="V1 model runner has no place for it"), engine(folder):
        pass


def test_a_student_of_an_earlier_format_is_not_run_dense(folder, tmp_path):
    """It had its base's type, and its schedule in config.json, of which vLLM knows nothing."""
    shutil.copytree(folder, tmp_path / "earlier")
    file = tmp_path / "earlier" / "config.json"
    values = json.loads(file.read_text())
    del values["auto_map"]
    values |= {
        "model_type": values.pop("base_model_type"),
        "architectures": ["LlavaForConditionalGeneration"],
    }
    file.write_text(json.dumps(values))
    refused = pytest.raises(ValueError, match="an earlier format, which vLLM would run dense, as a llava")
    with refused, engine(str(tmp_path / "earlier")):
        pass


def test_a_video_is_refused(tmp_path):
    """vLLM itself counts how many a prompt may hold."""
    folder = save_student(tmp_path, VisionSchedule(enter=2, exit=4), base("qwen2_5_vl"))
    frames = np.zeros((4, 56, 56, 3), np.uint8)
    with engine(folder, limit_mm_per_prompt={"image": 1}) as llm, pytest.raises(ValueError, match="video"):
        llm.generate({"prompt_token_ids": [1, 2], "multi_modal_data": {"video": [frames]}}, use_tqdm=False)
